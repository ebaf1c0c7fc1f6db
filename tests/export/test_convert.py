"""`megaflow convert RUN OUT`: what is in the folder is the run's network, to the bit or to the precision, and nothing is left half done."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megaflow.config.load import flatten
from megaflow.errors import UserError
from megaflow.evaluate.compare import compare
from megaflow.evaluate.evaluation import evaluate
from megaflow.evaluate.generate import sample
from megaflow.evaluate.loaded import load_run
from megaflow.export import convert as converting
from megaflow.export import load, source, verify
from megaflow.export.convert import convert, size_of, split
from megaflow.export.hf.modeling_megaflow_flow import FlowModel
from megaflow.train import checkpoint as checkpoints
from megaflow.train import checkpoint_writer, tensor_file
from tests.train.writers import write_anew

FAMILIES = [("coded", "flow"), ("char", "flow_map"), ("documents", "autoregressive")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What the safetensors library finds in the files of the weights."""
    return {name: value for file in sorted(out.glob("model*.safetensors")) for name, value in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class TestEveryFamily:
    @pytest.mark.parametrize("kind, family", FAMILIES)
    def test_the_averaged_weights_and_all_that_rebuilds_the_network(self, trained, out, kind, family):
        run = trained(kind, family)
        told = convert(run, out)
        found = checkpoints.newest(run)
        assert same(weights(out), found.tensors("averaged"))
        network, fixed, clock, config = load(out, "cpu")
        assert same(dict(network.named_parameters()), found.tensors("averaged")) and not network.training
        assert flatten(config) | {"run.dir": ""} == flatten(load_run(run).config) | {"run.dir": ""}
        if family == "autoregressive":
            assert fixed is None and clock is None and not (out / "flow.safetensors").exists()
        else:
            assert torch.equal(clock.times, found.read("stage/clock_times")) and torch.equal(clock.tau, found.read("stage/clock_tau"))
            assert (out / "flow.safetensors").read_bytes() == (run / "flow.safetensors").read_bytes()
        assert told[1] == f"{len(weights(out))} tensors read back: equal to the checkpoint's"
        assert told[2].endswith(" logits of the network before and after: equal") and len(told) == 3

    @pytest.mark.parametrize("kind, family", FAMILIES)
    def test_it_writes_the_run_s_text(self, trained, out, kind, family):
        convert(trained(kind, family), out)
        ours, theirs = (sample(each, count=2, steps=None, seed=3) for each in (out, trained(kind, family)))
        assert ours | {"run": ""} == theirs | {"run": ""}

    def test_it_is_evaluated_as_the_run_is(self, trained, out):
        convert(trained("coded"), out)
        run = load_run(trained("coded"))
        settings = {"steps": [2], "samples": 2, "rows": 4, "draws": 2, "seed": 0}
        ours, theirs = (evaluate(each, **settings, data=run.config.data.path) for each in (out, trained("coded")))
        for name in ("likelihood", "samples", "profile", "trajectory", "step"):
            assert ours[name] == theirs[name]
        assert json.loads((out / "evaluation.json").read_text())["weights"] == ours["weights"] != theirs["weights"]
        compared = compare([str(trained("coded")), str(out)])
        assert compared["likelihood"][str(out)]["difference"]["difference"] == 0.0

    def test_from_the_files_of_four_processes(self, mesh_run, out):
        assert len(checkpoints.newest(mesh_run).files) > 8
        told = convert(mesh_run, out)
        assert same(weights(out), checkpoints.newest(mesh_run).tensors("averaged")) and told[2].endswith("equal")
        wanted = sample(mesh_run, count=1, steps=2)["tokens"]
        assert sample(out, count=1, steps=2)["tokens"] == wanted
        convert(mesh_run, out.with_name("hf"), to="hf")
        assert FlowModel.from_pretrained(out.with_name("hf")).eval().generate(2).tolist() == wanted


class TestWhatIsAsked:
    def test_live_weights(self, trained, out):
        convert(trained("coded"), out, weights="live")
        found = checkpoints.newest(trained("coded"))
        assert same(weights(out), found.tensors("weights")) and not same(weights(out), found.tensors("averaged"))
        assert json.loads((out / "export.json").read_text())["weights"] == "live"

    @pytest.mark.parametrize("kind, family", FAMILIES)
    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_half_precision_is_the_rounded_weights(self, trained, out, precision, kind, family):
        told = convert(trained(kind, family), out, precision=precision)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        full = checkpoints.newest(trained(kind, family)).tensors("averaged")
        assert same(weights(out), {name: value.to(dtype) for name, value in full.items()})
        assert all(value.dtype == dtype for value in weights(out).values())
        assert same(dict(load(out, "cpu")[0].named_parameters()), {name: value.to(dtype).float() for name, value in full.items()})
        compared = json.loads((out / "export.json").read_text())["verified"]
        assert 0 < compared["difference_over_spread"] < compared["allowed"] and "they differ by" in told[2]

    def test_what_fp16_does_not_hold_is_refused(self, copied, out):
        write_anew(copied("coded"), "averaged", 1e6)
        with pytest.raises(UserError, match=r"has values up to \S+, beyond what torch.float16 holds; take --precision bf16"):
            convert(out.parent / "copy-coded-flow", out, precision="fp16")
        assert not out.exists()

    def test_an_earlier_step(self, trained, out):
        run = trained("coded")
        convert(run, out, step=30)
        assert same(weights(out), checkpoints.open_checkpoint(checkpoints.folder(run, 30)).tensors("averaged"))
        assert json.loads((out / "export.json").read_text())["source"]["step"] == 30

    def test_what_it_was_made_of_is_written_down(self, trained, out):
        run = trained("char", "flow_map")
        convert(run, out, precision="bf16")
        found, about = checkpoints.newest(run), json.loads((out / "export.json").read_text())
        assert (about["kind"], about["precision"], about["weights"]) == ("flow_map", "bf16", "averaged")
        assert about["source"] == {
            "run": str(run),
            "step": 40,
            "tokens": found.state["tokens"],
            "state": found.state,
            "manifest": tensor_file.sha256(found.path / "manifest.json"),
            "content": found.sha256,
        }
        written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"export.json"}
        assert about["files"].keys() == written
        assert all(entry["sha256"] == tensor_file.sha256(out / name) for name, entry in about["files"].items())
        assert about["parameters"] == sum(value.numel() for value in weights(out).values())


