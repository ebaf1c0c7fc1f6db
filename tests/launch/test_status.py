"""How runs are doing, by what lies in them: on this machine, and where Slurm is not asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megaflow.files import last_line
from megaflow.launch import status


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
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # megaflow"])
    try:
        while b"megaflow" not in status.command_of(other.pid):  # it is just becoming what it is to be
            time.sleep(0.01)
        for process in (other.pid, os.getpid(), 2**22 - 1):
            (tmp_path / f"{status.POOL}{process}").write_text(f"{process} on {os.uname().nodename}")
        assert other.pid in status.pools(tmp_path) and 2**22 - 1 not in status.pools(tmp_path)
    finally:
        other.kill()
        other.wait()


def test_where_there_is_no_run_that_is_said(cli, tmp_path):
    for place, words in ((tmp_path, "there is no run"), (tmp_path / "nowhere", "no such directory")):
        told = cli("status", place)
        assert told.code == 2 and words in told.err and told.err.count("\n") == 1
    told = cli("logs", tmp_path)
    assert told.code == 2 and "no job was submitted for it" in told.err
