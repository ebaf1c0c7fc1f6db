"""Which choices of a halving go on, as a function of what lies in its folder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megaflow.errors import UserError
from megaflow.sweep import halving, points
from megaflow.sweep.design import TEACHER, Point, Sweep
from megaflow.sweep.points import Placed

ASKED = Sweep("", "", draw={"kind": "halving", "keep": 0.5, "rungs": 2, "by": "validation_loss"})


@pytest.fixture
def place(tmp_path):
    """place(name, seed, {step: loss}) makes a point of 8 steps that has come so far; teacher: the point whose map it is."""

    def make(name: str, seed: int, losses: dict[int, float], teacher: Placed | None = None, labels: dict | None = None) -> Placed:
        directory = tmp_path / f"{name}-{seed}"
        stage = "pretrain" if teacher is None else "distill"
        point = Point(labels or {"choice": name}, {}, seed, stage, "", teacher.point.name if teacher else "")
        words = [f"distill.teacher={teacher.directory}"] if teacher else []
        placed = Placed(point, directory, directory.name, words, steps=8)
        points.note(placed, "paused")
        lines = [json.dumps({"step": step, "validation_loss": loss}) for step, loss in losses.items()]
        (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
        for step in losses:
            (directory / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
        return placed

    return make


def going(placed: list[Placed], note: bool = True) -> list[str]:
    (_, first), (share, second) = halving.rungs(ASKED, placed, note)
    assert first == placed and share == 1.0
    return [each.directory.name for each in second]


def state(each: Placed) -> tuple[str, str]:
    return points.stands(each.directory, {})


def test_the_better_half_by_the_mean_over_seeds(place):
    """Of five choices three; what does not go on is told why, and nothing where nothing is to be written."""
    found = [place(name, seed, {4: loss + seed}) for name, loss in zip("abcde", (5.0, 1.0, 4.0, 2.0, 3.0), strict=True) for seed in (0, 1)]
    assert going(found, note=False) == ["b-0", "b-1", "d-0", "d-1", "e-0", "e-1"]
    assert {state(each)[0] for each in found} == {"paused"}
    going(found)
    assert state(found[0]) == ("stopped early", "halving: validation_loss 5.5000 after 4 steps, 5 of 5")
    assert [state(each)[0] for each in found[2:4]] == ["paused"] * 2


def test_a_choice_of_which_a_seed_failed_is_out_and_its_other_seeds_are_told(place):
    found = [place("a", 0, {4: 1.0}), place("a", 1, {}), place("b", 0, {4: 2.0}), place("b", 1, {4: 2.0})]
    points.note(found[1], "failed", "the loss is nan")
    assert going(found) == ["b-0", "b-1"]
    assert state(found[1]) == ("failed", "the loss is nan")
    assert state(found[0]) == ("stopped early", "halving: one of its seeds has no validation_loss after 4 steps")


def test_a_seed_whose_flow_has_failed_is_left_out_of_all(place):
    flows = [place("flow", seed, {}, labels={TEACHER: "flow"}) for seed in (0, 1)]
    (flows[0].directory / "summary.json").write_text("{}")
    points.note(flows[1], "failed", "no memory")
    maps = [place(name, seed, {4: loss} if seed == 0 else {}, flows[seed]) for name, loss in (("a", 2.0), ("b", 1.0)) for seed in (0, 1)]
    assert going([*flows, *maps]) == ["flow-0", "flow-1", "b-0", "b-1"]


def test_what_somebody_has_stopped_stays_so_and_is_no_reason_against_others(place):
    """It has not stopped early; and of a flow that was stopped the maps of its seed are left out of all."""
    found = [place("a", 0, {2: 1.0}), place("b", 0, {4: 2.0}), place("c", 0, {4: 3.0})]
    points.note(found[0], "stopped", "told to stop")
    assert going(found) == ["b-0"] and state(found[0]) == ("stopped", "told to stop")
    points.note(found[2], "stopped")  # behind this rung already, in another sweep: it does not go on
    going(found)
    assert state(found[2])[0] == "stopped early"
    flows = [place("flow", seed, {}, labels={TEACHER: "flow"}) for seed in (0, 1)]
    (flows[0].directory / "summary.json").write_text("{}")
    points.note(flows[1], "stopped")
    maps = [place(name, seed, {4: loss} if seed == 0 else {}, flows[seed]) for name, loss in (("d", 2.0), ("e", 1.0)) for seed in (0, 1)]
    assert going([*flows, *maps]) == ["flow-0", "flow-1", "e-0", "e-1"]


def test_rungs_that_end_at_one_step_are_refused(place):
    found = [place("a", 0, {}), place("b", 0, {})]
    halving.check(ASKED, found)
    halving.check(replace(ASKED, draw={"kind": "grid"}), found)
    with pytest.raises(UserError, match="draw.rungs=6, and choice=a-seed=0: its 8 steps have rungs that end at 1, 1, 1, 2, 4, 8, some at"):
        halving.check(replace(ASKED, draw=ASKED.draw | {"rungs": 6}), found)


def test_what_is_further_already_goes_on(place):
    """Another sweep of the folder has trained it, and measured nothing where these pause; what is done is not told to have stopped."""
    found = [place("a", 0, {8: 9.0}), place("b", 0, {4: 1.0}), place("c", 0, {4: 2.0}), place("d", 0, {4: 3.0, 8: 2.5})]
    (found[3].directory / "summary.json").write_text("{}")
    assert going(found) == ["a-0", "b-0", "c-0"]
    assert state(found[3])[0] == "done"


def test_what_stands_there_without_a_measurement_goes_on(place):
    """As a grid's point that was killed just there."""
    found = [place("a", 0, {4: 1.0}), place("b", 0, {4: 2.0}), place("c", 0, {4: 3.0})]
    (found[2].directory / "metrics.jsonl").write_text("")
    assert going(found) == ["a-0", "c-0"]


@pytest.mark.parametrize("how", ["passed over", "failed"])
def test_what_was_passed_over_there_or_has_failed_does_not_go_on(place, how):
    found = [place("a", 0, {4: 1.0}), place("b", 0, {4: 2.0}), place("c", 0, {4: 3.0})]
    (found[2].directory / "metrics.jsonl").write_text('{"step": 4, "skipped": 1}\n' if how == "passed over" else "")
    if how == "failed":
        points.note(found[2], "failed", "the loss is nan")
    assert going(found) == ["a-0"]


def test_of_other_draws_all_points_train_to_their_end(place):
    found = [place("a", 0, {}), place("b", 0, {})]
    assert list(halving.rungs(Sweep("", ""), found)) == [(1.0, found)]


def test_an_element_that_was_told_to_stop_is_not_failed(place):
    """It goes on when the sweep is asked for again, where one that gave up does not."""
    each = place("a", 0, {2: 1.0})
    points.note(each, "queued")
    (each.directory / "slurm").mkdir()
    for decision, expected in (("left", "stopped"), ("over", "failed")):
        line = {"job": "12_0", "time": 1e12, "decision": decision, "said": "why"}
        Path(each.directory / "slurm" / "attempts.jsonl").write_text(json.dumps(line) + "\n")
        assert state(each) == (expected, "why")
