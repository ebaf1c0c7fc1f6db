"""The numbers of a sweep: means over seeds, paired differences, effects of axes, what is worth its cost, and a scaling law.

A sweep is plain data: {axes: {name: [value, …]}, metric, lower_is_better, baseline: {axis: value} or None, points: [{name, values: {axis:
value}, seed, state, said, metrics: {name: float}, curve, cost}, …]}. A *choice* is a tuple of values in the order of the axes; its points
differ by seed alone. Of a point that is not done nothing is used here: what stopped early has spent less than the others, and one that
failed has no number. A metric that is not finite counts as none.
"""

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.special import fdtrc

from megaflow.paired import Paired, holm, mean_error, paired

Choice = tuple[str, ...]

MOST_VALUES = 12
"""Values of a numeric axis that are told apart in its effect; more of them, as a random sweep has, go into BINS of equal count."""
BINS = 6
LAW_CONFIDENCE = 0.9
"""Of the intervals of a scaling law."""
LAW_SIZES = 4
"""Sizes without which no law is fitted: three numbers fit any three points."""
ALIKE = 1.05
"""Numbers of parameters, and costs, of which a scaling law makes one."""
REPLICATES = 400
"""Of the bootstrap of a scaling law."""
MOST_SPREAD = 1.0
"""Of the errors of log L in a replicate: with one degree of freedom some would be without bound; at this one nothing is known any more."""
FLATTEST, STEEPEST = 1e-3, 5.0
"""Bounds in which the exponent of a scaling law is looked for."""


class Row(NamedTuple):
    """A choice by one metric. values: {seed: value}; points: how many the sweep has of it; paired: None of the baseline itself; holm: the
    p-value of `paired`, adjusted for all comparisons of this metric."""

    choice: Choice
    values: dict[int, float]
    points: int
    mean: float | None
    error: float | None
    paired: Paired | None
    holm: float | None


class Level(NamedTuple):
    """An axis at one value (or one bin of values). mean: of the metric, averaged over the other axes and over seeds; effect: that minus its
    average over the values of the axis; error: of the effect. None where the design cannot tell. at: the value if it is a number."""

    label: str
    at: float | None
    points: int
    mean: float | None
    effect: float | None
    error: float | None


class Effect(NamedTuple):
    """The main effect of an axis, with the F-test against none at all (None without a degree of freedom for the error)."""

    axis: str
    levels: list[Level]
    binned: bool
    p: float | None


class Interaction(NamedTuple):
    """A pair of axes. means, residuals: [first's values][second's values], None where there is no point; a residual is a cell's mean minus
    what the additive fit says; size: root mean square of the residuals over the points; p: of the F-test, None where there is no error."""

    first: str
    second: str
    labels: tuple[list[str], list[str]]
    means: list[list[float | None]]
    residuals: list[list[float | None]]
    size: float
    p: float | None


class Design(NamedTuple):
    """What the axes do. balanced: every combination of the values is there with the same seeds, so that plain means are exact; error_from:
    'seeds' (points that differ by seed alone, seeds as blocks), 'fit' (what the additive fit leaves) or '' (nothing is left to take it
    from); freedom: its degrees of freedom."""

    balanced: bool
    error_from: str
    freedom: int
    effects: list[Effect]
    interactions: list[Interaction]


class Winner(NamedTuple):
    """The choice with the best mean of those with the most seeds. Of the others, by their paired difference from it: ties are within its
    error, ahead are better by more, on the seeds that both have, clear are worse by more, untested share fewer than two seeds with it.
    incomplete: choices with a better mean over fewer seeds, which is no fair comparison."""

    choice: Choice
    ties: list[Choice]
    ahead: list[Choice]
    clear: list[Choice]
    untested: list[Choice]
    incomplete: list[Choice]


class Law(NamedTuple):
    """L(C) = E + A C^-alpha. x, y (N,): the points that it was fitted to; intervals: {'E', 'A', 'alpha': (low, high)}; falls: whether
    that of alpha stays clear of the bounds in which it is looked for; determined: whether, besides, that of E stays clear of 0; curve: [(C,
    L, low, high), …] over the points' range; sizes: how many different ones."""

    E: float
    A: float
    alpha: float
    intervals: dict[str, tuple[float, float]]
    falls: bool
    determined: bool
    x: list[float]
    y: list[float]
    curve: list[tuple[float, float, float, float]]
    sizes: int


