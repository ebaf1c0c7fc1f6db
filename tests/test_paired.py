"""Paired differences against scipy's own tests, closed forms and simulated data."""

import itertools

import numpy as np
import pytest
from scipy import stats

from megaflow.paired import Paired, holm, mean_error, paired, per_unit, shares


def test_mean_and_error():
    values = np.random.default_rng(0).normal(3, 2, 7).tolist()
    assert mean_error(values) == pytest.approx((np.mean(values), stats.sem(values)))
    assert mean_error([2.5]) == (2.5, None) and mean_error([]) == (None, None)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_paired_differences_are_those_of_scipy(count):
    a, b = np.random.default_rng(count).normal(0, 1, (2, count))
    found = paired(dict(enumerate(a)) | {98: 4.0}, dict(enumerate(b)) | {99: 5.0})
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found.pairs == count
    numbers = (found.difference, found.error, found.low, found.high, found.p)
    assert numbers == pytest.approx(((a - b).mean(), stats.sem(a - b), interval.low, interval.high, expected.pvalue), rel=1e-9)


def test_fewer_than_two_shared_seeds_give_no_interval():
    assert paired({1: 2.0, 2: 3.0}, {2: 1.0, 3: 9.0}) == Paired(1, 2.0)
    assert paired({1: 2.0}, {2: 1.0}) == Paired(0, None)


def test_differences_without_spread():
    assert paired({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}) == Paired(2, 0.5, 0.0, 0.5, 0.5, 0.0)
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == Paired(2, 0.0, 0.0, 0.0, 0.0, 1.0)


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 1, (4000, 3))  # the seeds' own, which pairs take out
    a, b = shared + 0.3 + rng.normal(0, 0.2, (4000, 3)), shared + rng.normal(0, 0.2, (4000, 3))
    found = [paired(dict(enumerate(x)), dict(enumerate(y))) for x, y in zip(a, b, strict=True)]
    assert np.mean([one.low <= 0.3 <= one.high for one in found]) == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_shares_have_the_exact_test_of_those_that_differ():
    """Against scipy's binomial test, and all ways to exchange the two answers to each problem."""
    rng = np.random.default_rng(4)
    for count in (1, 2, 3, 8, 12):
        right, base = (rng.random((2, count)) < [[0.8], [0.3]]).tolist()
        found = shares(right, base)
        won, lost = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((right, base), (base, right)))
        apart = np.array(right, int) - np.array(base, int)
        assert found.pairs == count and found.difference == pytest.approx(apart.mean())
        assert found.p == pytest.approx(stats.binomtest(won, won + lost).pvalue if won + lost else 1.0)
        exchanged = np.array(list(itertools.product((1, -1), repeat=count))) @ apart
        assert found.p == pytest.approx((np.abs(exchanged) >= abs(apart.sum())).mean())
    assert shares([], []) == Paired(0, None)
    found = shares([True] * 3, [False] * 3)
    assert (found.difference, found.p) == (1.0, 0.25) and found.low < 0.0 and found.high == 1.0


@pytest.mark.parametrize("count, chances", [(8, (0.5, 0.5)), (20, (0.9, 0.8)), (20, (0.3, 0.05)), (64, (0.95, 0.6))])
def test_intervals_of_shares_cover_as_often_as_they_say(count, chances):
    rng = np.random.default_rng(count)
    draws = rng.random((3000, 2, count)) < np.array(chances)[:, None]
    found = [shares(*pair.tolist()) for pair in draws]
    assert np.mean([one.low <= chances[0] - chances[1] <= one.high for one in found]) >= 0.94
    if chances[0] == chances[1]:
        assert np.mean([one.p <= 0.05 for one in found]) <= 0.05


def test_holm_is_the_closed_test_of_bonferroni():
    rng = np.random.default_rng(2)
    for count in range(1, 7):
        ps = np.round(rng.uniform(0, 0.4, count) ** 2, 2).tolist()  # ties too
        sets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
        brute = [max(min(1.0, len(s) * min(ps[j] for j in s)) for s in sets if i in s) for i in range(count)]
        assert holm(ps) == pytest.approx(brute)
    assert holm([0.03, None, 0.01]) == pytest.approx([0.03, None, 0.02])
    assert holm([]) == []


def test_holm_errs_in_a_family_as_seldom_as_it_says():
    rng = np.random.default_rng(3)
    false = [min(holm(rng.uniform(0, 1, 8).tolist())) <= 0.05 for _ in range(4000)]
    assert np.mean(false) == pytest.approx(0.05, abs=0.012)


def test_of_rows_of_one_size_it_is_the_paired_test():
    a, b = np.random.default_rng(0).normal(0, 1, (2, 9))
    found, expected = per_unit(4 * a, 4 * b, [4.0] * 9), paired(dict(enumerate(a)), dict(enumerate(b)))
    assert found == pytest.approx(tuple(expected), rel=1e-12)
    assert per_unit([], [], []) == Paired(0, None) and per_unit([3.0], [1.0], [4.0]) == Paired(1, 0.5)


def test_of_rows_of_unlike_sizes_its_interval_covers_as_often_as_it_says():
    """Rows whose tokens vary four-fold, of which the long ones have more noise; 30 of them each time."""
    rng = np.random.default_rng(3)
    inside = []
    for _ in range(4000):
        sizes = rng.integers(10, 41, 30)
        apart = 0.3 * sizes + rng.normal(0, 1, 30) * np.sqrt(sizes)
        found = per_unit(apart, np.zeros(30), sizes)
        inside.append(found.low <= 0.3 <= found.high)
        assert found.difference == pytest.approx(apart.sum() / sizes.sum(), rel=1e-12)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
