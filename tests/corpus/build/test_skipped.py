"""What is skipped is counted by input and kind, and limited."""

from __future__ import annotations

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.corpus.build.skipped import SkipReport


def test_the_commonest_kind_is_that_of_the_input(tmp_path):
    """Not of all inputs together."""
    skipped = SkipReport(max_skipped=0.5)
    for _ in range(20):
        skipped.keep("good.jsonl")
    for line in range(9):
        skipped.skip(f"good.jsonl:{line}", "invalid JSON")
    skipped.skip("bad.jsonl:1", "invalid UTF-8")
    with pytest.raises(InputError, match=r"^bad.jsonl: 1 of 1 records left out, mostly for 'invalid UTF-8';"):
        skipped.check()


def test_a_loss_of_just_what_is_allowed():
    """One of twenty is no more than 0.05."""
    skipped = SkipReport(max_skipped=0.05)
    for _ in range(19):
        skipped.keep("a.txt")
    skipped.skip("a.txt:20", "invalid UTF-8")
    skipped.check()
    skipped.skip("a.txt:21", "invalid UTF-8")
    with pytest.raises(InputError, match=r"^a\.txt: 2 of 21 records left out"):
        skipped.check()
