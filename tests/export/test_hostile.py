"""Folders that somebody else has made: refused with one sentence, and nothing that lies in them is ever executed."""

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megaflow.export.convert import convert
from megaflow.files import hashed
from megaflow.train import checkpoint as checkpoints


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """The file that a trap makes; the trap works."""
    file = tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(file)))
    assert file.exists()
    file.unlink()
    return file


def poison(path: Path, how: str, sprung: Path) -> None:
    """Put a trap in a file's place."""
    path.unlink(missing_ok=True)
    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap(sprung)))
    elif how == "torch":
        torch.save({"weight": torch.ones(2), "trap": Trap(sprung)}, path)
    else:
        with path.open("wb") as file:
            np.save(file, np.array([Trap(sprung)], dtype=object), allow_pickle=True)


def described(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def change_manifest(run: Path, change: Callable[[dict], None]) -> Path:
    """Change what the newest checkpoint says of itself, with the hash that belongs to it: a hash is no signature."""
    folder = checkpoints.folder(run, checkpoints.steps(run)[-1])
    content = json.loads((folder / "manifest.json").read_text())["checkpoint"]
    change(content)
    (folder / "manifest.json").write_text(json.dumps({"sha256": hashed(content), "checkpoint": content}))
    return folder


def rename_file(content: dict, old: str, new: str) -> None:
    content["files"][new] = content["files"].pop(old)
    for tensor in content["tensors"].values():
        tensor["boxes"] = [[new if file == old else file, at] for file, at in tensor["boxes"]]


def refused(cli, *words: object) -> str:
    told = cli("convert", *words)
    lines = [line for line in told.err.splitlines() if not line.startswith(("check ", "write ", "verify "))]
    assert told.code == 2 and len(lines) == 1 and lines[0].startswith("megaflow: "), told.err
    return lines[0]


WAYS = [("--weights", "live"), ("--weights", "averaged"), ("--to", "run")]
AVERAGED, WEIGHTS = "averaged-00000-of-00001.safetensors", "weights-00000-of-00001.safetensors"


def test_a_pickle_beside_the_files_of_a_checkpoint(cli, copied, sprung):
    run = copied("coded")
    folder = checkpoints.folder(run, checkpoints.steps(run)[-1])
    poison(folder / "optim.pt", "torch", sprung)
    for words in (("convert", run, run.parent / "out"), ("sample", run, "--steps", 1)):
        told = cli(*words)
        assert told.code == 2 and told.err.splitlines()[-1].startswith(f"megaflow: {folder / 'optim.pt'}: a pickle runs whatever it holds")
    assert not sprung.exists()


class TestPickles:
    @pytest.mark.parametrize("how", ["pickle", "torch"])
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("known", [False, True], ids=["unannounced", "announced"])
    def test_in_place_of_safetensors(self, cli, copied, sprung, tmp_path, how, way, known):
        run = copied("coded")
        for name in (AVERAGED, WEIGHTS):
            file = checkpoints.folder(run, 40) / name
            poison(file, how, sprung)
            if known:
                change_manifest(run, lambda content, name=name, file=file: content["files"].update({name: described(file)}))
        sentence = refused(cli, run, tmp_path / "out", *way)
        assert ("not a safetensors file" if known else "not the file that was written") in sentence
        assert not sprung.exists() and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize("name", ["config.yaml", "origin.json", "run.json", "flow.safetensors", "shards/prepared.json"])
    @pytest.mark.parametrize("how", ["pickle", "torch"])
    def test_in_place_of_another_file(self, cli, copied, sprung, tmp_path, name, how):
        run = copied("coded")
        poison(run / name, how, sprung)
        refused(cli, run, tmp_path / "out")
        assert not sprung.exists() and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("how", ["pickle", "numpy"])
    def test_in_place_of_counts(self, cli, copied, sprung, tmp_path, how):
        run = copied("coded", "autoregressive")
        poison(run / "shards" / "unigram.npy", how, sprung)
        prepared = json.loads((run / "shards" / "prepared.json").read_text())
        prepared["files"]["unigram.npy"] = described(run / "shards" / "unigram.npy")
        (run / "shards" / "prepared.json").write_text(json.dumps(prepared))
        assert "unigram.npy: cannot be read" in refused(cli, run, tmp_path / "out")
        assert not sprung.exists()

    def test_beside_the_files_of_a_run(self, copied, sprung, tmp_path):
        run = copied("coded")
        for folder in (run, run / "shards"):  # where people put things of their own
            for name in ("pytorch_model.bin", "model.pkl", "weights-00001-of-00002.safetensors"):
                poison(folder / name, "torch", sprung)
        convert(run, tmp_path / "out")
        assert not sprung.exists() and not list((tmp_path / "out").rglob("*.bin"))

    def test_a_config_that_asks_for_a_call(self, cli, copied, sprung, tmp_path):
        run = copied("coded")
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(f"{text}\nnote: !!python/object/apply:os.mknod ['{sprung}']\n")
        assert "config.yaml: not valid YAML" in refused(cli, run, tmp_path / "out")
        assert not sprung.exists()


def test_a_config_that_names_a_file_outside(cli, copied, tmp_path):
    """It is not read: nothing of it is in what is said."""
    run, secret = copied("coded"), tmp_path / "secret"
    secret.write_text("passphrase: do not tell\n")
    (run / "config.yaml").write_text(f"base: {secret}\n" + (run / "config.yaml").read_text())
    for words in (("sample", run, "--count", 1), ("evaluate", run), ("convert", run, tmp_path / "out")):
        told = cli(*words)
        assert told.code == 2 and "has no base" in told.err and told.err.count("\n") == 1
        assert "passphrase" not in told.err and "do not tell" not in told.err


class TestManifests:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", ["../../../outside.safetensors", "/tmp/outside.safetensors", "checkpoints/../x.safetensors", ".."])
    def test_files_outside(self, cli, copied, tmp_path, name, way):
        run = copied("coded")
        change_manifest(run, lambda content: rename_file(content, AVERAGED, name))
        shutil.copy(checkpoints.folder(run, 40) / AVERAGED, tmp_path / "outside.safetensors")
        assert "manifest.json is missing or damaged" in refused(cli, run, tmp_path / "out", *way)

    def test_a_box_of_a_file_that_is_not_listed(self, cli, copied, tmp_path):
        run = copied("coded")
        outside = tmp_path / "outside.safetensors"
        shutil.copy(checkpoints.folder(run, 40) / AVERAGED, outside)

        def point_outside(content: dict) -> None:
            tensor = content["tensors"]["averaged/bias"]
            tensor["boxes"] = [[str(outside), at] for _, at in tensor["boxes"]]

        change_manifest(run, point_outside)
        assert "manifest.json is missing or damaged" in refused(cli, run, tmp_path / "out")

    @pytest.mark.parametrize(
        "path, value",
        [
            (("tensors", "averaged/bias", "shape"), ["300"]),
            (("tensors", "averaged/bias", "shape"), [-300]),
            (("tensors", "averaged/bias", "shape"), {}),
            (("tensors", "averaged/bias", "shape"), [2**62, 2**62]),
            (("tensors", "averaged/bias", "dtype"), "OBJECT"),
            (("tensors", "averaged/bias", "boxes"), []),
            (("tensors", "averaged/bias", "boxes"), [[AVERAGED, [[0, 10]]]]),
            (("tensors", "averaged/bias", "boxes"), [[AVERAGED, [["0", "300"]]]]),
            (("tensors",), []),
            (("files",), []),
            (("files", AVERAGED), "a hash"),
            (("state",), {}),
            (("state",), []),
            (("state", "step"), "40"),
        ],
    )
    def test_what_makes_no_sense(self, cli, copied, tmp_path, path, value):
        run = copied("coded")

        def change(content: dict) -> None:
            for name in path[:-1]:
                content = content[name]
            content[path[-1]] = value

        change_manifest(run, change)
        refused(cli, run, tmp_path / "out")

    def test_nesting_without_end(self, cli, copied, tmp_path):
        run = copied("coded")
        (checkpoints.folder(run, 40) / "manifest.json").write_text("[" * 100_000)
        assert "manifest.json is missing or damaged" in refused(cli, run, tmp_path / "out")


class TestSafetensors:
    @pytest.mark.parametrize("way", WAYS[1:])
    @pytest.mark.parametrize("kept", [0, 7, 100, -1])
    @pytest.mark.parametrize("known", [False, True], ids=["unannounced", "announced"])
    def test_truncated(self, cli, copied, tmp_path, way, kept, known):
        run = copied("coded")
        file = checkpoints.folder(run, 40) / AVERAGED
        file.write_bytes(file.read_bytes()[:kept])
        if known:
            change_manifest(run, lambda content: content["files"].update({AVERAGED: described(file)}))
        sentence = refused(cli, run, tmp_path / "out", *way)
        assert ("not a safetensors file" if known else "not the file that was written") in sentence and str(file) in sentence

    @pytest.mark.parametrize(
        "header",
        [
            {"bias": {"dtype": "F32", "shape": ["300"], "data_offsets": [0, 1200]}},
            {"bias": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 1200]}},
            {"bias": {"dtype": "F32", "shape": [-1, -300], "data_offsets": [0, 1200]}},
            {"bias": {"dtype": "F32", "shape": [1.5, 200], "data_offsets": [0, 1200]}},
            {"bias": {"dtype": "F32", "shape": [0, 2**62, 4], "data_offsets": [0, 0]}},
            {"bias": {"dtype": "F32", "shape": [300], "data_offsets": ["0", "1200"]}},
            {"bias": [1, 2]},
        ],
    )
    def test_a_header_that_makes_no_sense(self, cli, copied, tmp_path, header):
        run = copied("coded")
        file = checkpoints.folder(run, 40) / AVERAGED
        encoded = json.dumps(header).encode()
        file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(1200))
        change_manifest(run, lambda content: content["files"].update({AVERAGED: described(file)}))
        assert str(file) in refused(cli, run, tmp_path / "out")


