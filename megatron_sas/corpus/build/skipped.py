"""What is left out of the inputs: counted by kind, with examples, and never more than the user allows."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from megatron_sas.core.cli import InputError

EXAMPLES = 5  # of each kind, on the terminal and in the header
_PARTICULARS = re.compile(r"[(;:']|\s(?:at|is|in) |\s\d")

Report = dict[str, dict[str, Any]]  # of a header: kind → `count`, and `examples` of it


def add_example(report: Report, kind: str, **example: str) -> int:
    """Count one more of a kind, with the first few as examples; returns the count."""
    entry = report.setdefault(kind, {"count": 0, "examples": []})
    entry["count"] += 1
    if entry["count"] <= EXAMPLES:
        entry["examples"].append(example)
    return entry["count"]


@dataclass
class _Input:
    """Two stages, each of which may skip: all of it is read, what is selected of that is used.

    Records are lines of text, rows of JSON lines and datasets, sentences of CoNLL-U. Paragraphs are what they hold (a
    sentence counts as one).
    """

    unread: float = 0.0  # share of a damaged file that could not be read
    records: int = 0
    records_skipped: int = 0
    last_skipped: str = ""  # its place: a record is skipped once
    paragraphs: int = 0
    paragraphs_skipped: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def share_read(self) -> float:
        """Share of the input that could be read."""
        return (1 - self.unread) * (1 - self.records_skipped / max(self.records, 1))

    @property
    def share_kept(self) -> float:
        """Share of the input that is left, if what was not selected would have been skipped at the same rate."""
        return self.share_read * (1 - self.paragraphs_skipped / max(self.paragraphs, 1))

    def summary(self) -> str:
        """What was skipped, in words."""
        parts = {
            f"{self.records_skipped} of {self.records} records left out": self.records_skipped,
            f"{self.paragraphs_skipped} of {self.paragraphs} paragraphs left out": self.paragraphs_skipped,
            f"{self.unread:.1%} of the file unread": self.unread,
        }
        return " and ".join(part for part, count in parts.items() if count)


class SkipReport:
    """What was left out. `max_skipped`: the share of any one input that may be. `show`: print examples."""

    def __init__(self, max_skipped: float = 1.0, show: bool = False) -> None:
        self.max_skipped, self.show = max_skipped, show
        self._inputs: dict[str, _Input] = defaultdict(_Input)
        self._report: Report = {}

    @property
    def count(self) -> int:
        """How much input was left out: records, and paragraphs of others."""
        return sum(entry["count"] for entry in self._report.values())

    def keep(self, name: str) -> None:
        """One more good record of input `name`."""
        self._inputs[name].records += 1

    def use(self, name: str) -> None:
        """One more paragraph of input `name` goes to the parser, which may fail on it."""
        self._inputs[name].paragraphs += 1

    def skip(self, where: str, reason: str, *, used: bool = False, unread: float = 0.0) -> None:
        """The record at `where` ("input:line") cannot be read, or a paragraph of it that is `used` is left out."""
        entry = self._inputs[where.rpartition(":")[0]]
        if used:
            entry.paragraphs_skipped += 1
        elif where != entry.last_skipped:
            entry.last_skipped = where
            entry.records += 1
            entry.records_skipped += 1
        entry.unread = max(entry.unread, unread)
        kind = _PARTICULARS.split(reason, maxsplit=1)[0].strip()
        entry.kinds[kind] += 1
        count = add_example(self._report, kind, where=where, reason=reason)
        if self.show and count <= EXAMPLES:
            print(f"skipped: {where}: {reason}", file=sys.stderr)
        elif self.show and count == EXAMPLES + 1:
            print("skipped: further input of this kind is counted, not shown", file=sys.stderr)

    def check(self, name: str | None = None) -> None:
        """Raise `InputError` when more than `max_skipped` was skipped: of input `name` in reading, or of any input."""
        for key in list(self._inputs) if name is None else [name]:
            entry = self._inputs[key]
            # While it is read, nobody knows how many paragraphs will have been used in the end.
            if (entry.share_kept if name is None else entry.share_read) < 1 - self.max_skipped:
                commonest = entry.kinds.most_common(1)[0][0]
                raise InputError(
                    f"{key}: {entry.summary()}, mostly for {commonest!r}; more than --max-skipped {self.max_skipped:g} "
                    "allows: mend the file or raise it"
                )

    def report(self) -> Report:
        """Counts and examples by kind in alphabetical order, for the header."""
        return dict(sorted(self._report.items()))