class TestFiles:
    def test_files_of_a_size_and_their_index(self, trained, out):
        told = convert(trained("coded"), out, shard_size="40KB")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        full = checkpoints.newest(trained("coded")).tensors("averaged")
        files = sorted(path.name for path in out.glob("model-*.safetensors"))
        assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] and len(files) > 3
        assert f"{len(files)} files of weights" in told[0] and not (out / "model.safetensors").exists()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in full.values())
        assert index["weight_map"].keys() == full.keys() and set(index["weight_map"].values()) == set(files)
        for file in files:
            with safe_open(out / file, "pt") as opened:
                names = list(opened.keys())
                assert opened.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == file for name in names)
            assert len(names) == 1 or sum(full[name].nbytes for name in names) <= 40_000
        assert same(weights(out), full) and same(dict(load(out, "cpu")[0].named_parameters()), full)

    def test_hugging_face_s_loader_reads_them(self, trained, out):
        hub = pytest.importorskip("huggingface_hub")
        convert(trained("coded"), out, shard_size="40KB")
        network, _, _, _ = load(out, "cpu")
        expected = {name: value.detach().clone() for name, value in network.named_parameters()}
        with torch.no_grad():
            for p in network.parameters():
                p.zero_()
        found = hub.load_torch_model(network, out, safe=True)
        assert not found.unexpected_keys and same(dict(network.named_parameters()), expected)

    @pytest.mark.parametrize(
        "sizes, limit, expected",
        [
            ([3, 3, 3], 9, [[0, 1, 2]]),
            ([3, 3, 3], 8, [[0, 1], [2]]),
            ([9, 1, 1], 4, [[0], [1, 2]]),
            ([1, 9, 1], 4, [[0], [1], [2]]),
            ([4, 4], 4, [[0], [1]]),
            ([0, 4, 0], 4, [[0, 1, 2]]),
        ],
    )
    def test_tensors_stay_in_order_and_whole(self, sizes, limit, expected):
        assert split({str(i): size for i, size in enumerate(sizes)}, limit) == [[str(i) for i in names] for names in expected]

    @pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5tb", 15 * 10**11), (" 200 MB", 2 * 10**8), ("1KB", 1000)])
    def test_sizes(self, text, size):
        assert size_of(text) == size

    @pytest.mark.parametrize("text", ["", "5", "GB", "0GB", "-1GB", "5GiB", "1e3MB", "infGB"])
    def test_what_is_no_size_is_refused(self, text):
        with pytest.raises(UserError, match=r"--shard-size: .* is not a size above 0 such as 5GB or 200MB"):
            size_of(text)


