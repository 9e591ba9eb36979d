"""Several packed data sets of one tokenizer and sequence length → one, in the order given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError, progress
from megatron_sas.corpus.build.packed_writer import PackedWriter, relation_number
from megatron_sas.corpus.parsers.base import RelationNames
from megatron_sas.corpus.readers.registry import dataset_of
from megatron_sas.corpus.readers.text_lines import check_file_name
from megatron_sas.data.overlap import Documents, check_repeated
from megatron_sas.data.packed import PackedData, packed_header

_BLOCK = 4096  # sequences read at a time
_EXAMPLES = 5


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
    headers = [packed_header(prefix) for prefix in prefixes]
    _check_splits(prefixes, headers)
    _check_versions(prefixes, headers)
    filled = [(prefix, header) for prefix, header in zip(prefixes, headers, strict=True) if header["num_sequences"]]
    check_repeated("--inputs", [Documents(prefix, header) for prefix, header in filled])
    differing = [name for name in ("settings", "parser") if any(h.get(name) != headers[0].get(name) for h in headers)]
    used = [prefix for prefix, _ in filled]
    if not used:
        raise InputError(f"{', '.join(prefixes)}: hold no sequence; there is nothing to merge")
    first = PackedData(used[0])
    names, parts = RelationNames(), []
    total = sum(header["num_sequences"] for header in headers)
    with (
        PackedWriter(output, first.seq_length, first.tokenizer, overwrite) as writer,
        progress(total=total, unit=" sequences", unit_scale=True, desc="merging") as bar,
    ):
        for prefix in used:
            part = PackedData(prefix)
            _check_fits(part, first)
            part.verify()
            numbers = _renumbering(part, names)
            for start in range(0, len(part), _BLOCK):
                rows = slice(start, start + _BLOCK)
                writer.add(part.tokens[rows], part.heads[rows], part.boundaries[rows], numbers[part.deprels[rows]])
                bar.update(len(part.tokens[rows]))
            entry = {"name": Path(prefix).name, "num_sequences": len(part), "fingerprint": part.fingerprint}
            # A part that is merged itself may have them in its own parts.
            entry |= {name: part.header[name] for name in (*differing, "parts") if name in part.header}
            parts.append(entry)
        common = {} if "settings" in differing or "settings" not in headers[0] else {"settings": headers[0]["settings"]}
        return writer.finish(names.names, **_joined(headers), **common, parts=parts)


def _check_splits(prefixes: list[str], headers: list[dict[str, Any]]) -> None:
    """Training and validation documents, or all and one side, do not go together; imported data has no split."""
    known = [(prefix, split) for prefix, header in zip(prefixes, headers, strict=True) for split in _splits(header)]
    for prefix, split in known:
        if split != known[0][1]:
            raise InputError(
                f"{prefix}: was made with {split}, {known[0][0]} with {known[0][1]}; preprocess with one --split and "
                "--validation-share"
            )


def _splits(header: dict[str, Any]) -> list[str]:
    """What a header, or those of its parts, say of --split and --validation-share."""
    if "settings" not in header:
        return [split for part in header.get("parts", []) for split in _splits(part)]
    split, share = header["settings"].get("split"), header["settings"].get("validation_share")
    return ["no --split" if split is None else f"--split {split} --validation-share {share}"]


def _check_versions(prefixes: list[str], headers: list[dict[str, Any]]) -> None:
    """The parts of a dataset are of one version: jobs that do not name a revision may have found different ones."""
    known: dict[str, tuple[str, dict[str, Any]]] = {}
    for prefix, header in zip(prefixes, headers, strict=True):
        files = header.get("input_files", [])
        if not isinstance(files, list):
            raise InputError(f"{prefix}.json: field input_files is that of an earlier program; preprocess again")
        for file in files:
            if dataset := dataset_of(file["name"]):
                version = {key: value for key, value in file.items() if key != "name"}
                other, first = known.setdefault(dataset, (prefix, version))
                if version != first:
                    raise InputError(
                        f"{prefix}: is of another version of {dataset} ({_shown(version)}) than {other} "
                        f"({_shown(first)}); preprocess all parts of one (on the hub, name it: hf:NAME@REVISION)"
                    )


def _shown(version: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in version.items())


def _check_fits(part: PackedData, first: PackedData) -> None:
    if part.seq_length != first.seq_length:
        raise InputError(
            f"{part.prefix}: sequences of {part.seq_length} tokens, those of {first.prefix} have {first.seq_length}; "
            "preprocess with one --seq-length"
        )
    if not part.tokenizer.identity.matches(first.tokenizer.identity):
        raise InputError(
            f"{part.prefix}: was made with another tokenizer than {first.prefix}; preprocess with one --tokenizer"
        )


def _renumbering(part: PackedData, names: RelationNames) -> np.ndarray:
    """(256,) uint8: the common number of each of the part's relations."""
    numbers = np.zeros(256, dtype=np.uint8)
    numbers[: len(part.relations)] = [relation_number(names, name) for name in part.relations]
    return numbers


def _joined(headers: list[dict[str, Any]]) -> dict[str, Any]:
    """What the headers say of the data's origin and content, together."""
    parsers = [header.get("parser") or {"name": "unknown"} for header in headers]
    same = all(parser == parsers[0] for parser in parsers)
    counts, report = Counter(), {}
    for header in headers:
        counts.update(header.get("counts", {}))
        for kind, entry in header.get("report", {}).items():
            known = report.setdefault(kind, {"count": 0, "examples": []})
            known["count"] += entry["count"]
            known["examples"] = (known["examples"] + entry["examples"])[:_EXAMPLES]
    return {
        "parser": parsers[0] if same else {"name": " + ".join(dict.fromkeys(parser["name"] for parser in parsers))},
        "inputs": [name for header in headers for name in header.get("inputs", [])],
        "input_files": [file for header in headers for file in header.get("input_files", [])],
        "counts": dict(counts),
        "report": report,
    }
