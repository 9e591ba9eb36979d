"""The paper's five claims, each with a fixed rule, what these runs say about it, and a verdict.

The rules do not depend on the data; docs/analysis.md gives their reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHOWN, NOT_SHOWN, OPPOSITE, NOT_TESTABLE = "shown", "not shown", "opposite", "not testable with these runs"
MIN_RUNS = 2  # seeds of a condition, below which nothing is said about the condition
DETECTED_SHARE = 2 / 3  # of a condition's runs must show a break before it counts as the condition's


@dataclass(frozen=True)
class Part:
    """One checkable statement of a claim.

    `core` parts must be shown for the claim to be; the others count only where they can be tested. `missing` says what
    would be needed where the verdict is `NOT_TESTABLE`.
    """

    statement: str
    rule: str
    verdict: str
    evidence: Sequence[str] = ()
    missing: str = ""
    core: bool = True


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with its parts."""

    number: int
    name: str
    statement: str
    parts: Sequence[Part]

    @property
    def verdict(self) -> str:
        """Opposite if a core part is; else not testable if a core part is; else shown if all that is testable is."""
        core = [part.verdict for part in self.parts if part.core]
        if OPPOSITE in core:
            return OPPOSITE
        if NOT_TESTABLE in core:
            return NOT_TESTABLE
        return SHOWN if {part.verdict for part in self.parts} <= {SHOWN, NOT_TESTABLE} else NOT_SHOWN

    @property
    def missing(self) -> str:
        """What would be needed to test the claim, where it cannot be."""
        texts = dict.fromkeys(part.missing for part in self.parts if part.core and part.verdict == NOT_TESTABLE)
        return "; ".join(texts) if self.verdict == NOT_TESTABLE else ""


def enough(count: int, of: int) -> bool:
    """Whether so many of a condition's runs speak for the condition."""
    return count >= max(MIN_RUNS, DETECTED_SHARE * of - 1e-9)
