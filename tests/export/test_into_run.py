"""`megaflow convert FOLDER OUT --from hf`: a converted model is a run again, and training goes on from it."""

import hashlib
import json

import pytest
import torch

from megaflow.errors import UserError
from megaflow.evaluate.generate import sample
from megaflow.export.convert import convert
from megaflow.train import checkpoint as checkpoints
from megaflow.train import stages


@pytest.mark.parametrize(
    "kind, family, to", [("coded", "flow", "hf"), ("char", "flow_map", "hf"), ("documents", "autoregressive", "safetensors")]
)
def test_there_and_back_is_the_same_network(trained, tmp_path, kind, family, to):
    run = trained(kind, family)
    convert(run, tmp_path / "folder", to=to)
    told = convert(tmp_path / "folder", tmp_path / "again", origin="hf")
    assert told[1].endswith("tensors read back: equal to the checkpoint's") and told[2].endswith("before and after: equal")
    was, now = checkpoints.newest(run), checkpoints.newest(tmp_path / "again")
    assert now.sha256 == was.sha256 and now.state == was.state | {"taken": 0}
    assert all(torch.equal(now.read(f"weights/{name}"), now.read(f"averaged/{name}")) for name in (n[9:] for n in now.names("averaged/")))
    ours, theirs = (sample(each, count=2, steps=None, seed=3) for each in (tmp_path / "again", run))
    assert ours["tokens"] == theirs["tokens"]
    convert(tmp_path / "again", tmp_path / "folder2", to=to)
    once, twice = ({file.name: file.read_bytes() for file in tmp_path.glob(f"{name}/model*")} for name in ("folder", "folder2"))
    assert once == twice


@pytest.mark.parametrize("words", [[], ["optim.name=muon"]])
def test_training_goes_on_where_it_was(config, workspace, tmp_path, words):
    """From a step's weights with moments of zero: the first loss is that of the run that was never converted."""
    whole = tmp_path / "whole"
    few = ["train.steps=6", "train.checkpoint_every=3", "train.validate_every=6", "train.validation_rows=8", "log.every=1", *words]
    assert stages.pretrain(str(config("coded")), [f"run.dir={whole}", *few]) == 0
    convert(whole, tmp_path / "folder", to="hf", weights="live", step=3)
    convert(tmp_path / "folder", tmp_path / "again", origin="hf")
    assert stages.pretrain(str(config("coded")), [f"run.dir={tmp_path / 'again'}", *few]) == 0
    written = ((each / "metrics.jsonl").read_text().splitlines() for each in (whole, tmp_path / "again"))
    losses = [{line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line} for lines in written]
    assert losses[1].keys() == {4, 5, 6} and losses[1][4] == losses[0][4] and losses[1][6] != losses[0][6]
    assert checkpoints.newest(tmp_path / "again").names("moments/") == checkpoints.newest(whole).names("moments/")


class TestRefused:
    """With one sentence, and nothing is left."""

    @pytest.fixture
    def folder(self, trained, tmp_path):
        convert(trained("coded"), tmp_path / "folder", to="hf")
        return tmp_path / "folder"

    def refused(self, folder, said, changed=None):
        """changed: a file that somebody has changed, and its hash in export.json with it."""
        if changed:
            with pytest.raises(UserError, match=f"{changed}: not the file that was written"):
                convert(folder, folder.parent / "out", origin="hf")
            about, content = json.loads((folder / "export.json").read_text()), (folder / changed).read_bytes()
            about["files"][changed] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (folder / "export.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=said):
            convert(folder, folder.parent / "out", origin="hf")
        assert not list(folder.parent.glob("out*"))

    def test_a_run(self, trained, tmp_path):
        with pytest.raises(UserError, match=r"no folder of megaflow convert \(it has no export.json\)"):
            convert(trained("coded"), tmp_path / "out", origin="hf")

    def test_another_tokenizer(self, folder, trained):
        spec = json.loads((folder / "tokenizer.json").read_text())
        spec["model"]["vocab"]["and"], spec["model"]["vocab"]["the"] = (
            spec["model"]["vocab"].get("the", 1),
            spec["model"]["vocab"].get("and", 2),
        )
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        self.refused(folder, r"tokenizer.json: this tokenizer \(\w+\) is not the network's", "tokenizer.json")

    def test_another_network(self, folder):
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("hidden: 32", "hidden: 64"))
        self.refused(folder, "these are not the weights of its config.yaml", "config.yaml")

    @pytest.mark.parametrize("name", ["config.yaml", "config.json", "tokenizer.json", "shards/tokenizer.json", "modeling_megaflow.py"])
    def test_any_file_but_the_card_that_was_changed(self, folder, name):
        (folder / "README.md").write_text("mine")
        (folder / name).write_text((folder / name).read_text() + "\n")
        self.refused(folder, f"{name}: not the file that was written")
        with pytest.raises(UserError, match=f"{name}: not the file that was written"):
            sample(folder, count=1, steps=1, seed=0)

    def test_weights_that_are_cut_off(self, folder):
        file = sorted(folder.glob("model-*.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-4])
        self.refused(folder, "not the file that was written")

    def test_a_file_of_another_place(self, folder):
        about = json.loads((folder / "export.json").read_text())
        about["files"]["../model.safetensors"] = about["files"].pop("stage.safetensors")
        (folder / "export.json").write_text(json.dumps(about))
        self.refused(folder, r"it names \.\./model.safetensors, which is no file of this folder")

    @pytest.mark.parametrize("name", ["balance.safetensors", "config.yaml", "shards/tokenizer.json", "modeling_megaflow.py"])
    def test_a_file_that_nothing_was_said_of(self, folder, name):
        """Nobody could tell whether it is the one that was written; what megaflow does not read may lie there."""
        about = json.loads((folder / "export.json").read_text())
        about["files"].pop(name, None)
        (folder / "export.json").write_text(json.dumps(about))
        (folder / name).touch()
        (folder / ".gitattributes").touch()
        self.refused(folder, f"{name}: export.json does not name this file")

    def test_an_index_of_another_place(self, folder):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["bias"] = "../../model.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(folder, "not the file that was written")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "optim.pt", "shards/tokenizer.pkl"])
    def test_a_pickle_beside_its_files(self, folder, name):
        """Nothing of ours would read it, but somebody might."""
        torch.save({"bias": torch.zeros(300)}, folder / name)
        self.refused(folder, f"{name}: a pickle runs whatever it holds when it is opened, and none belongs here; take it out")

    def test_a_pickle_in_the_place_of_a_file(self, folder):
        file = sorted(folder.glob("model-*.safetensors"))[0]
        torch.save({"bias": torch.zeros(300)}, file)
        self.refused(folder, "not the file that was written")

    @pytest.mark.parametrize("words", [{"to": "hf"}, {"step": 3}, {"precision": "bf16"}, {"processes": 2}])
    def test_options_that_have_no_place(self, folder, words):
        with pytest.raises(UserError, match=f"--{next(iter(words))} has no place beside --from hf"):
            convert(folder, folder.parent / "out", origin="hf", **words)
