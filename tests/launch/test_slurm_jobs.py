"""Jobs on a real Slurm of two nodes: how they are submitted, stopped, preempted, queued again, lost and given up."""

import json
import random
import time
from pathlib import Path

import pytest

from megaflow.files import lines
from megaflow.launch import records
from megaflow.process import STOPPED
from megaflow.train import outcome

ENDLESS = 100000
"""Steps of a run that is ended from outside, however fast it is."""
EVERY = ("train.checkpoint_every=1000", "train.validate_every=1000", "train.validation_rows=8")


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line}


def step(run: Path) -> int:
    return max(losses(run), default=0)


@pytest.fixture
def submit(megaflow, config, tmp_path):
    """submit(name, steps, …) submits a flow of so many steps; returns (run, job)."""

    def call(name: str, steps: int, *words: str) -> tuple[Path, str]:
        run = tmp_path / name
        done = megaflow("submit", config("coded"), f"run.dir={run}", f"train.steps={steps}", *EVERY, *words)
        assert done.code == 0, done.err
        return run, done.jobs[0]

    return call


@pytest.fixture
def undisturbed(config, tmp_path):
    """undisturbed(reached) has the losses of a run of as many steps as those that are ended from outside, up to the step that one of them
    has come to; nothing happens to it before."""
    from megaflow.train import stages

    def run(reached: int) -> dict[int, float]:
        path = tmp_path / "undisturbed"
        words = [f"run.dir={path}", f"train.steps={ENDLESS}", *EVERY, f"train.pause_at={reached}"]
        assert stages.pretrain(str(config("coded")), words) == STOPPED
        return losses(path)

    return run


@pytest.fixture
def goes_on(cluster):
    """goes_on(run, job) waits until a run has come further than where it is saved, and ends it."""

    def call(run: Path, job: str) -> None:
        saved = outcome.newest_step(run)
        cluster.until(lambda: step(run) > saved + 5, 120.0)
        cluster.run("scancel", job)
        assert cluster.over(job) in ("FAILED", "CANCELLED")
        assert outcome.newest_step(run) == step(run) > saved

    return call


def test_a_job_of_two_hosts_trains_and_says_where_it_is(cluster, megaflow, submit, tmp_path):
    run, job = submit("two hosts", 30, "--nodes=2", "--time=0:30:00")
    assert cluster.over(job) == "COMPLETED"
    assert json.loads((run / "run.json").read_text())["starts"][0]["processes"] == 2
    assert (run / "slurm" / f"{job}.sbatch").read_text().startswith("#!/bin/bash\n")
    log = megaflow("logs", run).out
    assert "megaflow: job " in log and "megaflow: done" in log and "30/30 steps" in log
    assert "starts" in megaflow("logs", run, "--rank", 0).out and "starts" not in megaflow("logs", run, "--rank", 1).out
    refused = megaflow("logs", run, "--rank", 2)
    assert refused.code == 2 and "ranks 0 to 1" in refused.err
    (state,) = json.loads(megaflow("status", run, "--json").out)["runs"]
    assert (state["state"], state["step"], state["steps"], state["said"], state["jobs"]) == ("finished", 30, 30, None, [])


def test_a_job_that_is_told_to_stop_saves_and_goes_on_at_once_with_the_same_losses(cluster, submit, undisturbed, goes_on):
    run, job = submit("told", ENDLESS)
    cluster.until(lambda: step(run) > 5)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1 does before a time limit
    cluster.until(lambda: len(json.loads((run / "run.json").read_text())["starts"]) == 2, 100.0)  # by itself Slurm would wait two minutes
    goes_on(run, job)
    first, second = records.attempts(run / "slurm")
    assert (first["end"], first["decision"], second["decision"]) == ("stopped", "again", "left")
    assert first["step"] == json.loads((run / "run.json").read_text())["starts"][1]["step"] > 5
    assert losses(run) == undisturbed(step(run))


@pytest.mark.long
def test_ranks_that_are_told_to_stop_have_the_time_to_save(cluster, submit):
    """Slurm signals every process of the step here, torchrun too, and saving takes longer than a process takes to die."""
    large = ("model.hidden=768", "model.heads=8", "model.layers=6", "train.global_batch=2")
    run, job = submit("ranks", ENDLESS, "--processes-per-node=2", "--cpus-per-node=2", *large)
    cluster.until(lambda: step(run) > 2, 200.0)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: len(json.loads((run / "run.json").read_text())["starts"]) == 2, 200.0)
    (first,) = records.attempts(run / "slurm")
    assert (first["end"], first["decision"]) == ("stopped", "again")
    assert first["step"] == json.loads((run / "run.json").read_text())["starts"][1]["step"] > 2
    cluster.run("scancel", job)
    cluster.over(job)


