"""`megaflow convert MAP OUT --to onnx`: one file, which ONNX Runtime runs alone, writes the map's one-step texts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from megaflow.errors import UserError
from megaflow.evaluate.generate import sample
from megaflow.export import onnx as onnx_form
from megaflow.export.convert import convert
from megaflow.parallel import random

onnx = pytest.importorskip("onnx")
RUN = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(json.dumps(session.run(None, {"noise": np.load(sys.argv[2])})[0].tolist()))
assert "torch" not in sys.modules and "megaflow" not in sys.modules
"""


@pytest.mark.parametrize("kind, length, dim", [("char", 32, 27), pytest.param("coded", 16, 64, marks=pytest.mark.long)])
def test_one_step_text_of_any_number_of_texts(trained, tmp_path, kind, length, dim):
    run = trained(kind, "flow_map")
    (told,) = convert(run, tmp_path / "out", to="onnx")
    assert told.startswith(f"{tmp_path / 'out' / 'map.onnx'}: ") and told.endswith(
        f"noise (texts, {length}, {dim}) -> tokens (texts, {length}); 100.0% of {4 * length} tokens are those of transformers"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["map.onnx", "tokenizer.json"]
    for count in (1, 5):
        noise = torch.stack([torch.randn(length, dim, generator=random.generator(7, "initial noise", place)) for place in range(count)])
        np.save(tmp_path / "noise.npy", noise.numpy())
        words = [sys.executable, "-I", "-c", RUN, tmp_path / "out" / "map.onnx", tmp_path / "noise.npy"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == sample(run, count=count, steps=1, seed=7)["tokens"]
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / "map.onnx").metadata_props}
    assert about["megaflow.run"] == str(run) and about["megaflow.step"] == "40"


@pytest.mark.long
def test_a_file_that_writes_something_else_is_removed(trained, tmp_path, monkeypatch):
    def run(file, inputs):
        tokens = onnx_form_run(file, inputs)
        tokens[0, 0] = (tokens[0, 0] + 1) % 27
        return tokens

    onnx_form_run = onnx_form.run
    monkeypatch.setattr(onnx_form, "run", run)
    with pytest.raises(UserError, match=r"verification failed, ONNX Runtime writes 99\.2% of the tokens that transformers writes"):
        convert(trained("char", "flow_map"), tmp_path / "out", to="onnx")
    assert not list(tmp_path.iterdir())


def test_constants_of_other_times_are_seen(trained, tmp_path, monkeypatch):
    """What is compared with has no constants of its own."""

    class Other(onnx_form.AtTime):
        def __init__(self, embedding, time):
            super().__init__(embedding, time)
            self.value += 3.0

    monkeypatch.setattr(onnx_form, "AtTime", Other)
    with pytest.raises(UserError, match=r"verification failed, ONNX Runtime writes .* of the tokens that transformers writes"):
        convert(trained("char", "flow_map"), tmp_path / "out", to="onnx")


class TestRefused:
    def refused(self, run, tmp_path, said, **words):
        with pytest.raises(UserError, match=said):
            convert(run, tmp_path / "out", **{"to": "onnx"} | words)
        assert not list(tmp_path.glob("out*"))

    def test_a_flow(self, trained, tmp_path):
        self.refused(trained("coded"), tmp_path, r"is no flow map \(flow\), whose one pass would write a text; distill a flow")

    def test_options_of_folders(self, trained, tmp_path):
        self.refused(trained("char", "flow_map"), tmp_path, "--precision belongs to folders of weights", precision="bf16")

    def test_without_the_package(self, trained, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        self.refused(
            trained("char", "flow_map"), tmp_path, r"--to onnx needs the package onnxruntime, which is not here; pip install -e .\[onnx\]"
        )

    def test_a_server_s_layout_says_why_not(self, trained, tmp_path):
        self.refused(trained("documents", "autoregressive"), tmp_path, "no layout of a serving engine holds this network", to="vllm")
