"""What is left out of the inputs: counted by kind, with examples, and never more than the user allows."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megatron_sas.cli import InputError

_EXAMPLES = 5  # of each kind, on the terminal and in the header
_PARTICULARS = re.compile(r"[(;:']|\s(?:at|is|in) |\s\d")


@dataclass
class _Input:
    """Records are lines of text, documents of JSON lines and datasets, sentences of CoNLL-U."""

    kept: int = 0
    lost: int = 0
    unread: float = 0.0  # share of a damaged file that could not be read
    # The places of the last losses: a record is lost once. Those in kept records (index 1) are known later than those
    # of reading, the later the more processes work.
    last: list[str] = field(default_factory=lambda: ["", ""])
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Share of the input that was lost."""
        return 1 - (1 - self.unread) * (1 - self.lost / max(self.kept + self.lost, 1))


@dataclass
class _Kind:
    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


class Losses:
    """Records that were left out. `max_loss`: the share of any one input that may be. `show`: print examples."""

    def __init__(self, max_loss: float = 1.0, show: bool = False) -> None:
        self.max_loss, self.show = max_loss, show
        self._inputs: dict[str, _Input] = {}
        self._kinds: dict[str, _Kind] = {}

    @property
    def count(self) -> int:
        """Pieces of input left out: records, and paragraphs of records."""
        return sum(kind.count for kind in self._kinds.values())

    def keep(self, name: str) -> None:
        """One more good record of input `name`."""
        self._of(name).kept += 1

    def lose(self, where: str, reason: str, *, part_of_kept: bool = False, unread: float = 0.0) -> None:
        """The record at `where` ("input:line") is left out, or (`part_of_kept`) something in one that was counted."""
        entry = self._of(where.rpartition(":")[0])
        if where != entry.last[part_of_kept]:
            entry.last[part_of_kept] = where
            entry.lost += 1
            entry.kept -= part_of_kept
        entry.unread = max(entry.unread, unread)
        name = _PARTICULARS.split(reason, maxsplit=1)[0].strip()
        entry.kinds[name] += 1
        kind = self._kinds.setdefault(name, _Kind())
        kind.count += 1
        if kind.count <= _EXAMPLES:
            kind.examples.append({"where": where, "reason": reason})
            if self.show:
                print(f"skipped: {where}: {reason}", file=sys.stderr)
        elif kind.count == _EXAMPLES + 1 and self.show:
            print("skipped: further input of this kind is counted, not shown", file=sys.stderr)

    def check(self, name: str | None = None) -> None:
        """Raise `InputError` when input `name`, or any, has lost more than `max_loss`."""
        for key in self._inputs if name is None else [name]:
            entry = self._of(key)
            if entry.share > self.max_loss:
                commonest = entry.kinds.most_common(1)[0][0]
                missing = f" and {entry.unread:.1%} of the file unread" if entry.unread else ""
                raise InputError(
                    f"{key}: {entry.lost} of {entry.kept + entry.lost} records left out{missing}, mostly for "
                    f"{commonest!r}; more than --max-loss {self.max_loss:g} allows: mend the file or raise it"
                )

    def report(self) -> dict[str, Any]:
        """Counts and examples by kind in alphabetical order, for the header."""
        return {name: {"count": kind.count, "examples": kind.examples} for name, kind in sorted(self._kinds.items())}

    def _of(self, name: str) -> _Input:
        return self._inputs.setdefault(name, _Input())
