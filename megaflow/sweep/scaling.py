"""A scaling law over sizes and tokens, L(N, D) = E + A N^-alpha + B D^-beta (Hoffmann et al. 2022, arXiv:2203.15556, equation 2).

Of a sweep whose points differ in parameters and in tokens this is what can be fitted. A law of FLOPs alone would need the best split of
each budget, and the best points of a coarse grid are not that: fitted to them its exponent and floor are wrong by more than their
intervals.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from megaflow.sweep.statistics import FLATTEST, LAW_CONFIDENCE, MOST_SPREAD, REPLICATES, STEEPEST, alike, choices, count_alike, measured

LEVELS = 3
"""Sizes, and lengths of training, without which neither term has an exponent."""
GRID = 16
"""Exponents of each term that a fit is begun from."""


class Surface(NamedTuple):
    """E, A, alpha, B, beta; `frontier` = alpha beta / (alpha + beta), the exponent of L - E in FLOPs where these are best split, and
    `size` = beta / (alpha + beta), that of the best N; intervals of all; told: which of them the data determine; how many there are."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    told: dict[str, bool]
    points: int
    sizes: int
    lengths: int


NAMES = ("E", "A", "alpha", "B", "beta", "frontier", "size")


def triples(data: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(parameters, tokens, metric) of the points that a law is fitted to: of each size and length those of the choice with the best mean,
    of those with as many seeds as any. Empty where they do not vary both, each at three values or more and not together, where a metric is
    not above zero, or where it is better when higher."""
    costs = [point["cost"] for point in data["points"] if point["state"] == "done"]
    size_of, length_of = (alike(float(cost[name]) for cost in costs if cost.get(name)) for name in ("parameters", "tokens"))
    cells: dict[tuple[float, float], list[tuple[int, float, list[tuple[float, float, float]]]]] = {}
    for points in choices(data).values():
        values = measured(points, data["metric"])
        there: dict[tuple[float, float], list[tuple[float, float, float]]] = {}
        for point in points:
            cost = point["cost"]
            if point["state"] == "done" and point["seed"] in values and cost.get("parameters") and cost.get("tokens"):
                n, d = float(cost["parameters"]), float(cost["tokens"])
                there.setdefault((size_of[n], length_of[d]), []).append((n, d, values[point["seed"]]))
        for cell, own in there.items():
            cells.setdefault(cell, []).append((-len(own), float(np.mean([value for _, _, value in own])), own))
    found = [point for group in cells.values() for point in min(group)[2]]
    sizes, lengths = {n for n, _ in cells}, {d for _, d in cells}
    crossed = len(cells) >= len(sizes) + len(lengths)
    enough = min(len(sizes), len(lengths)) >= LEVELS and crossed and len(found) > 5
    if not enough or not data["lower_is_better"] or any(value <= 0 for _, _, value in found):
        return []
    return found


def surface_law(found: Sequence[tuple[float, float, float]], replicates: int = REPLICATES, seed: int = 0) -> Surface:
    """Fit the law to (N, D, L) by least squares of log L, E >= 0.

    Intervals are of a parametric bootstrap with the variance that the fit leaves, itself drawn from its law, as of statistics.scaling_law.
    What is not determined: an exponent whose interval comes to a bound, and with one of them all that hangs on it; E whose interval comes
    to 0. Raises ValueError with too few points.
    """
    if len(found) <= 5:
        raise ValueError("a law of five numbers takes more than five points")
    sizes, lengths = (count_alike(values) for values in list(zip(*found, strict=True))[:2])
    n, d, y = (np.log(np.array(column, float)) for column in zip(*found, strict=True))
    n, d, scales = n - n.mean(), d - d.mean(), (float(n.mean()), float(d.mean()))
    best = _fit(n, d, y, _start(n, d, y))
    line = _log(best, n, d)
    rest = float(((y - line) ** 2).sum())
    rng = np.random.default_rng(seed)
    spreads = np.minimum(np.sqrt(rest / rng.chisquare(len(y) - 5, replicates)), MOST_SPREAD)
    drawn = np.array([_fit(n, d, line + spread * rng.standard_normal(len(y)), best) for spread in spreads])
    named = [_named(law, scales) for law in (best, *drawn)]
    tails = (1 - LAW_CONFIDENCE) / 2, (1 + LAW_CONFIDENCE) / 2
    columns = {name: np.array([each[name] for each in named[1:]]) for name in NAMES}
    intervals = {name: (float(np.quantile(x, tails[0])), float(np.quantile(x, tails[1]))) for name, x in columns.items()}
    clear = {name: 1.01 * FLATTEST < intervals[name][0] and intervals[name][1] < 0.99 * STEEPEST for name in ("alpha", "beta")}
    both = clear["alpha"] and clear["beta"]
    told = {"alpha": clear["alpha"], "A": clear["alpha"], "beta": clear["beta"], "B": clear["beta"], "frontier": both, "size": both}
    told["E"] = both and intervals["E"][0] > 1e-3 * float(np.exp(y.min()))
    return Surface(named[0], intervals, told, len(y), sizes, lengths)


def _named(law: np.ndarray, scales: tuple[float, float]) -> dict[str, float]:
    E, a, alpha, b, beta = (float(x) for x in law)
    A, B = math.exp(min(a + alpha * scales[0], 700.0)), math.exp(min(b + beta * scales[1], 700.0))
    return dict(zip(NAMES, (E, A, alpha, B, beta, alpha * beta / (alpha + beta), beta / (alpha + beta)), strict=True))


def _log(law: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """log(E + exp(a - alpha n) + exp(b - beta d)) of law (E, a, alpha, b, beta)."""
    return np.log(law[0] + np.exp(law[1] - law[2] * n) + np.exp(law[3] - law[4] * d))


def _start(n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The best of a grid of exponents, at each of which E, A and B solve a linear problem in relative errors."""
    weight, best = np.exp(-y), (math.inf, np.zeros(5))
    for alpha in np.geomspace(0.02, 2.0, GRID):
        for beta in np.geomspace(0.02, 2.0, GRID):
            basis = np.stack([np.ones_like(n), np.exp(-alpha * n), np.exp(-beta * d)], axis=1) * weight[:, None]
            (E, A, B), error = nnls(basis, np.ones_like(y))
            if error < best[0]:
                best = error, np.array([E, math.log(max(A, 1e-9)), alpha, math.log(max(B, 1e-9)), beta])
    return best[1]


def _fit(n: np.ndarray, d: np.ndarray, y: np.ndarray, start: np.ndarray) -> np.ndarray:
    top = float(np.exp(y.max()))

    def wrong(law: np.ndarray) -> np.ndarray:
        return _log(law, n, d) - y

    def slope(law: np.ndarray) -> np.ndarray:
        of_size, of_length = np.exp(law[1] - law[2] * n), np.exp(law[3] - law[4] * d)
        columns = [np.ones_like(n), of_size, -of_size * n, of_length, -of_length * d]
        return np.stack(columns, axis=1) / (law[0] + of_size + of_length)[:, None]

    low, high = np.array([0.0, -50.0, FLATTEST, -50.0, FLATTEST]), np.array([top, 50.0, STEEPEST, 50.0, STEEPEST])
    begin = np.clip(start, low + 1e-9, high - 1e-9)
    return least_squares(wrong, begin, slope, (low, high), xtol=1e-13, ftol=1e-13, gtol=1e-13, max_nfev=300).x
