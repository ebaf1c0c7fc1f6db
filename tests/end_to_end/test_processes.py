"""Several data-parallel processes: the same losses as one, whatever the stage, the shards, and what ZeRO shards."""

import itertools
import shutil

import pytest

from megaflow.train import checkpoint as checkpoints
from megaflow.train import run as runs
from megaflow.train import stages

LENGTH = ("train.steps=8", "train.checkpoint_every=4", "train.validate_every=4", "train.validation_rows=8")
CASES = [("coded", "flow"), ("char", "flow"), ("documents", "flow"), ("coded", "autoregressive"), ("char", "flow_map")]
EVERY = [(*case, zero) for case, zero in itertools.product(CASES, (0, 1, 2))]


@pytest.fixture
def words(config, trained, tmp_path):
    """The words after `megaflow` for a run below tmp_path."""

    def make(kind: str, family: str, name: str, *overrides: str) -> list[str]:
        command = "distill" if family == "flow_map" else "pretrain"
        teacher = [f"distill.teacher={trained(kind)}"] if family == "flow_map" else []
        return [command, str(config(kind, family)), f"run.dir={tmp_path / name}", *teacher, *LENGTH, *overrides]

    return make


def here(words: list[str]) -> None:
    """The same command, in this process."""
    assert getattr(stages, words[0])(words[1], words[2:]) == 0


def check(torchrun, words, tmp_path, kind: str, family: str, zero: int, *overrides: str) -> None:
    """Losses, norms and validations of two processes are those of one to rounding; half as many rows at once, so they accumulate too.

    By the optimizer that a command takes by itself, Muon and AdamW together.
    """
    tolerance = 1e-5 if family == "flow_map" else 2e-6
    here(words(kind, family, "one", "optim.name=auto", *overrides))
    done = torchrun(2, *words(kind, family, "two", "optim.name=auto", *overrides, f"parallel.zero={zero}", "train.micro_batch=2"))
    assert done.returncode == 0, done.stderr
    one, two = (runs.lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one] and len(one) == 10
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys() and ours["tokens"] == theirs["tokens"]
        for name in ours.keys() & {"loss", "validation_loss", "learning_rate"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance)
        if "grad_norm" in ours:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert runs.read_json(tmp_path / "two" / "run.json")["starts"][0]["processes"] == 2


@pytest.mark.long
@pytest.mark.parametrize("family", ["flow", "autoregressive"])
def test_two_processes_have_the_curve_of_one_for_long(torchrun, words, tmp_path, family):
    """Rounding does not grow into another curve within hundreds of steps."""
    overrides = ("optim.name=auto", "train.steps=300", "train.checkpoint_every=300", "train.validate_every=100")
    here([*words("coded", family, "one"), *overrides])
    done = torchrun(2, *words("coded", family, "two"), *overrides)
    assert done.returncode == 0, done.stderr
    one, two = (
        [line.get("loss", line.get("validation_loss")) for line in runs.lines(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5) and len(one) == 303


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 2])
def test_a_matrix_that_two_processes_share(torchrun, words, tmp_path, zero):
    """The border between the slices of three blocks lies within a matrix of the second, which Muon needs whole."""
    check(torchrun, words, tmp_path, "coded", "autoregressive", zero, "model.layers=3")
    one, two = (checkpoints.newest(tmp_path / name) for name in ("one", "two"))
    for part in ("weights", "averaged", "moments"):
        ours, theirs = two.tensors(part), one.tensors(part)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (ours[name] - value).norm() <= 5e-3 * value.norm(), f"{part} {name}"


