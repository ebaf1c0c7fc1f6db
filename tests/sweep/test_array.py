"""A sweep as Slurm arrays on a real cluster: an element a point, evaluations behind them, and one page at the end."""

import json

import pytest

from megaflow.files import lines
from megaflow.sweep import points

EVALUATE = {"steps": "1", "samples": 4, "rows": 8, "draws": 2}


@pytest.fixture
def sweep(tmp_path, config):
    """The file of four points of the session's tiny flow, one of which diverges."""
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"dir: out\nbase: {config('coded')}\nset: {{train.steps: 6, train.validate_every: 6, train.validation_rows: 8}}\n"
        "axes: {flow.clock.name: [uniform, argmax], model.layers: [1, 2]}\n"
        'evaluate: {steps: "1", samples: 4, rows: 8, draws: 2}\n'
    )
    return path


def test_an_array_of_points_with_evaluations_and_a_report(cluster, megaflow, sweep, tmp_path):
    done = megaflow("sweep", sweep, "--slurm", "--limit", 2, "--time", "0:20:00")
    assert done.code == 0, done.err
    train, evaluate, report = done.jobs
    here = megaflow("sweep", sweep)
    assert here.code == 2 and "in Slurm's queue" in here.err and here.err.count("\n") == 1
    assert cluster.over(report) == "COMPLETED"
    out = tmp_path / "out"
    assert {content["state"] for content in points.recorded(out).values()} == {"queued"}
    assert [points.stands(path, EVALUATE)[0] for path in points.recorded(out)] == ["done"] * 4
    assert "%2" in (out / "slurm" / f"{train}.sbatch").read_text() and (out / "report.html").exists()
    assert len((out / "points.csv").read_text().splitlines()) == 5
    told = json.loads(megaflow("status", out, "--json").out)["runs"]
    assert [run["state"] for run in told] == ["finished"] * 4
    first = sorted(points.recorded(out))[0]
    assert "6/6 steps" in megaflow("logs", first, "--job", next(line["job"] for line in lines(first / "slurm" / "jobs.jsonl"))).out
    again = megaflow("sweep", sweep, "--slurm")
    assert again.code == 0 and "nothing to submit" in again.out
    more = megaflow("sweep", sweep, "axes.model.layers=[1,2,3]", "--slurm", "--dry-run")
    assert more.out.count("#SBATCH --array=0-1\n") == 2 and "squeue" not in more.err


@pytest.mark.long
def test_an_element_that_diverges_is_told_and_the_others_are_done(cluster, megaflow, sweep, tmp_path):
    words = ("sweep", sweep, "axes.optim.learning_rate=[0.005,1e30]", "set.optim.warmup_steps=0", "axes.model.layers=[1]", "--slurm")
    done = megaflow(*words, "axes.flow.clock.name=[uniform]")
    assert done.code == 0, done.err
    assert cluster.over(done.jobs[-1], 200.0) == "COMPLETED"
    found = {path.name: points.stands(path, EVALUATE) for path in points.recorded(tmp_path / "out")}
    assert sorted(state for state, _ in found.values()) == ["done", "failed"]
    (said,) = [said for state, said in found.values() if state == "failed"]
    assert " is " in said and "Traceback" not in said
