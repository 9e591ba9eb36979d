"""Text → packed data on disk (docs/architecture.md, "Packed data"): the whole path, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.cli import InputError, progress
from megatron_sas.data.checksums import describe_file
from megatron_sas.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_sas.data.packed import FILES, FORMAT, FORMAT_VERSION, TokenizerInfo
from megatron_sas.data.packing import Packer
from megatron_sas.data.parses import RelationNames, describe_parser
from megatron_sas.data.sources import Reading, Unit, input_format, read_units
from megatron_sas.data.text_lines import OnError
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_info
from megatron_sas.data.workers import ChunkResult, WorkerSettings, chunks, process_chunks
from megatron_sas.files import fsync_directory, fsync_file, refuse_existing, write_json_atomic

MIN_SEQ_LENGTH, MAX_SEQ_LENGTH = 8, 1 << 15
MAX_RELATIONS = 255
_EXAMPLES = 20  # errors shown on the terminal and kept in the header
_STREAMS = {"heads": "<i2", "marks": "u1", "relns": "u1"}


@dataclass
class PreprocessSettings:
    """What `tools/preprocess_data.py` takes; its --help explains each."""

    inputs: list[str]
    tokenizer: str
    parser: str
    output: str
    seq_length: int = 512
    workers: int = 1
    text_field: str = "text"
    on_error: OnError = "refuse"
    overwrite: bool = False


@dataclass
class _Errors:
    """Broken input that was skipped: all of it counted, the first few kept and shown."""

    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append({"where": where, "reason": reason})
            print(f"skipped: {where}: {reason}", file=sys.stderr)
        elif self.count == _EXAMPLES + 1:
            print("skipped: further broken input is counted, not shown", file=sys.stderr)


def preprocess(settings: PreprocessSettings) -> tuple[dict[str, Any], float]:
    """Make packed data from text and return its header and the seconds that reading, parsing and packing took.

    Everything is written in a temporary folder beside the output and renamed at the end, the header last. The bytes
    depend on the inputs, the tokenizer and the parser, not on `workers`.

    Raises:
        InputError: for anything wrong in the settings or the input (with "skip", broken input is counted instead), and
            when the text does not fill one sequence.
    """
    _check(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    info = tokenizer_info(tokenizer, settings.tokenizer)
    parser = describe_parser(settings.parser)
    serialised = tokenizer.backend_tokenizer.to_str()
    worker = WorkerSettings(serialised, settings.parser, settings.seq_length - 2)
    prefix = Path(settings.output)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with _temporary_folder(prefix) as folder:
        errors = _Errors()
        reading = Reading(settings.text_field, settings.on_error, errors)
        counts, relations = _write_streams(folder / "data", settings, info, worker, reading, errors)
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "seq_length": settings.seq_length,
            "num_sequences": counts["sequences"],
            "tokenizer": asdict(info),
            "parser": parser,
            "inputs": settings.inputs,
            "relations": relations,
            "counts": counts,
            "skipped_examples": errors.examples,
            "files": {name: describe_file(folder / f"data.{name}") for name in FILES},
        }
        _publish(folder, prefix, header)
    return header, time.perf_counter() - start


def _check(settings: PreprocessSettings) -> None:
    if not MIN_SEQ_LENGTH <= settings.seq_length <= MAX_SEQ_LENGTH:
        raise InputError(f"--seq-length {settings.seq_length}: must be {MIN_SEQ_LENGTH} to {MAX_SEQ_LENGTH}")
    if settings.workers < 1:
        raise InputError(f"--workers {settings.workers}: must be at least 1")
    for name in (*FILES, "json"):
        refuse_existing(f"{settings.output}.{name}", settings.overwrite)
    for name in settings.inputs:
        if (input_format(name) == "conllu") != (settings.parser == "conllu"):
            raise InputError(f"{name}: .conllu files need --parser conllu, and it needs .conllu files")


def _write_streams(
    path: Path,
    settings: PreprocessSettings,
    info: TokenizerInfo,
    worker: WorkerSettings,
    reading: Reading,
    errors: _Errors,
) -> tuple[dict[str, int], list[str]]:
    """Write `path`.bin, .idx, .heads.bin, .marks.bin and .relns.bin; return the counts and the relation names."""
    with contextlib.ExitStack() as stack:
        tokens_out = stack.enter_context(IndexedDatasetWriter(path, token_dtype(info.vocab_size)))
        files = [stack.enter_context(open(f"{path}.{name}.bin", "wb")) for name in _STREAMS]

        def emit(tokens: np.ndarray, *streams: np.ndarray) -> None:
            tokens_out.add(tokens)
            for file, dtype, stream in zip(files, _STREAMS.values(), streams, strict=True):
                file.write(stream.astype(dtype, copy=False))

        packer = Packer(settings.seq_length, info.cls_id, info.sep_id, emit)
        names, totals = RelationNames(), Counter()
        bar = stack.enter_context(progress(unit=" words", unit_scale=True, desc="preprocessing"))
        groups = chunks(read_units(settings.inputs, reading))
        with contextlib.closing(process_chunks(groups, worker, settings.workers)) as results:
            for units, result in results:
                for number, reason in result.bad:
                    reading.bad(units[number].where, reason)
                _pack(packer, units, result, names)
                totals.update(result.counts)
                bar.update(result.counts["words"])
        packer.finish()
        if not packer.counts.sequences:
            raise InputError(
                f"{', '.join(settings.inputs)}: {packer.counts.pieces} tokens do not fill one sequence of "
                f"{settings.seq_length}; give more text or a smaller --seq-length"
            )
    for name in _STREAMS:
        fsync_file(f"{path}.{name}.bin")
    packed = asdict(packer.counts)
    unparsed = packed["documents"] - packed["empty_documents"] if settings.parser == "none" else 0
    counts = {
        "documents": packed.pop("documents"),
        "empty_documents": packed.pop("empty_documents"),
        "unparsed_documents": unparsed,
        "sentences": totals["sentences"],
        "words": totals["words"],
        "words_without_piece": totals["words_without_piece"],
        "edges_without_piece": totals["edges_without_piece"],
        "paragraphs_cut": reading.paragraphs_cut,
        "skipped": errors.count,
    }
    return counts | packed, names.names


def _pack(packer: Packer, units: list[Unit], result: ChunkResult, names: RelationNames) -> None:
    """Hand a chunk to the packer, document by document."""
    used, first = np.unique(result.relations, return_index=True)
    numbers = np.zeros(len(result.names), dtype=np.uint8)
    for local in used[np.argsort(first)]:
        number = names.number(result.names[local])
        if number > MAX_RELATIONS:
            raise InputError(f"the parses use more than {MAX_RELATIONS} relation names; merge some in column DEPREL")
        numbers[local] = number
    relations = numbers[result.relations]
    starts = [number for number, unit in enumerate(units) if unit.starts_document]
    for begin, end in zip([0, *starts], [*starts, len(units)], strict=True):
        if units[begin].starts_document and begin < end:
            packer.start_document()
        pieces = slice(result.cuts[begin], result.cuts[end])
        packer.add(result.tokens[pieces], result.offsets[pieces], result.marks[pieces], relations[pieces])


@contextlib.contextmanager
def _temporary_folder(prefix: Path) -> Iterator[Path]:
    """A folder beside the output (so that renaming out of it is atomic), removed in every case but a kill."""
    folder = Path(tempfile.mkdtemp(dir=prefix.parent, prefix=f".{prefix.name}.", suffix=".tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, prefix: Path, header: dict[str, Any]) -> None:
    """Give the files their names, the header last; an old header goes first, so it never stands beside new data."""
    Path(f"{prefix}.json").unlink(missing_ok=True)
    fsync_directory(prefix.parent)
    for name in FILES:
        os.replace(folder / f"data.{name}", f"{prefix}.{name}")
    write_json_atomic(f"{prefix}.json", header)
