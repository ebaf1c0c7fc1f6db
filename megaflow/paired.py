"""Differences between measurements that share what they were taken on: seeds, or rows of text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, ndtri, stdtr, stdtrit

CONFIDENCE = 0.95
"""Of the intervals of paired differences."""


class Paired(NamedTuple):
    """One thing minus another over what both were measured on. pairs: of how many; error, low, high, p: None with fewer than two."""

    pairs: int
    difference: float | None
    error: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def mean_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error, s / sqrt(n) with n - 1 degrees of freedom; None of no value, and the error of fewer than two."""
    if not values:
        return None, None
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def paired(values: dict[int, float], base: dict[int, float], confidence: float = CONFIDENCE) -> Paired:
    """The mean of values[seed] - base[seed] over the seeds of both, with its interval and two-sided p-value by Student's t.

    Differences that are all the same have no spread: p is 0, or 1 where they are 0.
    """
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    return _tested(len(differences), *mean_error(differences), confidence)


def per_unit(values: Sequence[float], base: Sequence[float], sizes: Sequence[float], confidence: float = CONFIDENCE) -> Paired:
    """The same of sums over rows of unlike sizes: sum(values - base) / sum(sizes), such as nats per token over rows of text.

    Its error is that of a ratio of means over rows (Cochran 1977, section 6.4); p and interval by Student's t of R - 1 degrees.
    """
    apart, size = np.asarray(values, float) - np.asarray(base, float), np.asarray(sizes, float)
    count, total = len(apart), float(size.sum())
    if count == 0 or total <= 0.0:
        return Paired(0, None)
    mean = float(apart.sum()) / total
    residual = apart - mean * size
    error = math.sqrt(float((residual**2).sum()) * count / (count - 1)) / total if count > 1 else None
    return _tested(count, mean, error, confidence)


def shares(right: Sequence[bool], base: Sequence[bool], confidence: float = CONFIDENCE) -> Paired:
    """The share of problems that one solves minus that of another, of the same problems.

    p is exact and two-sided, of the problems that only one of them solves (McNemar 1947: a fair coin's); the interval is Bonett & Price's
    (2012), the normal one after a problem is added to either side, and error is its own. Both hold of few problems, too.
    """
    count = len(right)
    if count == 0:
        return Paired(0, None)
    won = sum(mine and not other for mine, other in zip(right, base, strict=True))
    lost = sum(other and not mine for mine, other in zip(right, base, strict=True))
    p = min(1.0, 2.0 * float(bdtr(min(won, lost), won + lost, 0.5)))
    ahead, behind = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    error = math.sqrt((ahead + behind - (ahead - behind) ** 2) / (count + 2))
    middle, half = ahead - behind, float(ndtri((1.0 + confidence) / 2.0)) * error
    return Paired(count, (won - lost) / count, error, max(middle - half, -1.0), min(middle + half, 1.0), p)


def _tested(count: int, mean: float | None, error: float | None, confidence: float) -> Paired:
    if mean is None or error is None:
        return Paired(count, mean)
    freedom = count - 1
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error)) if error > 0 else float(mean == 0)
    return Paired(count, mean, error, mean - half, mean + half, p)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (1979): the k-th smallest of m times m - k + 1, never below one before it, at most 1. None stays None."""
    order = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    adjusted: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[place] = highest
    return adjusted
