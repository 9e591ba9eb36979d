"""Text → packed data on disk (docs/architecture.md, "Packed data"): the whole path, in bounded memory."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sas.core.cli import InputError, progress
from megatron_sas.core.files import sha256_file
from megatron_sas.corpus.build.documents import Exclusions, Selection, Split
from megatron_sas.corpus.build.pack import Packer
from megatron_sas.corpus.build.packed_writer import MAX_RELATIONS, PackedWriter, check_seq_length
from megatron_sas.corpus.build.skipped import Report, add_example
from megatron_sas.corpus.build.workers import CHUNK_CHARACTERS, ChunkResult, WorkerSettings, chunks, process_chunks
from megatron_sas.corpus.parsers.base import RelationNames
from megatron_sas.corpus.parsers.products import FASTEST, SPACY
from megatron_sas.corpus.parsers.registry import PARSERS, describe_parser, parser_class
from megatron_sas.corpus.readers.base import ReadSettings, Unit, check_share
from megatron_sas.corpus.readers.registry import READERS_BY_SUFFIX, input_files, read_units, reader_of, source_name
from megatron_sas.data.tokenizer import knows_words, load_tokenizer, tokenizer_info
from megatron_sas.data.unknown import Unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FOREIGN = "foreign to the tokenizer"
_LONG_WORD = "a word too long for the tokenizer, now one [UNK]"
# In the header, in this order.
COUNTS = (
    *("documents", "empty_documents", "unparsed_documents", "documents_of_other_split", "documents_excluded"),
    *("sentences", "words", "words_without_piece", "edges_without_piece", "words_too_long", "words_cut"),
    *("pieces_unknown", "paragraphs_cut", "paragraphs_with_controls", "paragraphs_squeezed", "lines_joined"),
    *("paragraphs_foreign", "sentences_blanked", "skipped", "sequences", "pieces", "edges", "edges_cut"),
    *("joints_without_separator", "tail_pieces", "tail_edges"),
)


@dataclass
class PreprocessSettings(ReadSettings):
    """What `tools/preprocess_data.py` takes; its --help explains each."""

    inputs: list[str]
    tokenizer: str
    parser: str
    output: str
    seq_length: int = 512
    drop_foreign: bool = False
    exclude: str | None = None
    split: Split | None = None
    validation_share: float = 0.005
    overwrite: bool = False
    parser_ops: str = FASTEST


def preprocess(
    settings: PreprocessSettings,
    provenance: dict[str, Any] | None = None,
    *,
    allow_empty: bool = False,
    chunk_characters: int = CHUNK_CHARACTERS,
) -> tuple[dict[str, Any], float]:
    """Make packed data from text and return its header and the seconds that reading, parsing and packing took.

    The bytes depend on the inputs, the tokenizer, the parser and the settings in `provenance_of`, not on `workers`.

    Args:
        provenance: `provenance_of(settings)`, if it is known already.
        allow_empty: text that does not fill one sequence makes data of none, instead of an error.
        chunk_characters: what a worker is given at a time, which changes nothing in the data.

    Raises:
        InputError: for anything wrong in the settings or the input (with "skip", broken input is counted instead, up
            to `max_skipped` of an input, and so is in any case what `drop_foreign` leaves out), and when the text does
            not fill one sequence.
    """
    check_settings(settings)
    tokenizer = tokenizer_of(settings)
    info = tokenizer_info(tokenizer, settings.tokenizer)
    start = time.perf_counter()
    with PackedWriter(settings.output, settings.seq_length, info, settings.overwrite) as writer:
        provenance = provenance or provenance_of(settings)
        worker = WorkerSettings(
            tokenizer.backend_tokenizer.to_str(), settings.parser, settings.seq_length - 2, info.unk_id,
            settings.drop_foreign, provenance["parser"].get("ops", SPACY),
        )  # fmt: skip
        packer = Packer(settings.seq_length, info.cls_id, info.sep_id, writer.add)
        exclusions = None
        if settings.exclude is not None:
            exclusions = Exclusions.read(settings.exclude, settings.inputs, provenance["input_files"], settings)
        selection = Selection(settings.split, settings.validation_share, exclusions)
        counts, relations, report = _pack_inputs(settings, selection, worker, packer, chunk_characters)
        if not writer.num_sequences and not allow_empty:
            raise InputError(
                f"{', '.join(settings.inputs)}: {counts['pieces']} tokens do not fill one sequence of "
                f"{settings.seq_length}; give more text or a smaller --seq-length"
            )
        header = writer.finish(relations, **provenance, counts=counts, report=report)
    return header, time.perf_counter() - start


def check_settings(settings: PreprocessSettings) -> None:
    """Refuse settings that cannot be right (`InputError`), before anything is read."""
    check_seq_length(settings.seq_length)
    settings.check()
    check_share("--validation-share", settings.validation_share)
    seen, (parser, _) = set(), parser_class(settings.parser)
    for name in settings.inputs:
        reader = reader_of(name)
        if reader.place(name) in seen:
            raise InputError(f"--input: {name} is given twice; leave one out")
        seen.add(reader.place(name))
        if reader.gold != (parser.heads == "gold"):
            suffixes = " and ".join(suffix for suffix, reader in READERS_BY_SUFFIX.items() if reader.gold)
            kinds = " or ".join(kind for kind, parser in PARSERS.items() if parser.heads == "gold")
            raise InputError(f"{name}: {suffixes} files need --parser {kinds}, and it needs {suffixes} files")


def tokenizer_of(settings: PreprocessSettings) -> PreTrainedTokenizerFast:
    """The tokenizer; `InputError` when there is none, or the parser needs one that knows words."""
    tokenizer = load_tokenizer(settings.tokenizer)
    if parser_class(settings.parser)[0].heads == "none" and not knows_words(tokenizer):
        raise InputError(
            f"--parser {settings.parser}: takes its words from the tokenizer, but {settings.tokenizer} does not cut "
            "text at spaces; give a parser, or a tokenizer that does"
        )
    return tokenizer


def provenance_of(settings: PreprocessSettings) -> dict[str, Any]:
    """The header's record of the data's origin: parser, inputs (with their hashes), and the settings that matter.

    Equal provenance, tokenizer and sequence length mean equal data.
    """
    return {
        "parser": describe_parser(settings.parser, settings.parser_ops),
        "inputs": [source_name(name) for name in settings.inputs],
        "input_files": input_files(settings.inputs),
        "settings": {
            "text_field": settings.text_field,
            "rows_per_document": settings.rows_per_document,
            "line_breaks": settings.line_breaks,
            "on_error": settings.on_error,
            "drop_foreign": settings.drop_foreign,
            "exclude": settings.exclude and sha256_file(settings.exclude),
            "split": settings.split,
            "validation_share": settings.split and settings.validation_share,
        },
    }


def remarks(header: dict[str, Any], *, warnings_only: bool = False) -> list[str]:
    """What a user should read about packed data, by its header: the share of [UNK], and words that are too long.

    With `warnings_only` the share only if it is high. Headers of earlier versions have neither.
    """
    counts, lines = header["counts"], []
    unknown = Unknown(counts["pieces"], counts.get("pieces_unknown", 0))
    if "pieces_unknown" in counts and (unknown.is_high or not warnings_only):
        lines.append(unknown.line("the input"))
    if found := header["report"].get(_LONG_WORD):
        first = found["examples"][0]
        lines.append(f"warning: {_LONG_WORD}: {found['count']:,}, the first at {first['where']}: {first['text']}")
    return lines


def _pack_inputs(
    settings: PreprocessSettings, selection: Selection, worker: WorkerSettings, packer: Packer, chunk_characters: int
) -> tuple[dict[str, int], list[str], Report]:
    """Read, parse, align and pack everything; returns the counts, the relation names and what was found wrong."""
    reading, names = settings.reading(), RelationNames(MAX_RELATIONS)
    skipped, found, counts = reading.skipped, {}, Counter()
    with progress(unit=" words", unit_scale=True, desc="preprocessing") as bar:
        groups = chunks(selection.apply(read_units(settings.inputs, reading)), chunk_characters)
        with contextlib.closing(process_chunks(groups, worker, settings.workers)) as results:
            for units, result in results:
                for unit in units:
                    if unit.content is not None:
                        skipped.use(unit.input)
                for number, reason in result.bad:
                    reading.bad(units[number].where, reason, used=True)
                for number in result.foreign:
                    add_example(found, _FOREIGN, where=units[number].where, text=str(units[number].content)[:80])
                    if settings.drop_foreign:  # as asked for, so never refused; but not without limit
                        skipped.skip(units[number].where, _FOREIGN, used=True)
                for number, word in result.long_words:
                    add_example(found, _LONG_WORD, where=units[number].where, text=word)
                _pack(packer, units, result, names)
                counts.update(
                    result.counts, paragraphs_foreign=len(result.foreign), words_too_long=len(result.long_words)
                )
                bar.update(result.counts["words"])
    packer.finish()
    skipped.check()
    counts.update(reading.counts + selection.counts + packer.counts, skipped=skipped.count)
    if parser_class(settings.parser)[0].heads == "none":
        counts["unparsed_documents"] = counts["documents"] - counts["empty_documents"]
    report = skipped.report() | {kind: found[kind] for kind in (_FOREIGN, _LONG_WORD) if kind in found}
    return {name: counts[name] for name in COUNTS}, names.names, report


def _pack(packer: Packer, units: list[Unit], result: ChunkResult, names: RelationNames) -> None:
    """Hand a chunk to the packer, document by document."""
    used, first = np.unique(result.streams[3], return_index=True)
    numbers = np.zeros(len(result.names), dtype=np.uint8)
    for local in used[np.argsort(first)]:
        numbers[local] = names.number(result.names[local])
    streams = [*result.streams[:3], numbers[result.streams[3]]]
    starts = [number for number, unit in enumerate(units) if unit.starts_document and number]
    for begin, end in pairwise([0, *starts, len(units)]):  # the first may continue a document of the chunk before
        if units[begin].starts_document:
            packer.start_document()
        packer.add(*(stream[result.cuts[begin] : result.cuts[end]] for stream in streams))