class TestRefused:
    """With one sentence, before anything is written."""

    def refused(self, cli, sentence: str, *words: object) -> None:
        told = cli("convert", *words)
        said = [line for line in told.err.splitlines() if not line.startswith("check ")]
        assert told.code == 2 and len(said) == 1 and sentence in said[0], told.err
        assert not list(Path(words[1]).parent.glob("*.partial"))

    def test_a_folder_that_is_there(self, cli, trained, out):
        out.mkdir()
        self.refused(cli, f"{out}: this is there already", trained("coded"), out)
        assert not list(out.iterdir())

    def test_what_is_no_run(self, cli, trained, tmp_path, out):
        self.refused(cli, f"{tmp_path}: not a run directory", tmp_path, out)
        convert(trained("coded"), tmp_path / "model")
        self.refused(cli, f"{tmp_path / 'model'}: this is a converted model and no run", tmp_path / "model", out)

    def test_a_run_without_a_checkpoint(self, cli, copied, out):
        run = copied("coded")
        (run / "checkpoints").rename(run / "away")
        self.refused(cli, f"{run}: this run has no checkpoint yet", run, out)

    def test_options_that_do_not_belong(self, cli, trained, out):
        run = trained("coded")
        self.refused(cli, f"--step: {run} keeps no checkpoint of step 7; it keeps 30, 40", run, out, "--step", 7)
        self.refused(cli, "--processes belongs to --to run", run, out, "--processes", 2)
        self.refused(cli, "--precision belongs to a network", run, out, "--to", "run", "--precision", "bf16")
        self.refused(cli, "--processes: 0 is not a whole number from 1", run, out, "--to", "run", "--processes", 0)
        self.refused(cli, "--shard-size: 'much'", run, out, "--shard-size", "much")

    def test_weights_of_another_network(self, cli, copied, out):
        run = copied("coded")
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("layers: 2", "layers: 3"))
        self.refused(cli, "these are not the weights of its config.yaml: trunk.blocks.2.", run, out)

    def test_where_nothing_can_be_made(self, cli, trained, tmp_path):
        (tmp_path / "file").touch()
        self.refused(cli, f"{tmp_path / 'file' / 'out'}: cannot be made", trained("coded"), tmp_path / "file" / "out")
        assert cli("convert", trained("coded"), tmp_path / "new" / "out").code == 0  # the folders that it lies in are made

    def test_a_folder_that_another_process_writes(self, cli, trained, out):
        partial = out.with_name("out.partial")
        partial.mkdir()
        held = os.open(partial, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        told = cli("convert", trained("coded"), out)
        os.close(held)
        assert told.code == 2 and f"{partial}: another process is writing this folder" in told.err
        assert partial.exists() and not out.exists()

    def test_a_damaged_checkpoint_names_the_one_before(self, cli, copied, out):
        run = copied("coded")
        file = checkpoints.folder(run, 40) / "averaged-00000-of-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        self.refused(cli, f"{file}: not the file that was written (its hash differs)", run, out)
        assert cli("convert", run, out, "--step", 30).code == 0

    def test_a_disk_that_is_too_small(self, cli, trained, out, monkeypatch):
        monkeypatch.setattr(source.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
        self.refused(cli, "and the disk has 1 MB free; give a folder on another disk", trained("coded"), out)
        assert not list(out.parent.iterdir())


class TestNothingIsLeftHalfDone:
    def left(self, out: Path) -> list[str]:
        return [path.name for path in out.parent.iterdir()]

    def test_a_full_disk(self, cli, trained, tmp_path, monkeypatch):
        place = tmp_path / "disk"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)], capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        monkeypatch.setattr(source, "SPARE", -(10**9))  # what it needs is found out by writing
        try:
            told = cli("convert", trained("coded"), place / "out")
            assert told.code == 2 and "out: cannot be written (No space left on device); nothing of it is left" in told.err
            assert not list(place.iterdir())
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            told = cli("convert", trained("coded"), place / "out")
            assert told.code == 2 and "out: cannot be made (Read-only file system); give another folder" in told.err
        finally:
            subprocess.run(["umount", str(place)], check=True)

    @pytest.fixture
    def terminal(self):
        """SIGINT as a program in a terminal has it; a worker of several that run tests ignores it."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.usefixtures("terminal")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupted(self, cli, trained, out, monkeypatch, number):
        monkeypatch.setattr(converting, "_write_rest", lambda *_: os.kill(os.getpid(), number))
        before = signal.getsignal(signal.SIGTERM)
        told = cli("convert", trained("coded"), out)
        assert told.code == 130 and told.err.endswith(
            f"megaflow: interrupted; {out} is not made, and nothing of it is left; the same command begins anew\n"
        )
        assert self.left(out) == [] and signal.getsignal(signal.SIGTERM) == before

    def test_what_a_killed_one_has_left_goes(self, trained, out):
        left = out.with_name("out.partial")
        (left / "folder").mkdir(parents=True)
        (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
        convert(trained("coded"), out)
        assert self.left(out) == ["out"] and not (out / "folder").exists() and not list(out.glob("model-*"))

    def test_a_bit_that_the_disk_has_lost(self, cli, trained, out, monkeypatch):
        write_rest = converting._write_rest

        def lose(given, partial: Path, offsets) -> None:
            content = bytearray((partial / "model.safetensors").read_bytes())
            content[-1] ^= 1
            (partial / "model.safetensors").write_bytes(content)
            write_rest(given, partial, offsets)

        monkeypatch.setattr(converting, "_write_rest", lose)
        told = cli("convert", trained("coded"), out)
        assert told.code == 2 and "verification failed, " in told.err and "read back is not what was written; it is removed" in told.err
        assert self.left(out) == [] and checkpoints.newest(trained("coded")).state["step"] == 40

    def test_a_config_of_another_network(self, cli, trained, out, monkeypatch):
        to_yaml = converting.to_yaml
        monkeypatch.setattr(
            converting,
            "to_yaml",
            lambda config: to_yaml(config).replace("skip: 'on'", "skip: 'off'"),
        )
        told = cli("convert", trained("coded"), out)
        assert told.code == 2 and "verification failed, logits differ by" in told.err and self.left(out) == []


def test_what_does_not_fit_in_memory_is_compared_by_its_tensors(trained, out, monkeypatch):
    monkeypatch.setattr(verify, "memory", lambda: 10**6)
    told = convert(trained("coded"), out)
    assert told[1].endswith("tensors read back: equal to the checkpoint's")
    assert told[2].startswith("logits of the network before and after not compared: the network takes 26") and told[2].endswith(
        "of memory and 1 MB are free"
    )
    assert json.loads((out / "export.json").read_text())["verified"]["logits"] is None
    assert same(weights(out), checkpoints.newest(trained("coded")).tensors("averaged"))


LARGE = """
import sys
from megaflow.export import verify
from megaflow.export.convert import convert
from megaflow.train import checkpoint

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

