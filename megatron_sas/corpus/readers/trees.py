"""What every reader of dependency trees checks, whatever the file's format."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron_sas.core.cli import InputError

BLANK = "_"  # where a treebank under licence has taken a word out


def tree_fault(heads: Sequence[int]) -> tuple[int, str] | None:
    """Return what is wrong with the first bad head, as (word, reason), or None for a tree (or several side by side).

    Every head must lie in the sentence, and following heads must end at a root.

    Args:
        heads: index of each word's head, -1 for a root.
    """
    for word, head in enumerate(heads):
        if not -1 <= head < len(heads):
            return word, f"has head {head + 1}, outside 0..{len(heads)}"
        if head == word:
            return word, "is its own head, which makes a cycle"
    state = [0] * len(heads)  # 0 not visited, 1 on the path being followed, 2 known to reach a root
    for start in range(len(heads)):
        path, node = [], start
        while node >= 0 and state[node] == 0:
            state[node] = 1
            path.append(node)
            node = heads[node]
        if node >= 0 and state[node] == 1:
            return node, "is on a cycle: following its heads leads back to it"
        for visited in path:
            state[visited] = 2
    return None


def word_spans(words: Sequence[str], token: str, start: int, end: int) -> list[tuple[int, int]]:
    """Characters [start, end) of each word of a token, which has those from `start` to `end`.

    They follow each other if the words spell the token; else the first has all and the others an empty span.
    """
    if "".join(words) == token and len(token) == end - start:
        return list(pairwise(accumulate(map(len, words), initial=start)))
    return [(start, end)] + [(end, end)] * (len(words) - 1)


def is_blanked(words: Sequence[str]) -> bool:
    """Whether at least half of a sentence's words are `_`, as in treebanks that come without their text.

    Their licence does not allow them to hold it: UD_English-GUMReddit has `_` for every word, UD_French-FTB for all
    but a sentence's first. A sentence with fewer is an ordinary one, in which `_` was written.
    """
    return 2 * sum(word == BLANK for word in words) >= max(len(words), 1)


def blanked_note(count: int) -> str:
    """A line for the log about sentences that were left out for `is_blanked`; "" for none."""
    return f"{count:,} sentences left out, whose words are blanked ({BLANK})" if count else ""


def check_blanked(path: object, blanked: int) -> None:
    """Raise `InputError` for a treebank of which nothing is left without its `blanked` sentences; 0 is no reason."""
    if blanked:
        raise InputError(
            f"{path}: has no words: in all {blanked} sentences column FORM or field 'words' is {BLANK!r}, as in "
            "treebanks whose licence forbids to pass the text on; put it back with the treebank's own script (see its "
            "README)"
        )
