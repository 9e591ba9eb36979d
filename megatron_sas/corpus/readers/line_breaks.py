"""Which line ends of a text end a paragraph, and which stand where a space would, because the line was full.

In hard-wrapped prose nearly every line that goes on in lower case is full: the next word would not fit. Verses, lists,
tables, and text of a sentence or a paragraph a line are not like that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, get_args

LineBreaks = Literal["paragraph", "wrapped", "auto"]
LINE_BREAKS: tuple[str, ...] = get_args(LineBreaks)

_WIDTHS = range(40, 133)  # of wrapped text; longer lines are paragraphs
_LEAST = 4  # lines that go on in lower case; fewer are no evidence
_SHARE_GOING_ON = 0.3  # of the line ends within blocks (0.6 to 0.9 in books and licences, 0.1 in poems)
_SHARE_FULL = 0.85  # of those that go on (0.88 and more in such text, 0.7 and less in verses of about one length)
_SHARE_LONGER = 0.05  # of all lines: paragraphs on one line, with which a text is not wrapped as a whole
_ITEM = re.compile(r"[>|*•·+=#]|[-–—]\s|(\d{1,3}|[A-Za-z])[.)]\s")  # begins a list's item, a quotation, a table's row
_DASH = re.compile(r"[^\s—-][—-]+\Z")  # ends a word


def wrap_width(lines: Sequence[str]) -> int | None:
    """Return the column at which a text looks hard-wrapped, or None where it does not.

    Args:
        lines: without white space at their ends; blank ones separate blocks.
    """
    breaks = [(line, following) for line, following in pairwise(lines) if line and following]
    going_on = [(line, following) for line, following in breaks if _goes_on(line, following)]
    if len(going_on) < max(_LEAST, _SHARE_GOING_ON * len(breaks)):
        return None
    # People leave some lines shorter than they might be, and some longer.
    width = sorted(len(line) for line, _ in going_on)[len(going_on) * 3 // 4]
    full = sum(_is_full(line, following, width) for line, following in going_on)
    longer = sum(len(line) > 1.25 * width and " " in line for line in lines)
    if width not in _WIDTHS or full < _SHARE_FULL * len(going_on) or longer > _SHARE_LONGER * len(lines):
        return None
    return width


def paragraphs(lines: Sequence[str], width: int | None) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of the lines of each paragraph. Blank lines belong to none.

    Args:
        lines: as for `wrap_width`.
        width: lines are joined with the next where they are full at this width (0: all are) or go on in lower case, but
            for items of lists and quotations; None: every line is a paragraph.
    """
    start = 0
    for number, (line, following) in enumerate(pairwise([*lines, ""])):
        may_wrap = width is not None and line and following and not _ITEM.match(following.lstrip())
        if may_wrap and (_is_full(line, following, width) or _goes_on(line, following)):
            continue
        if line:
            yield start, number + 1
        start = number + 1


def join(lines: Sequence[str]) -> str:
    """Lines as one: with a space between them, except after a hyphen or dash that ends a word."""
    return "".join(line + ("" if _DASH.search(line) else " ") for line in lines[:-1]) + lines[-1]


def _goes_on(line: str, following: str) -> bool:
    return following.lstrip()[0].islower() and line[-1] not in ".!?:"


def _is_full(line: str, following: str, width: int) -> bool:
    """Whether the first word of the following line would have made this one longer than `width`."""
    return len(line) + 1 + len(following.split(None, 1)[0]) > width