@pytest.mark.parametrize(
    "kind, family, zero",
    [
        pytest.param("coded", "autoregressive", 0, marks=pytest.mark.long),
        pytest.param("coded", "autoregressive", 1, marks=pytest.mark.long),
        pytest.param("coded", "flow", 2, marks=pytest.mark.long),
        pytest.param("coded", "flow_map", 1, marks=pytest.mark.long),
        pytest.param("char", "flow_map", 2, marks=pytest.mark.long),
        pytest.param("char", "flow", 1, marks=pytest.mark.long),
        pytest.param("coded", "autoregressive", 2, marks=pytest.mark.long),
    ],
)
def test_two_processes_in_bf16(torchrun, words, tmp_path, kind, family, zero):
    """Gradients of fewer rows are rounded at other places: the losses of one process without sharding, to what bf16 holds."""
    overrides = ["optim.name=auto", "train.precision=bf16"] + ([] if family == "flow_map" else ["model.layers=3"])
    here(words(kind, family, "one", *overrides))
    done = torchrun(2, *words(kind, family, "two", *overrides, f"parallel.zero={zero}"))
    assert done.returncode == 0, done.stderr
    one, two = ([line["loss"] for line in runs.lines(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-3) and len(one) == 8


@pytest.mark.long
@pytest.mark.parametrize("kind, family, zero", EVERY)
def test_two_processes_have_the_losses_of_one(torchrun, words, tmp_path, kind, family, zero):
    check(torchrun, words, tmp_path, kind, family, zero)


@pytest.mark.long
def test_a_run_moves_to_another_layout_in_the_middle(torchrun, words, tmp_path):
    """Four steps on two processes under ZeRO 2, four more on one under ZeRO 0: the curve of one process all along."""
    overrides = ("optim.name=auto", "model.layers=3")
    here(words("coded", "autoregressive", "one", *overrides))
    both = words("coded", "autoregressive", "moved", *overrides)
    done = torchrun(2, *both, "parallel.zero=2")
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "moved"
    (directory / "summary.json").unlink()
    shutil.rmtree(checkpoints.folder(directory, 8))
    here([*both, "parallel.zero=0"])
    curves = [[line["loss"] for line in runs.lines(path / "metrics.jsonl") if "loss" in line] for path in (directory, tmp_path / "one")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and len(curves[0]) == 8
    assert [start["processes"] for start in runs.read_json(directory / "run.json")["starts"]] == [2, 1]


@pytest.mark.long
def test_what_one_process_refuses_ends_all(torchrun, words, tmp_path):
    """An indivisible batch and a changed key, found by one process or by all: everybody leaves, nobody waits for the others."""
    done = torchrun(2, *words("coded", "flow", "odd", "train.global_batch=7"))
    assert done.returncode != 0 and "train.global_batch=7 does not divide over 2 data-parallel processes" in done.stderr
    here(words("coded", "flow", "changed"))
    done = torchrun(2, *words("coded", "flow", "changed", "run.seed=1"))
    assert done.returncode != 0 and "run.seed (was 0, now 1)" in done.stderr
    before = len(runs.lines(tmp_path / "changed" / "metrics.jsonl"))
    done = torchrun(2, *words("coded", "flow", "changed"))
    assert done.returncode == 0 and "nothing to do" in done.stderr
    assert len(runs.lines(tmp_path / "changed" / "metrics.jsonl")) == before


def test_what_all_processes_refuse_is_said_once(torchrun, words):
    done = torchrun(3, *words("coded", "flow", "odd", "optim.learning_rat=1"))
    said = [line for line in done.stderr.splitlines() if line.startswith("megaflow: ")]
    assert done.returncode != 0 and len(said) == 1 and "optim.learning_rat" in said[0], done.stderr


def test_a_process_that_is_alone_with_its_refusal_says_it(process, words, environment, monkeypatch):
    """No other speaks for it, and nobody ends it."""
    monkeypatch.setitem(environment, "LOCAL_RANK", "1")
    done = process("-m", "megaflow", *words("coded", "flow", "odd", "optim.learning_rat=1"), timeout=60.0)
    assert done.returncode == 2 and done.stderr.startswith("megaflow: ") and "optim.learning_rat" in done.stderr
