"""`megaflow convert RUN OUT --to run`: the same run, its checkpoint in the files of another number of processes."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.export.convert import convert
from megaflow.export.recut import share
from megaflow.parallel import boxes
from megaflow.process import STOPPED
from megaflow.train import checkpoint as checkpoints
from megaflow.train import run as runs
from megaflow.train import stages
from tests import layout_job

GROUPS = ("weights", "averaged", "moments", "stage")


def same(one: checkpoints.Checkpoint, other: checkpoints.Checkpoint) -> bool:
    """Every tensor of every group, the numbers of the state, and the identity."""
    equal = all(torch.equal(one.read(name), other.read(name)) for name in other.names())
    return equal and one.names() == other.names() and (one.state, one.sha256) == (other.state, other.sha256)


def goes_on(config, run, steps: int) -> list[float]:
    """Train a run up to so many steps; its losses."""
    assert stages.pretrain(str(config), [f"run.dir={run}", f"train.steps={steps}"]) == 0
    return [line["loss"] for line in runs.lines(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("processes", [1, 3])
def test_training_goes_on_as_it_would_have(copied, config, tmp_path, processes):
    run, out = copied("coded"), tmp_path / "out"
    told = convert(run, out, to="run", processes=processes)
    assert told[0].endswith(f"4 files of tensors became {3 * processes + 1}; training continues with run.dir={out}")
    assert told[1].endswith("tensors read back: equal to the checkpoint's") and told[2].endswith("before and after: equal")
    assert same(checkpoints.newest(out), checkpoints.newest(run))
    assert goes_on(config("coded"), out, 43) == goes_on(config("coded"), run, 43)
    assert same_but_seconds(checkpoints.newest(out), checkpoints.newest(run))


def same_but_seconds(one: checkpoints.Checkpoint, other: checkpoints.Checkpoint) -> bool:
    return one.sha256 == other.sha256 and all(torch.equal(one.read(name), other.read(name)) for name in other.names())


def test_from_the_files_of_four_processes_into_one_and_into_many(ranks, config, tmp_path):
    """Trained as tensor 2 x data 2 under ZeRO 2; what becomes of it is read by any layout again."""
    run = tmp_path / "mesh"
    words = ["pretrain", str(config("coded", "flow")), f"run.dir={run}", "parallel.tensor=2", "parallel.zero=2"]
    words += ["train.steps=2", "train.validation_rows=8"]
    ranks(4, layout_job.train, words)
    found = checkpoints.newest(run)
    assert len(found.files) == 13
    for processes in (1, 5):
        out = tmp_path / f"files-{processes}"
        convert(run, out, to="run", processes=processes)
        again = checkpoints.newest(out)
        assert same(again, found)
        assert {name.rsplit("-", 3)[0] for name in again.files} == set(GROUPS)
        assert len(again.files) == 3 * processes + 1
        convert(out, tmp_path / f"model-{processes}")
    models = [(tmp_path / f"model-{processes}" / "model.safetensors").read_bytes() for processes in (1, 5)]
    assert models[0] == models[1]
    words[2], words[5] = f"run.dir={tmp_path / 'files-5'}", "train.steps=3"
    assert "continues after step 2" in ranks(4, layout_job.train, words)[0]


def test_a_map_stays_finished_and_what_is_its_own_stays_behind(copied, config, tmp_path):
    run, out = copied("char", "flow_map"), tmp_path / "out"
    content = json.loads((run / "run.json").read_text()) | {"wandb": "abcd"}
    (run / "run.json").write_text(json.dumps(content))
    (run / "wandb").mkdir()
    convert(run, out, to="run", processes=2)
    about = json.loads((out / "run.json").read_text())
    assert about["converted"] == {"from": str(run), "step": 40, "processes": 2} and "wandb" not in about
    assert (about["stage"], about["starts"]) == (content["stage"], content["starts"])
    assert {path.name for path in run.iterdir()} - {path.name for path in out.iterdir()} <= {
        ".lock",
        ".evaluating",
        "wandb",
        "ended.json",
        "spikes.jsonl",
        "evaluation.json",
        "judge.npz",
    }
    assert runs.read_config(out).config.run.dir == str(out)
    teacher = runs.read_config(run).config.distill.teacher
    assert stages.distill(str(config("char", "flow_map")), [f"run.dir={out}", f"distill.teacher={teacher}"]) == 0
    assert len(json.loads((out / "run.json").read_text())["starts"]) == len(content["starts"])  # nothing to do


def test_an_earlier_step_ends_the_curve_there(trained, tmp_path):
    convert(trained("coded"), tmp_path / "out", to="run", step=30)
    assert checkpoints.steps(tmp_path / "out") == [30]
    assert not (tmp_path / "out" / "summary.json").exists()  # it is not finished
    assert max(line["step"] for line in runs.lines(tmp_path / "out" / "metrics.jsonl")) == 30


@pytest.mark.parametrize("to", ["run", "hf"])
def test_a_run_that_paused_goes_on_in_what_it_became(config, tmp_path, to):
    """As it does from a point that a halving has stopped early."""
    run, out, words = tmp_path / "run", tmp_path / "out", ["train.steps=6", "train.validate_every=6", "train.validation_rows=8"]
    assert stages.pretrain(str(config("coded")), [f"run.dir={run}", *words, "train.pause_at=3"]) == STOPPED
    convert(run, out if to == "run" else tmp_path / "model", to=to)
    if to == "hf":
        convert(tmp_path / "model", out, origin="hf")
    assert stages.pretrain(str(out / "config.yaml"), [f"run.dir={out}"]) == 0
    assert checkpoints.newest(out).state["step"] == 6


def test_nothing_is_left_of_one_that_fails(cli, copied, tmp_path):
    run = copied("coded")
    shutil.rmtree(run / "shards")
    told = cli("convert", run, tmp_path / "out", "--to", "run")
    assert told.code == 2 and "restore this folder of the run" in told.err
    assert [path.name for path in tmp_path.iterdir()] == [run.name]


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.integers(1, 12), st.sampled_from(["weights/a", "stage/a"]))
def test_shares_make_up_the_tensor(shape, size, name):
    held = [at for rank in range(size) if (at := share(name, shape, rank, size)) is not None]
    assert boxes.fault(shape, held) is None
    assert len(held) == (1 if name == "stage/a" or not shape or not all(shape) else min(size, shape[0]))
