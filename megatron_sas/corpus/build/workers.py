"""Chunks of units → aligned tokens, in this process or in several, in order and with bounded memory.

A chunk's content depends on the input only, and a chunk's result on the chunk only; so the number of processes cannot
be seen in the output.
"""

from __future__ import annotations

import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sas.core.cli import kind_and_reason
from megatron_sas.core.processes import worker_pool
from megatron_sas.corpus.build.align import align
from megatron_sas.corpus.parsers.base import Parse, RelationNames
from megatron_sas.corpus.parsers.products import SPACY
from megatron_sas.corpus.parsers.registry import make_parser
from megatron_sas.corpus.readers.base import Unit, text_of
from megatron_sas.data.tokenizer import plain_text_tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

# A quarter second of parsing: worth a message between processes. Larger chunks are no faster and take more memory.
CHUNK_CHARACTERS = 20_000
_AHEAD = 6  # chunks in flight per worker


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to build its tokenizer and parser; picklable."""

    tokenizer: str  # backend_tokenizer.to_str()
    parser: str
    max_word_tokens: int
    unk_id: int
    drop_foreign: bool = False  # leave out text that `is_foreign`
    parser_ops: str = SPACY  # the library of the parser's products, resolved


@dataclass
class ChunkResult:
    """Tokens of a chunk: `streams` (P,) are ids int32, offsets int32, boundaries uint8, and relations int64, numbers
    into `names`.

    `cuts` (units + 1,) int64: unit u owns tokens [cuts[u], cuts[u+1]). `bad`: units left out, with the reason;
    `foreign`: units in another language than the tokenizer's, left out where the settings say so. `long_words`: (unit,
    description) of every word that the tokenizer takes for [UNK] because of its length alone.
    """

    streams: list[np.ndarray]
    names: list[str]
    cuts: np.ndarray
    counts: Counter[str]
    bad: list[tuple[int, str]]
    foreign: list[int]
    long_words: list[tuple[int, str]] = field(default_factory=list)


def is_foreign(characters: int, tokens: int, unknown: int) -> bool:
    """Whether a text is foreign to the tokenizer: cut nearly into characters, or made of unknown tokens.

    (English has about 0.23 tokens a character, other languages in Latin letters up to 0.45, Cyrillic or Chinese 0.9.)
    """
    return characters >= 40 and (tokens > 0.6 * characters or unknown > 0.2 * tokens)


class Worker:
    """Turns the contents of a chunk's units into a `ChunkResult`."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._tokenizer = plain_text_tokenizer(settings.tokenizer)
        self._parser = make_parser(settings.parser, settings.parser_ops)
        self._settings = settings
        self._longest_word: int | None = getattr(self._tokenizer.model, "max_input_chars_per_word", None)  # WordPiece

    def __call__(self, contents: list[Any]) -> ChunkResult:
        """Tokenize, parse and align; units whose content is None (empty documents) get no tokens.

        If the parser fails on a chunk, split it in half and retry, down to single units, which are then `bad`.
        """
        try:
            return self._chunk(contents, {})
        except Exception as error:  # parsers are large programs: a text that one cannot take must not end hours of work
            reason = f"the parser fails ({kind_and_reason(error)})"
        # Out here nothing holds on to the memory that the failed attempt took.
        if len(contents) == 1:
            return self._chunk(contents, {0: reason})
        middle = len(contents) // 2
        return _joined(self(contents[:middle]), self(contents[middle:]))

    def _chunk(self, contents: list[Any], bad: dict[int, str]) -> ChunkResult:
        units = [u for u, content in enumerate(contents) if content is not None and u not in bad]
        texts = [text_of(contents[u]) for u in units]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        foreign = [
            unit
            for unit, text, encoding in zip(units, texts, encodings, strict=True)
            if is_foreign(len(text), len(encoding), encoding.ids.count(self._settings.unk_id))
        ]
        if foreign and self._settings.drop_foreign:
            kept = [number for number, unit in enumerate(units) if unit not in foreign]
            units, texts, encodings = ([values[number] for number in kept] for values in (units, texts, encodings))
        names = RelationNames()
        parses, characters, first_words = [], [0], [0]  # of each text: where its characters and its words begin
        for text, parse in zip(texts, self._parser.parse([contents[u] for u in units], encodings, names), strict=True):
            parses.append(parse.shifted(characters[-1], first_words[-1]))
            characters.append(characters[-1] + len(text) + 1)  # so that words of two texts never touch
            first_words.append(first_words[-1] + len(parse.starts))
        sizes = np.zeros(len(contents), dtype=np.int64)
        sizes[units] = [len(encoding) for encoding in encodings]
        cuts = np.append(0, np.cumsum(sizes))
        if not cuts[-1]:
            empty = [np.zeros(0, dtype) for dtype in (np.int32, np.int32, np.uint8, np.int64)]
            return ChunkResult(empty, names.names, cuts, Counter(), sorted(bad.items()), foreign)
        tokens = np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])
        spans = np.concatenate([np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) for encoding in encodings])
        spans += np.repeat(np.array(characters[:-1]), sizes[units])[:, None]
        aligned = align(spans[:, 0], spans[:, 1], Parse.concatenate(parses), "\n".join(texts))

        lengths = np.bincount(aligned.words[aligned.words >= 0], minlength=1)
        longest = self._settings.max_word_tokens
        if lengths.max() > longest:
            for word in np.flatnonzero(lengths > longest):
                unit = units[int(np.searchsorted(first_words[:-1], word, side="right")) - 1]
                bad[unit] = f"a word longer than a sequence ({lengths[word]} pieces; {longest} fit)"
            return self._chunk(contents, bad)
        return ChunkResult(
            [tokens, aligned.offsets, aligned.boundaries, aligned.relations],
            names.names,
            cuts,
            aligned.counts + Counter(pieces_unknown=int((tokens == self._settings.unk_id).sum())),
            sorted(bad.items()),
            foreign,
            self._long_words(units, texts, encodings),
        )

    def _long_words(self, units: list[int], texts: list[str], encodings: list[Encoding]) -> list[tuple[int, str]]:
        """See `ChunkResult.long_words`."""
        limit = self._longest_word
        return [
            (unit, f"{text[start : start + 40]}… ({end - start:,} characters)")
            for unit, text, encoding in zip(units, texts, encodings, strict=True)
            if limit is not None and len(text) > limit
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token == self._settings.unk_id and end - start > limit
        ]


