"""Pieces get the edges of words: a naive reference, and cases worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from byte_level import BYTE_LEVEL, WORDS, words_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sas.corpus.build.align import align
from megatron_sas.corpus.parsers.base import Parse
from megatron_sas.data.tokenizer import encode_texts, load_tokenizer

COUNTS = ("sentences", "words_without_piece", "edges_without_piece")


def parse_of(spans, heads, sentences=None, relations=None, is_word=None):
    count = len(spans)
    spans = np.array(spans, dtype=np.int64).reshape(-1, 2)
    return Parse(
        starts=spans[:, 0],
        ends=spans[:, 1],
        heads=np.array(heads, dtype=np.int64),
        relations=np.array(relations or range(1, count + 1), dtype=np.int64),
        sentence_starts=np.array(sentences or [i == 0 for i in range(count)], dtype=bool),
        is_word=np.array(is_word or [True] * count, dtype=bool),
    )


def run(pieces, parse, text):
    pieces = np.array(pieces, dtype=np.int64).reshape(-1, 2)
    return align(pieces[:, 0], pieces[:, 1], parse, text)


def naive(pieces, parse, text):
    """Word by word and piece by piece, as the definition reads."""
    owner = []
    for start, end in pieces:
        after = range(start, min(end + 1, len(text)))
        for place in [start] + [p for p in after if not text[p].isspace()][:1]:
            words = range(len(parse.starts))
            found = [w for w in words if parse.starts[w] <= place < parse.ends[w] and parse.is_word[w]]
            if found:
                break
        owner.append(found[0] if found else -1)
    first = {w: owner.index(w) for w in set(owner) if w >= 0}
    offsets, boundaries, relations = [0] * len(pieces), [0] * len(pieces), [0] * len(pieces)
    lost, sentence, seen = 0, 0, set()
    for w in range(len(parse.starts)):
        sentence += bool(parse.sentence_starts[w])
        head = int(parse.heads[w])
        if head >= 0 and w in first and head in first:
            offsets[first[w]] = first[head] - first[w]
        elif head >= 0 and parse.is_word[w]:
            lost += 1
        if w in first:
            boundaries[first[w]] = 1 if sentence in seen else 3
            seen.add(sentence)
            relations[first[w]] = int(parse.relations[w])
    wordless = sum(bool(parse.is_word[w]) and w not in first for w in range(len(parse.starts)))
    return owner, offsets, boundaries, relations, len(seen), wordless, lost


@st.composite
def texts(draw):
    text = draw(st.text("ab ", min_size=1, max_size=30))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    words, is_word = [], []
    for start, end in itertools.pairwise(cuts):
        visible = [place for place in range(start, end) if not text[place].isspace()]
        if visible and draw(st.booleans()):
            start, end = visible[0], visible[-1] + 1
        elif visible or draw(st.booleans()):
            continue
        words.append((start, end))
        is_word.append(bool(visible))
        if draw(st.booleans()):  # a word without characters of its own
            words.append((end, end))
            is_word.append(True)
    count = len(words)
    heads = [draw(st.integers(-1, count - 1)) for _ in words]
    heads = [-1 if head == index else head for index, head in enumerate(heads)]
    sentences = [index == 0 or draw(st.booleans()) for index in range(count)]
    piece_cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [pair for pair in itertools.pairwise(piece_cuts) if draw(st.booleans())]
    return text, pieces, parse_of(words, heads, sentences, None, is_word)


@settings(max_examples=300, deadline=None)
@given(texts())
def test_against_the_naive_reference(case):
    text, pieces, parse = case
    result = run(pieces, parse, text)
    owner, offsets, boundaries, relations, sentences, wordless, lost = naive(pieces, parse, text)
    assert result.words.tolist() == owner
    assert result.offsets.tolist() == offsets
    assert result.boundaries.tolist() == boundaries
    assert result.relations.tolist() == relations
    assert [result.counts[name] for name in COUNTS] == [sentences, wordless, lost]
    assert result.counts["words"] == parse.is_word.sum()


def test_two_words_in_one_piece():
    # "cannot go": can(aux of go) not(advmod of go) go; "cannot" is one piece, so "not" has none.
    parse = parse_of([(0, 3), (3, 6), (7, 9)], [2, 2, -1])
    result = run([(0, 6), (7, 9)], parse, "cannot go")
    assert result.offsets.tolist() == [1, 0] and result.boundaries.tolist() == [3, 1]
    assert (result.counts["words_without_piece"], result.counts["edges_without_piece"]) == (1, 1)


def test_a_piece_across_a_word_boundary_belongs_to_where_it_begins():
    # "don't": words do|n't, pieces don|'|t
    parse = parse_of([(0, 2), (2, 5)], [1, -1])
    result = run([(0, 3), (3, 4), (4, 5)], parse, "don't")
    assert result.words.tolist() == [0, 1, 1]
    assert result.offsets.tolist() == [1, 0, 0] and result.boundaries.tolist() == [3, 1, 0]


def test_pieces_that_begin_with_their_space():
    parse = parse_of([(0, 1), (2, 3)], [1, -1])
    result = run([(0, 1), (1, 3)], parse, "a b")
    assert result.words.tolist() == [0, 1] and result.offsets.tolist() == [1, 0]


def test_a_piece_that_is_only_the_space_before_a_word():
    parse = parse_of([(0, 1), (2, 3)], [1, -1])
    result = run([(0, 1), (1, 2), (2, 3)], parse, "a b")
    assert result.words.tolist() == [0, 1, 1] and result.offsets.tolist() == [1, 0, 0]
    assert run([(0, 1), (1, 2)], parse_of([(0, 1)], [-1]), "a  ").words.tolist() == [0, -1]


def test_a_sentence_whose_first_word_has_no_piece():
    parse = parse_of([(0, 0), (0, 1), (2, 3)], [1, -1, 1], sentences=[True, False, True])
    result = run([(0, 1), (2, 3)], parse, "a b")
    assert result.boundaries.tolist() == [3, 3] and result.counts["sentences"] == 2
    assert result.counts["edges_without_piece"] == 1


def test_nothing():
    result = run([], parse_of([], []), "")
    assert len(result.offsets) == 0 and result.counts["words"] == 0
    result = run([(0, 1)], parse_of([], []), "a")
    assert result.boundaries.tolist() == [0]
    result = run([], parse_of([(0, 1)], [-1]), "a")
    assert result.counts["words_without_piece"] == 1


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_tokens_belong_to_the_word_after_their_space(kind, tmp_path):
    BYTE_LEVEL[kind]().save_pretrained(tmp_path)
    text, ends = " ".join(WORDS), np.cumsum([len(word) + 1 for word in WORDS]) - 1
    (encoding,) = encode_texts([text], load_tokenizer(tmp_path))
    chain = [*range(1, len(WORDS)), -1]  # the head of each word is the next one
    parse = parse_of([(end - len(word), end) for word, end in zip(WORDS, ends.tolist(), strict=True)], chain)
    result = run(encoding.offsets, parse, text)
    words = words_by_hand(encoding.tokens)
    assert result.words.tolist() == words
    first = [words.index(word) for word in range(len(WORDS))]
    heads = {place: place + int(offset) for place, offset in enumerate(result.offsets) if offset}
    assert heads == dict(itertools.pairwise(first))