def choices(data: dict[str, Any]) -> dict[Choice, list[dict[str, Any]]]:
    """The points of every choice, choices in the order of their axes' values. Raises ValueError where a seed of a choice is done twice."""
    found: dict[Choice, list[dict[str, Any]]] = {}
    for point in data["points"]:
        found.setdefault(tuple(point["values"][axis] for axis in data["axes"]), []).append(point)
    for choice, points in found.items():
        done = [point["seed"] for point in points if point["state"] == "done"]
        if len(done) > len(set(done)):
            raise ValueError(f"{', '.join(choice)}: a seed of this choice is done twice")
    places = [{value: place for place, value in enumerate(values)} for values in data["axes"].values()]

    def order(choice: Choice) -> list[int]:
        return [place.get(value, len(place)) for place, value in zip(places, choice, strict=True)]

    return {choice: found[choice] for choice in sorted(found, key=order)}


def measured(points: Iterable[dict[str, Any]], metric: str) -> dict[int, float]:
    """{seed: value} of the points that are done and whose metric is finite."""
    values = {point["seed"]: point["metrics"].get(metric) for point in points if point["state"] == "done"}
    return {seed: float(value) for seed, value in values.items() if value is not None and math.isfinite(value)}


def metrics(data: dict[str, Any]) -> list[str]:
    """Names of the metrics of the points that are done: the one that decides first, the others in the order they are met."""
    names = [name for point in data["points"] if point["state"] == "done" for name in point["metrics"]]
    return list(dict.fromkeys([data["metric"], *names]))


def baseline(data: dict[str, Any]) -> Choice | None:
    """The choice that the others are compared with: the first one, done, that has the values of `baseline`; None where there is none."""
    asked = data.get("baseline") or {}
    for point in data["points"]:
        if measured([point], data["metric"]) and all(point["values"].get(axis) == value for axis, value in asked.items()):
            return tuple(point["values"][axis] for axis in data["axes"])
    return None


def rows(data: dict[str, Any], metric: str) -> list[Row]:
    """Every choice by this metric, in the order of `choices`."""
    groups, base = choices(data), baseline(data)
    reference = measured(groups[base], metric) if base is not None else {}
    found = {choice: measured(points, metric) for choice, points in groups.items()}
    pairs = {choice: None if choice == base else paired(values, reference) for choice, values in found.items()}
    adjusted = holm([pair.p if pair else None for pair in pairs.values()])
    return [
        Row(choice, values, len(groups[choice]), *mean_error(list(values.values())), pairs[choice], p)
        for (choice, values), p in zip(found.items(), adjusted, strict=True)
    ]


def winner(data: dict[str, Any]) -> Winner | None:
    """Which choice won by the metric that decides; None where nothing is done."""
    sign = 1 if data["lower_is_better"] else -1
    scored = sorted(((sign * row.mean, row) for row in rows(data, data["metric"]) if row.mean is not None), key=lambda pair: pair[0])
    if not scored:
        return None
    most = max(len(row.values) for _, row in scored)
    score, best = next(pair for pair in scored if len(pair[1].values) == most)
    found = Winner(best.choice, [], [], [], [], [row.choice for other, row in scored if other < score])
    for row in (row for _, row in scored if row.choice != best.choice):
        pair = paired(row.values, best.values)
        if pair.difference is None or pair.error is None:
            found.untested.append(row.choice)
        elif abs(pair.difference) <= pair.error:
            found.ties.append(row.choice)
        else:
            (found.ahead if sign * pair.difference < 0 else found.clear).append(row.choice)
    return found


def pareto(costs: Sequence[float], scores: Sequence[float], lower_is_better: bool = True) -> list[int]:
    """Places, by rising cost, of the points that no other beats, that is, costs at most as much and is at least as good, one strictly."""
    sign = 1 if lower_is_better else -1
    best, front, last = math.inf, [], (math.nan, math.nan)
    for cost, score, place in sorted((cost, sign * score, place) for place, (cost, score) in enumerate(zip(costs, scores, strict=True))):
        if score < best or (cost, score) == last:
            best, last = score, (cost, score)
            front.append(place)
    return front