class TestConvertedModels:
    @pytest.fixture
    def model(self, trained, tmp_path) -> Path:
        convert(trained("coded"), tmp_path / "model", shard_size="200KB")
        return tmp_path / "model"

    def refused(self, cli, model: Path) -> str:
        told = cli("sample", model, "--count", 1, "--steps", 1)
        assert told.code == 2 and told.err.count("\n") == 1 and told.err.startswith("megaflow: "), told.err
        return told.err

    def announce(self, model: Path, name: str) -> None:
        about = json.loads((model / "export.json").read_text())
        about["files"][name] = described(model / name)
        (model / "export.json").write_text(json.dumps(about))

    @pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "flow.safetensors", "stage.safetensors", "export.json"])
    @pytest.mark.parametrize("how", ["pickle", "torch"])
    @pytest.mark.parametrize("known", [False, True], ids=["unannounced", "announced"])
    def test_pickles(self, cli, model, sprung, name, how, known):
        assert (model / name).exists()
        poison(model / name, how, sprung)
        if known and name != "export.json":
            self.announce(model, name)
        assert str(model / name) in self.refused(cli, model) or name.startswith("model")
        assert not sprung.exists()

    def test_an_index_of_files_outside(self, cli, model):
        file = model / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        shutil.copy(model / "model-00001-of-00003.safetensors", model.parent / "outside.safetensors")
        index["weight_map"] = {
            name: "../outside.safetensors" if place.startswith("model-00001") else place for name, place in index["weight_map"].items()
        }
        file.write_text(json.dumps(index))
        assert "not the file that was written" in self.refused(cli, model)
        self.announce(model, file.name)
        assert "it names files of other folders" in self.refused(cli, model)

    @pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors"])
    def test_a_description_that_names_files_outside(self, cli, model, name):
        about = json.loads((model / "export.json").read_text())
        about["files"][name] = {"bytes": 1, "sha256": ""}
        (model / "export.json").write_text(json.dumps(about))
        assert "which is no file of this folder" in self.refused(cli, model)

    @pytest.mark.parametrize(
        "change",
        [
            {"version": 2},
            {"kind": "other"},
            {"source": {"step": "40"}},
            {"source": {"step": 10**30}},
            {"source": {"step": 40, "state": [1]}},
            {"source": {"step": 40, "state": {"tokens": "many"}}},
            {"source": []},
            {"files": {"a": 1}},
        ],
    )
    def test_a_description_that_makes_no_sense(self, cli, model, change):
        about = json.loads((model / "export.json").read_text())
        (model / "export.json").write_text(json.dumps(about | change))
        assert "export.json: not what megaflow convert writes" in self.refused(cli, model)

    def test_weights_that_are_no_numbers(self, cli, model):
        """One of them, in a file that export.json tells of: sampled, evaluated, or converted back."""
        file = next(path for path in sorted(model.glob("model-*.safetensors")) if "bias" in load_file(path))
        tensors = load_file(file)
        tensors["bias"][3] = float("nan")
        save_file(tensors, file)
        self.announce(model, file.name)
        assert "bias has values that are no finite numbers" in self.refused(cli, model)

    def test_a_config_of_a_network_that_no_machine_holds(self, cli, model):
        """Its shapes are not those of the files, which is seen before any memory is asked for."""
        text = (model / "config.yaml").read_text()
        (model / "config.yaml").write_text(re.sub(r"hidden: \d+", "hidden: 3200000", text))
        self.announce(model, "config.yaml")
        assert "these are not the weights of its config.yaml" in self.refused(cli, model)

    def test_a_config_of_more_layers_than_weights(self, cli, model, tmp_path):
        text = (model / "config.yaml").read_text()
        (model / "config.yaml").write_text(re.sub(r"layers: \d+", "layers: 2000000", text))
        self.announce(model, "config.yaml")
        assert "these are not the weights of its config.yaml, which has 2,000,000 layers" in self.refused(cli, model)
        told = cli("convert", model, tmp_path / "again", "--from", "hf")
        assert told.code == 2 and "2,000,000 layers" in told.err

    def test_weights_that_are_whole_numbers(self, cli, model):
        file = next(path for path in sorted(model.glob("model-*.safetensors")) if "bias" in load_file(path))
        tensors = load_file(file)
        save_file(tensors | {"bias": tensors["bias"].long()}, file)
        self.announce(model, file.name)
        assert "bias has whole numbers" in self.refused(cli, model)

    def test_rows_of_another_length(self, cli, trained, model, tmp_path):
        """Of what tells their lengths, where they differ, and of the config."""
        convert(trained("documents"), tmp_path / "documents")
        for folder, said in ((tmp_path / "documents", "length_counts.npy has lengths up to"), (model, "rows have 1000000000 tokens by")):
            file = folder / "shards" / "prepared.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"length": 10**9}))
            self.announce(folder, "shards/prepared.json")
            assert said in self.refused(cli, folder)
            told = cli("convert", folder, tmp_path / "again", "--from", "hf")
            assert told.code == 2 and said in told.err and not (tmp_path / "again").exists()

    @pytest.mark.parametrize(
        "clock",
        [
            (torch.zeros(1), torch.zeros(1)),
            (torch.zeros(3), torch.zeros(3)),
            (torch.tensor([0.0, torch.nan]), torch.tensor([0.0, 1.0])),
            (torch.tensor([5.0, 9.0]), torch.tensor([-3.0, 7.0])),
            (torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 1.0])),
        ],
    )
    def test_a_clock_that_is_none(self, cli, model, clock):
        kept = load_file(model / "stage.safetensors")
        times, tau = (x.to(kept["clock_times"]) for x in clock)
        save_file(kept | {"clock_times": times, "clock_tau": tau}, model / "stage.safetensors")
        self.announce(model, "stage.safetensors")
        assert "its clock is none" in self.refused(cli, model)

    def test_offsets_of_other_tokens(self, cli, trained, tmp_path):
        convert(trained("char", "flow_map"), tmp_path / "map")
        save_file({"offsets": torch.zeros(1)}, tmp_path / "map" / "balance.safetensors")
        self.announce(tmp_path / "map", "balance.safetensors")
        assert "its offsets are no " in self.refused(cli, tmp_path / "map")

    def test_a_description_without_end(self, cli, model):
        (model / "shards" / "prepared.json").write_text("[" * 100_000)
        self.announce(model, "shards/prepared.json")
        self.refused(cli, model)

    def test_a_weight_that_is_missing(self, cli, model):
        file = model / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"].pop("bias")
        file.write_text(json.dumps(index))
        self.announce(model, file.name)
        assert "these are not the weights of its config.yaml: bias is missing" in self.refused(cli, model)
