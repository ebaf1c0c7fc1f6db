"""What Weights & Biases and TensorBoard find in a run: read from the files that they were given, offline."""

import json
import struct
from pathlib import Path

import pytest

from megaflow.errors import UserError
from megaflow.files import lines
from megaflow.train import stages

BLOCK = 32768


@pytest.fixture
def words(config, tmp_path) -> list[str]:
    return [str(config("coded")), f"run.dir={tmp_path / 'run'}", "train.steps=6", "train.validation_rows=8", "train.checkpoint_every=3"]


def records(file: Path) -> list:
    """The records of an offline file of wandb: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, found, part = file.read_bytes(), 7, [], b""
    while place < len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        if not size and not kind:
            break
        part, place = part + data[place + 7 : place + 7 + size], place + 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


def test_points_of_a_sweep_are_one_group_with_what_differs_as_config(words, tmp_path, process):
    """In a process of its own: the service that wandb starts is one for all runs of a process, whatever became of them."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "point.json").write_text(json.dumps({"labels": {"flow.clock.name": "uniform", "size": "model.layers=2"}}))
    done = process("-m", "megaflow", "pretrain", *words, "log.wandb=offline", "log.group=clocks", "flow.clock.name=uniform")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    found = records(file)
    (run,) = [record.run for record in found if record.HasField("run")][:1]
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert run.run_group == "clocks" and run.display_name == "run"
    assert settings["sweep/flow.clock.name"] == settings["flow.clock.name"] == "uniform" and settings["sweep/size"] == "model.layers=2"
    losses = [
        json.loads(item.value_json) for record in found for item in record.history.item if "loss" in (item.key, "/".join(item.nested_key))
    ]
    assert losses == [line["loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]


def events(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {name: {event.step: event.value for event in read.Scalars(name)} for name in read.Tags()["scalars"]}


def test_tensorboard_has_the_curve_of_a_run_that_went_on(words, tmp_path):
    """What a start has written after its last checkpoint is taken back, as in metrics.jsonl."""
    on = "log.tensorboard=true"
    assert stages.pretrain(words[0], [*words[1:], on]) == 0
    (tmp_path / "run" / "summary.json").unlink()
    assert stages.pretrain(words[0], [*words[1:], on, "train.steps=8"]) == 0
    found, written = events(tmp_path / "run" / "tensorboard"), lines(tmp_path / "run" / "metrics.jsonl")
    for name in ("loss", "validation_loss", "learning_rate"):
        assert found[name] == pytest.approx({line["step"]: line[name] for line in written if name in line}, rel=1e-6)


def test_without_the_package_that_is_said(words, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="log.tensorboard=true needs the package tensorboard"):
        stages.pretrain(words[0], [*words[1:], "log.tensorboard=true"])


def test_a_run_pauses_and_goes_on_with_the_losses_of_one_that_does_not(words, tmp_path, trained):
    """It validates where it pauses; asked to pause where it has been, it leaves at once."""
    assert stages.pretrain(words[0], [*words[1:], "train.pause_at=4"]) == 75
    run = tmp_path / "run"
    assert lines(run / "metrics.jsonl")[-1]["step"] == 4 and "validation_loss" in lines(run / "metrics.jsonl")[-1]
    assert stages.pretrain(words[0], [*words[1:], "train.pause_at=4"]) == 75
    assert stages.pretrain(words[0], [*words[1:], "train.pause_at=0"]) == 0
    assert stages.pretrain(words[0], [*words[1:], f"run.dir={tmp_path / 'other'}"]) == 0
    ours, theirs = ([line["loss"] for line in lines(path / "metrics.jsonl") if "loss" in line] for path in (run, tmp_path / "other"))
    assert ours == theirs and len(ours) == 6
