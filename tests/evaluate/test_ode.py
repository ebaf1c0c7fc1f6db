"""`megaflow evaluate --ode-likelihood`: the bound of the flow's equation beside the other, in its units and of its tokens."""

import math
import shutil

import pytest

from megaflow.errors import UserError
from megaflow.evaluate import likelihood
from megaflow.evaluate.evaluation import evaluate, table
from megaflow.evaluate.likelihood import Ode, by_equation
from megaflow.evaluate.loaded import load_run
from megaflow.evaluate.real_text import of_split
from megaflow.model import ode_bound

QUICK = {"steps": [1], "samples": 2, "rows": 4, "draws": 2, "seed": 0}
SLOW = [pytest.param(*of, marks=pytest.mark.long) for of in (("documents", "flow"), ("char", "flow_map"))]
RUNS = [("coded", "flow"), *SLOW]


@pytest.mark.parametrize("kind, family", RUNS)
def test_it_stands_beside_the_bound(trained, tmp_path, kind, family):
    shutil.copytree(trained(kind, family), tmp_path / "run")
    result = evaluate(tmp_path / "run", **QUICK, ode=Ode(24, 1))
    whole, found = result["likelihood"], result["likelihood"]["ode"]
    assert result["settings"]["ode"] == {"steps": 24, "probes": 1}
    assert found["tokens"] == whole["tokens"] and found["unigram_nats_per_token"] == pytest.approx(
        whole["unigram_nats_per_token"], rel=1e-6
    )
    scale = whole["bits_per_char"] / whole["nats_per_token"]
    assert found["bits_per_char"] == pytest.approx(found["nats_per_token"] * scale)
    assert sum(found["rows"]["nats"]) / found["tokens"] == pytest.approx(found["nats_per_token"])
    # of a network that has hardly learned, both are about what the channel alone says
    spread = abs(found["half_steps_difference_nats"]) + 4.0 * math.hypot(found["standard_error_nats"], whole["standard_error_nats"])
    assert abs(found["nats_per_token"] - whole["nats_per_token"]) < spread + 0.1 * whole["nats_per_token"]
    shown = [line for line in table(result).splitlines() if line.startswith("equation")]
    assert shown and "24 steps, 1 probe)" in shown[0] and f"{found['bits_per_char']:.4f}" in shown[0]


def test_probes_and_steps_are_those_asked_for(trained):
    run = load_run(trained("coded", "flow"))
    rows = of_split(run, "validation", 2)
    one, other, more = (by_equation(run, rows, Ode(*asked), 0) for asked in ((4, 1), (4, 2), (8, 1)))
    assert len({found["nats_per_token"] for found in (one, other, more)}) == 3
    assert (one["steps"], one["probes"], one["draws"]) == (4, 1, ode_bound.DRAWS) and "upper bound" in one["bias"]


@pytest.mark.parametrize(
    "kind, family, asked, words",
    [
        ("coded", "autoregressive", Ode(8, 1), "is a baseline .* and has no equation"),
        ("coded", "flow", Ode(7, 1), "7 is no even number of steps"),
        ("coded", "flow", Ode(2, 1), "2 is no even number of steps"),
        ("char", "flow", Ode(8, None), "a row has 864 dimensions, and the limit is 512"),
    ],
)
def test_what_cannot_be_taken_is_refused(trained, kind, family, asked, words):
    with pytest.raises(UserError, match=words):
        likelihood.check_ode(load_run(trained(kind, family)), asked)


def test_probes_want_an_equation(trained, cli):
    told = cli("evaluate", str(trained("coded", "flow")), "--probes", "2")
    assert told.code == 2 and "--probes belongs to --ode-likelihood" in told.err
    told = cli("evaluate", str(trained("coded", "flow")), "--ode-likelihood", "8", "--probes", "all")
    assert told.code == 2 and "--probes: 'all' is not a positive whole number" in told.err