checkpoint.BLOCK = 2**20
verify.memory = lambda: 0
run, small, out, form = sys.argv[1:]
way = dict(to="run", processes=3) if form == "run" else dict(to=form, precision="bf16", shard_size="20MB")
convert(small, out + "-small", **way)  # what the first of them loads is no matter of sizes
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
convert(run, out, **way)
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("form", ["safetensors", "hf", "run"])
def test_a_model_larger_than_the_memory_that_it_is_given(trained, tmp_path, out, process, form):
    """67 MB of weights in tensors of 34 MB, in blocks of 1 MB: it never holds so much as one of the tensors."""
    small, run = trained("coded", "autoregressive"), tmp_path / "large"
    shutil.copytree(small, run, ignore=shutil.ignore_patterns("checkpoints"))
    text = (small / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("mlp_ratio: 4", "mlp_ratio: 8192").replace("layers: 2", "layers: 1"))
    found = checkpoints.newest(small)
    values = {name: found.read(name) for name in found.names() if "blocks.1." not in name and not name.startswith("moments")}
    for group in ("weights", "averaged"):
        for name, shape in (("up.weight", (262144, 32)), ("up.bias", (262144,)), ("down.weight", (32, 262144))):
            values[f"{group}/trunk.blocks.0.{name}"] = torch.ones(1).expand(shape)
    checkpoint_writer.save(run, values, {"step": 1}, keep=1)
    done = process("-c", LARGE, run, small, out, form)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 24 * 1024, done.stdout
