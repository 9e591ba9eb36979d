"""Preprocessing in one line, for tests."""

from __future__ import annotations

from pathlib import Path

from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.corpus.build.workers import CHUNK_CHARACTERS
from megatron_sas.data.packed import FILES


def run(inputs, tokenizer, parser, output, chunk_characters=CHUNK_CHARACTERS, **options):
    inputs = [inputs] if isinstance(inputs, str | Path) else inputs
    settings = PreprocessSettings([str(i) for i in inputs], str(tokenizer), parser, str(output), **options)
    return preprocess(settings, chunk_characters=chunk_characters)[0]


def contents(prefix):
    return {name: Path(f"{prefix}.{name}").read_bytes() for name in (*FILES, "json")}


def row(number, form, head, relation="dep", misc="_"):
    return "\t".join([str(number), form, "_", "_", "_", "_", str(head), relation, "_", misc])
