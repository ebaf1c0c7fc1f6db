"""Adaptive search over a grid: it learns, it never tries a choice twice, and it goes on where it was."""

import json
import math
import random
import sys

import pytest

from megaflow.errors import UserError
from megaflow.sweep import design, search

AXES = "{optim.learning_rate: {log: [1.0e-4, 1.0e-1], count: 25}, model.layers: {range: [1, 8], step: 1}, flow.code: [frame, learned]}"


@pytest.fixture
def sweep(tmp_path):
    def read(count: int, seed: int = 0, more: str = "") -> design.Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(
            f"dir: {tmp_path / 'out'}\nbase: b.yaml\naxes: {AXES}\ndraw: {{kind: optuna, count: {count}, seed: {seed}}}\n{more}"
        )
        return design.read(str(path))

    return read


def loss(choice: design.Choice) -> float:
    """Least at a rate of 1e-2, 6 layers and a frame."""
    labels, _ = choice
    rate, layers = math.log10(float(labels["optim.learning_rate"])), int(labels["model.layers"])
    return (rate + 2.0) ** 2 + 0.1 * (layers - 6) ** 2 + (labels["flow.code"] != "frame")


def best_of(asked: design.Sweep, at_once: int = 2) -> float:
    return min(map(loss, search.search(asked, at_once, lambda new, chosen: list(map(loss, new)), [])))


def test_a_metric_that_is_to_be_large_is_sought_large(sweep):
    """What is found is the same as of its negative that is to be small."""
    found = search.search(sweep(12, more="lower_is_better: false"), 2, lambda new, chosen: [-loss(each) for each in new], [])
    assert found == search.search(sweep(12), 2, lambda new, chosen: list(map(loss, new)), [])


def test_it_finds_better_choices_than_chance(sweep, tmp_path):
    """Thirty of four hundred choices, against thirty drawn at random, over eight seeds."""
    grid = design.choices(sweep(30))
    assert len(grid) == 400
    found, chance = [], []
    for seed in range(8):
        found.append(best_of(sweep(30, seed)))
        chance.append(min(map(loss, random.Random(seed).sample(grid, 30))))
        for file in (tmp_path / "out" / "sweeps").glob("*.chosen"):
            file.unlink()
    assert sum(found) < 0.5 * sum(chance), (found, chance)


def test_the_baseline_is_tried_first_wherever_the_search_has_come_to(sweep):
    wanted = {"model.layers": "3", "flow.code": "learned"}
    baseline = "baseline: {model.layers: 3, flow.code: learned}"
    before = search.search(sweep(3), 1, lambda new, chosen: list(map(loss, new)), [])
    assert not any(wanted.items() <= labels.items() for labels, _ in before)
    with pytest.raises(UserError, match="the search has tried its 3 choices, and none is the baseline; give a larger draw.count"):
        search.search(sweep(3, more=baseline), 1, lambda new, chosen: list(map(loss, new)), [])
    for _ in range(2):
        found = search.search(sweep(5, more=baseline), 1, lambda new, chosen: list(map(loss, new)), [])
        assert len(found) == 5 and wanted.items() <= found[0][0].items() and found[1:4] == before


def test_no_choice_is_tried_twice_and_what_is_excluded_never(sweep):
    more = "exclude: [{flow.code: frame, model.layers: [1, 2, 3, 4]}]"
    asked = sweep(60, more=more)
    found = search.search(asked, 4, lambda new, chosen: [None if loss(choice) > 5.0 else loss(choice) for choice in new], [])
    keys = [search.key(labels) for labels, _ in found]
    assert len(keys) == 60 == len(set(keys))
    assert not [labels for labels, _ in found if labels["flow.code"] == "frame" and int(labels["model.layers"]) < 5]


def test_all_of_a_small_grid_are_tried(sweep):
    more = "exclude: [{flow.code: learned}, {model.layers: [1, 2, 3, 4, 5, 6, 7]}]"
    assert len(search.search(sweep(100, more=more), 3, lambda new, chosen: list(map(loss, new)), [])) == 25


def test_a_search_that_was_stopped_goes_on_with_the_same_choices(sweep, tmp_path):
    whole = search.search(sweep(12), 2, lambda new, chosen: list(map(loss, new)), [])
    (file,) = (tmp_path / "out" / "sweeps").glob("*.chosen")
    file.unlink()
    stop: list[int] = []

    def stopped_at_the_third(new: list[design.Choice], chosen: list[design.Choice]) -> list[float | None]:
        stopped_at_the_third.calls = getattr(stopped_at_the_third, "calls", 0) + 1
        if stopped_at_the_third.calls == 3:
            stop.append(15)
            return [None] * len(new)
        return list(map(loss, new))

    assert len(search.search(sweep(12), 2, stopped_at_the_third, stop)) == 6
    assert len(json.loads(file.read_text())) == 6
    assert search.search(sweep(12), 2, lambda new, chosen: list(map(loss, new)), []) == whole


def test_without_optuna_that_is_said(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="draw.kind=optuna needs the package optuna; pip install optuna"):
        search.search(sweep(3), 1, lambda new, chosen: [0.0], [])
