"""A sweep as Slurm arrays on a real cluster: an element a point, evaluations behind them, and one page at the end."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megaflow.config.load import load
from megaflow.files import lines
from megaflow.launch import records, slurm
from megaflow.launch.script import Resources
from megaflow.sweep import array, command, design, points

EVALUATE = {"steps": "1", "samples": 4, "rows": 8, "draws": 2}


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line}


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


def test_a_container_sees_what_points_read(tmp_path, config):
    path = tmp_path / "grid.yaml"
    axes = "axes: {data.path: [/data/a, /data/b], model.start: ['', /models/gpt2]}\nevaluate: {judge: /models/judge}"
    path.write_text(f"dir: out\nbase: {config('coded')}\n{axes}\n")
    data = load(config("coded")).config.data.path
    assert array.read(design.read(str(path), [])) == ["out", data, "/data/a", "/data/b", "/models/gpt2", "/models/judge"]


def test_a_sweep_that_asks_for_itself_does_so_for_no_point_for_ever(tmp_path, sweep, monkeypatch):
    """What somebody cancels, and what leaves the queue three times without a word, it leaves out; somebody who asks has it once more."""
    monkeypatch.chdir(tmp_path)
    asked = design.read(str(sweep), ["evaluate={}"])
    placed = points.place(asked, design.points(asked))
    cancelled, gone, fresh, _ = placed
    for each, jobs in ((cancelled, ["1_0"]), (gone, ["1_1", "2_0", "3_0"]), (fresh, ["1_2", "2_1"])):
        points.note(each, "queued")
        (each.directory / "slurm").mkdir()
        for job in jobs:
            records.add_job(each.directory / "slurm", {"job": job, "stage": "pretrain"})
    ended = {"job": "1_0", "time": time.time() + 1, "decision": "left", "end": "stopped", "said": "", "cancelled": True}
    records.add_attempt(cancelled.directory / "slurm", ended)
    how = array.Cluster(tmp_path / "out" / "slurm", tmp_path, Resources(), None, False, False, [])
    free = {each.directory: [] for each in placed}
    assert array.left(asked, placed, how, free, 1.0) == placed
    logs = [each.directory / "slurm" / f"{job}.log" for each, job in ((gone, "3_0"), (fresh, "2_1"))]
    for log in logs:
        log.write_text("")  # they have begun
    remembered: dict[str, slurm.Queued] = {}
    monkeypatch.setattr(slurm, "queue", lambda ids, *more: {id: remembered[id] for id in ids if id in remembered})
    assert array.left(asked, placed, replace(how, itself=True), free, 1.0) == placed[2:]
    # cancelled before it began, as Slurm remembers for a while, or never: of an element of an array that waits
    remembered["2_1"] = slurm.Queued("2_1", "NODE_FAIL", "", "", "")
    assert array.left(asked, placed, replace(how, itself=True, dry_run=True), free, 1.0) == placed[2:]
    remembered["2_1"] = slurm.Queued("2_1", "CANCELLED", "", "", "")
    assert array.left(asked, placed, replace(how, itself=True, dry_run=True), free, 1.0) == placed[3:]
    remembered.clear()
    logs[1].unlink()
    assert array.left(asked, placed, replace(how, itself=True), free, 1.0) == placed[3:]
    assert points.cancelled(fresh.directory) and records.attempts(fresh.directory / "slurm")[-1]["said"].startswith("job 2_1 has left")
    # of a flow that was cancelled no map is submitted, nor told to have failed: whoever asks has all of them
    taught = [replace(fresh, point=replace(fresh.point, teacher=cancelled.point.name))]
    assert array.left(asked, [cancelled, *taught], replace(how, itself=True), free, 1.0) == []
    assert points.stands(fresh.directory, {})[0] == "stopped"
    assert array.left(asked, [cancelled, *taught], how, free, 1.0) == [cancelled, *taught]
    state, said = points.stands(gone.directory, {})
    assert state == "failed" and said.startswith("its jobs 1_1, 2_0, 3_0 have left the queue before any attempt of theirs could be noted")
    assert array.left(asked, placed, how, free, 1.0) == [cancelled, *placed[2:]]
    assert array.left(asked, placed, replace(how, retry=True), free, 1.0) == placed


def test_what_could_not_queue_again_is_submitted_again_and_not_for_ever(tmp_path, sweep, monkeypatch):
    """By its site, or since its flow was not there: three times with no new checkpoint between it has failed. Nobody has cancelled it."""
    monkeypatch.chdir(tmp_path)
    asked = design.read(str(sweep), ["evaluate={}"])
    each, *_ = points.place(asked, design.points(asked))
    points.note(each, "queued")
    (each.directory / "slurm").mkdir()
    how = array.Cluster(tmp_path / "out" / "slurm", tmp_path, Resources(), None, False, False, [], itself=True)
    steps = (0, 20, 20, 20)
    for number, step in enumerate(steps):
        records.add_job(each.directory / "slurm", {"job": f"{number}_0", "stage": "pretrain"})
        line = {
            "job": f"{number}_0",
            "time": time.time() + 1,
            "decision": "left",
            "end": "failed",
            "said": "cannot queue again",
            "step": step,
        }
        records.add_attempt(each.directory / "slurm", line)
        left = array.left(asked, [each], how, {each.directory: []}, 1.0)
        assert left == ([each] if number < len(steps) - 1 else [])
    assert points.record(each.directory)["said"] == "cannot queue again; so 3 times, with no new checkpoint between"
    records.add_attempt(each.directory / "slurm", {"job": "9_0", "time": time.time() + 1, "decision": "done", "step": 40})
    assert points.stuck(each.directory, 3) == ""


def test_who_asks_for_a_sweep_asks_for_what_was_cancelled_before(tmp_path, sweep, monkeypatch):
    """Also for what is not submitted yet, since its rung comes later."""
    monkeypatch.chdir(tmp_path)
    asked = design.read(str(sweep), ["evaluate={}"])
    each, *_ = points.place(asked, design.points(asked))
    points.note(each, "queued")
    (each.directory / "slurm").mkdir()
    records.add_job(each.directory / "slurm", {"job": "1", "stage": "pretrain"})
    records.add_attempt(each.directory / "slurm", {"job": "1", "time": time.time(), "decision": "left", "cancelled": True, "said": ""})
    how = array.Cluster(tmp_path / "out" / "slurm", tmp_path, Resources(), None, False, False, [], itself=True)
    command.taken_up([each], how)
    assert points.cancelled(each.directory)
    # what becomes of another stage of the run is not the point's
    records.add_job(each.directory / "slurm", {"job": "2", "stage": "convert"})
    records.add_attempt(each.directory / "slurm", {"job": "2", "time": time.time(), "decision": "over", "said": "no room"})
    assert points.cancelled(each.directory)
    command.taken_up([each], replace(how, itself=False))
    assert not points.cancelled(each.directory) and points.stands(each.directory, {})[0] == "pending"


@pytest.mark.long
def test_an_array_of_points_with_evaluations_and_a_report(cluster, megaflow, sweep, tmp_path):
    done = megaflow("sweep", sweep, "--slurm", "--limit", 2, "--time", "0:20:00")
    assert done.code == 0, done.err
    train, evaluate, report = done.jobs
    here = megaflow("sweep", sweep)
    assert here.code == 2 and "in Slurm's queue" in here.err and here.err.count("\n") == 1
    assert cluster.over(report) == "COMPLETED"
    out = tmp_path / "out"
    assert f"#SBATCH --dependency=aftercorr:{train}\n" in (out / "slurm" / f"{evaluate}.sbatch").read_text()  # each as soon as it is done
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
    assert more.out.count("# 0: megaflow pretrain ") == more.out.count("# 1: megaflow evaluate ") == 1


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


HALVED = """dir: out
base: {base}
set: {{train.steps: 24, train.validate_every: 24, train.validation_rows: 64, optim.warmup_steps: 0}}
axes: {{optim.learning_rate: [0.00001, 0.0001, 0.001, 0.01]}}
"""


@pytest.mark.long
def test_a_halving_goes_on_by_itself_rung_by_rung(cluster, megaflow, config, tmp_path):
    """Four choices pause at a quarter of their steps, two at a half, one comes to its end: three arrays that follow one another, and the
    losses of the same halving on this machine."""
    path = tmp_path / "halved.yaml"
    path.write_text(HALVED.format(base=config("coded")) + "draw: {kind: halving, keep: 0.5, rungs: 3}\n")
    listed = megaflow("sweep", path, "--slurm", "--dry-run")
    assert "--array=0-3\n" in listed.out and "train.pause_at=6" in listed.out and not (tmp_path / "out").exists()
    done = megaflow("sweep", path, "--slurm")
    assert done.code == 0, done.err
    out = tmp_path / "out"
    asked = megaflow("sweep", path, "--slurm")
    assert asked.code == 0 and not asked.jobs and "in the queue" in asked.out
    here = megaflow("sweep", path)
    assert here.code == 2 and "in Slurm's queue" in here.err
    (told,) = json.loads(megaflow("status", out, "--json").out)["sweeps"]
    assert told["points"] == 4 and list(told["jobs"]) == [done.jobs[-1]]
    cluster.until(lambda: len(records.jobs(out / "slurm")) >= 6, 200.0)
    jobs = records.jobs(out / "slurm")
    assert [job["stage"] for job in jobs] == ["pretrain", "next"] * 3
    assert cluster.over(jobs[-1]["job"]) == "COMPLETED"
    assert [len(json.loads(Path(job["words"][0]).read_text())) for job in jobs[::2]] == [4, 2, 1]
    steps = {run.name: max(line["step"] for line in lines(run / "metrics.jsonl")) for run in points.recorded(out)}
    assert sorted(steps.values()) == [6, 6, 12, 24] and (out / "report.html").exists()
    assert sorted(points.stands(run, {})[0] for run in points.recorded(out)) == ["done"] + ["stopped early"] * 3
    assert len(records.jobs(out / "slurm")) == 6 and "nothing to submit, every point is over" in megaflow("logs", out).out
    here = megaflow("sweep", path, f"dir={tmp_path / 'here'}")
    assert here.code == 0, here.err
    assert {run.name: losses(run) for run in points.recorded(out)} == {run.name: losses(run) for run in points.recorded(tmp_path / "here")}


@pytest.mark.long
def test_a_halving_goes_on_without_what_is_cancelled_while_it_waits(cluster, megaflow, config, tmp_path):
    """By megaflow cancel, or by scancel, after which Slurm knows nothing of it; and each takes no other out of the queue."""
    path = tmp_path / "halved.yaml"
    path.write_text(HALVED.format(base=config("coded")) + "draw: {kind: halving, keep: 0.5, rungs: 2}\n")
    done = megaflow("sweep", path, "--slurm", "--limit", 1)
    assert done.code == 0, done.err
    train, out = done.jobs[0], tmp_path / "out"
    cluster.until(lambda: f"{train}_0" in cluster.run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i"))
    points_of = [Path(each["directory"]).name for each in json.loads(Path(records.jobs(out / "slurm")[0]["words"][0]).read_text())]
    assert f"job {train}_3 of" in megaflow("cancel", out / points_of[3]).out
    cluster.run("scancel", f"{train}_2")
    waiting = cluster.run("squeue", "-h", "-r", "-t", "PENDING", "-o", "%i").split()
    assert f"{train}_1" in waiting and not {f"{train}_2", f"{train}_3"} & set(waiting)
    cluster.until(lambda: len(records.jobs(out / "slurm")) >= 4, 200.0)
    assert cluster.over(records.jobs(out / "slurm")[-1]["job"]) == "COMPLETED"
    found = {run.name: points.stands(run, {})[0] for run in points.recorded(out)}
    assert [found[name] for name in points_of[2:]] == ["stopped"] * 2
    assert sorted(found[name] for name in points_of[:2]) == ["done", "stopped early"]
    assert not any((out / name / "run.json").exists() for name in points_of[2:])
    assert "nothing to submit, 2 points were cancelled, which the same command takes up" in megaflow("logs", out).out


@pytest.mark.long
def test_a_search_goes_on_by_itself(cluster, megaflow, config, tmp_path):
    """Two choices at once with two seeds each, then one more."""
    path = tmp_path / "searched.yaml"
    path.write_text(HALVED.format(base=config("coded")) + "draw: {kind: optuna, count: 3}\nseeds: 2\n")
    refused = megaflow("sweep", path, "--slurm")
    assert refused.code == 2 and "--limit" in refused.err
    done = megaflow("sweep", path, "--slurm", "--limit", 4)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    cluster.until(lambda: len(records.jobs(out / "slurm")) >= 4, 200.0)
    assert cluster.over(records.jobs(out / "slurm")[-1]["job"]) == "COMPLETED"
    assert len(records.jobs(out / "slurm")) == 4
    assert [points.stands(run, {})[0] for run in points.recorded(out)] == ["done"] * 6
    assert (out / "points.csv").read_text().count("\n") == 7


@pytest.mark.long
def test_maps_of_a_flow_that_failed_fail_and_the_others_are_trained(cluster, megaflow, config, tmp_path):
    """A flow of the seeds is given a run that something else holds, so that it cannot be trained."""
    path = tmp_path / "maps.yaml"
    path.write_text(
        f"dir: out\nstage: distill\nbase: {config('coded', 'flow_map')}\nset: {{train.steps: 6, train.validation_rows: 8}}\n"
        f"teacher: {{base: {config('coded')}, set: {{train.steps: 6, train.validation_rows: 8}}}}\n"
        "axes: {distill.between: [middle, uniform]}\nseeds: 2\n"
    )
    held = tmp_path / "out" / "teacher=coded-flow-seed=1"
    held.mkdir(parents=True)
    (held / "checkpoints").write_text("in the way")
    done = megaflow("sweep", path, "--slurm")
    assert done.code == 0, done.err
    assert cluster.over(done.jobs[-1], 400.0) == "COMPLETED"
    found = {run.name: points.stands(run, {}) for run in points.recorded(tmp_path / "out")}
    assert sorted(state for state, _ in found.values()) == ["done"] * 3 + ["failed"] * 3
    assert all(
        "has not been trained to its end" in said for name, (state, said) in found.items() if state == "failed" and "distill" in name
    )
    (held / "checkpoints").unlink()
    again = megaflow("sweep", path, "--slurm", "--retry")
    assert cluster.over(again.jobs[-1], 400.0) == "COMPLETED"
    assert [points.stands(run, {})[0] for run in points.recorded(tmp_path / "out")] == ["done"] * 6


def test_what_goes_on_is_submitted_again_where_it_was_lost_and_what_is_not_noted_is_said(cluster, megaflow, sweep, tmp_path):
    """The last job is gone, as when a command is killed between two submissions; and an array of which nothing is known."""
    words = ("sweep", sweep, "--slurm", "--sbatch=--hold")
    first = megaflow(*words)
    assert first.code == 0, first.err
    train, evaluate, report = first.jobs
    assert not megaflow(*words).jobs
    cluster.run("scancel", report)
    cluster.until(lambda: not cluster.run("squeue", "-h", "-j", report).strip())
    again = megaflow(*words)
    (new,) = again.jobs
    waits = (tmp_path / "out" / "slurm" / f"{new}.sbatch").read_text()
    assert f"--dependency=afterany:{train}:{evaluate}\n" in waits
    own = tmp_path / "out" / "slurm"
    strange = cluster.run("sbatch", "--parsable", "--hold", "-o", f"{own}/%j.log", "--wrap=true").strip()
    refused = megaflow(*words)
    assert refused.code == 2 and f"scancel {strange}" in refused.err and refused.err.count("\n") == 1
