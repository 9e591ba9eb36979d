"""Tests, intervals and corrections against SciPy and against definitions."""

import itertools

import numpy as np
import pytest
from scipy import stats

from megatron_sas.report.statistics import difference, estimate, holm


@pytest.mark.parametrize("count", [2, 3, 7])
def test_t_interval(count):
    values = np.random.default_rng(count).normal(3, 2, count)
    found = estimate(values)
    assert found.mean == pytest.approx(values.mean()) and found.error == pytest.approx(stats.sem(values))
    for confidence in (0.9, 0.95):
        expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
        assert found.interval(confidence) == pytest.approx((expected.low, expected.high))
    assert estimate([1.0]).interval(0.95) is None and estimate([1.0]).error is None


@pytest.mark.parametrize("count", [2, 3, 8])
def test_paired_by_seed_whatever_the_order(count):
    rng = np.random.default_rng(count)
    left, right = rng.normal(size=(2, count))
    found = difference(list(enumerate(left)), list(enumerate(right))[::-1])
    expected = stats.ttest_rel(left, right)
    assert found.paired and found.freedom == expected.df == count - 1
    assert (found.p, found.mean) == pytest.approx((expected.pvalue, (left - right).mean()))
    assert found.mean / found.error == pytest.approx(expected.statistic)


@pytest.mark.parametrize(
    "seeds", [([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [1, 2]), ([1, 1, 2], [1, 1, 2]), ([None] * 3,) * 2]
)
def test_welch_where_seeds_are_not_the_same(seeds):
    rng = np.random.default_rng(5)
    left, right = (list(zip(s, rng.normal(size=len(s)), strict=True)) for s in seeds)
    found = difference(left, right)
    expected = stats.ttest_ind([v for _, v in left], [v for _, v in right], equal_var=False)
    assert not found.paired
    assert (found.p, found.freedom) == pytest.approx((expected.pvalue, expected.df))
    assert found.mean / found.error == pytest.approx(expected.statistic)


def test_where_nothing_can_be_tested():
    single = difference([(1, 2.0)], [(2, 0.5), (3, 0.7)])
    assert (single.mean, single.error, single.p) == (pytest.approx(1.4), None, None)
    assert difference([(1, 2.0)], [(1, 0.5)]).p is None
    equal = difference([(1, 0.1 + 0.2), (2, 0.3)], [(1, 0.1), (2, 0.1)])  # a spread of rounding alone
    assert (equal.error, equal.p) == (0.0, None)


def test_holm_is_the_closed_test_of_bonferroni():
    """Holm by its definition: rejected at α if every subset of hypotheses with it is rejected by Bonferroni."""
    p = dict(enumerate([0.011, 0.02, 0.3, 0.004, 0.02]))
    corrected = holm({**p, "none": None})
    assert set(corrected) == set(p)
    for key in p:
        subsets = [s for size in range(1, 6) for s in itertools.combinations(p, size) if key in s]
        assert corrected[key] == pytest.approx(max(min(1, len(s) * min(p[k] for k in s)) for s in subsets))
    assert holm({}) == {} and holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_holm_keeps_the_error_rate():
    """Of 400 families of 8 true null hypotheses at most about 5 % have a false discovery."""
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(400):
        groups = rng.normal(size=(9, 3))
        base = list(enumerate(groups[0]))
        tests = {i: difference(list(enumerate(group)), base).p for i, group in enumerate(groups[1:])}
        false += min(holm(tests).values()) < 0.05
    assert false / 400 < 0.08
