"""What a run notes of how its last attempt ended: who starts it again, or looks at it, knows no more."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megaflow.files import last_line
from megaflow.process import STOPPED
from megaflow.train import outcome, stages
from megaflow.train.loop import NotFinite

SHORT = ("train.steps=4", "train.validation_rows=8", "train.checkpoint_every=2")


@pytest.fixture
def words(config, tmp_path) -> list[str]:
    return [str(config("coded")), f"run.dir={tmp_path / 'run'}", *SHORT]


def test_a_finished_run(words, tmp_path):
    assert stages.pretrain(words[0], words[1:]) == 0
    assert outcome.read(tmp_path / "run")["code"] == 0 and outcome.newest_step(tmp_path / "run") == 4


def test_a_run_whose_loss_is_not_finite(words, tmp_path):
    """Its own sentence; the next attempt takes it away and leaves its own."""
    with pytest.raises(NotFinite) as error:
        stages.pretrain(words[0], [*words[1:], "optim.learning_rate=1e30", "optim.warmup_steps=0"])
    found = outcome.read(tmp_path / "run")
    assert found["code"] == 1 and found["said"] == str(error.value) and time.time() - found["time"] < 100.0


def test_an_error_that_nobody_has_thought_of(words, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "train", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stages.pretrain(words[0], words[1:])
    assert outcome.read(tmp_path / "run")["said"] == "raised ZeroDivisionError: division by zero"


def test_another_process_on_the_same_run_leaves_its_note_alone(words, tmp_path, cli):
    assert stages.pretrain(words[0], words[1:]) == 0
    before = (tmp_path / "run" / outcome.FILE).read_text()
    assert cli("pretrain", *words, "run.seed=1").code == 2
    assert (tmp_path / "run" / outcome.FILE).read_text() == before


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, STOPPED), (signal.SIGKILL, None)])
def test_a_run_that_a_signal_ends(words, tmp_path, environment, number, code):
    """One that is killed notes nothing."""
    command = [sys.executable, "-m", "megaflow", "pretrain", *words, "train.steps=100000", "train.checkpoint_every=100000"]
    started = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        while not last_line(tmp_path / "run" / "metrics.jsonl", "loss"):
            assert started.poll() is None
            time.sleep(0.05)
        os.kill(started.pid, number)
        started.wait(timeout=60)
    finally:
        started.kill()
    found = outcome.read(tmp_path / "run")
    assert (None if found is None else found["code"]) == code


def test_with_two_processes_who_speaks_notes_it(torchrun, words, tmp_path):
    done = torchrun(2, "pretrain", *words, "optim.learning_rate=1e30", "optim.warmup_steps=0")
    assert done.returncode
    assert " is " in outcome.read(tmp_path / "run")["said"] and json.loads((tmp_path / "run" / outcome.FILE).read_text())["code"] == 1


def test_a_damaged_note_is_none(tmp_path):
    (tmp_path / outcome.FILE).write_text("{")
    assert outcome.read(tmp_path) is None and outcome.newest_step(tmp_path) == 0
