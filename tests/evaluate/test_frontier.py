"""The reading of a frontier, against numpy and laws that are known, and the frontier of every kind of run."""

import json
import math

import numpy as np
import pytest

from megaflow.evaluate import frontier
from megaflow.evaluate.evaluation import fitted_judge, judged, table
from megaflow.evaluate.generate import generate
from megaflow.evaluate.loaded import load_run
from megaflow.evaluate.settings import Settings
from tests.evaluate.judges import save_judge

QUICK = ["--steps", "1,3", "--samples", "6", "--rows", "12", "--draws", "2"]


def test_between_points_it_is_linear_and_outside_there_is_none():
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 9):
        x, y = rng.uniform(2.0, 5.0, size), rng.normal(size=size)
        order = rng.permutation(size)
        points = list(zip(x[order].tolist(), y[order].tolist(), strict=True))
        for at in (*np.linspace(x.min(), x.max(), 13), *x):
            expected = np.interp(at, np.sort(x), y[np.argsort(x)])
            assert frontier.at(float(np.clip(at, x.min(), x.max())), points) == pytest.approx(expected, rel=1e-12)
        assert frontier.at(x.min() - 1e-9, points) is None and frontier.at(x.max() + 1e-9, points) is None
    assert frontier.at(1.0, []) is None and frontier.at(1.0, [(0.0, None), (2.0, 3.0)]) is None
    assert frontier.at(1.0, [(1.0, 3.0), (1.0, 2.0)]) == 2.0  # of equal entropy the lowest


def test_a_law_that_is_linear_is_read_exactly():
    """log perplexity = 1.5 + 0.7 entropy at every temperature and number of steps, whichever points there are."""

    def entry(entropy):
        nats = 1.5 + 0.7 * entropy
        return {"entropy": entropy, frontier.NGRAM: nats / 3.0, "judges": {"j": {"nats_per_token": nats, "perplexity": math.exp(nats)}}}

    ways = [(Settings(steps, "ode", heat), entry(heat + 0.1 * steps)) for steps in (2, 8) for heat in (1.0, 0.7, 0.85)]
    found = frontier.read(ways, 1.03)
    assert [each["steps"] for each in found["matched"]] == [2, 8] and len(found["points"]) == 6
    for each in found["matched"]:
        assert each["outside"] == ("below" if each["steps"] == 8 else None)
    here, beyond = found["matched"]
    assert here[frontier.NGRAM] == pytest.approx((1.5 + 0.7 * 1.03) / 3.0)
    assert here["judges"]["j"]["perplexity"] == pytest.approx(math.exp(1.5 + 0.7 * 1.03))
    assert beyond[frontier.NGRAM] is None and beyond["judges"]["j"] == {"nats_per_token": None, "perplexity": None}
    assert frontier.read(ways, 5.0)["matched"][0]["outside"] == "above"


