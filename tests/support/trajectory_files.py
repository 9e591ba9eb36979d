"""What measuring a run's snapshots leaves, written independently of the code that measures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RELATIONS = ("amod", "case", "det", "nsubj", "obj")
SETS = {"agreement_1": "agreement", "agreement_2": "agreement", "islands_1": "islands"}


@dataclass
class Items:
    """Results of single edges (sentence, relation), bool (E, 2, L, H), and of single pairs, bool (P,), in sets."""

    edges: np.ndarray
    correct: np.ndarray
    pairs: np.ndarray
    sets: np.ndarray


def write_items(directory: Path, items: Items) -> Path:
    """An items.npz."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "items.npz"
    np.savez_compressed(
        path,
        uas_edges=items.edges,
        uas_correct=np.packbits(items.correct.reshape(len(items.correct), -1), axis=1),
        uas_shape=np.array(items.correct.shape[1:], np.int32),
        blimp_correct=items.pairs,
        blimp_set=items.sets,
        blimp_names=np.array(list(SETS)),
    )
    return path


def write_trajectory(
    run: Path, *, steps=range(0, 901, 50), onset=400, lag=100, edges=600, pairs=200, shape=(2, 2, 4), seed=0, twonn=True
) -> None:
    """Points of a run whose UAS rises at `onset` and whose BLiMP does `lag` steps later, both within 150 steps.

    An edge or pair has a threshold of its own (from `seed` alone, so that runs share them): it is right where a rising
    probability exceeds it. One head follows each relation, the others are at chance.
    """
    rng = np.random.default_rng(seed)
    relation = rng.integers(0, len(RELATIONS), edges)
    places = np.stack([np.sort(rng.integers(0, 60, edges)), relation], axis=1).astype(np.int32)
    sets = np.repeat(np.arange(len(SETS)), pairs).astype(np.int16)
    edge_thresholds, pair_thresholds = rng.random((edges, *shape)), rng.random(len(sets))
    chosen = np.array([np.unravel_index(3 * r + 1, shape) for r in range(len(RELATIONS))])[relation]
    settings = {"format": "megatron_sas trajectory", "version": 1, "treebank": {"path": "x", "sha256": "t"}}
    directory = run / "trajectory"
    directory.mkdir(parents=True)
    (directory / "settings.json").write_text(json.dumps(settings | {"blimp": {"metric": "pll"}, "text": None}))
    for step in steps:
        rise = np.clip((step - onset) / 150, 0, 1)
        probability = np.full((edges, *shape), 0.12)
        probability[np.arange(edges), *chosen.T] = 0.15 + 0.55 * rise
        right = 0.5 + 0.4 * np.clip((step - onset - lag) / 150, 0, 1)
        items = Items(places, edge_thresholds < probability, pair_thresholds < right, sets)
        point = directory / "points" / f"step_{step:08d}"
        write_items(point, items)
        (point / "point.json").write_text(json.dumps(_point(step, items, onset, twonn)))


def _point(step: int, items: Items, onset: float, twonn: bool) -> dict:
    counts = np.array([items.correct[items.edges[:, 1] == r].sum(axis=0) for r in range(len(RELATIONS))])
    edges = np.bincount(items.edges[:, 1], minlength=len(RELATIONS))
    best = counts.reshape(len(RELATIONS), -1).max(axis=1)
    accuracy = [float(items.pairs[items.sets == s].mean()) for s in range(len(SETS))]
    fields = {name: [a for a, f in zip(accuracy, SETS.values(), strict=True) if f == name] for name in SETS.values()}
    value = {
        "step": step,
        "model": "x",
        "weight_norm": 50 + step / 100,
        "uas": {
            "uas": float(best.sum() / edges.sum()),
            "uas_baseline": 0.3,
            "uas_single_head": 0.2,
            "relations": {
                name: {"count": int(edges[r]), "accuracy": float(best[r] / edges[r]), "in_table": True}
                for r, name in enumerate(RELATIONS)
            },
            "counts": {"relations": list(RELATIONS), "directions": ["a", "b"], "correct": counts.tolist()},
        },
        "blimp": {
            "blimp": float(np.mean(accuracy)),
            "fields": {name: float(np.mean(values)) for name, values in fields.items()},
            "terms": {},
            "sets": {name: {"accuracy": a} for name, a in zip(SETS, accuracy, strict=True)},
        },
        "attention_entropy": {"mean": 2.0 - step / 2000, "per_head": [[2.0]]},
        "sas": {"to_head": 0.1, "to_dependent": 0.1},
        "seconds": 1.0,
    }
    if twonn:
        dimension = 8 + 6 * float(np.clip((step - onset) / 150, 0, 1)) + 0.02 * np.sin(step)
        value["intrinsic_dimension"] = {"twonn": dimension, "standard_error": 0.1, "num_points": 500, "discarded": 0}
    return value
