"""The numbers of a sweep against closed forms, brute force, scipy's own tests and simulated data whose law is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from megaflow.paired import Paired, holm
from megaflow.sweep import statistics


def sweep(values: dict[tuple, dict[int, float]], axes: dict[str, list[str]], **more) -> dict:
    """A sweep of these {choice: {seed: metric}}, all done. costs: {choice: {cost: float}}."""
    costs = more.pop("costs", {})
    points = [
        {
            "name": f"{'-'.join(choice)}-{seed}",
            "values": dict(zip(axes, choice, strict=True)),
            "seed": seed,
            "state": "done",
            "said": None,
            "metrics": {"loss": value},
            "curve": {},
            "cost": costs.get(choice, {}),
        }
        for choice, found in values.items()
        for seed, value in found.items()
    ]
    return {"axes": axes, "metric": "loss", "lower_is_better": True, "baseline": None, "points": points} | more


def grid(shape: tuple[int, ...]) -> dict[str, list[str]]:
    return {f"axis.{'abcd'[i]}": [f"{'abcd'[i]}{j}" for j in range(count)] for i, count in enumerate(shape)}


def filled(shape: tuple[int, ...], seeds: int, law) -> dict:
    """A full sweep whose metric is law(indices of the values, seed)."""
    axes = grid(shape)
    places = itertools.product(*map(range, shape))
    cells = {
        tuple(values[i] for values, i in zip(axes.values(), at, strict=True)): {s: float(law(at, s)) for s in range(seeds)} for at in places
    }
    return sweep(cells, axes)


class TestChoices:
    AXES = {"lr": ["1", "2", "3"]}

    def test_what_is_not_done_or_not_finite_does_not_count(self):
        data = sweep({("1",): {0: 1.0, 1: 2.0, 2: math.nan}, ("2",): {0: 5.0, 1: 6.0}}, self.AXES)
        data["points"][1]["state"] = "stopped early"
        data["points"][3]["metrics"] = {}
        first, second = statistics.rows(data, "loss")
        assert first.values == {0: 1.0} and first.points == 3 and first.mean == 1.0 and first.error is None
        assert second.values == {1: 6.0} and second.paired == Paired(0, None)

    def test_choices_come_in_the_order_of_their_axes(self):
        data = sweep({("3",): {0: 1.0}, ("9",): {0: 1.0}, ("1",): {0: 2.0}}, self.AXES)
        assert list(statistics.choices(data)) == [("1",), ("3",), ("9",)]

    def test_the_baseline_is_the_one_asked_for_or_the_first_that_is_done(self):
        data = sweep({("3",): {0: 1.0}, ("1",): {0: 2.0}, ("2",): {0: 3.0}}, self.AXES)
        assert statistics.baseline(data) == ("3",)
        data["points"][0]["state"] = "failed"
        assert statistics.baseline(data) == ("1",)
        assert statistics.baseline(data | {"baseline": {"lr": "2"}}) == ("2",)
        assert statistics.baseline(data | {"baseline": {"lr": "3"}}) is None
        assert all(row.paired is not None and row.paired.p is None for row in statistics.rows(data | {"baseline": {"lr": "3"}}, "loss"))

    def test_a_seed_done_twice_is_refused(self):
        data = sweep({("1",): {0: 1.0}}, self.AXES)
        data["points"] *= 2
        with pytest.raises(ValueError, match="done twice"):
            statistics.choices(data)

    def test_rows_compare_with_the_baseline_and_adjust(self):
        rng = np.random.default_rng(4)
        cells = {(value,): dict(enumerate(rng.normal(float(value) / 5, 0.1, 4))) for value in "123"}
        rows = statistics.rows(sweep(cells, self.AXES), "loss")
        ps = [stats.ttest_rel(list(cells[(value,)].values()), list(cells[("1",)].values())).pvalue for value in "23"]
        assert rows[0].paired is None and rows[0].holm is None
        assert [row.paired.p for row in rows[1:]] == pytest.approx(ps)
        assert [row.holm for row in rows[1:]] == pytest.approx(holm(ps))

    def test_the_winner_and_what_does_not_stand_clear_of_it(self):
        cells = {("1",): {0: 1.0, 1: 2.0, 2: 3.0}, ("2",): {0: 1.3, 1: 1.9, 2: 3.1}, ("3",): {0: 1.2, 1: 2.2, 2: 3.25}}
        won = statistics.winner(sweep(cells, self.AXES))
        # 2 - 1: .3, -.1, .1, mean .1, error .115; 3 - 1: .2, .2, .25, far from none
        assert won == statistics.Winner(("1",), ties=[("2",)], ahead=[], clear=[("3",)], untested=[], incomplete=[])
        assert statistics.winner(sweep(cells, self.AXES, lower_is_better=False)).choice == ("3",)

    def test_a_better_mean_of_fewer_seeds_does_not_win(self):
        won = statistics.winner(sweep({("1",): {0: 1.0, 1: 2.0}, ("2",): {0: 0.9}, ("3",): {0: 1.6, 1: 2.1}}, self.AXES))
        assert won.choice == ("1",) and won.incomplete == won.untested == [("2",)] and won.clear == [("3",)]

    @pytest.mark.parametrize("lower", [True, False])
    def test_what_is_better_on_the_seeds_that_both_have_is_told(self, lower):
        """Means of different seeds: that of 1 is better because of the seeds that it has."""
        sign = 1 if lower else -1
        cells = {("1",): {0: 4.0, 1: 4.1, 2: 4.2}, ("2",): {1: 4.05, 2: 4.149, 3: 4.5}}
        signed = {choice: {seed: sign * value for seed, value in values.items()} for choice, values in cells.items()}
        won = statistics.winner(sweep(signed, self.AXES, lower_is_better=lower))
        assert won == statistics.Winner(("1",), ties=[], ahead=[("2",)], clear=[], untested=[], incomplete=[])

    def test_one_seed_tests_nothing(self):
        won = statistics.winner(sweep({("1",): {0: 1.0}, ("2",): {0: 0.9}}, self.AXES))
        assert won == statistics.Winner(("2",), [], [], [], [("1",)], [])
        assert statistics.winner(sweep({}, self.AXES)) is None

    @pytest.mark.parametrize("lower", [True, False])
    def test_the_pareto_front_is_what_nothing_beats(self, lower):
        rng = np.random.default_rng(5)
        for _ in range(100):
            costs, scores = rng.integers(0, 6, (2, 12)).astype(float).tolist()
            sign = 1 if lower else -1

            def beats(j: int, i: int, costs=costs, scores=scores, sign=sign) -> bool:
                no_worse = costs[j] <= costs[i] and sign * scores[j] <= sign * scores[i]
                return no_worse and (costs[j], scores[j]) != (costs[i], scores[i])

            brute = {i for i in range(12) if not any(beats(j, i) for j in range(12))}
            found = statistics.pareto(costs, scores, lower)
            assert set(found) == brute and len(found) == len(brute)
            assert [costs[i] for i in found] == sorted(costs[i] for i in found)
        assert statistics.pareto([], []) == []


class TestDesign:
    def test_an_additive_law_is_found_exactly(self):
        a, b, c, seed = (0.3, -0.1, 0.0), (1.0, 2.0), (0.0, 0.5, 0.25, 0.75), (0.02, -0.07)
        found = statistics.design(filled((3, 2, 4), 2, lambda at, s: 2 + a[at[0]] + b[at[1]] + c[at[2]] + seed[s]))
        assert found.balanced and found.error_from == "seeds"
        middle = 2 + np.mean(a) + np.mean(b) + np.mean(c) + np.mean(seed)
        for effect, truth in zip(found.effects, (a, b, c), strict=True):
            assert [level.effect for level in effect.levels] == pytest.approx(np.array(truth) - np.mean(truth), abs=1e-12)
            assert [level.mean for level in effect.levels] == pytest.approx(middle + np.array(truth) - np.mean(truth))
            assert [level.error for level in effect.levels] == pytest.approx([0] * len(truth), abs=1e-9)
            assert effect.p == 0.0
        for pair in found.interactions:
            assert np.abs(np.array(pair.residuals, float)).max() < 1e-12 and pair.size < 1e-12 and pair.p == 1.0

    def test_a_balanced_design_has_plain_means_and_the_errors_of_an_analysis_of_variance(self):
        """The classical sums of squares of a two-way table with seeds as blocks, by loops."""
        rng = np.random.default_rng(6)
        y = rng.normal(0, 1, (3, 4, 5)) + rng.normal(0, 2, (1, 1, 5))
        found = statistics.design(filled((3, 4), 5, lambda at, s: y[at[0], at[1], s]))
        cell, seed, mean = y.mean(2), y.mean((0, 1)), y.mean()
        error = ((y - cell[:, :, None] - seed + mean) ** 2).sum()
        freedom = (12 - 1) * (5 - 1)
        assert (found.balanced, found.error_from, found.freedom) == (True, "seeds", freedom)
        for axis, effect in enumerate(found.effects):
            means = y.mean(tuple({0, 1, 2} - {axis}))
            each = y.size / len(means)
            assert [level.mean for level in effect.levels] == pytest.approx(means)
            assert [level.points for level in effect.levels] == [each] * len(means)
            expected = math.sqrt(error / freedom * (1 - 1 / len(means)) / each)
            assert [level.error for level in effect.levels] == pytest.approx([expected] * len(means))
            ratio = each * ((means - mean) ** 2).sum() / (len(means) - 1) / (error / freedom)
            assert effect.p == pytest.approx(stats.f.sf(ratio, len(means) - 1, freedom))
        (pair,) = found.interactions
        residual = cell - y.mean((1, 2))[:, None] - y.mean((0, 2)) + mean
        np.testing.assert_allclose(np.array(pair.residuals, float), residual, atol=1e-12)
        np.testing.assert_allclose(np.array(pair.means, float), cell, atol=1e-12)
        assert pair.size == pytest.approx(math.sqrt((residual**2).mean()))
        assert pair.p == pytest.approx(stats.f.sf(5 * (residual**2).sum() / 6 / (error / freedom), 6, freedom))

    def test_two_values_over_shared_seeds_are_a_paired_t_test(self):
        y = np.random.default_rng(7).normal(0, 1, (2, 6)) + np.arange(6)
        found = statistics.design(filled((2,), 6, lambda at, s: y[at[0], s]))
        assert found.effects[0].p == pytest.approx(stats.ttest_rel(*y).pvalue)
        assert found.effects[0].levels[0].error == pytest.approx(stats.sem(y[0] - y[1]) / 2)
        assert found.interactions == []

    def test_without_a_second_seed_the_error_is_what_the_fit_leaves(self):
        y = np.random.default_rng(8).normal(0, 1, (3, 4))
        found = statistics.design(filled((3, 4), 1, lambda at, s: y[at]))
        residual = y - y.mean(1)[:, None] - y.mean(0) + y.mean()
        assert (found.balanced, found.error_from, found.freedom) == (True, "fit", 6)
        expected = math.sqrt((residual**2).sum() / 6 * (1 - 1 / 3) / 4)
        assert found.effects[0].levels[0].error == pytest.approx(expected)
        (pair,) = found.interactions
        assert pair.p is None and pair.size == pytest.approx(math.sqrt((residual**2).mean()))  # nothing is left to test it against

    def test_an_unbalanced_additive_law_is_found_exactly(self):
        a, b, seed = (0.3, -0.1, 0.0), (1.0, 2.0, 4.0), (0.0, 0.2, -0.1)
        data = filled((3, 3), 3, lambda at, s: a[at[0]] + b[at[1]] + seed[s])
        kept = [point for place, point in enumerate(data["points"]) if place not in (0, 1, 2, 7, 11, 12, 25)]
        found = statistics.design(data | {"points": kept})
        assert not found.balanced and found.error_from == "fit"
        for effect, truth in zip(found.effects, (a, b), strict=True):
            assert [level.effect for level in effect.levels] == pytest.approx(np.array(truth) - np.mean(truth))
        assert found.interactions[0].means[0][0] is None and found.interactions[0].residuals[0][0] is None
        plain = np.mean([point["metrics"]["loss"] for point in kept if point["values"]["axis.a"] == "a0"])
        assert abs(plain - found.effects[0].levels[0].mean) > 0.1  # the plain mean of what is there is something else

    def test_an_unbalanced_fit_is_that_of_other_columns(self):
        """Dummies against a first level instead of effects that sum to zero: the same predictions, averaged over all combinations."""
        rng = np.random.default_rng(9)
        data = filled((3, 4), 3, lambda at, s: rng.normal())
        data["points"] = [point for point in data["points"] if rng.random() < 0.7]
        found = statistics.design(data)
        places = [(int(p["values"]["axis.a"][1]), int(p["values"]["axis.b"][1]), p["seed"]) for p in data["points"]]

        def dummies(i: int, j: int, s: int) -> list[float]:
            return [1.0, *(float(i == k) for k in (1, 2)), *(float(j == k) for k in (1, 2, 3)), *(float(s == k) for k in (1, 2))]

        x, y = np.array([dummies(*place) for place in places]), np.array([p["metrics"]["loss"] for p in data["points"]])
        weights, rest, rank, _ = np.linalg.lstsq(x, y, rcond=None)
        assert rank == 8 and found.freedom == len(y) - 8
        covariance = np.linalg.inv(x.T @ x) * rest[0] / found.freedom
        everywhere = np.array([[dummies(i, j, s) for j in range(4) for s in range(3)] for i in range(3)])
        average = everywhere.mean((0, 1))
        for i, level in enumerate(found.effects[0].levels):
            mean = everywhere[i].mean(0)
            assert level.mean == pytest.approx(mean @ weights)
            assert level.error == pytest.approx(math.sqrt((mean - average) @ covariance @ (mean - average)))

    def test_axes_that_change_together_are_not_told_apart(self):
        axes = {"a": ["1", "2"], "b": ["x", "y"], "c": ["u", "v"]}
        cells = {(a, b, c): {0: float(a) + (c == "v")} for (a, b), c in itertools.product((("1", "x"), ("2", "y")), "uv")}
        one, two, three = statistics.design(sweep(cells, axes)).effects
        assert all(level.effect is None and level.mean is None and level.error is None for effect in (one, two) for level in effect.levels)
        assert one.p is None and [level.effect for level in three.levels] == pytest.approx([-0.5, 0.5])

    def test_where_nothing_happens_tests_find_something_as_often_as_they_say(self):
        rng = np.random.default_rng(10)
        found = []
        for _ in range(600):
            data = filled((2, 3), 3, lambda at, s: rng.normal())
            data["points"] = [p for p in data["points"] if rng.random() < 0.9] if len(found) % 2 else data["points"]
            done = statistics.design(data)
            found.append([done.effects[1].p, done.interactions[0].p])
        for ps in np.array(found, float).T:
            assert np.nanmean(ps < 0.05) == pytest.approx(0.05, abs=0.03)
            assert np.nanmean(ps) == pytest.approx(0.5, abs=0.05)

    def test_many_numbers_go_into_bins_and_names_do_not(self):
        rng = np.random.default_rng(11)
        values = [f"{value:.4g}" for value in np.exp(rng.uniform(-8, -2, 60))]
        places, labels, at, binned = statistics.levels(values, values)
        assert binned and len(labels) == statistics.BINS and np.bincount(places).tolist() == [10] * 6
        for level in range(6):
            inside = [float(value) for value, place in zip(values, places, strict=True) if place == level]
            assert labels[level] == f"{min(inside):.3g} … {max(inside):.3g}" and at[level] == pytest.approx(np.median(inside))
        assert statistics.levels(["10", "9", "9"], ["10", "9", "8"]) == ([1, 0, 0], ["9", "10"], [9.0, 10.0], False)
        names = [f"n{i}" for i in range(20)]
        assert statistics.levels(names, names) == (list(range(20)), names, None, False)

    def test_no_axis_or_no_point(self):
        assert statistics.design(sweep({("1",): {0: 1.0, 1: 2.0}}, {"a": ["1", "2"]})) is None
        assert statistics.design(sweep({}, {"a": ["1", "2"]})) is None
        assert statistics.design(sweep({(): {0: 1.0}}, {})) is None
        two = statistics.design(sweep({("1",): {0: 1.0}, ("2",): {0: 2.0}}, {"a": ["1", "2"]}))
        assert two.error_from == "" and two.effects[0].p is None and [level.error for level in two.effects[0].levels] == [None, None]


class TestScalingLaw:
    C = np.geomspace(1e16, 1e20, 6)

    @pytest.mark.parametrize(("E", "A", "alpha"), [(1.8, 2e3, 0.2), (1.69, 406.4, 0.34), (3.0, 5e7, 0.5), (0.5, 30.0, 0.08)])
    def test_an_exact_law_is_found(self, E, A, alpha):
        C = np.geomspace(1e6, 1e10, 6)
        law = statistics.scaling_law(list(zip(C, E + A * C**-alpha, strict=True)), replicates=20)
        assert (law.E, law.A, law.alpha) == pytest.approx((E, A, alpha), rel=1e-5)
        assert law.falls and law.determined and law.intervals["E"] == pytest.approx((E, E), rel=1e-4)

    def test_no_law_of_a_grid_fits_better(self):
        rng = np.random.default_rng(12)
        for _ in range(5):
            y = (1.8 + 4e3 * self.C**-0.2) * np.exp(0.02 * rng.standard_normal(6))
            law = statistics.scaling_law(list(zip(self.C, y, strict=True)), replicates=5)
            own = ((np.log(law.E + law.A * self.C**-law.alpha) - np.log(y)) ** 2).sum()
            E = np.linspace(0, y.min(), 200)[:, None, None, None]
            top = np.linspace(0.3, 2, 120)[None, :, None, None] * (y[0] - E)
            alpha = np.geomspace(0.02, 1, 100)[None, None, :, None]
            brute = ((np.log(E + top * (self.C / self.C[0]) ** -alpha) - np.log(y)) ** 2).sum(-1).min()
            assert own <= brute * (1 + 1e-9) and own > 0.9 * brute

    def test_intervals_cover_as_often_as_they_say(self):
        rng = np.random.default_rng(13)
        truth = {"E": 1.8, "A": 4e3, "alpha": 0.2}
        hits = []
        for _ in range(60):
            C = np.repeat(np.geomspace(1e15, 1e20, 6), 2)
            y = (1.8 + 4e3 * C**-0.2) * np.exp(0.01 * rng.standard_normal(12))
            law = statistics.scaling_law(list(zip(C, y, strict=True)), replicates=100, seed=int(rng.integers(1e6)))
            hits.append([low <= truth[name] <= high for name, (low, high) in law.intervals.items()])
        assert np.all(np.abs(np.mean(hits, axis=0) - 0.9) < 0.12)  # three standard errors

    def test_a_short_range_does_not_determine_the_floor(self):
        rng = np.random.default_rng(14)
        C = np.geomspace(1e17, 4e17, 5)
        for _ in range(5):
            y = (1.8 + 4e3 * C**-0.2) * np.exp(0.005 * rng.standard_normal(5))
            assert not statistics.scaling_law(list(zip(C, y, strict=True)), replicates=60).determined

    def test_a_power_law_without_a_floor_is_not_given_one(self):
        rng = np.random.default_rng(15)
        y = 60 * self.C**-0.07 * np.exp(0.005 * rng.standard_normal(6))
        law = statistics.scaling_law(list(zip(self.C, y, strict=True)), replicates=100)
        assert not law.determined and law.intervals["alpha"][0] < 0.075

    @pytest.mark.parametrize("slope", [0.0, 0.1])
    def test_a_loss_that_does_not_fall_has_no_exponent(self, slope):
        y = 2 + slope * np.arange(6) + 0.01 * np.random.default_rng(16).standard_normal(6)
        law = statistics.scaling_law(list(zip(self.C, y, strict=True)), replicates=60)
        assert not law.falls and not law.determined

    def test_the_seed_makes_it_the_same(self):
        pairs = list(zip(self.C, 2 + 4e3 * self.C**-0.2 + [0.01, -0.01, 0, 0.02, -0.01, 0], strict=True))
        assert statistics.scaling_law(pairs, 20) == statistics.scaling_law(pairs, 20)
        assert statistics.scaling_law(pairs, 20).intervals != statistics.scaling_law(pairs, 20, seed=1).intervals

    def test_too_few_sizes_are_refused(self):
        with pytest.raises(ValueError, match="at least 4"):
            statistics.scaling_law([(1.0, 3.0), (2.0, 2.0), (3.0, 1.9), (3.0, 1.8)])
        with pytest.raises(ValueError, match="above zero"):
            statistics.scaling_law([(1.0, 3.0), (2.0, 2.0), (3.0, 1.9), (4.0, 0.0)])

    def test_of_each_size_the_best_choice_is_taken_with_all_its_seeds(self):
        axes = {"size": ["1", "2", "3", "4"], "lr": ["a", "b", "c"]}
        cells = {(n, lr): {0: 5 - float(n) + (lr == "b"), 1: 5.5 - float(n) + (lr == "b")} for n in "1234" for lr in "ab"}
        cells[("2", "c")] = {0: 0.1}  # of fewer seeds
        costs = {key: {"parameters": 10.0 ** int(key[0]), "flops": 7 * 10.0 ** int(key[0])} for key in cells}
        data = sweep(cells, axes, costs=costs)
        expected = [(7 * 10.0**n, 5 - n + more) for n in range(1, 5) for more in (0, 0.5)]
        assert statistics.by_size(data, "flops") == expected
        assert statistics.by_size(data, "parameters") == [(x / 7, y) for x, y in expected]
        assert statistics.by_size(data, "seconds") == [] and statistics.by_size(data | {"lower_is_better": False}, "flops") == []
        same = [point | {"cost": point["cost"] | {"flops": 1e9 * (1 + point["cost"]["parameters"] / 1e7)}} for point in data["points"]]
        assert statistics.by_size(data | {"points": same}, "flops") == []  # a budget of FLOPs, kept to a step
        turned = [point | {"cost": point["cost"] | {"flops": 1e20 / point["cost"]["flops"]}} for point in data["points"]]
        found = statistics.by_size(data | {"points": turned}, "flops")  # of which more parameters take less
        assert [y for _, y in found] == [y for _, y in expected]
        costs = {key: {name: value * (1.02 if key[1] == "b" else 1.0) for name, value in cost.items()} for key, cost in costs.items()}
        found = statistics.by_size(sweep(cells, axes, costs=costs), "flops")  # a choice that has some weights more is of the same size
        assert [y for _, y in found] == [y for _, y in expected] and len(found) == len(expected)
        few = [point for point in data["points"] if point["values"]["size"] != "4"]
        assert statistics.by_size(data | {"points": few}, "flops") == []


def test_costs_that_are_nearly_the_same_are_one():
    found = statistics.alike([100.0, 104.0, 110.0, 108.0, 95.0])
    assert found == {95.0: 95.0, 100.0: 100.0, 104.0: 100.0, 108.0: 108.0, 110.0: 108.0}  # no chain goes on for ever
    assert statistics.count_alike([1.0, 1.04, 2.0]) == 2 and statistics.count_alike([]) == 0


def test_the_error_of_an_axis_in_bins_is_what_its_seeds_say():
    """A bin holds several choices, which differ by more than their seeds do."""
    rng = np.random.default_rng(0)
    cells = {(str(value),): {seed: 0.1 * value + 1e-4 * rng.standard_normal() for seed in range(3)} for value in range(18)}
    found = statistics.design(sweep(cells, {"a": [str(value) for value in range(18)]}))
    assert found.error_from == "seeds" and found.effects[0].binned
    assert all(level.error < 1e-3 for level in found.effects[0].levels)
    alone = {choice: {0: values[0]} for choice, values in cells.items()}
    assert statistics.design(sweep(alone, {"a": [str(value) for value in range(18)]})).error_from != "seeds"
