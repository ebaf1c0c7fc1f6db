"""Real jobs of several processes in which one is killed, raises, hangs or was started otherwise: all end, and one sentence says why."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megaflow.parallel import watch as watches
from megaflow.train import checkpoint as checkpoints
from megaflow.train import run as runs
from megaflow.train.meter import SPEED
from tests import layout_job

FAULTY = Path(__file__).with_name("faulty.py")
LENGTH = ("train.steps=30", "train.checkpoint_every=5", "train.validate_every=30", "train.validation_rows=8")
SLOW = 10.0
"""Seconds that a busy machine, and a launcher that looks at its processes now and then, may add."""
LIMIT = 8
"""Seconds for train.hang_timeout, after which these jobs must have noticed."""
HOST = re.escape(os.uname().nodename)


@pytest.fixture
def words(config, tmp_path) -> Callable[..., list[str]]:
    """The words after `megaflow` for a run below tmp_path."""

    def make(name: str, *overrides: str) -> list[str]:
        return ["pretrain", str(config("coded")), f"run.dir={tmp_path / name}", *LENGTH, *overrides]

    return make


@pytest.fixture
def job(environment, tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """job(*arguments of torchrun): two processes and their launcher, ended with the test."""
    started = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for each in started:
        if each.poll() is None:
            each.terminate()  # the launcher ends its processes
            each.wait(timeout=60)


@pytest.fixture
def fails(job, words, tmp_path) -> Callable[..., list[list[str]]]:
    """fails(fault, rank, step, *overrides, noticed=seconds): what each process of a job that meets a fault says, line by line; not the
    launcher, which may speak before them."""

    def run(fault: str, rank: int, step: int, *overrides: str, noticed: float = watches.PERIOD) -> list[list[str]]:
        said = tmp_path / "said"
        started = job("--redirects=2", f"--log-dir={said}", FAULTY, fault, rank, step, *words("run", *overrides))
        started.communicate(timeout=200)
        assert started.returncode == 1
        if (met := tmp_path / "met").exists():  # found after `noticed` seconds, all have ended LEAVING later: docs/failures.md
            assert time.time() - met.stat().st_mtime < noticed + watches.LEAVING + SLOW
        return [path.read_text().splitlines() for path in sorted(said.glob("*/attempt_0/*/stderr.log"))]

    return run


def sentence(told: list[list[str]]) -> str:
    """The only one of all processes, and the last line of the one that says it."""
    said = [line for lines in told for line in lines if line.startswith("megaflow: ")]
    assert len(said) == 1 and len(told) == 2 and said[0] in (lines[-1] for lines in told if lines), told
    return said[0]


def tracebacks(told: list[list[str]]) -> int:
    """How many, those of gloo counted: its errors are what another's end looks like."""
    return sum("Traceback" in line or "gloo" in line for lines in told for line in lines)


def curve(directory: Path) -> list[dict]:
    """Everything that was logged, less the speed."""
    return [{k: v for k, v in line.items() if k not in SPEED} for line in runs.lines(directory / "metrics.jsonl")]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_is_killed(fails, rank):
    """The other one waits in a collective call, or meets the error that gloo makes of it: neither is seen. The step is one that both have
    told of: what was killed at the start of step 7 may have told of step 6 alone, and the other may still be at the end of it."""
    told = fails("kill", rank, 7)
    assert re.fullmatch(rf"megaflow: rank {rank} on {HOST} ended without a word \(.*\) in step [67]", sentence(told))
    assert tracebacks(told) == 0


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises(fails, rank):
    """Its traceback, nobody else's, and what it comes to."""
    told = fails("fail", rank, 7)
    assert sentence(told) == f"megaflow: rank {rank} on {os.uname().nodename} raised ValueError: the planted fault in step 7"
    assert tracebacks(told) == 1 and told[rank][-2] == "ValueError: the planted fault"


@pytest.mark.long
def test_a_rank_that_hangs(fails):
    """All stand in the same step; the one that has not come to the call in which the others wait is named, and where it stands."""
    told = fails("sleep", 1, 5, f"train.hang_timeout={LIMIT}", noticed=LIMIT + 2 * watches.PERIOD)
    found = re.fullmatch(rf"megaflow: rank 1 on {HOST} hangs in step 5 since (\d+) s \(.*\); the stack of rank 1: (.*)", sentence(told))
    assert LIMIT <= int(found[1]) < 3 * LIMIT and re.match(r"faulty\.py:\d+ sleep < faulty\.py:\d+ accumulate < loop\.py", found[2])


