"""Which documents packed data hold, by their headers; data that certainly share some are refused.

A header names the content of its inputs, and of `--split` the side and its share: an interval of the documents' hashes.
Equal texts in different inputs are not known here (tools/survey_corpus.py finds them).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_sas.core.cli import InputError

if TYPE_CHECKING:
    from megatron_sas.data.packed import PackedData

_DATASET = re.compile(r"[a-z]{2,}:")  # begins the name of one, as "hf:"
_NEXT_TO_NOTHING = 64  # bytes: an archive of nothing has some 30, and so the same content as any other


class Documents:
    """The documents of the packed data `prefix`, by its header. `settings`: those of the data or of their parts, [{}]
    where none are known (imported data)."""

    def __init__(self, prefix: str, header: dict[str, Any]) -> None:
        self.prefix, self.header = prefix, header
        self.content = set(_fingerprints(header))
        self.inputs = dict(_inputs(header))  # what tells an input from all others: its name
        self.settings = _settings(header) or [{}]
        self.splits = {settings["split"] for settings in self.settings if settings.get("split")}

    def shared_with(self, other: Documents) -> str | None:
        """What both certainly have, in words; None where the headers show nothing shared."""
        if self.content & other.content:
            return "the same sequences"
        same = next((name for key, name in self.inputs.items() if key in other.inputs), None)
        if same is None or not all(_meet(one, two) for one in self.settings for two in other.settings):
            return None
        return f"the same documents of {same}"


def check_repeated(field: str, parts: Sequence[Documents]) -> None:
    """Refuse (`InputError` with the name of the field) data sets of which two share documents."""
    holders: dict[str, list[Documents]] = {}
    for part in parts:
        for key in (*part.content, *part.inputs):
            for other in holders.setdefault(key, []):
                if other.prefix == part.prefix:
                    raise InputError(f"{field}: {part.prefix} is given twice; leave one out")
                if shared := other.shared_with(part):
                    raise InputError(f"{field}: {other.prefix} and {part.prefix} hold {shared}; leave one out")
        for key in (*part.content, *part.inputs):
            holders[key].append(part)


def check_overlap(training: Sequence[PackedData], validation: PackedData | None) -> None:
    """Refuse (`InputError`) to train on the same documents twice in an epoch, on those of validation, or on both sides
    of a split."""
    parts = [Documents(part.prefix, part.header) for part in training]
    check_repeated("data.train", parts)
    sides = {split: part.prefix for part in parts for split in part.splits}
    if len(sides) > 1:
        raise InputError(
            f"data.train: {sides['validation']} was made with --split validation, {sides['train']} with --split train; "
            "leave the first out"
        )
    if validation is None:
        return
    held_out = Documents(validation.prefix, validation.header)
    for part in parts:
        if shared := part.shared_with(held_out):
            raise InputError(
                f"data.validation: {held_out.prefix} and {part.prefix} of data.train hold {shared}; take other text, "
                "or preprocess with --split train and --split validation, both with one --validation-share"
            )


def _fingerprints(header: dict[str, Any]) -> list[str]:
    """SHA-256 of the tokens, and of those of all merged parts."""
    own = header.get("files", {}).get("bin", {}).get("sha256", header.get("fingerprint"))
    return ([] if own is None else [own]) + [f for part in header.get("parts", []) for f in _fingerprints(part)]


def _inputs(header: dict[str, Any]) -> list[tuple[str, str]]:
    """What tells each input from all others, and its name; inputs that only have a name are left out."""
    records = header.get("input_files", [])
    if isinstance(records, dict):  # of earlier versions
        records = [{"name": name, **record} for name, record in records.items()]
    known = [record for record in records if record.get("size", _NEXT_TO_NOTHING + 1) > _NEXT_TO_NOTHING]
    return [(_identity(record), record["name"]) for record in known if "revision" in record or "sha256" in record]


def _identity(record: dict[str, Any]) -> str:
    """A file is known by its content; of a dataset the name says which split and part."""
    content = record.get("revision") or record["sha256"]
    return f"{record['name']} {content}" if _DATASET.match(record["name"]) else content


def _settings(header: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of the data or of their parts; imported data have none."""
    if "settings" in header:
        return [header["settings"]]
    return [settings for part in header.get("parts", []) for settings in _settings(part)]


def _meet(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two settings take some of the same documents of an input, in the same field."""
    if one.get("text_field") != two.get("text_field"):
        return False
    (begin, end), (other_begin, other_end) = _hashes(one), _hashes(two)
    if _rows(one) != _rows(two):  # other documents of the same text: no side
        return begin < end and other_begin < other_end  # of the one is a side of the other
    return max(begin, other_begin) < min(end, other_end)


def _rows(settings: dict[str, Any]) -> tuple[int, str] | None:
    """What makes documents of rows, and of lines rows; None where documents are those of the input."""
    rows = settings.get("rows_per_document")
    return None if rows is None else (rows, settings.get("line_breaks", "paragraph"))


def _hashes(settings: dict[str, Any]) -> tuple[float, float]:
    """The interval of documents' hashes, of [0, 1), that --split takes (`documents.is_validation`)."""
    share = settings.get("validation_share")
    return {"train": (share, 1.0), "validation": (0.0, share)}.get(settings.get("split"), (0.0, 1.0))
