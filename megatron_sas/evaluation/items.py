"""Which edges and which minimal pairs a model got right: as arrays of an items.npz, and resampled.

A sampler draws the same items in every model, so that what is common to all of them cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Items(Protocol):
    """Which single items (edges, pairs) a model got right, for resampling them."""

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays of an items.npz, whose names tell the evaluation."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Items | None:
        """What `arrays` gave; None where there is nothing of this kind. Raises `KeyError` where a part is missing."""

    def __len__(self) -> int: ...

    def sampler(self, replicates: int, seed: int) -> Sampler:
        """One that draws from these items with replacement."""


class Sampler(Protocol):
    """Draws the same items in every model."""

    def takes(self, items: Items) -> bool:
        """Whether `items` are results on the same items."""

    def values(self, items: Items) -> np.ndarray:
        """The metric of each replicate, float64 (B,)."""


def draws(rng: np.random.Generator, count: int, replicates: int) -> np.ndarray:
    """How often each of `count` items is drawn in each replicate, int64 (B, count); every row sums to `count`."""
    drawn = rng.integers(0, count, (replicates, count)) + count * np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=replicates * count).reshape(replicates, count)


@dataclass(frozen=True)
class UasItems:
    """Which edges each head got right. Edge e is one of sentence `edges[e, 0]` and has relation `edges[e, 1]`.

    `edges` int32 (E, 2), sentences numbered as in the treebank; `correct` bool (E, 2, L, H), direction dep->head first.
    """

    edges: np.ndarray
    correct: np.ndarray

    def __len__(self) -> int:
        return len(self.correct)

    def arrays(self) -> dict[str, np.ndarray]:
        """See `Items`; one bit for each edge and head."""
        return {
            "uas_edges": self.edges.astype(np.int32),
            "uas_correct": np.packbits(self.correct.reshape(len(self), -1), axis=1),
            "uas_shape": np.array(self.correct.shape[1:], np.int32),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> UasItems | None:
        """See `Items`."""
        if "uas_edges" not in arrays:
            return None
        shape = tuple(map(int, arrays["uas_shape"]))
        bits = np.unpackbits(arrays["uas_correct"], axis=1, count=math.prod(shape))
        return cls(arrays["uas_edges"], bits.reshape(-1, *shape).astype(bool))

    def sampler(self, replicates: int, seed: int) -> UasSampler:
        """See `Items`."""
        return UasSampler(self, replicates, seed)


class UasSampler:
    """Draws whole sentences, as their edges stand or fall together, and chooses the best heads in every replicate."""

    def __init__(self, items: UasItems, replicates: int, seed: int) -> None:
        self.edges = items.edges
        sentences, sentence = np.unique(items.edges[:, 0], return_inverse=True)
        rng = np.random.default_rng([seed, 0])
        drawn = draws(rng, len(sentences), replicates)
        order = np.argsort(items.edges[:, 1], kind="stable")
        bounds = np.flatnonzero(np.diff(items.edges[order, 1], prepend=-1))
        # One matrix (B, edges) per relation; float32 counts edges exactly up to 2²⁴.
        self.parts = [(edges, drawn[:, sentence[edges]].astype(np.float32)) for edges in np.split(order, bounds[1:])]

    def takes(self, items: UasItems) -> bool:
        """Whether `items` are of the same edges."""
        return np.array_equal(self.edges, items.edges)

    def values(self, items: UasItems) -> np.ndarray:
        """UAS of each replicate, float64 (B,): best head per relation, weighted by the edges drawn."""
        hits, total = 0.0, 0.0
        for edges, weights in self.parts:
            correct = items.correct[edges].reshape(len(edges), -1).astype(np.float32)
            hits = hits + (weights @ correct).max(axis=1).astype(np.float64)
            total = total + weights.sum(axis=1, dtype=np.float64)
        return hits / total


@dataclass(frozen=True)
class BlimpItems:
    """Which minimal pairs were right: `correct` bool (P,), `sets` int16 (P,) numbers into `names`."""

    correct: np.ndarray
    sets: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.correct)

    def arrays(self) -> dict[str, np.ndarray]:
        """See `Items`."""
        return {
            "blimp_correct": self.correct.astype(bool),
            "blimp_set": self.sets.astype(np.int16),
            "blimp_names": np.array(self.names, dtype=np.str_),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> BlimpItems | None:
        """See `Items`."""
        if "blimp_correct" not in arrays:
            return None
        return cls(arrays["blimp_correct"], arrays["blimp_set"], arrays["blimp_names"].tolist())

    def sampler(self, replicates: int, seed: int) -> BlimpSampler:
        """See `Items`."""
        return BlimpSampler(self, replicates, seed)


class BlimpSampler:
    """Draws pairs within each set."""

    def __init__(self, items: BlimpItems, replicates: int, seed: int) -> None:
        self.sets = items.sets
        self.parts = []
        for index in np.unique(items.sets):
            pairs = np.flatnonzero(items.sets == index)
            rng = np.random.default_rng([seed, 1, int(index)])
            self.parts.append((pairs, draws(rng, len(pairs), replicates).astype(np.float32)))

    def takes(self, items: BlimpItems) -> bool:
        """Whether `items` are of the same pairs."""
        return np.array_equal(self.sets, items.sets)

    def values(self, items: BlimpItems) -> np.ndarray:
        """Mean accuracy over the sets of each replicate, float64 (B,)."""
        correct = items.correct.astype(np.float32)
        return np.mean(
            [weights @ correct[pairs] / len(pairs) for pairs, weights in self.parts], axis=0, dtype=np.float64
        )
