"""What evaluations have in common: short names, texts that are there once, judges known by their files."""

import pytest

from megaflow.evaluate import side_by_side
from tests.evaluate.made import JUDGE, evaluation


@pytest.mark.parametrize(
    "runs, names",
    [
        (["runs/q/flow", "runs/q/flow_map"], ["flow", "flow_map"]),
        (["a/x/flow", "a/y/flow", "other"], ["x/flow", "y/flow", "other"]),
        (["x/flow", "flow"], ["x/flow", "flow"]),
        (["runs/flow/"], ["flow"]),
        (["."], ["."]),
    ],
)
def test_names_are_the_shortest_ends_of_paths(runs, names):
    assert list(side_by_side.short_names(runs).values()) == names


def test_a_frontier_s_texts_are_there_once():
    """Those at the samples' temperature are the samples, and the cold ones have been judged besides."""
    found = evaluation(1)
    assert [(each.steps, each.temperature) for each in side_by_side.samples_of("a", found)] == [(1, 1.0), (4, 1.0)]
    assert [(each.steps, each.temperature, each.way) for each in side_by_side.others_of("a", found)] == [(4, 0.7, "")]
    found["frontier"]["points"].append({**found["frontier"]["points"][0], "temperature": 0.5, "entropy": 2.0})
    found["frontier"]["points"].append({**found["samples"]["1"], "steps": 1, "temperature": 0.7, "gamma": None})  # an argmax all the same
    found["even"]["4"] = found["samples"]["4"]
    ways = [(each.steps, each.temperature, each.way) for each in side_by_side.others_of("a", found)]
    assert ways == [(4, 0.7, ""), (4, 1.0, "even grid"), (4, 0.5, "")]


def test_judges_are_known_by_their_files():
    """Whatever each run calls them; their values are found under the run's own path."""
    evaluations = {"a": evaluation(1), "b": evaluation(2, judge="elsewhere"), "c": evaluation(3, judge="another")}
    evaluations["c"]["judges"]["another"]["sha256"] = "11" * 32
    one, other = side_by_side.judges_of(evaluations)
    assert (one.path, one.paths, other.paths) == ("gpt2", {"a": "gpt2", "b": "elsewhere"}, {"c": "another"}) and one.sha256 == JUDGE
    assert one.reference["data"] == evaluations["a"]["reference"]["data"]["judges"]["gpt2"]
    (_, texts), (_, strange) = (side_by_side.samples_of(run, evaluations[run]) for run in "bc")
    assert one.of(texts) == evaluations["b"]["samples"]["4"]["judges"]["elsewhere"] and one.of(strange) is None
    rows = side_by_side.matched_of(evaluations, [one, other])
    assert [row["perplexities"] for row in rows if row["outside"] is None] == [[90.017, None], [90.017, None], [None, 90.017]]


def test_a_judge_that_guesses_blindly_is_doubted():
    """A uniform guess among 50 tokens has 3.91 nats; one that reads by another model's tokenizer has more."""
    (judge,) = side_by_side.judges_of({"a": evaluation(1)})
    real = judge.reference["data"]
    assert judge.doubt is None
    assert side_by_side.doubt({"vocab_size": 50}, real | {"nats_per_token": 3.91}) is None
    assert "3.92 nats a token, where a blind guess has 3.91" in side_by_side.doubt({"vocab_size": 50}, real | {"nats_per_token": 3.92})
    assert side_by_side.doubt({"vocab_size": 50}, real | {"nats_per_token": None}) is None


def test_real_text_is_there_once_of_each_judge():
    evaluations = {"a": evaluation(1), "b": evaluation(2, judge="elsewhere"), "c": evaluation(3)}
    assert [row["run"] for row in side_by_side.mauve_of(evaluations)] == ["a", "a", "b", "b", "c", "c", None]
    evaluations["c"]["mauve"]["real"] = {"mauve": 0.5, "over_seeds": 0.0, "texts": [24, 24], "clusters": 2}
    assert [row["mauve"] for row in side_by_side.mauve_of(evaluations) if row["run"] is None] == [0.9876, 0.5]
    assert [row["run"] for row in side_by_side.repetition_of(evaluations)] == ["a", "a", "b", "b", "c", "c", None]