def test_a_name_is_data_whatever_it_holds(cluster, megaflow, config, tmp_path):
    ugly = """$(touch x); "a b" 'c' `d` é #"""
    done = megaflow("submit", config("coded"), f"run.dir={ugly}", "train.steps=2", *EVERY, "--time=0:30:00")
    assert done.code == 0, done.err
    assert cluster.run("squeue", "-h", "-o", "%j", "-j", done.jobs[0]).strip() == ugly
    assert cluster.over(done.jobs[0]) == "COMPLETED"
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".yaml") == [ugly]
    assert step(tmp_path / ugly) == 2
    assert "megaflow: done" in megaflow("logs", ugly).out
    refused = megaflow("submit", config("coded"), "run.dir=50%", "--dry-run")
    assert refused.code == 2 and "%" in refused.err and "Traceback" not in refused.err


@pytest.mark.long
def test_from_text_to_a_converted_map_by_one_command(cluster, megaflow, config, texts, tmp_path):
    flow, out, data = tmp_path / "flow", tmp_path / "out", tmp_path / "data"
    own = [f"data.path={data}", f"data.source=[{texts['chapters']}]"]
    words = ["submit", config("coded"), *own, "stage=prepare", "--time=0:30:00"]
    words += ["--then", "pretrain", config("coded"), *own, f"run.dir={flow}", "train.steps=20", *EVERY]
    words += ["--then", "distill", config("coded", "flow_map"), f"run.dir={tmp_path / 'map'}", f"distill.teacher={flow}", "train.steps=10"]
    words += ["--then", "evaluate", "steps=1", "samples=4", "rows=8", "--then", "convert", out]
    done = megaflow(*words)
    assert done.code == 0, done.err
    assert [cluster.over(job) for job in done.jobs] == ["COMPLETED"] * 5
    assert (tmp_path / "map" / "evaluation.json").exists() and (out / "config.yaml").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.slurm", "flow", "map", "out"]


@pytest.mark.long
def test_stages_wait_for_one_another(cluster, megaflow, config, tmp_path):
    """An evaluation runs when its run is done; what waits for jobs that are over waits for nothing."""
    run = tmp_path / "flow"
    done = megaflow(
        "submit", config("coded"), f"run.dir={run}", "train.steps=2", *EVERY, "--then", "evaluate", "steps=1", "samples=2", "rows=4"
    )
    assert done.code == 0, done.err
    assert f"--dependency=afterok:{done.jobs[0]}" in done.out
    assert [cluster.over(job) for job in done.jobs] == ["COMPLETED"] * 2 and (run / "evaluation.json").exists()
    again = megaflow("submit", run, "stage=evaluate", "--after", run, "--dry-run")
    assert again.code == 0 and "--dependency" not in again.out


