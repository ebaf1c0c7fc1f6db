"""How runs are doing, by what lies in them: on this machine, and where Slurm is not asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaflow.files import last_line
from megaflow.launch import records, slurm, status
from megaflow.process import STOPPED
from megaflow.sweep.command import cancelled_by_name
from megaflow.train import outcome
from megaflow.train.run import lock


@pytest.fixture
def training(config, tmp_path, environment):
    """A run that is being trained by a process of its own."""
    words = [str(config("coded")), f"run.dir={tmp_path / 'runs' / 'one'}", "train.steps=100000", "train.checkpoint_every=100000"]
    started = subprocess.Popen([sys.executable, "-m", "megaflow", "pretrain", *words], env=environment, stderr=subprocess.DEVNULL)
    while not last_line(tmp_path / "runs" / "one" / "metrics.jsonl", "loss"):
        assert started.poll() is None
        time.sleep(0.05)
    yield started
    started.kill()
    started.wait()


def state(cli, *places) -> dict:
    told = cli("status", *places, "--json")
    assert told.code == 0, told.err
    (found,) = json.loads(told.out)["runs"]
    return found


def test_a_run_that_is_trained_stopped_and_killed(training, cli, tmp_path):
    run = tmp_path / "runs" / "one"
    now = state(cli, tmp_path / "runs")
    assert (now["run"], now["state"], now["steps"], now["said"]) == (str(run), "training", 100000, None)
    assert now["step"] > 0 and now["loss"] > 0 and now["tokens_per_second"] > 0 and now["seconds_left"] > 0
    assert f"process {training.pid} of {run} is told to save and end" in cli("cancel", run).out
    assert training.wait(timeout=60) == 75
    then = state(cli, run)
    assert then["state"] == "stopped" and then["checkpoint"] == then["step"] and then["seconds_left"] is None
    assert "nothing to cancel" in cli("cancel", run).out
    (run / "ended.json").unlink()
    assert state(cli, run)["state"] == "ended" and "killed" in state(cli, run)["said"]


def test_a_run_on_another_host_cannot_be_seen(training, cli, tmp_path):
    run = tmp_path / "runs" / "one"
    os.kill(training.pid, signal.SIGSTOP)
    (run / ".lock").write_text("17 on elsewhere")
    found = state(cli, run)
    assert found["state"] == "unknown" and found["said"] == "started on elsewhere, which cannot be seen from here"


def test_a_finished_run_and_one_that_failed(copied, cli, tmp_path):
    run = copied("coded")
    assert state(cli, run)["state"] == "finished"
    (run / "summary.json").unlink()
    (run / "ended.json").write_text(json.dumps({"time": 0.0, "code": 1, "said": "the loss of step 3 is nan"}))
    found = state(cli, run)
    assert found["state"] == "failed" and found["said"] == "the loss of step 3 is nan"
    lines = cli("status", run).out.splitlines()
    assert lines[0].split() == list(status.COLUMNS) and lines[1].split()[1:3] == ["failed", "40/40"] and lines[2].strip() == found["said"]


def test_a_run_that_pauses_is_not_stopped(copied, cli):
    """As a rung of a halving leaves it."""
    run = copied("coded")
    (run / "summary.json").unlink()
    (run / "ended.json").write_text(json.dumps({"time": 0.0, "code": STOPPED, "said": outcome.PAUSED}))
    found = state(cli, run)
    assert found["state"] == "paused" and found["said"] is None


def test_a_process_of_another_program_is_not_the_run_s(copied, cli):
    """Numbers of processes are used again."""
    run = copied("coded")
    (run / "summary.json").unlink()
    (run / "ended.json").unlink(missing_ok=True)
    other = subprocess.Popen(["sleep", "60"])
    try:
        (run / ".lock").write_text(f"{other.pid} on {os.uname().nodename}")
        assert state(cli, run)["state"] == "ended"
    finally:
        other.kill()
        other.wait()


def test_a_process_that_holds_no_lock_is_not_the_run_s(copied, cli, monkeypatch):
    """Nor that of another run, which has the number now."""
    run = copied("coded")
    monkeypatch.setattr(status, "command_of", lambda pid: b"megaflow")
    with lock(run):
        assert status.here(run) == os.getpid()
    assert (run / ".lock").read_text().startswith(str(os.getpid())) and status.here(run) == 0 == status.here(run / "nowhere")
    assert "nothing to cancel" in cli("cancel", run).out


def test_a_run_whose_last_step_was_passed_over_is_finished(copied, cli):
    run = copied("coded")
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] < 40]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines) + '{"step": 40, "tokens": 5, "skipped": 1}\n')
    assert state(cli, run)["state"] == "finished"


def test_one_folder_that_cannot_be_looked_at_hides_no_other(tmp_path, monkeypatch):
    """As a link does that leads into a folder of somebody else."""
    for name in "ab":
        (tmp_path / name).mkdir()
    look = os.stat

    def stat(path, *more, **named):
        if Path(path).name == "b":
            raise PermissionError(13, "closed", str(path))
        return look(path, *more, **named)

    monkeypatch.setattr(os, "stat", stat)
    assert status.folders(tmp_path) == [tmp_path / "a"] and status.folders(tmp_path / "nowhere") == []


def test_a_line_that_was_cut_swallows_no_other(tmp_path):
    records.add_job(tmp_path, {"job": "1"})
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"job": "2", "sta')
    records.add_job(tmp_path, {"job": "3"})
    assert [line["job"] for line in records.jobs(tmp_path)] == ["1", "3"]


def test_slurm_is_asked_once_for_all_that_is_cancelled(cli, tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name / "slurm").mkdir(parents=True)
        records.add_job(tmp_path / name / "slurm", {"job": name, "stage": "pretrain"})
    asked = []

    def away(ids, *more):
        asked.append(ids)
        raise slurm.Unreachable("squeue is away")

    monkeypatch.setattr(slurm, "waiting_or_running", away)
    assert cli("cancel", tmp_path).err == "megaflow: jobs are not told: squeue is away\n" and asked == [["a", "b", "c"]]


@pytest.mark.parametrize("job", ["50", "51"], ids=["that submits more", "of a point"])
def test_what_cannot_be_told_keeps_no_job_from_being_asked_for(cli, tmp_path, monkeypatch, job):
    """Neither a process of another user, nor a job that Slurm refuses to end."""
    sweep = tmp_path / "sweep"
    (sweep / "sweeps").mkdir(parents=True)
    (sweep / "sweeps" / "a.json").write_text(json.dumps({"members": [{"directory": "one"}]}))
    for place, content in ((sweep, {"job": "50", "stage": "next", "sweep": "a"}), (sweep / "one", {"job": "51", "stage": "pretrain"})):
        (place / "slurm").mkdir(parents=True)
        records.add_job(place / "slurm", content)
    told = []

    def scancel(*words, **more):
        if words[-1] == job:
            raise slurm.Unreachable("scancel: no")
        told.append(words[-1])
        return ""

    def closed(process, number):
        raise PermissionError

    monkeypatch.setattr(status, "pools", lambda folder: [1])
    monkeypatch.setattr(status.os, "kill", closed)
    queue = {id: slurm.Queued(id, "RUNNING", "", "n1", "") for id in ("50", "51")}
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: {id: queue[id] for id in ids if id in queue})
    monkeypatch.setattr(slurm, "ask", scancel)
    said = cli("cancel", sweep).err
    assert set(told) == {"50", "51"} - {job} and f"job {job} of" in said and "process 1 of" in said


def test_what_has_begun_since_it_was_asked_for_is_to_save(cli, tmp_path, monkeypatch):
    (tmp_path / "one" / "slurm").mkdir(parents=True)
    records.add_job(tmp_path / "one" / "slurm", {"job": "5", "stage": "pretrain"})
    states, asked = iter(["PENDING", "RUNNING"]), []
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: {"5": slurm.Queued("5", next(states), "", "", "")})
    monkeypatch.setattr(slurm, "ask", lambda *words, **more: asked.append(words) or "")
    assert "job 5 of" in cli("cancel", tmp_path / "one").out
    assert asked == [("scancel", "--state=PENDING", "5"), ("scancel", "--batch", "--signal=TERM", "5"), ("scancel", "--signal=TERM", "5")]


def test_of_an_array_what_is_asked_for_is_cancelled_alone(cli, tmp_path, monkeypatch):
    """With a state Slurm would take out all of the array that wait."""
    (tmp_path / "one" / "slurm").mkdir(parents=True)
    records.add_job(tmp_path / "one" / "slurm", {"job": "5_3", "stage": "pretrain"})
    asked = []
    monkeypatch.setattr(
        slurm, "waiting_or_running", lambda ids, *more: {} if asked else {"5_3": slurm.Queued("5_3", "PENDING", "", "", "")}
    )
    monkeypatch.setattr(slurm, "ask", lambda *words, **more: asked.append(words) or "")
    assert "job 5_3 of" in cli("cancel", tmp_path / "one").out and asked == [("scancel", "5_3")]


def test_all_runs_below_a_folder(copied, cli, tmp_path):
    shutil.move(copied("coded"), tmp_path / "all" / "deep" / "one")
    shutil.copytree(tmp_path / "all" / "deep" / "one", tmp_path / "all" / "two")
    found = json.loads(cli("status", tmp_path / "all", "--json").out)["runs"]
    assert [run["run"] for run in found] == [str(tmp_path / "all" / name) for name in ("two", "deep/one")]


def test_points_of_a_sweep_are_counted(copied, cli, tmp_path):
    """Those that nobody has begun too."""
    sweep = tmp_path / "sweep"
    shutil.move(copied("coded"), sweep / "one")
    (sweep / "sweeps").mkdir()
    for name, members in (("a", ["one", "two"]), ("b", ["one", "three"])):
        (sweep / "sweeps" / f"{name}.json").write_text(json.dumps({"members": [{"directory": member} for member in members]}))
    told = json.loads(cli("status", sweep, "--json").out)
    assert told["sweeps"] == [{"sweep": str(sweep), "points": 3, "states": {"finished": 1, "not begun": 2}, "jobs": {}, "said": None}]
    (sweep / "three").mkdir()
    (sweep / "three" / "point.json").write_text('{"state": "refused"}')  # it never became a run
    assert cli("status", sweep).out.splitlines()[-1] == f"{sweep}: 3 points, 1 finished, 1 refused, 1 not begun"
    assert json.loads(cli("status", sweep / "one", "--json").out)["sweeps"] == []  # of one run that is asked for there is nothing to count


def test_a_sweep_of_which_nothing_has_begun_is_one(cli, tmp_path):
    """All refused, or just started; and what was left out on the way says why."""
    sweep = tmp_path / "sweep"
    (sweep / "sweeps").mkdir(parents=True)
    (sweep / "sweeps" / "a.json").write_text(json.dumps({"members": [{"directory": "one"}, {"directory": "two"}]}))
    assert cli("status", sweep).out.splitlines()[-1] == f"{sweep}: 2 points, 2 not begun"
    assert cli("cancel", sweep).code == 0
    (sweep / "one").mkdir()
    (sweep / "one" / "run.json").write_text("{}")
    (sweep / "one" / "point.json").write_text(json.dumps({"state": "stopped early", "said": "halving: 2 of 2"}))
    (told,) = json.loads(cli("status", sweep, "--json").out)["runs"]
    assert (told["state"], told["said"]) == ("stopped early", "halving: 2 of 2")


def test_every_pool_of_a_sweep_is_found(tmp_path):
    """Two sweeps may share a folder; a process that is no more is none."""
    holds = "import sys, time; from pathlib import Path; from megaflow.sweep.command import cancelled_by_name\n"
    holds += "with cancelled_by_name(Path(sys.argv[1])): time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", holds, tmp_path])
    try:
        until = time.monotonic() + 60.0
        while not status.pools(tmp_path):
            assert other.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        (tmp_path / f"{status.POOL}{2**22 - 1}").write_text(f"{2**22 - 1} on {os.uname().nodename}")
        (tmp_path / f"{status.POOL}{other.pid}0").write_text(f"{other.pid} on {os.uname().nodename}")  # whose lock nobody holds
        assert status.pools(tmp_path) == [other.pid]
    finally:
        other.kill()
        other.wait()


def test_where_there_is_no_run_that_is_said(cli, tmp_path):
    for place, words in ((tmp_path, "there is no run"), (tmp_path / "nowhere", "no such directory")):
        told = cli("status", place)
        assert told.code == 2 and words in told.err and told.err.count("\n") == 1
    told = cli("logs", tmp_path)
    assert told.code == 2 and "no job was submitted for it" in told.err


def test_shards_have_the_jobs_that_are_noted_beside_them(cli, tmp_path, monkeypatch):
    """Before their job has made the folder, and when it is done."""
    monkeypatch.setattr(slurm, "ask", lambda *words, **more: "")
    shards, place = tmp_path / "shards", tmp_path / "shards.slurm"
    place.mkdir()
    records.add_job(place, {"job": "7", "stage": "prepare"})
    assert state(cli, shards)["state"] == "not begun"
    shards.mkdir()
    (shards / "prepared.json").write_text("{}")
    records.add_attempt(place, {"job": "7", "end": "done", "decision": "done", "said": "done", "time": 0.0, "attempt": 1})
    for given in (shards, place, tmp_path):
        found = state(cli, given)
        assert (found["run"], found["state"], found["said"]) == (str(place), "finished", None)
    assert "nothing to cancel" in cli("cancel", shards).out


def test_what_fails_after_training_is_said(copied, cli, monkeypatch):
    monkeypatch.setattr(slurm, "ask", lambda *words, **more: "")
    run = copied("coded")
    (run / "slurm").mkdir()
    records.add_job(run / "slurm", {"job": "8", "stage": "evaluate"})
    failed = {"job": "8", "end": "failed", "decision": "over", "said": "--steps: 'a' is no number", "time": time.time(), "attempt": 3}
    records.add_attempt(run / "slurm", failed)
    found = state(cli, run)
    assert (found["state"], found["said"]) == ("finished", "evaluate: --steps: 'a' is no number")
    (run / "evaluation.json").write_text("{}")
    os.utime(run / "evaluation.json", (time.time() + 9.0,) * 2)
    assert state(cli, run)["said"] is None  # it was done since


def test_a_sweep_says_why_its_points_failed(copied, cli, tmp_path):
    sweep = tmp_path / "sweep"
    shutil.move(copied("coded"), sweep / "one")  # trained, and its evaluation has failed
    (sweep / "sweeps").mkdir()
    members = [{"directory": name} for name in ("one", "two", "three")]
    (sweep / "sweeps" / "a.json").write_text(json.dumps({"members": members}))
    for name, said in (("one", "x"), ("two", "there is no folder data"), ("three", "there is no folder data")):
        (sweep / name).mkdir(exist_ok=True)
        (sweep / name / "point.json").write_text(json.dumps({"state": "failed", "said": said}))
    (told,) = json.loads(cli("status", sweep, "--json").out)["sweeps"]
    assert told["states"] == {"failed": 3} and told["said"] == "there is no folder data"


def test_what_trains_here_is_told_also_where_slurm_cannot_be_asked(training, cli, tmp_path, monkeypatch):
    def away(*words, **more):
        raise slurm.Unreachable("squeue is away")

    run = tmp_path / "runs" / "one"
    (run / "slurm").mkdir()
    records.add_job(run / "slurm", {"job": "9", "stage": "pretrain"})
    monkeypatch.setattr(slurm, "ask", away)
    told = cli("cancel", run)
    assert told.code == 2 and "jobs are not told: squeue is away" in told.err and f"process {training.pid}" in told.out
    assert training.wait(timeout=60) == 75


@pytest.mark.parametrize("decision, end", [("over", "stopped"), ("left", "stopped"), ("over", "failed")])
def test_an_evaluation_that_came_to_no_end_is_told(copied, cli, tmp_path, decision, end):
    """By its time limit, or cancelled: of its run, which is finished, and of the sweep that it is a point of."""
    sweep = tmp_path / "sweep"
    (sweep / "sweeps").mkdir(parents=True)
    (sweep / "sweeps" / "a.json").write_text(json.dumps({"members": [{"directory": "one"}]}))
    run = copied("coded").rename(sweep / "one")
    (run / "slurm").mkdir()
    records.add_job(run / "slurm", {"job": "7_0", "stage": "evaluate"})
    records.add_attempt(run / "slurm", {"job": "7_0", "time": time.time(), "decision": decision, "end": end, "said": "give it more --time"})
    (run / "point.json").write_text(json.dumps({"state": "queued"}))
    (run / "evaluation.json").unlink(missing_ok=True)
    out = cli("status", sweep).out
    assert "    evaluate: give it more --time" in out and f"{sweep}: 1 points, 1 failed" in out
    (run / "point.json").write_text(json.dumps({"state": "done"}))  # and somebody evaluates it by hand, or converts it
    assert f"{sweep}: 1 points, 1 finished" in cli("status", sweep).out
    (run / "evaluation.json").write_text("{}")
    assert "give it more" not in cli("status", sweep).out


def test_who_cancels_a_point_that_its_sweep_evaluates_is_told_how(cli, copied, tmp_path, monkeypatch):
    run = copied("coded")
    (run / "point.json").write_text(json.dumps({"state": "running"}))
    monkeypatch.setattr(status, "command_of", lambda pid: b"megaflow")
    (run / ".lock").unlink(missing_ok=True)
    with cancelled_by_name(run.parent):
        assert (
            f"process {os.getpid()}, starts or evaluates {run.name}; megaflow cancel {run.parent} ends that sweep" in cli("cancel", run).out
        )


def test_a_point_that_is_just_starting_is_one(cli, tmp_path, monkeypatch):
    """It has nothing of a run yet; and one that its sweep was stopped before is told as it is noted."""
    point = tmp_path / "sweep" / "one"
    point.mkdir(parents=True)
    (point / "point.json").write_text(json.dumps({"state": "running"}))
    monkeypatch.setattr(status, "command_of", lambda pid: b"megaflow")
    with cancelled_by_name(point.parent):
        assert f"starts or evaluates one; megaflow cancel {point.parent} ends that sweep" in cli("cancel", point).out
    (point / "point.json").write_text(json.dumps({"state": "stopped"}))
    assert cli("status", point).code == 0 and "nothing to cancel" in cli("cancel", point).out


def test_what_is_cancelled_before_it_began_is_noted(cli, tmp_path, monkeypatch):
    """As a sweep that asks for itself has to know: its job has left the queue, and nobody wants it back."""
    run = tmp_path / "one"
    (run / "slurm").mkdir(parents=True)
    records.add_job(run / "slurm", {"job": "5_1", "stage": "pretrain"})
    queue = {"5_1": slurm.Queued("5_1", "PENDING", "Resources", "", "")}
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: dict(queue) if ids else {})
    monkeypatch.setattr(slurm, "ask", lambda *words, **more: queue.clear() or "")
    assert "job 5_1 of" in cli("cancel", run).out
    (attempt,) = records.attempts(run / "slurm")
    assert attempt["cancelled"] is True
    assert (attempt["decision"], attempt["end"], attempt["said"]) == ("left", "stopped", "cancelled before it began")
    found = state(cli, run)
    assert found["state"] == "stopped" and found["attempts"] is None


def test_a_job_of_a_sweep_is_told_once(cli, tmp_path, monkeypatch):
    asked = []
    sweep = tmp_path / "sweep"
    (sweep / "sweeps").mkdir(parents=True)
    (sweep / "sweeps" / "a.json").write_text(json.dumps({"members": [{"directory": "one"}]}))
    for place in (sweep / "slurm", sweep / "one" / "slurm"):
        place.mkdir(parents=True)
        records.add_job(place, {"job": "5_1", "stage": "pretrain"})
    monkeypatch.setattr(
        slurm, "waiting_or_running", lambda ids, *more: {"5_1": slurm.Queued("5_1", "RUNNING", "", "vm", "")} if ids else {}
    )
    monkeypatch.setattr(slurm, "ask", lambda *words, **more: asked.append(words) or "")
    told = cli("cancel", sweep)
    assert told.out.count("job 5_1") == 1 and f"job 5_1 of {sweep / 'one'} is told" in told.out
    # the script first, and then what it has started
    assert asked == [("scancel", "--batch", "--signal=TERM", "5_1"), ("scancel", "--signal=TERM", "5_1")]


def test_the_time_that_is_left():
    line = {"step": 40, "tokens": 4000, "tokens_per_second": 50.0}
    assert status.left(line, 100) == pytest.approx(60 * 100 / 50.0) and status.left(line, 40) == 0.0
    assert status.left(line, None) is None and status.left(line | {"tokens_per_second": None}, 100) is None


def test_what_is_to_be_evaluated_is_not_over(copied, cli, tmp_path, monkeypatch):
    """A point that is trained and whose evaluation waits in the queue; --live goes on until that has left it."""
    run = copied("coded")
    out = tmp_path / "out"
    (out / "sweeps").mkdir(parents=True)
    (out / "sweeps" / "s.json").write_text(json.dumps({"members": [{"directory": "a=1"}]}))
    shutil.move(run, out / "a=1")
    (out / "a=1" / "slurm").mkdir()
    for job, stage in (("7_0", "pretrain"), ("8_0", "evaluate")):
        records.add_job(out / "a=1" / "slurm", {"job": job, "stage": stage})
        records.add_attempt(out / "a=1" / "slurm", {"job": job, "attempt": 1, "time": 0.0, "end": "done", "said": ""})
    queue = [{"8_0": slurm.Queued("8_0", "PENDING", "Dependency", "", "")}] * 2
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: queue.pop() if queue else {})
    monkeypatch.setattr(status, "PERIOD", 0.0)
    told = cli("status", out, "--live")
    assert told.out.count("1 points, 1 to be evaluated") == 2 and told.out.count("1 points, 1 finished") == 1 and not queue
    assert json.loads(cli("status", out, "--json").out)["runs"][0]["attempts"] == 1  # of training


@pytest.mark.parametrize("noted, said", [("running", "1 stopped"), ("stopped", "1 stopped"), ("pending", "1 not begun")])
def test_a_point_whose_sweep_was_killed_before_it_was_a_run_is_stopped(cli, tmp_path, noted, said):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "s.json").write_text(json.dumps({"members": [{"directory": "a=1"}]}))
    (tmp_path / "a=1").mkdir()
    (tmp_path / "a=1" / "point.json").write_text(json.dumps({"state": noted}))
    assert f"1 points, {said}\n" in cli("status", tmp_path).out


def test_live_ends_where_what_was_left_out_is_all_that_is_not_finished(copied, cli, tmp_path):
    (tmp_path / "sweeps").mkdir()
    members = [{"directory": "a=1"}, {"directory": "a=2"}]
    (tmp_path / "sweeps" / "s.json").write_text(json.dumps({"members": members, "evaluate": {"rows": 4}}))
    shutil.move(copied("coded"), tmp_path / "a=1")
    (tmp_path / "a=2").mkdir()
    (tmp_path / "a=2" / "run.json").write_text("{}")
    (tmp_path / "a=2" / "point.json").write_text(json.dumps({"state": "stopped early", "said": "halving: 2 of 2"}))
    assert "2 points, 1 finished, 1 stopped early" in cli("status", tmp_path, "--live").out
    (tmp_path / "a=1" / "point.json").write_text(json.dumps({"state": "stopped"}))  # in its evaluation
    assert "2 points, 1 stopped, 1 stopped early" in cli("status", tmp_path).out


def test_many_jobs_are_asked_for_in_parts(monkeypatch):
    """Linux takes no argument of more than 128 KiB."""
    asked = []

    def squeue(*words, **more):
        (jobs,) = [word.partition("=")[2].split(",") for word in words if word.startswith("--jobs=")]
        asked.append(len(",".join(jobs)))
        return "".join(f"{id}|RUNNING|n1|N/A|None\n" for id in dict.fromkeys(jobs))

    monkeypatch.setattr(slurm, "ask", squeue)
    ids = [f"400000_{index}" for index in range(15_000)]
    assert list(slurm.queue(ids)) == ids and max(asked) < 2**17 and len(asked) == 8


def test_a_command_of_slurm_that_cannot_begin_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.Unreachable, match="squeue: No such file"):
        slurm.ask("squeue")


def test_a_folder_that_goes_while_it_is_looked_at_is_left_out(copied, cli, tmp_path, monkeypatch):
    """As that of a conversion does, which is renamed when it is whole."""
    run = copied("coded")
    gone = run.parent / "gone"
    gone.mkdir()
    below = status.folders
    monkeypatch.setattr(status, "folders", lambda place: [*below(place), *([gone] if place == run.parent and not gone.exists() else [])])
    gone.rmdir()
    assert [each["run"] for each in json.loads(cli("status", run.parent, "--json").out)["runs"]] == [str(run)]


def test_one_that_cannot_be_cancelled_leaves_no_other_alone(cli, tmp_path, monkeypatch):
    """Of one that is over by then nothing is said."""
    for name, job in (("a", "1"), ("b", "2"), ("c", "3")):
        (tmp_path / name / "slurm").mkdir(parents=True)
        records.add_job(tmp_path / name / "slurm", {"job": job, "stage": "pretrain"})
    queue = {id: slurm.Queued(id, "RUNNING", "", "n1", "") for id in "123"}
    told = []

    def scancel(*words, **more):
        if words[-1] == "1":
            del queue["1"]
        if words[-1] in "12":
            raise slurm.Unreachable("scancel: no")
        told.append(words[-1])
        return ""

    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: {id: queue[id] for id in ids if id in queue})
    monkeypatch.setattr(slurm, "ask", scancel)
    said = cli("cancel", tmp_path)
    assert told == ["3", "3"] and "job 3 of" in said.out
    assert said.code == 2 and said.err == f"megaflow: job 2 of {tmp_path / 'b'} is not told: scancel: no\n"


@pytest.mark.parametrize("decision, noted", [("over", 1), ("again", 2)])
def test_a_job_that_is_just_over_is_none_that_never_began(cli, tmp_path, monkeypatch, decision, noted):
    place = tmp_path / "one" / "slurm"
    place.mkdir(parents=True)
    records.add_job(place, {"job": "5", "stage": "pretrain"})
    records.add_attempt(place, {"job": "5", "attempt": 1, "time": 1.0, "end": "done", "decision": decision, "said": ""})
    ending = {"5": slurm.Queued("5", "COMPLETING", "", "n1", "")}
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: ending if ids else {})
    monkeypatch.setattr(slurm, "ask", lambda *words, **more: "")
    assert "job 5 of" in cli("cancel", tmp_path / "one").out
    assert len(records.attempts(place)) == noted
