"""Sequences with their edges as text and as a self-contained HTML page, in the manner of displaCy."""

from __future__ import annotations

import itertools
import unicodedata
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup, escape

from megatron_sas.data.packed import SENTENCE_START, WORD_START, PackedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADVANCE, _LABEL_ADVANCE = 8.45, 6.7  # px: a monospaced character of a token and of a label
_GAP, _STEP = 18, 26  # px between tokens and between arcs
_UP, _DOWN, _LEFT, _RIGHT = 1, 2, 4, 8
_STROKES = " ╵╷│╴┘┐┤╶└┌├─┴┬┼"  # by the sum of their bits


@dataclass
class Segment:
    """A sentence, or what a sequence's ends have left of it: tokens with edges (dependent, head, relation) by token."""

    start: int  # position of the first token in its sequence
    tokens: list[str]
    first: list[bool]  # whether a token begins a word
    edges: list[tuple[int, int, str]]


def segments(packed: PackedData, index: int, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The segments of sequence `index`, without [CLS], [SEP] and padding; edges between segments join them into one."""
    boundaries, heads = np.asarray(packed.boundaries[index]), np.asarray(packed.heads[index], dtype=np.int64)
    special = np.isin(packed.tokens[index], packed.tokenizer.special_ids)
    starts = {int(place) for place in np.flatnonzero(boundaries & SENTENCE_START)}
    starts |= {int(place) + 1 for place in np.flatnonzero(special) if place + 1 < len(boundaries)}
    for place in np.flatnonzero(heads >= 0).tolist():  # gold parses have none; heads made by a control may
        low, high = sorted((place, int(heads[place])))
        starts -= set(range(low + 1, high + 1))
    tokens = tokenizer.convert_ids_to_tokens(packed.tokens[index].tolist())
    result = []
    for start, stop in itertools.pairwise(sorted(starts | {0, len(boundaries)})):
        kept = [place for place in range(start, stop) if not special[place]]
        if not kept:
            continue
        new = {place: number for number, place in enumerate(kept)}
        edges = [
            (new[place], new[int(heads[place])], packed.relations[packed.deprels[index, place]])
            for place in kept
            if heads[place] >= 0
        ]
        first = [bool(boundaries[place] & WORD_START) for place in kept]
        result.append(Segment(kept[0], [tokens[place] for place in kept], first, edges))
    return result


def levels(edges: list[tuple[int, int, str]]) -> list[int]:
    """A height from 1 for each edge; short ones lie low.

    Edges over a common gap differ, and those that meet at a token, unless it is the head of both: else a chain would
    look like two dependents of one head.
    """
    result = [0] * len(edges)
    placed: list[tuple[int, int, int, int]] = []
    for number in sorted(range(len(edges)), key=lambda n: (abs(edges[n][0] - edges[n][1]), edges[n][:2])):
        head = edges[number][1]
        low, high = sorted(edges[number][:2])
        taken = set()
        for a, b, other, level in placed:
            meet = b if b == low else a if a == high else None
            if (a < high and low < b) or (meet is not None and not meet == head == other):
                taken.add(level)
        level = next(level for level in range(1, len(edges) + 1) if level not in taken)
        result[number] = level
        placed.append((low, high, head, level))
    return result


def as_text(segment: Segment) -> str:
    """One token a line with its relation, and arcs at the left that end in an arrow at the dependent."""
    height = levels(segment.edges)
    width = 2 * max(height, default=0)
    lines = np.zeros((len(segment.tokens), width + 2), dtype=np.int64)  # bits: where a character's strokes lead
    for (dependent, head, _), level in zip(segment.edges, height, strict=True):
        column = width - 2 * level
        low, high = sorted((dependent, head))
        lines[low, column] |= _DOWN | _RIGHT
        lines[high, column] |= _UP | _RIGHT
        lines[low + 1 : high, column] |= _UP | _DOWN
        lines[[low, high], column + 1 : width + 1] |= _LEFT | _RIGHT
    grid = [[_STROKES[bits] for bits in row] for row in lines.tolist()]
    for dependent, _, _ in segment.edges:
        grid[dependent][width] = "▸"
    relations = {dependent: name or "(none)" for dependent, _, name in segment.edges}
    text = []
    for place, (row, token) in enumerate(zip(grid, segment.tokens, strict=True)):
        shown = token if segment.first[place] else f"  {token}"
        text.append(f"{segment.start + place:>5} {''.join(row)}{shown:<18} {relations.get(place, '')}".rstrip())
    return "\n".join(text)


def as_svg(segment: Segment) -> str:
    """Tokens from left to right, arcs above them from head to dependent with an arrow, relations on the arcs."""
    widths = [max(2, _columns(token)) * _ADVANCE + _GAP for token in segment.tokens]
    for dependent, head, relation in segment.edges:  # the label of an arc between neighbours must not hide it
        if abs(dependent - head) == 1:
            lacking = len(relation) * _LABEL_ADVANCE + _GAP - (widths[dependent] + widths[head]) / 2
            widths[dependent] += max(0.0, lacking)
            widths[head] += max(0.0, lacking)
    right = np.cumsum(widths)
    middle = right - np.array(widths) / 2
    height = levels(segment.edges)
    top = _STEP * (max(height, default=0) + 1)
    linked = {place for edge in segment.edges for place in edge[:2]}
    parts = [f'<svg width="{right[-1]:.0f}" height="{top + 34:.0f}" role="img">']
    for (dependent, head, relation), level in zip(segment.edges, height, strict=True):
        side = 4 if dependent < head else -4  # a token's own arc and those to its dependents begin a little apart
        begin, end, y = middle[head] - side, middle[dependent] + side, top - _STEP * level
        turn = 8 if end > begin else -8
        parts.append(
            f'<path class="arc" d="M{begin:.1f} {top} V{y + 8} Q{begin:.1f} {y} {begin + turn:.1f} {y} '
            f'H{end - turn:.1f} Q{end:.1f} {y} {end:.1f} {y + 8} V{top - 5}"/>'
            f'<path class="tip" d="M{end:.1f} {top} l-3.5 -7 h7 z"/>'
            f'<text class="label" x="{(begin + end) / 2:.1f}" y="{y + 4}">{escape(relation)}</text>'
        )
    for place, token in enumerate(segment.tokens):
        kind = "more" if not segment.first[place] else "word" if place in linked else "alone"
        parts.append(f'<text class="{kind}" x="{middle[place]:.1f}" y="{top + 18}">{escape(token)}</text>')
    return "".join([*parts, "</svg>"])


def _columns(text: str) -> int:
    """Columns that a text takes in a monospaced font."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def as_html(title: str, tables: dict[str, dict[str, str]], sequences: dict[int, list[Segment]]) -> str:
    """A page that needs nothing else: `tables` (caption → name → value), then the sequences by number."""
    from jinja2 import Environment, StrictUndefined

    pictures = {number: [Markup(as_svg(segment)) for segment in content] for number, content in sequences.items()}
    template = files("megatron_sas.corpus.inspect").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, autoescape=True, keep_trailing_newline=True)
    return environment.from_string(template).render(title=title, tables=tables, sequences=pictures)
