"""The law over sizes and tokens: known ones are found again, their intervals hold as often as they say, and what is not told is said."""

import numpy as np
import pytest
from scipy import stats

from megaflow.sweep import scaling

N = [1e6, 4e6, 1.6e7, 6.4e7]
D = [2e7, 8e7, 3.2e8, 1.28e9]
TRUE = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28}


def points(noise: float = 0.0, seed: int = 0, sizes=N, lengths=D, seeds: int = 2, **law: float) -> list[tuple[float, float, float]]:
    rng, law = np.random.default_rng(seed), TRUE | law
    return [
        (n, d, (law["E"] + law["A"] * n ** -law["alpha"] + law["B"] * d ** -law["beta"]) * np.exp(noise * rng.standard_normal()))
        for n in sizes
        for d in lengths
        for _ in range(seeds)
    ]


def test_a_law_without_noise_is_found_exactly():
    found = scaling.surface_law(points(), replicates=5)
    for name, value in TRUE.items():
        assert found.values[name] == pytest.approx(value, rel=1e-4)
    a, b = TRUE["alpha"], TRUE["beta"]
    assert found.values["frontier"] == pytest.approx(a * b / (a + b), rel=1e-4)
    assert found.values["size"] == pytest.approx(b / (a + b), rel=1e-4)
    assert (found.points, found.sizes, found.lengths) == (32, 4, 4)


def test_the_frontier_is_what_the_best_split_of_flops_comes_to():
    """By search over N at each C = 6 N D: the slope of log(L - E), and that of the best N."""
    flops = np.geomspace(1e18, 1e22, 9)
    n = np.geomspace(1e5, 1e12, 20001)
    best = [
        (n[i], loss[i])
        for c in flops
        for loss in [TRUE["A"] * n ** -TRUE["alpha"] + TRUE["B"] * (c / 6 / n) ** -TRUE["beta"]]
        for i in [int(loss.argmin())]
    ]
    found = scaling.surface_law(points(), replicates=5).values
    fall = np.polyfit(np.log(flops), np.log([loss for _, loss in best]), 1)[0]
    grow = np.polyfit(np.log(flops), np.log([size for size, _ in best]), 1)[0]
    assert -fall == pytest.approx(found["frontier"], rel=1e-3) and grow == pytest.approx(found["size"], rel=1e-2)


@pytest.mark.long
def test_intervals_hold_as_often_as_they_say():
    inside = {name: 0 for name in TRUE}
    for seed in range(60):
        found = scaling.surface_law(points(0.003, seed), replicates=60, seed=seed)
        for name, value in TRUE.items():
            low, high = found.intervals[name]
            inside[name] += low <= value <= high
    assert all(0.78 <= count / 60 <= 0.99 for count in inside.values()), inside  # 90 %, of 60 trials


def test_what_the_data_do_not_determine_is_said():
    assert all(scaling.surface_law(points(0.001), replicates=30).told.values())
    flat = scaling.surface_law(points(0.01, B=1e-6), replicates=30)
    assert not flat.told["beta"] and not flat.told["E"] and not flat.told["frontier"]
    short = scaling.surface_law(points(0.02, sizes=[1e6, 1.2e6, 1.4e6], lengths=[2e7, 2.4e7, 2.8e7]), replicates=30)
    assert not short.told["E"]
    floorless = scaling.surface_law(points(0.003, E=0.0), replicates=30)
    assert floorless.told["frontier"] and not floorless.told["E"]


def test_small_errors_have_the_intervals_of_student():
    """Where the law is linear in its numbers over them: half the interval is t_0.95(n - 5) sqrt(rest / (n - 5) (J'J)^-1)."""
    cells = points(1e-4, seeds=1, sizes=N[:3], lengths=D[:3])
    found = scaling.surface_law(cells, replicates=400)
    n, d, y = (np.log(column) for column in np.array(cells).T)
    E, A, alpha, B, beta = (found.values[name] for name in TRUE)
    of_size, of_length = A * np.exp(-alpha * n), B * np.exp(-beta * d)
    fitted = E + of_size + of_length
    slopes = np.stack([np.ones_like(n), of_size, -of_size * n, of_length, -of_length * d], axis=1) / fitted[:, None]
    rest, freedom = float(((y - np.log(fitted)) ** 2).sum()), len(y) - 5
    covariance = np.linalg.inv(slopes.T @ slopes)
    for place, name in {0: "E", 2: "alpha", 4: "beta"}.items():
        low, high = found.intervals[name]
        half = stats.t.ppf(0.95, freedom) * np.sqrt(rest / freedom * covariance[place, place])
        assert (high - low) / 2 == pytest.approx(half, rel=0.25)


def test_the_same_points_give_the_same_law():
    assert scaling.surface_law(points(0.01), 10) == scaling.surface_law(points(0.01), 10)
    with pytest.raises(ValueError, match="more than five points"):
        scaling.surface_law(points()[:5])


def sweep(cells: list[tuple[float, float, float]], **more: object) -> dict:
    some = [
        {
            "name": str(place),
            "values": {"point": str(place)},
            "seed": 0,
            "state": "done",
            "said": None,
            "metrics": {"loss": loss},
            "cost": {"parameters": n, "tokens": d, "flops": 6 * n * d, "seconds": 1.0},
        }
        for place, (n, d, loss) in enumerate(cells)
    ]
    return {
        "axes": {"point": [str(place) for place in range(len(cells))]},
        "metric": "loss",
        "lower_is_better": True,
        "points": some,
    } | more


def test_other_axes_do_not_enter_the_law():
    """Of each size and length the law has the best choice alone, as that of one variable has: a bad learning rate is no spread."""
    good = points(0.003, seeds=1)
    bad = [(n, d, 1.2 * loss) for n, d, loss in good]
    data = sweep([cell for pair in zip(good, bad, strict=True) for cell in pair])
    assert scaling.triples(data) == good
    data["points"].append(data["points"][1] | {"seed": 1})  # a second seed: it is the one that all are told by
    assert scaling.triples(data) == [(*bad[0][:2], bad[0][2])] * 2 + good[1:]


def test_which_points_have_such_a_law():
    cells = points(seeds=1)
    assert scaling.triples(sweep(cells)) == cells
    worse = [(n * 1.001, d, loss + 0.3) for n, d, loss in cells]  # another weighting, of some weights more
    assert sorted(scaling.triples(sweep([*cells, *worse]))) == sorted(cells)
    assert scaling.triples(sweep(points(seeds=1, lengths=D[:2]))) == []  # of two lengths
    assert scaling.triples(sweep([cell for cell in cells if N.index(cell[0]) == D.index(cell[1])])) == []  # which vary together
    assert scaling.triples(sweep(cells, lower_is_better=False)) == []
    assert scaling.triples(sweep([(n, d, -loss) for n, d, loss in cells])) == []