@pytest.mark.long
def test_a_time_limit_is_a_signal_a_checkpoint_and_a_place_in_the_queue(cluster, submit, undisturbed, goes_on):
    run, job = submit("limited", ENDLESS, "--time=0:30:00")
    cluster.until(lambda: step(run) > 5)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # minutes, of which the last two are for saving
    cluster.until(lambda: len(records.attempts(run / "slurm")) == 1, 90.0)
    cluster.until(lambda: cluster.state(job) == "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    goes_on(run, job)
    first = records.attempts(run / "slurm")[0]
    assert (first["asked"], first["end"], first["decision"]) == ("USR1", "stopped", "again")
    assert losses(run) == undisturbed(step(run))


@pytest.mark.long
def test_a_job_that_is_preempted_goes_on_when_there_is_room(cluster, submit, undisturbed, goes_on):
    run, job = submit("preempted", ENDLESS, "--cpus-per-node=2", "--sbatch=--nodelist=n1")
    cluster.until(lambda: step(run) > 5)
    other = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodelist=n1", "--exclusive", "-o", "/dev/null", "--wrap=sleep 3")
    assert cluster.over(other.strip()) == "COMPLETED"
    goes_on(run, job)
    assert [(line["end"], line["decision"]) for line in records.attempts(run / "slurm")] == [("stopped", "again"), ("stopped", "left")]
    assert losses(run) == undisturbed(step(run))


@pytest.mark.long
def test_what_fails_the_same_way_three_times_is_given_up(cluster, megaflow, submit):
    run, job = submit("diverges", 40, "optim.learning_rate=1e30", "optim.warmup_steps=0")
    waits = megaflow("submit", run, "stage=evaluate", "--after", run)
    assert cluster.over(job) == "FAILED"
    attempts = records.attempts(run / "slurm")
    assert [line["decision"] for line in attempts] == ["again", "again", "over"]
    assert "gives up after 3 attempts" in megaflow("logs", run, "--job", job).out
    (state,) = json.loads(megaflow("status", run, "--json").out)["runs"]
    assert state["state"] == "failed" and state["attempts"] == 3 and " is " in state["said"] and str(run) in state["said"]
    assert cluster.over(waits.jobs[0]) == "CANCELLED"  # what waits for it does not wait for ever


def test_what_is_cancelled_saves_and_does_not_come_again(cluster, megaflow, submit):
    run, job = submit("cancelled", ENDLESS)
    second = megaflow("submit", run / "config.yaml", f"run.dir={run}") if (run / "config.yaml").exists() else None
    assert second is None or second.code == 2 and job in second.err
    cluster.until(lambda: step(run) > 5)
    (state,) = json.loads(megaflow("status", run, "--json").out)["runs"]
    assert state["state"] == "training" and state["seconds_left"] > 0 and state["jobs"][0]["state"] == "RUNNING"
    assert f"job {job} " in megaflow("cancel", run).out
    assert cluster.over(job) in ("FAILED", "CANCELLED")
    assert outcome.newest_step(run) > 5 and records.attempts(run / "slurm")[-1]["decision"] == "left"
    again = megaflow("submit", run / "config.yaml", f"run.dir={run}")
    cluster.until(lambda: cluster.state(again.jobs[0]) == "RUNNING")
    refused = megaflow("submit", run / "config.yaml", f"run.dir={run}")
    assert refused.code == 2 and again.jobs[0] in refused.err
    cluster.run("scancel", again.jobs[0])
    assert cluster.over(again.jobs[0]) == "CANCELLED"


@pytest.mark.long
def test_a_node_that_dies_is_left_out_of_the_next_attempt(cluster, submit, goes_on):
    run, job = submit("two of three", ENDLESS, "--nodes=2", "train.checkpoint_every=20", "train.hang_timeout=10")
    cluster.until(lambda: outcome.newest_step(run) > 0)
    lost = cluster.run("squeue", "-h", "-j", job, "-o", "%B").strip().replace("n1", "n2")
    assert lost == "n2"
    try:
        cluster.lose(lost)
        cluster.until(lambda: len(lines(run / "slurm" / "attempts.jsonl")) == 1, 90.0)
        goes_on(run, job)
    finally:
        cluster.start(lost)
    first, second = records.attempts(run / "slurm")
    assert first["end"] == "failed" and first["decision"] == "again" and first["hosts"] == "n[1-2]"
    assert second["hosts"] == "n[1,3]" and second["end"] == "stopped"
    assert list(losses(run)) == list(range(1, step(run) + 1))


@pytest.mark.long
def test_a_log_without_room_costs_the_log_alone(cluster, submit, full, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "slurm").symlink_to(full)
    (full / "all of it").unlink()
    _, job = submit("run", 20)
    (full / "all of it").write_bytes(b"x")
    assert cluster.over(job) == "COMPLETED"
    assert step(run) == 20


@pytest.mark.long
def test_a_controller_that_does_not_answer_is_said_not_to(cluster, megaflow, submit):
    import os
    import signal

    run, job = submit("unasked", 2)
    assert cluster.over(job) == "COMPLETED"
    os.kill(cluster.pid("slurmctld"), signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = megaflow("status", run)
        assert done.code == 0 and "finished" in done.out and "squeue did not answer within 10 s" in done.out
        assert time.monotonic() - began < 30.0
    finally:
        os.kill(cluster.pid("slurmctld"), signal.SIGCONT)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_twenty_preemptions_at_random_moments(cluster, submit, undisturbed):
    """From before a process has begun to the middle of its training; the curve is that of a run that paused nowhere before."""
    run, job = submit("twenty", ENDLESS)
    draw = random.Random(0)
    for number in range(20):
        cluster.until(lambda: cluster.state(job) == "RUNNING", 120.0)
        time.sleep(draw.uniform(0.0, 12.0))
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        cluster.until(lambda number=number: len(records.attempts(run / "slurm")) == number + 1, 120.0)
    cluster.run("scancel", job)
    assert [(line["end"], line["decision"]) for line in records.attempts(run / "slurm")] == [("stopped", "again")] * 20
    reached = outcome.newest_step(run)
    steps = [start["step"] for start in json.loads((run / "run.json").read_text())["starts"]]
    assert steps == sorted(steps) and len(set(steps)) > 10 and max(losses(run)) == reached
    assert losses(run) == undisturbed(reached)