def _joined(first: ChunkResult, second: ChunkResult) -> ChunkResult:
    """The result of two chunks one after the other as that of one."""
    names = RelationNames()
    numbers = [np.array([names.number(name) for name in result.names]) for result in (first, second)]
    second.streams[3] = numbers[1][second.streams[3]]  # those of the first stay what they are
    units = len(first.cuts) - 1
    return ChunkResult(
        [np.concatenate(pair) for pair in zip(first.streams, second.streams, strict=True)],
        names.names,
        np.append(first.cuts, first.cuts[-1] + second.cuts[1:]),
        first.counts + second.counts,
        first.bad + [(units + number, reason) for number, reason in second.bad],
        first.foreign + [units + number for number in second.foreign],
        first.long_words + [(units + number, word) for number, word in second.long_words],
    )


def chunks(units: Iterable[Unit], characters: int = CHUNK_CHARACTERS) -> Iterator[list[Unit]]:
    """Group consecutive units until they hold `characters`, or as many units as would take as long to handle."""
    chunk: list[Unit] = []
    size = 0
    for unit in units:
        chunk.append(unit)
        size += 20 + len(unit.text)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def process_chunks(
    groups: Iterable[list[Unit]], settings: WorkerSettings, workers: int
) -> Iterator[tuple[list[Unit], ChunkResult]]:
    """Yield every chunk with its result, in order; at most `_AHEAD` chunks per worker are in memory."""
    if workers == 1:
        worker = Worker(settings)
        for group in groups:
            yield group, worker([unit.content for unit in group])
        return
    with worker_pool(workers, signal.SIG_IGN, _start_worker, settings) as pool:
        waiting: deque = deque()
        for group in groups:
            waiting.append((group, pool.submit(_run_worker, [unit.content for unit in group])))
            if len(waiting) >= workers * _AHEAD:
                group, future = waiting.popleft()
                yield group, future.result()
        for group, future in waiting:
            yield group, future.result()


_worker: Worker | Exception | None = None


def _start_worker(settings: WorkerSettings) -> None:
    global _worker
    try:
        _worker = Worker(settings)
    except Exception as error:  # raised here it would only break the pool, and nobody would learn why
        _worker = error


def _run_worker(contents: list[Any]) -> ChunkResult:
    if isinstance(_worker, Exception):
        raise _worker
    return _worker(contents)