def numbers(values: Iterable[str]) -> list[float] | None:
    """Values as finite numbers, or None if one of them is not."""
    try:
        found = [float(value) for value in values]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None


def levels(values: Sequence[str], order: Sequence[str]) -> tuple[list[int], list[str], list[float] | None, bool]:
    """What is told apart of an axis: the level of each point, the levels' labels, where they lie if they are numbers, and whether of bins.

    values: the axis' value at each point; order: its values in the order of the sweep. More than MOST_VALUES numbers go into BINS of
    about as many points each, equal values into the same one; a bin lies at the median of its points.
    """
    met = set(values)
    present = [value for value in dict.fromkeys([*order, *values]) if value in met]
    found = numbers(present)
    if found is not None:
        present = sorted(present, key=float)
    if found is None or len(present) <= MOST_VALUES:
        places = {value: place for place, value in enumerate(present)}
        return [places[value] for value in values], present, None if found is None else sorted(found), False
    at = np.array([float(value) for value in values])
    cuts = np.quantile(at, np.arange(1, BINS) / BINS)
    bins = np.unique(np.searchsorted(cuts, at, side="left"), return_inverse=True)[1].tolist()
    groups = [[float(value) for value, place in zip(values, bins, strict=True) if place == level] for level in range(max(bins) + 1)]
    labels = [f"{min(group):.3g} … {max(group):.3g}" for group in groups]
    return bins, labels, [float(np.median(group)) for group in groups], True


