"""What every parser is asked, and what all share. Parsers run in worker processes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from megatron_sas.core.cli import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass
class Parse:
    """Words of one or more texts in a shared character space, sorted by position.

    `starts`, `ends` (W,) int64: characters [start, end); an empty span is a word without characters of its own.
    `heads` (W,) int64: index of the head word, -1 for none. `relations` (W,) int64: relation numbers, 0 for none.
    `sentence_starts` (W,) bool. `is_word` (W,) bool: false for white-space tokens, which no statistic counts.
    """

    starts: np.ndarray
    ends: np.ndarray
    heads: np.ndarray
    relations: np.ndarray
    sentence_starts: np.ndarray
    is_word: np.ndarray

    @classmethod
    def of_words(
        cls, spans: ArrayLike, heads: ArrayLike, relations: ArrayLike, sentence_starts: ArrayLike | None = None
    ) -> Parse:
        """Words, with no white space among them, that have the characters `spans` (W, 2); by default one sentence."""
        spans = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
        starts = np.arange(len(spans)) == 0 if sentence_starts is None else np.asarray(sentence_starts, dtype=bool)
        heads, relations = np.asarray(heads, dtype=np.int64), np.asarray(relations, dtype=np.int64)
        return cls(spans[:, 0], spans[:, 1], heads, relations, starts, np.ones(len(spans), dtype=bool))

    def shifted(self, characters: int, words: int) -> Parse:
        """The same words `characters` further on, after `words` other words."""
        heads = np.where(self.heads >= 0, self.heads + words, -1)
        starts, ends = self.starts + characters, self.ends + characters
        return Parse(starts, ends, heads, self.relations, self.sentence_starts, self.is_word)

    @staticmethod
    def concatenate(parses: list[Parse]) -> Parse:
        """One parse of parses that are shifted already; at least one."""
        names = Parse.__dataclass_fields__
        return Parse(*(np.concatenate([getattr(parse, name) for parse in parses]) for name in names))


class RelationNames:
    """Numbers for relation names in order of appearance, up to `limit`; number 0 is "" (no relation)."""

    def __init__(self, limit: float = math.inf) -> None:
        self.names, self._numbers, self._limit = [""], {"": 0}, limit

    def number(self, name: str) -> int:
        """The number of `name`, a new one if it has none; `InputError` when all are given away."""
        if name not in self._numbers:
            if len(self.names) > self._limit:
                raise InputError(f"there are more than {self._limit} relation names; merge some of them in the parses")
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]


class Parser(ABC):
    """A kind of parser, by its class attributes, and one that is loaded, by its methods.

    `argument`: what follows the kind and a colon in `--parser KIND:ARGUMENT`, "" if nothing does; without one, the
        class is called without arguments.
    `remark`: its note in --help.
    `heads`: whether it predicts heads from text, takes the gold ones of inputs that have them, or gives none and has
        its words from the tokenizer.
    `takes_ops`: whether `describe` and the class take the library of its products (`--parser-ops`) as well.
    """

    argument: ClassVar[str] = ""
    remark: ClassVar[str] = ""
    heads: ClassVar[Literal["predicted", "gold", "none"]] = "predicted"
    takes_ops: ClassVar[bool] = False

    @staticmethod
    def describe(argument: str) -> dict[str, str]:
        """What the header records of it besides its name: versions, and the SHA-256 of what is loaded.

        Raises:
            InputError: it does not exist or cannot parse.
        """
        return {}

    @abstractmethod
    def parse(self, contents: list[Any], encodings: list[Encoding], names: RelationNames) -> Iterator[Parse]:
        """Parse units in order; `encodings` are the same units as the tokenizer cut them."""
