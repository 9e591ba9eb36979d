"""Scores of GLUE against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_sas.glue.tasks import TASKS


def test_scores_follow_their_definitions():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    predictions[:150] = labels[:150]
    tp, tn = int(((labels == 1) & (predictions == 1)).sum()), int(((labels == 0) & (predictions == 0)).sum())
    fp, fn = int(((labels == 0) & (predictions == 1)).sum()), int(((labels == 1) & (predictions == 0)).sum())
    accuracy, f1 = (tp + tn) / 300, 2 * tp / (2 * tp + fp + fn)
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert TASKS["cola"].score(labels, predictions) == pytest.approx(
        {"matthews_correlation": matthews, "accuracy": accuracy}
    )
    for name in ("mrpc", "qqp"):
        expected = {"f1": f1, "accuracy": accuracy, "combined_score": (f1 + accuracy) / 2}
        assert TASKS[name].score(labels, predictions) == pytest.approx(expected)
    for name in ("sst2", "mnli", "qnli", "rte", "wnli"):
        assert TASKS[name].score(labels, predictions) == pytest.approx({"accuracy": accuracy})
    scores = rng.permutation(100) / 20
    guesses = scores + rng.normal(0, 1, 100)
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (scores, guesses)]
    pearson, spearman = np.corrcoef(scores, guesses)[0, 1], np.corrcoef(*ranks)[0, 1]
    expected = {"pearson": pearson, "spearman": spearman, "combined_score": (pearson + spearman) / 2}
    assert TASKS["stsb"].score(scores, guesses) == pytest.approx(expected)
    # Predictions of one kind only have a score, not a NaN.
    assert TASKS["cola"].score(labels, np.ones_like(labels))["matthews_correlation"] == 0
    assert TASKS["mrpc"].score(labels, np.zeros_like(labels))["f1"] == 0
    assert TASKS["stsb"].score(scores, np.ones(100))["combined_score"] == 0
