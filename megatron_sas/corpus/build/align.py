"""Words with heads → WordPieces with heads, by character offsets.

A token belongs to the word that contains its first character, or its first visible one when it begins with the space
before a word; a token that is only that space (SentencePiece's "▁" before a rare letter) belongs to the word after it,
as it does when words are tokenised one by one. Only the first token of a word carries an edge, and it points to the
first token of the head word. P tokens, W words.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_sas.corpus.parsers.base import Parse
from megatron_sas.data.packed import SENTENCE_START, WORD_START


@dataclass
class Alignment:
    """Per token (P,): `offsets` int32, head position minus own position, 0 without an edge; `boundaries` uint8;
    `relations` int64; `words` int64, the word a token belongs to or -1.

    `counts` of the header: `words`, `sentences` with at least one token, `words_without_piece`, and
    `edges_without_piece`, which a word without a token has lost, as dependent or as head.
    """

    offsets: np.ndarray
    boundaries: np.ndarray
    relations: np.ndarray
    words: np.ndarray
    counts: Counter[str]


def _containing_word(positions: np.ndarray, parse: Parse) -> np.ndarray:
    """Index of the word whose span contains each character position, else -1."""
    if not len(parse.starts):
        return np.full(len(positions), -1, dtype=np.int64)
    word = np.searchsorted(parse.starts, positions, side="right") - 1
    return np.where((word >= 0) & (positions < parse.ends[word]), word, -1)


def align(token_starts: np.ndarray, token_ends: np.ndarray, parse: Parse, text: str) -> Alignment:
    """Give tokens the edges of `parse`.

    Args:
        token_starts, token_ends: (P,) int64 character offsets in `text`, ascending. parse: words of `text`.
    """
    words = _containing_word(token_starts, parse)
    # Some tokenizers count the space before a word to its first token. Only such tokens can begin outside all words.
    outside = (words < 0) | ~np.append(parse.is_word, False)[words]
    if outside.any():
        spans = zip(token_starts[outside], token_ends[outside], strict=True)
        words[outside] = _containing_word(np.array([_first_visible(text, *span) for span in spans]), parse)
    owned = np.flatnonzero(words >= 0)
    first = owned[np.diff(words[owned], prepend=-1) != 0]
    count = len(parse.starts)
    first_token = np.full(count, -1, dtype=np.int64)
    first_token[words[first]] = first

    has_head = parse.heads >= 0
    head_token = np.where(has_head, first_token[parse.heads], -1) if count else first_token
    edge = (first_token >= 0) & (head_token >= 0)
    offsets = np.zeros(len(words), dtype=np.int32)
    offsets[first_token[edge]] = head_token[edge] - first_token[edge]

    boundaries = np.zeros(len(words), dtype=np.uint8)
    boundaries[first] = WORD_START
    sentences = np.cumsum(parse.sentence_starts)[words[first]]
    sentence_first = first[np.diff(sentences, prepend=-1) != 0]
    boundaries[sentence_first] |= SENTENCE_START
    relations = np.zeros(len(words), dtype=np.int64)
    relations[first] = parse.relations[words[first]]
    counts = Counter(
        words=int(parse.is_word.sum()),
        sentences=len(sentence_first),
        words_without_piece=int((parse.is_word & (first_token < 0)).sum()),
        edges_without_piece=int((parse.is_word & has_head & ~edge).sum()),
    )
    return Alignment(offsets, boundaries, relations, words, counts)


def _first_visible(text: str, start: int, end: int) -> int:
    """Position of the first character in [start, end], thus with the one after the token, that is not white space; -1,
    which is in no word, if all are."""
    return next((place for place in range(start, min(end + 1, len(text))) if not text[place].isspace()), -1)
