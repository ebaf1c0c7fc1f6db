"""The run directory: what may continue it, what its curve holds after a restart, and who is writing to it."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megaflow.config.check import resolve
from megaflow.config.load import ConfigError, Loaded, assemble, flatten
from megaflow.config.schema import Config, entries, keys
from megaflow.errors import UserError
from megaflow.train import run
from megaflow.train.run import MAY_CHANGE, Metrics, open_run, read_config
from megaflow.train.spikes import Spikes

ROOT = Path(__file__).resolve().parents[2]


def given(directory: Path, vocab: int = 300, **values: object) -> Loaded:
    """A resolved config as a command would have it: values are overrides, train__steps=5."""
    layer = {"run.dir": str(directory)} | {name.replace("__", "."): value for name, value in values.items()}
    return resolve(assemble([("command line", layer)]), vocab)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def other_value(name: str) -> object:
    """A valid value that is neither the default nor what auto stands for."""
    item, default = keys()[name], flatten(Config())[name]
    offered = list(entries(item)) if item.metadata["table"] else item.metadata["choices"]
    if offered:
        settled = flatten(given(Path("x")).config)[name]
        return next((value for value in offered if value not in (default, settled)), None)
    if item.type is str or item.type == list[str]:
        return "other" if item.type is str else ["other"]
    if item.type is bool:
        return not default
    if item.type is float:
        return default * 0.5 + 0.01
    return 77 if default == "auto" else default + 1


FIXED = [n for n in keys() if not n.startswith((*MAY_CHANGE, "train.steps", "flow.code")) and other_value(n) is not None]


class TestOpenRun:
    def test_a_new_run_is_written_down(self, directory):
        loaded = open_run(given(directory, train__steps=50), "pretrain")
        assert read_config(directory).config == loaded.config
        assert run.stage_of(directory) == "pretrain"
        origin = json.loads((directory / "origin.json").read_text())
        assert (origin["train.steps"], origin["flow.code"], origin["optim.beta1"]) == ("command line", "auto", "default")

    def test_the_same_config_continues(self, directory):
        first = open_run(given(directory), "pretrain")
        assert open_run(given(directory), "pretrain").config == first.config

    @pytest.mark.parametrize("name", FIXED)
    def test_any_other_key_is_refused_by_name(self, directory, name):
        stage = "distill" if name.startswith("distill.") else "pretrain"
        open_run(given(directory), stage)
        before = (directory / "config.yaml").read_text()
        changed = assemble([("command line", flatten(given(directory).config) | {name: other_value(name)})])
        with pytest.raises(ConfigError) as error:
            open_run(changed, stage)
        assert f"{name} (was {flatten(given(directory).config)[name]!r}, now {other_value(name)!r})" in str(error.value)
        assert (directory / "config.yaml").read_text() == before

    def test_what_is_the_machines_or_only_prepares_may_change(self, directory):
        open_run(given(directory), "pretrain")
        moved = flatten(given(directory).config) | {"data.workers": 3, "data.source": ["elsewhere"], "model.attention": "plain"}
        assert open_run(assemble([("command line", moved)]), "pretrain").config.model.attention == "plain"

    def test_what_only_stage_2_reads_stops_no_flow(self, directory):
        """Earlier versions resolved it for every run, and wrote it down."""
        open_run(given(directory), "pretrain")
        file = directory / "config.yaml"
        file.write_text(file.read_text().replace("state_input: auto", "state_input: hot_belief"))
        assert read_config(directory).config.distill.state_input == "hot_belief"
        assert open_run(given(directory), "pretrain").config.distill.state_input == "auto"

    def test_all_changed_keys_are_listed(self, directory):
        open_run(given(directory), "pretrain")
        with pytest.raises(ConfigError, match="run.seed .was 0, now 1., model.layers .was 4, now 5."):
            open_run(given(directory, run__seed=1, model__layers=5), "pretrain")

    @pytest.mark.parametrize(
        "name, value", [("parallel.zero", 2), ("log.every", 5), ("log.wandb", "off"), ("log.project", "p"), ("train.checkpoint_every", 3)]
    )
    def test_these_may_change(self, directory, name, value):
        open_run(given(directory), "pretrain")
        found = open_run(given(directory, **{name.replace(".", "__"): value}), "pretrain")
        assert flatten(found.config)[name] == value == flatten(read_config(directory).config)[name]

    def test_a_moved_run_continues(self, directory, tmp_path):
        open_run(given(directory), "pretrain")
        directory.rename(tmp_path / "moved")
        assert open_run(given(tmp_path / "moved"), "pretrain").config.run.dir == str(tmp_path / "moved")
        assert read_config(tmp_path / "moved").config.run.dir == str(tmp_path / "moved")

    def test_steps_may_grow_and_not_shrink(self, directory):
        open_run(given(directory, train__steps=100), "pretrain")
        assert open_run(given(directory, train__steps=150), "pretrain").config.train.steps == 150
        with pytest.raises(ConfigError, match="train.steps may grow from 150, not shrink to 100"):
            open_run(given(directory, train__steps=100), "pretrain")
        assert read_config(directory).config.train.steps == 150

    def test_what_was_a_default_then_is_kept_where_auto_now_stands_for_something_else(self, directory):
        """Weights of joint training were adaptive unless something else was said; auto is none."""
        joint = {"train.joint": True, "distill.anchor": "data", "distill.state_input": "linear"}
        written = assemble([("file", joint | {"distill.weighting": "adaptive", "run.dir": str(directory)})])
        written.origin["distill.weighting"] = "default"
        open_run(written, "pretrain")
        now = assemble([("file", joint | {"distill.weighting": "none", "run.dir": str(directory)})])
        now.origin["distill.weighting"] = "auto"
        assert open_run(now, "pretrain").config.distill.weighting == "adaptive"

    def test_what_auto_stood_for_is_kept_when_a_run_grows(self, directory):
        """Warm-up and validation were a tenth and a twentieth of the first length; a longer run does not move them."""
        open_run(given(directory, train__steps=2000), "pretrain")
        for steps in (9000, 20000):
            found = open_run(given(directory, train__steps=steps), "pretrain")
            assert (found.config.optim.warmup_steps, found.config.train.validate_every) == (200, 100)
            assert found.origin["optim.warmup_steps"] == "auto"

    def test_a_value_given_once_may_be_left_to_auto_only_if_it_is_the_same(self, directory):
        open_run(given(directory, optim__warmup_steps=7), "pretrain")
        with pytest.raises(ConfigError, match="optim.warmup_steps .was 7, now 100."):
            open_run(given(directory), "pretrain")

    def test_a_run_of_another_command(self, directory):
        open_run(given(directory), "pretrain")
        with pytest.raises(ConfigError, match="started by megaflow pretrain, not by megaflow distill; choose another run.dir"):
            open_run(given(directory), "distill")

    @pytest.mark.parametrize("written", [1, 2])
    def test_a_kill_between_its_first_files_leaves_no_run(self, directory, monkeypatch, written):
        count, write = iter(range(written)), run.write_atomically

        def killed(path, text):
            if next(count, None) is None:
                raise KeyboardInterrupt
            write(path, text)

        monkeypatch.setattr(run, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(given(directory), "pretrain")
        assert len(list(directory.glob("*.json")) + list(directory.glob("*.yaml"))) == written
        monkeypatch.undo()
        assert open_run(given(directory, run__seed=1), "pretrain").config == read_config(directory).config

    def test_not_a_run(self, tmp_path):
        with pytest.raises(UserError, match="nowhere: no such directory"):
            read_config(tmp_path / "nowhere")
        with pytest.raises(UserError, match="not a run directory .it has no config.yaml."):
            read_config(tmp_path)


class TestMetrics:
    @pytest.fixture
    def config(self, directory) -> Config:
        return given(directory, log__wandb="off").config

    def write(self, config: Config, step: int, numbers: range) -> None:
        metrics = Metrics(config, step)
        for number in numbers:
            metrics.write({"step": number, "loss": float(number)})
        metrics.close()

    def test_no_gap_and_no_double_step_after_a_restart(self, config, directory):
        """Nine steps were logged, the checkpoint was at six: the restart writes seven to nine again."""
        self.write(config, 0, range(1, 10))
        self.write(config, 6, range(7, 12))
        assert [line["step"] for line in run.lines(directory / "metrics.jsonl")] == list(range(1, 12))

    def test_validation_lines_of_the_checkpoint_s_step_stay_and_later_ones_go(self, config, directory):
        metrics = Metrics(config, 0)
        for step in (5, 6, 7):
            metrics.write({"step": step, "loss": 1.0})
            metrics.write({"step": step, "validation_loss": 2.0})
        metrics.close()
        Metrics(config, 6).close()
        assert [(line["step"], "loss" in line) for line in run.lines(directory / "metrics.jsonl")] == [
            (5, True),
            (5, False),
            (6, True),
            (6, False),
        ]

    def test_a_line_cut_short_by_a_kill_is_dropped(self, config, directory):
        self.write(config, 0, range(1, 4))
        with (directory / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
        self.write(config, 3, range(4, 6))
        assert [line["step"] for line in run.lines(directory / "metrics.jsonl")] == [1, 2, 3, 4, 5]
        assert all(json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines())

    def test_every_line_is_on_disk_when_write_returns(self, config, directory):
        metrics = Metrics(config, 0)
        metrics.write({"step": 1, "loss": 0.1 + 0.2})
        assert (directory / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.30000000000000004}\n'
        metrics.close()

    def test_a_fresh_start_empties_the_curve(self, config, directory):
        self.write(config, 0, range(1, 4))
        self.write(config, 0, range(1, 2))
        assert [line["step"] for line in run.lines(directory / "metrics.jsonl")] == [1]


class TestRecord:
    def test_a_full_disk_is_named(self, full):
        config = Config()
        config.run.dir, config.log.wandb = str(full), "off"
        metrics = Metrics(config, 0)
        for write in (
            lambda: run.write_atomically(full / "summary.json", "{}"),
            lambda: metrics.write({"step": 1}),
            metrics.close,
            lambda: Spikes(full, 4.0, 0).see(1, math.nan, 1.0, torch.ones(1), 0, 1),
        ):
            with pytest.raises(OSError, match="No space left on device: '.*/(summary.json|metrics.jsonl|spikes.jsonl)'"):
                write()

    def test_every_start_is_recorded_with_code_and_versions(self, directory, monkeypatch):
        open_run(given(directory), "pretrain")
        monkeypatch.setattr(sys, "argv", ["megaflow", "pretrain", "x.yaml"])
        run.record_start(directory, Config(), processes=2, step=0)
        run.record_start(directory, Config(), processes=1, step=30)
        starts = json.loads((directory / "run.json").read_text())["starts"]
        assert [(start["step"], start["processes"]) for start in starts] == [(0, 2), (30, 1)]
        assert starts[0]["command"] == ["megaflow", "pretrain", "x.yaml"]
        import torch

        assert starts[0]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # not every wheel names its build
        assert {"python", "deepspeed", "mosaicml-streaming", "tokenizers", "omegaconf"} <= starts[0]["versions"].keys()

    @pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
    def test_git_state_is_that_of_the_code_that_runs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # not that of the folder one happens to be in
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        found = run.git_state()
        assert found["commit"] == commit and found["changed_files"] >= 0


DAMAGE = [
    ("config.yaml", "", "not the config of a run"),
    ("config.yaml", "run: [", "not valid YAML"),
    ("config.yaml", "- 1", "a config is a mapping"),
    ("config.yaml", "run: {dir: x, colour: red}", "there is no key run.colour"),
    ("origin.json", "", "cannot be read"),
    ("origin.json", "[]", "it is not a JSON object"),
    ("run.json", "{}", "it lacks stage"),
    ("run.json", "{", "cannot be read"),
]


@pytest.mark.parametrize("name, content, words", DAMAGE)
def test_a_damaged_run_is_said_to_be_one(directory, name, content, words):
    """With the file that is damaged, whoever reads it: who continues the run, samples from it or distils it."""
    open_run(given(directory), "pretrain")
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=words) as told:
        read_config(directory), run.stage_of(directory)
    assert str(directory / name) in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(UserError, match=words):
        open_run(given(directory), "pretrain")


class TestLock:
    def test_one_process_at_a_time(self, directory):
        held = run.lock(directory)
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is already working on this run"):
            run.lock(directory)
        held.close()
        run.lock(directory).close()

    def test_one_may_wait_for_it(self, directory):
        held = run.lock(directory)
        threading.Timer(0.3, held.close).start()
        run.lock(directory, patience=60.0).close()

    def test_a_killed_process_holds_nothing(self, directory, environment):
        code = """
import pathlib, sys, time
from megaflow.train.run import lock
held = lock(pathlib.Path(sys.argv[1]))
print(1, flush=True)
time.sleep(60)
"""
        holder = subprocess.Popen([sys.executable, "-c", code, str(directory)], env=environment, stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"1\n"
            with pytest.raises(UserError, match=f"process {holder.pid} on "):
                run.lock(directory)
        finally:
            holder.kill()
            holder.wait()
        run.lock(directory).close()

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write the run directory"):
            run.lock(tmp_path / "file" / "run")
