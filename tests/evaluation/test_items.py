"""Resampled results of single edges and pairs."""

import numpy as np
import pytest

from megatron_sas.evaluation.items import BlimpItems, UasItems


def test_standard_errors_are_those_of_theory():
    """Of sentences with one edge and one head the replicates spread as a binomial share."""
    rng = np.random.default_rng(0)
    correct = rng.random(300) < 0.3
    edges = np.stack([np.arange(300), np.zeros(300)], axis=1).astype(np.int32)
    items = UasItems(edges, correct[:, None, None, None])
    values = items.resampler(4000, 0)(items)
    share = correct.mean()
    assert values.std() == pytest.approx(np.sqrt(share * (1 - share) / 300), rel=0.05)
    sets = np.repeat([0, 1], [200, 50]).astype(np.int16)
    pairs = rng.random(250) < 0.6
    items = BlimpItems(pairs, sets, ["a", "b"])
    values = items.resampler(4000, 0)(items)
    a, b = pairs[:200].mean(), pairs[200:].mean()
    assert values.std() == pytest.approx(np.sqrt(a * (1 - a) / 200 + b * (1 - b) / 50) / 2, rel=0.05)
