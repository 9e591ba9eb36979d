"""Shards in, shards out: every input becomes its own packed data, whole or absent, left alone when it is done."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sas.core.cli import InputError, kind_and_reason
from megatron_sas.core.files import obey_umask, write_text_atomic
from megatron_sas.corpus.build.packed_writer import remove_leftovers
from megatron_sas.corpus.build.preprocess import (
    PreprocessSettings,
    check_settings,
    preprocess,
    provenance_of,
    remarks,
    tokenizer_of,
)
from megatron_sas.corpus.parsers.products import FASTEST, SPACY
from megatron_sas.corpus.parsers.registry import describe_parser, parser_class
from megatron_sas.corpus.readers.registry import reader_of, repeated_name
from megatron_sas.corpus.readers.trees import blanked_note
from megatron_sas.data.packed import FORMAT_VERSION, PackedData, TokenizerIdentity, read_header
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_identity

_CHOSEN_OPS = ".parser-ops"  # in the output's folder: the library of the parser's products, by the first job that asks


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` with 0 <= i < n, else `InputError`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise InputError(f"--shard {text}: must be i/n with i from 0 to n-1, such as 0/16")
    return int(match[1]), int(match[2])


def preprocess_shards(
    settings: PreprocessSettings, shard: tuple[int, int] = (0, 1), log: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Make packed data `settings.output`/NAME of every input whose turn it is, and return their headers.

    `shard` (i, n): this call does inputs i, i + n, i + 2n, …. An output that is there and whole is left alone; one that
    is damaged is made again. A shard that fails, for whatever reason, does not keep the others from being made.

    Raises:
        InputError: at the beginning, for wrong settings; at the end, when shards have failed, naming them and why. An
            output made with other settings is such a failure (unless `overwrite`), and is left as it is.
    """
    check_settings(settings)
    tokenizer_of(settings)  # a fault of it or the parser is reported once, not for every shard
    parser = describe_parser(settings.parser, settings.parser_ops)
    names = [reader_of(name).output_name(name) for name in settings.inputs]
    if (double := repeated_name(names)) is not None:
        raise InputError(f"--input: two inputs would both be written to {double}; rename one")
    mine = list(zip(settings.inputs, names, strict=True))[shard[0] :: shard[1]]
    headers, failures = [], []
    if settings.parser_ops == FASTEST and parser_class(settings.parser)[0].takes_ops:
        settings = replace(settings, parser_ops=_common_ops(settings, names, parser.get("ops", SPACY)))
        describe_parser(settings.parser, settings.parser_ops)  # this machine may lack it
    for name, output in mine:
        one = replace(settings, inputs=[name], output=str(Path(settings.output, output)))
        try:
            header, note = _one_shard(one, log)
        except Exception as error:
            reason = str(error)
            if not isinstance(error, InputError | OSError):  # nobody foresaw it: the place in the program may help
                traceback.print_exc()
                reason = kind_and_reason(error)
            log(f"{one.output}: failed: {reason}")
            failures.append(f"{name} ({reason})")
            continue
        headers.append(header)
        counts = header["counts"]
        log(f"{one.output}: {header['num_sequences']:,} sequences, {counts['words']:,} words, {note}")
        for line in remarks(header, warnings_only=True):
            log(f"{one.output}: {line}")
    if failures:
        raise InputError(f"{len(failures)} of {len(mine)} shards failed: {'; '.join(failures)}")
    return headers


def _common_ops(settings: PreprocessSettings, names: list[str], fastest: str) -> str:
    """The library that made the parses of outputs that are there, else the one that the first job of all chose."""
    folder = Path(settings.output)
    for path in (Path(folder, f"{name}.json") for name in names if not settings.overwrite):
        with contextlib.suppress(InputError, KeyError, AttributeError, OSError):  # damage is reported with its shard
            return read_header(path, "")["parser"].get("ops", SPACY)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = folder / _CHOSEN_OPS
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=_CHOSEN_OPS) as file:
        file.write(fastest)
        file.flush()
        obey_umask(file.name)
        try:
            os.link(file.name, chosen)  # one job succeeds, with the complete content
        except OSError:  # another job was first, or the file system has no hard links
            if not chosen.exists():
                write_text_atomic(chosen, fastest)
    return chosen.read_text()


def _one_shard(settings: PreprocessSettings, log: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    provenance = provenance_of(settings)
    if not settings.overwrite:
        header = _finished(settings, provenance, log)
        if header is not None:
            remove_leftovers(Path(settings.output))  # a job that was killed may have been finished by another host
            return header, "done before"
    # What lies there without a header, or damaged, is an unfinished publication of the same shard.
    header, seconds = preprocess(replace(settings, overwrite=True), provenance, allow_empty=True)
    notes = (f"{header['counts']['skipped']} skipped", blanked_note(header["counts"]["sentences_blanked"]))
    return header, ", ".join([*filter(None, notes), f"{seconds:.0f} s"])


def _finished(
    settings: PreprocessSettings, provenance: dict[str, Any], log: Callable[[str], None]
) -> dict[str, Any] | None:
    """The header of an output that is whole and is what these settings make, None when it is to be made (again)."""
    path = Path(f"{settings.output}.json")
    if not path.exists():
        return None
    header = read_header(path, "remove it to make this shard again")
    expected = {"version": FORMAT_VERSION, "seq_length": settings.seq_length, **provenance}
    differing = [name for name, value in expected.items() if header.get(name) != value]
    recorded = header["tokenizer"] if isinstance(header.get("tokenizer"), dict) else {}
    identity = TokenizerIdentity(recorded.get("hash", ""), recorded.get("digest"))  # the path may be another anywhere
    if not identity.matches(tokenizer_identity(load_tokenizer(settings.tokenizer))):
        differing.append("tokenizer")
    if differing:
        raise InputError(
            f"{path}: was made with other values of {', '.join(differing)}; choose another --output-dir or pass "
            "--overwrite"
        )
    try:
        if header["num_sequences"]:  # an empty shard has nothing to compare
            PackedData(settings.output).verify()
    except InputError as error:
        log(f"{error}: it is made again")
        return None
    return header
