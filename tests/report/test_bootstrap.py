"""Resampling of evaluation items against the plainest possible way to do it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from trajectory_files import Items, write_items

from megatron_sas.core.cli import InputError
from megatron_sas.onsets.offline import break_point, onset_steps
from megatron_sas.report.bootstrap import onset_interval, resample_curves

SHAPE = (2, 3, 5)


def items_of(seed, edges=400, sentences=30, relations=6):
    rng = np.random.default_rng(seed)
    places = np.stack([rng.integers(0, sentences, edges) * 3, rng.integers(0, relations, edges)], axis=1)
    return Items(
        edges=places.astype(np.int32),
        correct=rng.random((edges, *SHAPE)) < rng.random((1, *SHAPE)),
        pairs=rng.random(90) < 0.7,
        sets=np.repeat([2, 0, 1], [40, 30, 20]).astype(np.int16),
    )


def run_with(tmp_path, items_by_step):
    for step, items in items_by_step.items():
        write_items(Path(tmp_path) / "points" / f"step_{step:08d}", items)
    measured = SimpleNamespace(directory=Path(tmp_path), item_steps=tuple(items_by_step))
    return SimpleNamespace(measured=measured, item_metrics=frozenset({"uas", "blimp"}))


def test_uas_replicates_are_those_of_a_resampled_treebank(tmp_path):
    """Write out each resampled treebank edge by edge and take its best heads anew."""
    items = items_of(0)
    run = run_with(tmp_path, {0: items})
    (replicates,) = resample_curves(run, 20, 7)["uas"][1].T
    sentences = np.unique(items.edges[:, 0])
    drawn = np.random.default_rng([7, 0]).integers(0, len(sentences), (20, len(sentences)))
    for value, draw in zip(replicates, drawn, strict=True):
        edges = np.concatenate([np.flatnonzero(items.edges[:, 0] == sentences[s]) for s in draw])
        relations = items.edges[edges, 1]
        hits = sum(items.correct[edges[relations == r]].sum(axis=0).max() for r in np.unique(relations))
        assert value == hits / len(edges)
    assert np.std(replicates) > 0


def test_blimp_replicates_resample_within_sets(tmp_path):
    items = items_of(1)
    (replicates,) = resample_curves(run_with(tmp_path, {0: items}), 15, 3)["blimp"][1].T
    expected = []
    for index in (0, 1, 2):
        pairs = items.pairs[items.sets == index]
        drawn = np.random.default_rng([3, 1, index]).integers(0, len(pairs), (15, len(pairs)))
        expected.append([pairs[d].mean() for d in drawn])
    np.testing.assert_allclose(replicates, np.mean(expected, axis=0), rtol=1e-6)


def test_the_same_items_are_drawn_at_every_step(tmp_path):
    items = items_of(2)
    curves = resample_curves(run_with(tmp_path, {0: items, 10: items, 20: items}), 30, 0)
    for steps, replicates in curves.values():
        assert steps.tolist() == [0, 10, 20]
        assert (replicates == replicates[:, :1]).all() and np.std(replicates[:, 0]) > 0


def test_onset_of_every_replicate_is_its_break_point():
    rng = np.random.default_rng(0)
    steps = np.sort(rng.choice(1000, 25, replace=False)).astype(float)
    curves = np.clip((steps - 400) / 200, 0, 1) + rng.normal(0, 0.05, (40, 25))
    for sign in (1, -1):
        expected = [break_point(steps, curve, 90, sign).step for curve in sign * curves]
        np.testing.assert_allclose(onset_steps(steps, sign * curves, 90, sign), expected)
    found = onset_interval(steps, curves, 90)
    known = [break_point(steps, curve, 90).step for curve in curves]
    assert found.interval == pytest.approx(tuple(np.quantile(known, [0.025, 0.975])))


def test_curves_without_a_bend_have_no_onset():
    steps = np.arange(10.0)
    assert np.isnan(onset_steps(steps, np.tile(steps, (3, 1)), 2)).all()
    assert np.isnan(onset_steps(steps[:2], np.ones((3, 2)), 2)).all()
    assert np.isnan(onset_steps(steps, np.ones((3, 10)), 6)).all()  # shorter than two windows
    assert onset_interval(steps, np.tile(steps, (3, 1)), 2).interval is None


def test_damaged_items_are_one_line(tmp_path):
    run = run_with(tmp_path / "a", {0: items_of(0), 10: items_of(5)})
    with pytest.raises(InputError, match="other items"):
        resample_curves(run, 5, 0)
    (run.measured.directory / "points" / "step_00000010" / "items.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match="cannot be read"):
        resample_curves(run, 5, 0)
