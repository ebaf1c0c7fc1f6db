"""The ranks of a host within a job: who hears a signal, and when an attempt is over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaflow.files import lines
from megaflow.launch import host
from megaflow.process import STOPPED
from megaflow.train import outcome

FEW = ["train.steps=100000", "train.checkpoint_every=100000", "train.validate_every=100000", "train.validation_rows=8"]


def step(run: Path) -> int:
    return max((line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line), default=0)


def below(process: int) -> list[int]:
    """A process and all that it has started, as Slurm counts a step's without control groups."""
    return [process, *(each for child in host.children(process) for each in below(child))]


def until(met, patience: float = 120.0) -> None:
    end = time.monotonic() + patience
    while not met():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_to_every_process_of_a_step_is_heard_by_its_ranks_alone(config, tmp_path, number):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "megaflow.launch.host", "--place", tmp_path / "slurm", "--processes", "2", "--"]
    words = ["pretrain", config("coded"), f"run.dir={run}", "train.global_batch=8", *FEW]
    started = subprocess.Popen([*map(str, command), *map(str, words)], env=os.environ | {"SLURM_JOB_ID": "1"}, cwd=tmp_path)
    try:
        until(lambda: step(run) > 3)
        everyone = below(started.pid)
        assert len(everyone) >= 4  # host, launcher and two ranks
        for process in everyone:
            os.kill(process, number)
        code = started.wait(timeout=60)
        assert not any(map(host.alive, everyone[1:]))  # and what they have to note is noted
        assert code == 1 and outcome.read(run)["code"] == STOPPED
        assert outcome.newest_step(run) == step(run) > 3
    finally:
        for process in below(started.pid):
            os.kill(process, signal.SIGKILL) if host.alive(process) else None


def test_a_process_that_nobody_has_waited_for_is_gone():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: not host.alive(ended.pid), 30.0)
    assert Path(f"/proc/{ended.pid}").exists()
    ended.wait()
    assert not host.alive(ended.pid) and host.alive(os.getpid())


def test_every_attempt_meets_at_another_port(tmp_path):
    environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    first = host.command(["pretrain", "x"], 2, tmp_path, environment)
    second = host.command(["pretrain", "x"], 2, tmp_path, environment | {"SLURM_RESTART_COUNT": "1"})
    port = next(word for word in first if word.startswith("--master-port="))
    assert port not in second and any(word.startswith("--master-port=") for word in second)
    assert "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT" in first
