"""Which edges and which minimal pairs a model got right: as arrays of an items.npz, and resampled.

A resampler draws the same items in every model, so that what is common to all of them cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np


class Items(Protocol):
    """Which single items (edges, pairs) a model got right, for resampling them."""

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays of an items.npz, whose names tell the evaluation."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self | None:
        """What `arrays` gave; None where there is nothing of this kind. Raises `KeyError` where a part is missing."""

    def __len__(self) -> int: ...

    def are_those_of(self, other: Self) -> bool:
        """Whether `other` are results on the same items."""

    def resampler(self, replicates: int, seed: int) -> Callable[[Self], np.ndarray]:
        """Draw from these items with replacement: a function that gives the metric of each replicate, float64 (B,)."""


def draws(rng: np.random.Generator, count: int, replicates: int) -> np.ndarray:
    """How often each of `count` items is drawn in each replicate, int64 (B, count); every row sums to `count`."""
    drawn = rng.integers(0, count, (replicates, count)) + count * np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=replicates * count).reshape(replicates, count)


@dataclass(frozen=True)
class UasItems:
    """Which edges each head got right. Edge e is one of sentence `edges[e, 0]` and has relation `edges[e, 1]`."""

    edges: np.ndarray  # int32 (E, 2), sentences numbered as in the treebank
    correct: np.ndarray  # bool (E, 2, L, H), direction dep->head first

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

    def are_those_of(self, other: UasItems) -> bool:
        """See `Items`."""
        return np.array_equal(self.edges, other.edges)

    def resampler(self, replicates: int, seed: int) -> Callable[[UasItems], np.ndarray]:
        """Draw whole sentences, as their edges stand or fall together; each replicate chooses its best heads."""
        sentences, sentence = np.unique(self.edges[:, 0], return_inverse=True)
        drawn = draws(np.random.default_rng([seed, 0]), len(sentences), replicates)
        order = np.argsort(self.edges[:, 1], kind="stable")
        bounds = np.flatnonzero(np.diff(self.edges[order, 1], prepend=-1))
        # One matrix (B, edges) per relation; float32 counts edges exactly up to 2²⁴.
        parts = [(edges, drawn[:, sentence[edges]].astype(np.float32)) for edges in np.split(order, bounds[1:])]

        def uas(items: UasItems) -> np.ndarray:
            hits, total = 0.0, 0.0
            for edges, weights in parts:
                correct = items.correct[edges].reshape(len(edges), -1).astype(np.float32)
                hits = hits + (weights @ correct).max(axis=1).astype(np.float64)
                total = total + weights.sum(axis=1, dtype=np.float64)
            return hits / total

        return uas


@dataclass(frozen=True)
class BlimpItems:
    """Which minimal pairs were right."""

    correct: np.ndarray  # bool (P,)
    sets: np.ndarray  # int16 (P,), numbers into `names`
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

    def are_those_of(self, other: BlimpItems) -> bool:
        """See `Items`."""
        return np.array_equal(self.sets, other.sets)

    def resampler(self, replicates: int, seed: int) -> Callable[[BlimpItems], np.ndarray]:
        """Draw pairs within each set; the metric is the mean accuracy over the sets."""
        parts = []
        for index in np.unique(self.sets):
            pairs = np.flatnonzero(self.sets == index)
            rng = np.random.default_rng([seed, 1, int(index)])
            parts.append((pairs, draws(rng, len(pairs), replicates).astype(np.float32)))

        def accuracy(items: BlimpItems) -> np.ndarray:
            correct = items.correct.astype(np.float32)
            of_sets = [weights @ correct[pairs] / len(pairs) for pairs, weights in parts]
            return np.mean(of_sets, axis=0, dtype=np.float64)

        return accuracy