class _Fit:
    """Least squares of y (N,) on the columns of x (N, K), of whatever rank; `rest`: sum of squares that is left, `freedom`: N - rank."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        left, scale, right = np.linalg.svd(x, full_matrices=False)
        kept = scale > 1e-9 * scale.max(initial=1.0)
        self.span = right[kept]
        self.inverse = (self.span.T / scale[kept] ** 2) @ self.span
        self.weights = self.span.T @ ((left[:, kept].T @ y) / scale[kept])
        self.residual = y - x @ self.weights
        rest = float(self.residual @ self.residual)
        self.rest = rest if rest > 1e-26 * float(y @ y) else 0.0  # what is below is rounding
        self.freedom = len(y) - int(kept.sum())

    def told(self, row: np.ndarray) -> bool:
        """Whether the data tell this combination (K,) of the weights: it lies in the span of their rows."""
        return bool(np.abs(row - (row @ self.span.T) @ self.span).max(initial=0.0) < 1e-7)


def _coded(places: Sequence[int], count: int) -> np.ndarray:
    """Columns (N, count - 1) of a factor whose effects sum to zero: the last level is minus the sum of the others."""
    return np.vstack([np.eye(count - 1), -np.ones(count - 1)])[np.asarray(places, int)]


def _test(reduced: _Fit, full: _Fit, error: float, freedom: int) -> float | None:
    """p-value of the F-test of what `full` has more than `reduced`, against `error`, squares of `freedom` degrees; None without."""
    more = reduced.freedom - full.freedom
    if more < 1 or freedom < 1:
        return None
    if error <= 0:
        return 0.0 if reduced.rest > full.rest else 1.0
    return float(fdtrc(more, freedom, max(0.0, reduced.rest - full.rest) / more / (error / freedom)))


class _Model(NamedTuple):
    """The additive model of a design: y = middle + parts @ weights. told: what `levels` says of each axis; parts: columns of the mean and
    the seeds, under an empty name, and of each axis; pure: the fit of choices and seeds; source: of the error, see `design`."""

    told: dict[str, tuple[list[int], list[str], list[float] | None, bool]]
    parts: dict[str, np.ndarray]
    y: np.ndarray
    middle: float
    additive: _Fit
    pure: _Fit
    source: str

    @property
    def error(self) -> tuple[float, int]:
        """(squares, degrees of freedom) that effects are tested against."""
        fit = self.pure if self.source == "seeds" else self.additive
        return fit.rest, fit.freedom

    def row(self, levels: dict[str, int], mean: bool = True) -> np.ndarray:
        """What the weights are multiplied by for some levels of axes, with the mean or without."""
        found = []
        for name, part in self.parts.items():
            inside = np.zeros(part.shape[1])
            if name in levels:
                inside = _coded([levels[name]], len(self.told[name][1]))[0]
            elif not name and mean:
                inside[0] = 1.0
            found.append(inside)
        return np.concatenate(found)

    def predicted(self, levels: dict[str, int]) -> float | None:
        """The mean at some levels; None where the design does not tell it."""
        row = self.row(levels)
        return self.middle + float(row @ self.additive.weights) if self.additive.told(row) else None


def design(data: dict[str, Any]) -> Design | None:
    """Main effects and pairwise interactions of the axes with more than one value; None where there is none, or no point is done.

    All are estimates of one additive model by least squares, y = m + sum of an effect of each axis + an effect of the seed, every group of
    effects summing to zero; in a balanced design they are the plain means. The error is taken from points that differ by seed alone (after
    the seed's own effect, which all choices share) where the design is balanced and has such points, else from what the fit leaves, which
    holds interactions too. The test of an interaction is that of its columns beside the additive ones.
    """
    metric = data["metric"]
    seen = [
        (choice, seed, value)
        for choice, points in choices(data).items()
        for seed, value in measured(points, metric).items()
    ]  # fmt: skip
    if not seen:
        return None
    axes = list(data["axes"])
    told = {axis: levels([choice[place] for choice, _, _ in seen], data["axes"][axis]) for place, axis in enumerate(axes)}
    told = {axis: found for axis, found in told.items() if len(found[1]) > 1}
    if not told:
        return None
    y = np.array([value for _, _, value in seen])
    middle, y = float(y.mean()), y - float(y.mean())  # sums of squares keep their digits
    cells = [tuple(found[0][place] for found in told.values()) for place in range(len(seen))]
    seeds = [seed for _, seed, _ in seen]
    balanced = _balanced(cells, seeds)

    def column(groups: Sequence[Hashable]) -> np.ndarray:
        names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
        return _coded([names[name] for name in groups], len(names))

    parts: dict[str, np.ndarray] = {"": np.hstack([np.ones((len(y), 1)), column(seeds)])}
    parts |= {axis: _coded(found[0], len(found[1])) for axis, found in told.items()}
    # a choice is its values themselves, of which a bin holds several
    additive, pure = _Fit(np.hstack(list(parts.values())), y), _Fit(np.hstack([parts[""], column([choice for choice, _, _ in seen])]), y)
    source = "seeds" if balanced and pure.freedom > 0 else "fit" if additive.freedom > 0 else ""
    model = _Model(told, parts, y, middle, additive, pure, source)
    effects = [_effect(model, axis) for axis in told]
    interactions = [_interaction(model, first, second) for first, second in itertools.combinations(told, 2)]
    return Design(balanced, source, model.error[1], effects, interactions)


def _effect(model: _Model, axis: str) -> Effect:
    places, labels, at, binned = model.told[axis]
    squares, freedom = model.error
    found = []
    for level, label in enumerate(labels):
        row = model.row({axis: level}, mean=False)
        clear, error = model.additive.told(row), None
        if clear and freedom > 0:
            error = math.sqrt(max(0.0, squares / freedom * float(row @ model.additive.inverse @ row)))
        deviation = float(row @ model.additive.weights) if clear else None
        mean = model.predicted({axis: level})
        found.append(Level(label, at[level] if at else None, places.count(level), mean, deviation, error))
    without = _Fit(np.hstack([part for name, part in model.parts.items() if name != axis]), model.y)
    return Effect(axis, found, binned, _test(without, model.additive, squares, freedom))


def _interaction(model: _Model, first: str, second: str) -> Interaction:
    (at_first, labels_first, *_), (at_second, labels_second, *_) = model.told[first], model.told[second]
    one, two = model.parts[first], model.parts[second]
    products = (one[:, :, None] * two[:, None, :]).reshape(len(model.y), -1)
    full = _Fit(np.hstack([*model.parts.values(), products]), model.y)
    left = model.error if model.source == "seeds" else (full.rest, full.freedom)
    means: list[list[float | None]] = [[None] * len(labels_second) for _ in labels_first]
    residuals: list[list[float | None]] = [[None] * len(labels_second) for _ in labels_first]
    squares = 0.0
    for i, j in sorted(set(zip(at_first, at_second, strict=True))):
        inside = np.array([a == i and b == j for a, b in zip(at_first, at_second, strict=True)])
        residual = float(model.additive.residual[inside].mean())
        squares += float(inside.sum()) * residual**2
        residuals[i][j] = residual
        if (mean := model.predicted({first: i, second: j})) is not None:
            means[i][j] = mean + residual
    size = math.sqrt(squares / len(model.y))
    return Interaction(first, second, (labels_first, labels_second), means, residuals, size, _test(model.additive, full, *left))


def _balanced(cells: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> bool:
    """Whether every combination of the levels is there as often with every seed that there is."""
    counts: dict[tuple[tuple[int, ...], int], int] = {}
    for key in zip(cells, seeds, strict=True):
        counts[key] = counts.get(key, 0) + 1
    combinations = math.prod(len({cell[axis] for cell in cells}) for axis in range(len(cells[0]))) * len(set(seeds))
    return len(counts) == combinations and len(set(counts.values())) == 1


def alike(values: Iterable[float]) -> dict[float, float]:
    """The least of those that each value is as good as: a choice of weighting has some weights more than another, and a budget of FLOPs is
    kept to a step. Each is at most a factor of ALIKE above its least."""
    found: dict[float, float] = {}
    least = math.nan
    for value in sorted(set(values)):
        least = least if value <= ALIKE * least else value
        found[value] = least
    return found


def count_alike(values: Iterable[float]) -> int:
    return len(set(alike(values).values()))


def by_size(data: dict[str, Any], cost: str) -> list[tuple[float, float]]:
    """(cost, metric) of the points that a scaling law is fitted to: of each number of parameters (alike) the choice with the best mean.

    Empty where fewer than LAW_SIZES sizes have both, where a metric is not above zero, or where it is better when higher. Choices with
    fewer seeds than the most of a size are passed over, as in `winner`.
    """
    counts = [point["cost"].get("parameters") or 0 for point in data["points"] if point["state"] == "done"]
    size_of = alike(filter(None, counts))
    sizes: dict[float, list[tuple[int, float, list[tuple[float, float]]]]] = {}
    for points in choices(data).values():
        values = measured(points, data["metric"])
        found = [point for point in points if point["state"] == "done" and point["seed"] in values and point["cost"].get(cost)]
        if found and found[0]["cost"].get("parameters"):
            pairs = [(float(point["cost"][cost]), values[point["seed"]]) for point in found]
            size = size_of[found[0]["cost"]["parameters"]]
            sizes.setdefault(size, []).append((-len(pairs), float(np.mean([y for _, y in pairs])), pairs))
    chosen = [min(group)[2] for _, group in sorted(sizes.items())]
    kept = [pair for pairs in chosen for pair in pairs]
    distinct = min(count_alike(float(np.mean([x for x, _ in pairs])) for pairs in chosen), count_alike(x for x, _ in kept))
    if not data["lower_is_better"] or distinct < LAW_SIZES or any(y <= 0 for _, y in kept):
        return []
    return kept


def scaling_law(pairs: Sequence[tuple[float, float]], replicates: int = REPLICATES, seed: int = 0) -> Law:
    """Fit L(C) = E + A C^-alpha, E >= 0, to (C, L) by least squares of log L.

    Plain squares, not the Huber loss of Hoffmann et al. (2022, arXiv:2203.15556, appendix D.3): here are a few means, not hundreds of runs
    of which some went wrong, and every one is to count. The start is the best of a grid of alpha, at each of which E and A solve a linear
    problem. Intervals are of a parametric bootstrap: losses of the fitted law with normal errors of log L, of the variance that the fit
    leaves, itself drawn from its law (n - 3 over chi-squared of as many degrees), so that few points give wide intervals. Points are not
    drawn again with replacement: of four to eight sizes that would often leave two, which have no law. Raises ValueError with fewer than
    LAW_SIZES different C, or a number that is not above zero.
    """
    x, y = (np.array(column, float) for column in zip(*pairs, strict=True))
    sizes = count_alike(x.tolist())
    if sizes < LAW_SIZES or min(x.min(), y.min()) <= 0:
        raise ValueError(f"a scaling law takes at least {LAW_SIZES} different costs, and numbers above zero")
    scale = float(np.exp(np.log(x).mean()))
    log_x = np.log(x / scale)
    best = _law(log_x, np.log(y))
    line = _log_law(best, log_x)
    freedom = len(x) - 3
    rest = float(((np.log(y) - line) ** 2).sum())
    rng = np.random.default_rng(seed)
    spreads = np.minimum(np.sqrt(rest / rng.chisquare(freedom, replicates)), MOST_SPREAD)
    drawn = np.array([_law(log_x, line + spread * rng.standard_normal(len(x))) for spread in spreads])
    tails = (1 - LAW_CONFIDENCE) / 2, (1 + LAW_CONFIDENCE) / 2
    amplitude = np.exp(np.minimum(drawn[:, 1] + drawn[:, 2] * math.log(scale), 700.0))
    named = {"E": drawn[:, 0], "A": amplitude, "alpha": drawn[:, 2]}
    intervals = {name: (float(np.quantile(values, tails[0])), float(np.quantile(values, tails[1]))) for name, values in named.items()}
    at = np.linspace(log_x.min(), log_x.max(), 60)
    fan = np.exp(np.array([_log_law(law, at) for law in drawn]))
    low, high = (np.quantile(fan, tail, axis=0) for tail in tails)
    curve = list(zip((scale * np.exp(at)).tolist(), np.exp(_log_law(best, at)).tolist(), low.tolist(), high.tolist(), strict=True))
    falls = 1.01 * FLATTEST < intervals["alpha"][0] and intervals["alpha"][1] < 0.99 * STEEPEST
    determined = falls and intervals["E"][0] > 1e-3 * float(y.min())
    A = math.exp(min(best[1] + best[2] * math.log(scale), 700.0))
    return Law(float(best[0]), A, float(best[2]), intervals, falls, determined, x.tolist(), y.tolist(), curve, sizes)


def _log_law(law: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """log(E + exp(a - alpha log x)) of law (E, a, alpha)."""
    return np.log(law[0] + np.exp(law[1] - law[2] * log_x))


def _law(log_x: np.ndarray, log_y: np.ndarray) -> np.ndarray:
    """(E, a, alpha) with the least sum of squares of log y - log(E + exp(a - alpha log x)), E and alpha in their bounds."""
    y = np.exp(log_y)
    alphas = np.geomspace(FLATTEST, STEEPEST, 60)
    basis = np.exp(-alphas[:, None] * log_x) / y  # of relative errors, which are those of the logarithm to first order
    ones = 1 / y
    bb, bo, oo, b, o = (basis**2).sum(1), basis @ ones, float(ones @ ones), basis.sum(1), float(ones.sum())
    det = bb * oo - bo**2
    E = np.where(det > 1e-12 * bb * oo, (bb * o - bo * b) / np.maximum(det, 1e-300), 0.0)
    E = np.clip(E, 0.0, 0.999 * float(y.min()))
    amplitude = np.maximum((b - bo * E) / bb, 1e-12)
    errors = ((E[:, None] * ones + amplitude[:, None] * basis - 1) ** 2).sum(1)
    place = int(errors.argmin())
    top = float(y.max())
    start = [min(float(E[place]), 0.999 * top), math.log(amplitude[place]), float(alphas[place])]

    def wrong(law: np.ndarray) -> np.ndarray:
        return _log_law(law, log_x) - log_y

    def slope(law: np.ndarray) -> np.ndarray:
        power = np.exp(law[1] - law[2] * log_x)
        return np.stack([np.ones_like(power), power, -power * log_x], axis=1) / (law[0] + power)[:, None]

    bounds = ([0.0, -np.inf, FLATTEST * (1 - 1e-9)], [top, np.inf, STEEPEST * (1 + 1e-9)])
    begin = np.maximum(start, [1e-9 * top, -np.inf, FLATTEST])
    return least_squares(wrong, begin, slope, bounds, xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=200).x