@pytest.mark.long
def test_a_rank_that_stands_still_with_all_its_threads(fails):
    torchrun = 30.0  # seconds until it kills what does not react to SIGTERM
    told = fails("freeze", 1, 5, f"train.hang_timeout={LIMIT}", noticed=LIMIT + 2 * watches.PERIOD + torchrun)
    found = re.fullmatch(rf"megaflow: rank 1 on {HOST} gave no sign of life for (\d+) s in step 5: .*", sentence(told))
    assert LIMIT <= int(found[1]) < 3 * LIMIT


@pytest.mark.long
@pytest.mark.parametrize(
    "fault, differs",
    [
        pytest.param("config", "optim.learning_rate is 0.005 on rank 0 ({host}), 0.004 on rank 1 ({host})", marks=pytest.mark.long),
        ("packages", "the version of numpy is {numpy!r} on rank 0 ({host}), '0.0.1' on rank 1 ({host})"),
    ],
)
def test_ranks_that_disagree(fails, tmp_path, fault, differs):
    """Refused by one sentence that names ranks, hosts and what differs, before there is a run."""
    told = fails(fault, 1, 0)
    expected = differs.format(host=os.uname().nodename, numpy=runs.versions()["numpy"])
    assert sentence(told) == (f"megaflow: the processes do not agree: {expected}; start all of them with the same config and packages")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_launcher_starts_again_and_the_run_goes_on(job, words, ranks, tmp_path):
    """kill -9 of the first rank, which holds the run's lock: from the last checkpoint to the curve of an undisturbed run, bit for bit."""
    ranks(2, layout_job.train, words("undisturbed"))
    started = job("--max-restarts=3", FAULTY, "kill", 0, 23, *words("run"))
    _, told = started.communicate(timeout=250)
    assert started.returncode == 0, told
    assert curve(tmp_path / "run") == curve(tmp_path / "undisturbed")
    first, second = (start["step"] for start in runs.read_json(tmp_path / "run" / "run.json")["starts"])
    assert first == 0 and second in (10, 15, 20) and f"continues after step {second}" in told
    assert told.count("ended without a word") == 1


@pytest.mark.long
@pytest.mark.parametrize("moment", ["start", "steps"])
def test_a_signal_is_no_failure(job, words, tmp_path, moment):
    """The launcher hands SIGTERM on to all: in the steps they save and leave with 75, before them they leave; the watch is silent."""
    started = job("-m", "megaflow", *words("run", "train.steps=100000", "train.checkpoint_every=100000"))
    awaited = tmp_path / "run" / (".lock" if moment == "start" else "metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (awaited.exists() and (moment == "start" or awaited.stat().st_size)):
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=60)
    said = [line for line in told.splitlines() if line.startswith("megaflow: ") or "stopped by a signal" in line]
    assert len(said) == 1 and "stopped by a signal" in said[0] and not re.search(r"rank \d on", told), told
    assert bool(checkpoints.steps(tmp_path / "run")) == (moment == "steps")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_before_its_steps(fails, rank):
    """It says so, whichever it is, and the others end with it."""
    assert sentence(fails("stop", rank, 0)) == "megaflow: stopped by a signal outside of training steps; the same command goes on"


@pytest.mark.parametrize(
    "what, tensor, data, zero",
    [
        pytest.param("gradient", 2, 2, 1, marks=pytest.mark.long),
        ("loss", 1, 2, 3),
        pytest.param("gradient", 1, 2, 0, marks=pytest.mark.long),
        pytest.param("loss", 2, 1, 0, marks=pytest.mark.long),
        pytest.param("gradient", 1, 4, 2, marks=pytest.mark.long),
        pytest.param("gradient", 2, 2, 3, marks=pytest.mark.long),
    ],
)
def test_a_step_that_is_not_finite_on_one_process_is_passed_over_on_all(ranks, words, tmp_path, what, tensor, data, zero):
    """Weights, averages, moments and clock stay as they are on every process, and the run goes on."""
    overrides = (f"parallel.tensor={tensor}", f"parallel.zero={zero}", "model.heads=4", "optim.name=auto")
    overrides += ("train.skip_nonfinite=1", "train.checkpoint_every=1", "train.keep_checkpoints=9")
    for steps in (3, 5):  # the last step of a run is saved, whatever it was
        started = words("run", *overrides, f"train.steps={steps}")
        ranks(tensor * data, layout_job.train_poisoned, started, what, tensor * data - 1, 3)
    before, after = (checkpoints.open_checkpoint(checkpoints.folder(tmp_path / "run", step)) for step in (2, 3))
    for group in ("weights", "averaged", "moments", "stage"):
        ours, theirs = after.tensors(group), before.tensors(group)
        assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    lines = runs.lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 4, 5] and [line["step"] for line in lines if "skipped" in line] == [
        3
    ]
    last = checkpoints.newest(tmp_path / "run").tensors("weights")
    assert any((last[name] != value).any() for name, value in after.tensors("weights").items())
