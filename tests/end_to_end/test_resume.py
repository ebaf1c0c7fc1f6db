"""Real training processes, killed or stopped: the same command continues them, and no loss is another than that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megaflow.train import checkpoint as checkpoints
from megaflow.train import run as runs
from megaflow.train import stages
from megaflow.train.meter import SPEED

STEPS, EVERY = 150, 20
LENGTH = (
    "optim.name=auto",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={EVERY}",
    "train.validate_every=50",
    "train.validation_rows=8",
)


@pytest.fixture(scope="module")
def command(config, trained) -> Callable[[str, str, Path], list[str]]:
    """The words after `megaflow` that train a family on a kind of data into a directory."""

    def words(kind: str, family: str, directory: Path) -> list[str]:
        if family == "flow_map":
            return ["distill", str(config(kind, family)), f"run.dir={directory}", f"distill.teacher={trained(kind)}", *LENGTH]
        return ["pretrain", str(config(kind, family)), f"run.dir={directory}", *LENGTH]

    return words


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Callable[[str, str], Path]:
    """The run that nothing happened to."""
    made: dict[tuple[str, str], Path] = {}

    def directory(kind: str, family: str) -> Path:
        if (kind, family) not in made:
            made[kind, family] = tmp_path_factory.mktemp("undisturbed") / "run"
            finish(command(kind, family, made[kind, family]))
        return made[kind, family]

    return directory


def finish(words: list[str]) -> None:
    """Run a command to its end in this process, which computes what one of its own would."""
    assert getattr(stages, words[0])(words[1], words[2:]) == 0


class Training:
    """A real training process whose steps can be watched."""

    def __init__(self, words: list[str], directory: Path, environment: dict[str, str]) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megaflow", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def last_step(self) -> int:
        return max((line["step"] for line in runs.lines(self.directory / "metrics.jsonl")), default=0)

    def stop_where(self, wanted: Callable[["Training"], bool]) -> int:
        """Freeze the process (SIGSTOP) at a wanted moment; returns its last logged step."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.stdout.read()
            if wanted(self):
                os.kill(self.process.pid, signal.SIGSTOP)
                if wanted(self):  # still so, now that nothing moves
                    return self.last_step()
                os.kill(self.process.pid, signal.SIGCONT)
            time.sleep(0.005)
        raise TimeoutError(f"the run did not come to the wanted moment; it is at step {self.last_step()}")

    def send(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal to the frozen process, let it go on; its exit code and what it said."""
        os.kill(self.process.pid, number)
        os.kill(self.process.pid, signal.SIGCONT)
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def start(command, environment, tmp_path):
    """start(kind, family, *overrides): a Training below tmp_path; ended with the test."""
    started: list[Training] = []

    def training(kind: str, family: str, *overrides: str) -> Training:
        started.append(Training([*command(kind, family, tmp_path / "run"), *overrides], tmp_path / "run", environment))
        return started[-1]

    yield training
    for each in started:
        each.process.kill()
        each.process.communicate()


def curve(directory: Path) -> list[dict]:
    """Everything that was logged, less the speed."""
    return [{k: v for k, v in line.items() if k not in SPEED} for line in runs.lines(directory / "metrics.jsonl")]


def past_a_checkpoint(training: Training) -> bool:
    """One that is on disk: it is written beside the steps that follow."""
    step = training.last_step()
    return step > EVERY and 3 <= step % EVERY <= EVERY - 3 and step < STEPS - 30 and bool(checkpoints.steps(training.directory))


FAMILIES = [(kind, family) for kind in ("char", "coded") for family in ("flow", "autoregressive", "flow_map")]
COVER = [("coded", "flow_map")]
KILLED = [case if case in COVER else pytest.param(*case, marks=pytest.mark.long) for case in FAMILIES]


@pytest.mark.parametrize("kind, family", KILLED)
def test_kill_in_the_middle_of_the_steps(start, command, undisturbed, kind, family):
    """kill -9 some steps after a checkpoint: those steps are taken again, and come out the same to the last bit.

    By the optimizer that a command takes by itself: Muon and AdamW together.
    """
    training = start(kind, family)
    killed_at = training.stop_where(past_a_checkpoint)
    code, _ = training.send(signal.SIGKILL)
    assert code == -signal.SIGKILL
    saved = checkpoints.steps(training.directory)[-1]
    assert 0 < saved < killed_at < STEPS and not (training.directory / "summary.json").exists()
    finish(command(kind, family, training.directory))
    assert curve(training.directory) == curve(undisturbed(kind, family))
    starts = runs.read_json(training.directory / "run.json")["starts"]
    assert [each["step"] for each in starts] == [0, saved]


@pytest.mark.parametrize("kind, number", [("char", signal.SIGTERM), pytest.param("coded", signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_signal_saves_and_leaves_with_75(start, command, undisturbed, kind, number):
    """A checkpoint is written right where the signal came, between two of the regular ones, and the same command goes on from it."""
    training = start(kind, "flow")
    stopped_at = training.stop_where(past_a_checkpoint)
    code, said = training.send(number)
    step = checkpoints.steps(training.directory)[-1]
    assert code == 75 and f"stopped by a signal after step {step}; saved, the same command continues" in said and "Traceback" not in said
    assert stopped_at <= step <= stopped_at + 2 and training.last_step() == step
    finish(command(kind, "flow", training.directory))
    assert curve(training.directory) == curve(undisturbed(kind, "flow"))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGUSR1])
def test_a_signal_before_the_first_step_leaves_with_75(start, command, undisturbed, number):
    """While the engine starts there is nothing to save; the same command starts again."""
    training = start("coded", "flow")
    training.stop_where(lambda training: (training.directory / ".lock").exists())
    code, said = training.send(number)
    assert code == 75 and "stopped by a signal" in said and "Traceback" not in said
    assert not checkpoints.steps(training.directory) or training.last_step() > 0
    finish(command("coded", "flow", training.directory))
    assert curve(training.directory) == curve(undisturbed("coded", "flow"))


def test_kill_while_a_checkpoint_is_written(start, command, undisturbed):
    """What is half written is no checkpoint: the run goes on from the one before and cleans up."""
    training = start("coded", "flow", "train.checkpoint_every=1")
    half = "checkpoints/*.partial"
    training.stop_where(lambda training: checkpoints.steps(training.directory) and list(training.directory.glob(half)))
    training.send(signal.SIGKILL)
    assert list(training.directory.glob(half)) and checkpoints.steps(training.directory)[-1] < STEPS
    finish(command("coded", "flow", training.directory))
    assert curve(training.directory) == curve(undisturbed("coded", "flow"))
    assert not list(training.directory.glob(half))


@pytest.mark.long
@pytest.mark.parametrize("kind, family", KILLED)
def test_killed_again_and_again(start, command, undisturbed, kind, family):
    """At moments that nobody chose, the first of them before any checkpoint."""
    killed = 0
    for attempt in range(6):
        training = start(kind, family)
        time.sleep(3.0 + 0.8 * attempt)
        if training.process.poll() is not None:
            break
        training.process.kill()
        training.process.communicate(timeout=30)
        killed += 1
    assert killed
    finish(command(kind, family, training.directory))
    assert curve(training.directory) == curve(undisturbed(kind, family))


@pytest.mark.long
def test_a_second_process_is_refused_and_the_first_goes_on(start, cli, command, undisturbed):
    training = start("coded", "flow")
    training.stop_where(lambda training: training.last_step() > 2)
    told = cli(*command("coded", "flow", training.directory))
    assert told.code == 2 and f"process {training.process.pid} on " in told.err and "is already working on this run" in told.err
    os.kill(training.process.pid, signal.SIGCONT)
    assert training.process.wait(timeout=120) == 0
    assert curve(training.directory) == curve(undisturbed("coded", "flow"))
    assert json.loads((training.directory / "summary.json").read_text())["steps"] == STEPS
