"""Several packed data sets of one tokenizer and sequence length → one, in the order given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError, progress
from megatron_sas.corpus.build.packed_writer import MAX_RELATIONS, PackedWriter
from megatron_sas.corpus.build.skipped import EXAMPLES
from megatron_sas.corpus.parsers.base import RelationNames
from megatron_sas.corpus.readers.registry import dataset_of
from megatron_sas.corpus.readers.text_lines import check_file_name
from megatron_sas.data.overlap import Documents, check_repeated
from megatron_sas.data.packed import PackedData, check_same_form, packed_header

_BLOCK = 4096  # sequences read at a time


def merge(prefixes: list[str], output: str, overwrite: bool = False) -> dict[str, Any]:
    """Concatenate packed data and return the header of the result. Every file is compared with its header first.

    Data without a sequence (shards of too little text) add their counts only. Relations get common numbers. The header
    has the `settings` and the `parser` that all parts were made with, or each of its `parts` has its own.

    Raises:
        InputError: a part is damaged, has another tokenizer or sequence length than the first, another `--split` or
            `--validation-share`, documents of another part, or is a part of another version of a Hugging Face dataset;
            the output is among the parts.
    """
    if Path(output).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise InputError(f"--inputs: {output} is the --output itself; leave it out")
    for prefix in prefixes:
        check_file_name(prefix)
    parts = [Documents(prefix, packed_header(prefix)) for prefix in prefixes]
    _check_splits(parts)
    _check_versions(parts)
    filled = [part for part in parts if part.header["num_sequences"]]
    check_repeated("--inputs", filled)
    if not filled:
        raise InputError(f"{', '.join(prefixes)}: hold no sequence; there is nothing to merge")
    headers = [part.header for part in parts]
    differing = [name for name in ("settings", "parser") if any(h.get(name) != headers[0].get(name) for h in headers)]
    first = PackedData(filled[0].prefix)
    names, entries = RelationNames(MAX_RELATIONS), []
    total = sum(header["num_sequences"] for header in headers)
    with (
        PackedWriter(output, first.seq_length, first.tokenizer, overwrite) as writer,
        progress(total=total, unit=" sequences", unit_scale=True, desc="merging") as bar,
    ):
        for part in (PackedData(documents.prefix) for documents in filled):
            check_same_form("--inputs", part, first)
            part.verify()
            numbers = np.array([names.number(name) for name in part.relations], np.uint8)
            for start in range(0, len(part), _BLOCK):
                rows = slice(start, start + _BLOCK)
                writer.add(part.tokens[rows], part.heads[rows], part.boundaries[rows], numbers[part.deprels[rows]])
                bar.update(len(part.tokens[rows]))
            entry = {"name": Path(part.prefix).name, "num_sequences": len(part), "fingerprint": part.fingerprint}
            # A part that is merged itself may have them in its own parts.
            entries.append(entry | {name: part.header[name] for name in (*differing, "parts") if name in part.header})
        common = {} if "settings" in differing or "settings" not in headers[0] else {"settings": headers[0]["settings"]}
        return writer.finish(names.names, **_joined(headers), **common, parts=entries)


def _check_splits(parts: list[Documents]) -> None:
    """Training and validation documents, or all and one side, do not go together; imported data has no split."""
    known = [(part.prefix, _split(settings)) for part in parts for settings in part.settings if settings]
    for prefix, split in known:
        if split != known[0][1]:
            raise InputError(
                f"{prefix}: was made with {split}, {known[0][0]} with {known[0][1]}; preprocess with one --split and "
                "--validation-share"
            )


def _split(settings: dict[str, Any]) -> str:
    split, share = settings.get("split"), settings.get("validation_share")
    return "no --split" if split is None else f"--split {split} --validation-share {share}"


def _check_versions(parts: list[Documents]) -> None:
    """The parts of a dataset are of one version: jobs that do not name a revision may have found different ones."""
    known: dict[str, tuple[str, str]] = {}
    for part in parts:
        files = part.header.get("input_files", [])
        if not isinstance(files, list):
            raise InputError(f"{part.prefix}.json: field input_files is that of an earlier program; preprocess again")
        for file in files:
            if dataset := dataset_of(file["name"]):
                version = ", ".join(f"{key} {value}" for key, value in file.items() if key != "name")
                other, first = known.setdefault(dataset, (part.prefix, version))
                if version != first:
                    raise InputError(
                        f"{part.prefix}: is of another version of {dataset} ({version}) than {other} ({first}); "
                        "preprocess all parts of one (on the hub, name it: hf:NAME@REVISION)"
                    )


def _joined(headers: list[dict[str, Any]]) -> dict[str, Any]:
    """The headers' records of the data's origin and content, together."""
    parsers = [header.get("parser") or {"name": "unknown"} for header in headers]
    same = all(parser == parsers[0] for parser in parsers)
    counts, report = Counter(), {}
    for header in headers:
        counts.update(header.get("counts", {}))
        for kind, entry in header.get("report", {}).items():
            known = report.setdefault(kind, {"count": 0, "examples": []})
            known["count"] += entry["count"]
            known["examples"] = (known["examples"] + entry["examples"])[:EXAMPLES]
    return {
        "parser": parsers[0] if same else {"name": " + ".join(dict.fromkeys(parser["name"] for parser in parsers))},
        "inputs": [name for header in headers for name in header.get("inputs", [])],
        "input_files": [file for header in headers for file in header.get("input_files", [])],
        "counts": dict(counts),
        "report": report,
    }