def test_gammas_are_curves_of_their_own():
    ways = [
        (Settings(4, "stochastic", heat, gamma), {"entropy": heat + gamma, frontier.NGRAM: gamma})
        for gamma in (0.0, 0.5)
        for heat in (0.6, 1.1)
    ]
    assert [(each["gamma"], each[frontier.NGRAM]) for each in frontier.read(ways, 1.1)["matched"]] == [(0.0, 0.0), (0.5, 0.5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judges") / "plain")


def ask(cli, run, *options):
    told = cli("evaluate", run, *QUICK, *options)
    assert told.code == 0, told.err
    return json.loads((run / "evaluation.json").read_text()), told.out


def test_of_a_flow_with_a_judge(copied, cli, folder):
    """Every combination is sampled and judged as `judged` says; one step once."""
    directory = copied("coded")
    options = ("--frontier", "--temperatures", "0.5,1", "--gammas", "0,1", "--judge", folder)
    found, shown = ask(cli, directory, *options)
    run, points = load_run(directory), found["frontier"]["points"]
    expected = [(1, 1.0, None), (3, 0.5, 0.0), (3, 1.0, 0.0), (3, 0.5, 1.0), (3, 1.0, 1.0)]
    assert [(point["steps"], point["temperature"], point["gamma"]) for point in points] == expected
    for point in points[1:]:
        rows = generate(run, 6, Settings(3, "stochastic", point["temperature"], point["gamma"]))
        entry = judged(run, rows, fitted_judge(run), [])
        assert (point["entropy"], point[frontier.NGRAM]) == (entry["entropy"], entry[frontier.NGRAM])
        assert point["judges"][str(folder)]["texts"] == 6 and "texts" not in point
    assert points[0] | {"texts": 0} == {"steps": 1, "temperature": 1.0, "gamma": None} | found["samples"]["1"] | {"texts": 0}
    matched = found["frontier"]["matched"]
    assert [(each["steps"], each["gamma"]) for each in matched] == [(1, None), (3, 0.0), (3, 1.0)]
    assert found["frontier"]["entropy"] == found["reference"]["data"]["entropy"]
    assert found["settings"]["frontier"] == {"temperatures": [0.5, 1.0], "gammas": [0.0, 1.0], "entropy": None}
    assert table(found) in shown and "at " + f"{found['frontier']['entropy']:.3f} nats" in shown
    assert all(each["outside"] or each["judges"][str(folder)]["perplexity"] for each in matched)
    before = (directory / "evaluation.json").stat().st_mtime_ns
    ask(cli, directory, *options)
    assert (directory / "evaluation.json").stat().st_mtime_ns == before  # it is part of what an evaluation is of
    middle = (points[1]["entropy"] + points[2]["entropy"]) / 2
    again, _ = ask(cli, directory, *options[:-2], "--entropy", middle)
    assert again["frontier"]["entropy"] == middle and "judges" not in again
    value = (points[1][frontier.NGRAM] + points[2][frontier.NGRAM]) / 2
    assert again["frontier"]["matched"][1][frontier.NGRAM] == pytest.approx(value)


def test_of_the_baseline_and_of_a_map(copied, cli):
    found, shown = ask(cli, copied("coded", "autoregressive"), "--frontier", "--temperatures", "0.7,1")
    points = found["frontier"]["points"]
    assert [(point["steps"], point["temperature"]) for point in points] == [(None, 0.7), (None, 1.0)]
    assert points[1]["entropy"] == found["samples"]["autoregressive"]["entropy"] and "autoregressive" in shown
    assert points[0]["entropy"] == found["cooled"]["autoregressive"][0]["entropy"]
    found, _ = ask(cli, copied("char", "flow_map"), "--frontier", "--temperatures", "1,0.8")
    points = found["frontier"]["points"]
    assert [(point["steps"], point["temperature"]) for point in points] == [(1, 1.0), (3, 1.0), (3, 0.8)]
    assert points[0]["entropy"] == found["samples"]["1"]["entropy"] and points[1]["entropy"] == found["samples"]["3"]["entropy"]


def test_of_discrete_diffusion_one_step_has_temperatures_too(cli, config, tmp_path):
    directory = tmp_path / "masked"
    assert cli("pretrain", config("coded"), f"run.dir={directory}", "model.family=masked", "train.steps=3").code == 0
    found, _ = ask(cli, directory, "--frontier", "--temperatures", "0.7,1")
    expected = [(1, 0.7), (1, 1.0), (3, 0.7), (3, 1.0)]
    assert [(point["steps"], point["temperature"]) for point in found["frontier"]["points"]] == expected
    assert "takes no gamma" in cli("evaluate", directory, *QUICK, "--frontier", "--gammas", "0.5").err


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("autoregressive", ["--frontier", "--gammas", "0.5"], "is a baseline (model.family=autoregressive) and its sampler takes no gamma"),
        ("flow", ["--gammas", "0.5"], "--gammas belongs to --frontier; give both, or leave it out"),
        ("flow", ["--entropy", "4"], "--entropy belongs to --frontier"),
        ("flow", ["--frontier", "--gammas", "0.5,2"], "--gammas: 2.0 is not between 0 and 1"),
        ("flow", ["--frontier", "--temperatures", "1,x"], "--temperatures: '1,x' is not a list of numbers"),
        ("flow", ["--frontier", "--temperatures", "1,0"], "--temperatures: 0.0 is not a finite number above 0"),
        ("flow", ["--frontier", "--temperatures", "1,1.0"], "--temperatures: one value stands there twice"),
        ("flow", ["--frontier", "--gammas", ""], "--gammas: '' is not a list of numbers"),
        ("flow", ["--frontier", "--entropy", "nan"], "--entropy: nan is not a finite number"),
    ],
)
def test_what_cannot_be_is_refused(trained, cli, family, options, words):
    told = cli("evaluate", trained("coded", family), *QUICK, *options)
    assert told.code == 2 and words in told.err and told.err.count("\n") == 1
