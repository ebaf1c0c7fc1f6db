"""The training commands in this process: every override trains, layouts and restarts change no loss, and what stops a run is said."""

import json
import math
import re
import resource
import shutil
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from megaflow.config.load import ConfigError, load
from megaflow.data.prepare import prepare
from megaflow.data.shards import open_prepared
from megaflow.model import build, parts
from megaflow.parallel import mesh as meshes
from megaflow.process import STOPPED
from megaflow.train import checkpoint as checkpoints
from megaflow.train import engine, loop, stages
from megaflow.train import run as runs
from megaflow.train.context import Contexts
from megaflow.train.meter import SPEED
from megaflow.train.stage_flow import FlowStage

BIT_FOR_BIT = [("char", "flow"), ("coded", "flow"), ("documents", "flow"), ("coded", "autoregressive"), ("char", "flow_map")]


def losses(directory: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in runs.lines(directory / "metrics.jsonl") if "loss" in line}


@pytest.fixture
def train(config, trained, tmp_path):
    """train(kind, family, *overrides): a run below tmp_path that must end well; returns its directory."""

    def start(kind: str, family: str = "flow", *overrides: str, name: str = "run", code: int = 0) -> Path:
        directory = tmp_path / name
        if family == "flow_map":
            found = stages.distill(str(config(kind, family)), [f"distill.teacher={trained(kind)}", f"run.dir={directory}", *overrides])
        else:
            found = stages.pretrain(str(config(kind, family)), [f"run.dir={directory}", *overrides])
        assert found == code
        return directory

    return start


class TestARun:
    @pytest.mark.parametrize("kind, family", BIT_FOR_BIT)
    def test_what_it_writes(self, trained, kind, family):
        """One line a step with everything a curve needs, validations apart, and a loss that went down."""
        directory = trained(kind, family)
        written = runs.lines(directory / "metrics.jsonl")
        steps = [line for line in written if "loss" in line]
        assert [line["step"] for line in steps] == list(range(1, 41))
        assert all({"step", "tokens", "loss", "learning_rate", "grad_norm", *SPEED} <= line.keys() for line in steps)
        summary, flops = json.loads((directory / "summary.json").read_text()), steps[0]["model_flops_per_token"]
        assert all(line["model_flops_per_token"] == flops and 0.0 <= line["data_wait"] < 1.0 for line in steps)
        assert all(line["memory_bytes"] > 5e7 and 0.0 < line["mfu"] < 1.5 for line in steps)
        peaks = [line["tokens_per_second"] * flops / line["mfu"] for line in steps]
        assert peaks == pytest.approx([peaks[0]] * 40) and summary["model_flops_per_token"] == flops
        assert summary["mfu"] == pytest.approx(summary["tokens_per_second"] * flops / peaks[0])
        assert 0.0 < summary["checkpoint_wait_seconds"] < summary["seconds"]
        checks = [line for line in written if "loss" not in line]
        assert [line["step"] for line in checks] == [10, 20, 30, 40] and all("validation_loss" in line for line in checks)
        assert all(math.isfinite(value) for line in written for value in line.values())
        assert checkpoints.steps(directory) == [30, 40]
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["steps"] == 40 and summary["tokens"] == steps[-1]["tokens"]
        if family == "autoregressive":
            assert checks[-1]["validation_loss"] < checks[0]["validation_loss"]
        if family == "flow":  # a bound of few rows: within its own error
            assert checks[-1]["validation_loss"] < checks[0]["validation_loss"] + 3.0 * checks[-1]["validation_standard_error"]
        assert {"config.yaml", "metrics.jsonl", "checkpoints", "run.json"} <= {path.name for path in directory.iterdir()}

    def test_tokens_that_pad_are_not_counted(self, trained, shards):
        from megaflow.data.stream import TokenStream

        _, lengths = TokenStream(shards("documents"), "train", seed=0).rows(range(40 * 8))
        assert lengths.min() < lengths.max()  # there is padding
        assert runs.lines(trained("documents") / "metrics.jsonl")[-2]["tokens"] == int(lengths.sum())

    def test_a_map_shares_its_teacher_s_fixed_parts_bit_for_bit(self, trained):
        assert parts.same(*(parts.read(trained("char", family) / parts.FILE) for family in ("flow_map", "flow")))
        map_stage, teacher = (checkpoints.newest(trained("char", family)).tensors("stage") for family in ("flow_map", "flow"))
        assert all(torch.equal(map_stage[name], teacher[name]) for name in ("clock_times", "clock_tau"))

    def test_a_map_keeps_documents_apart_where_its_teacher_does(self, copied, config):
        """It would be asked for what it never saw in training; and a config that says otherwise is refused."""
        flow = copied("coded")
        file = flow / "config.yaml"
        file.write_text(file.read_text().replace("mask_documents: false", "mask_documents: true"))
        path, words = str(config("coded", "flow_map")), [f"distill.teacher={flow}"]
        assert runs.load_distill(path, words).config.data.mask_documents is True
        with pytest.raises(ConfigError, match="data.mask_documents=False contradicts the teacher's True"):
            runs.load_distill(path, [*words, "data.mask_documents=false"])

    def test_a_map_reads_beliefs_by_its_teacher_s_table(self, trained):
        found, teacher = (checkpoints.newest(trained("coded", family)) for family in ("flow_map", "flow"))
        for group in ("averaged", "weights"):
            assert torch.equal(found.read(f"{group}/table"), teacher.read("averaged/table"))
        assert "moments/exp_avg.table" not in found.names()
        assert not torch.equal(found.read("averaged/widen.weight"), teacher.read("averaged/widen.weight"))

    def test_a_map_s_line_has_its_divergences(self, trained):
        """Of both kinds of rows, without the weights that are in the loss: positive, and what is to go down."""
        steps = [line for line in runs.lines(trained("char", "flow_map") / "metrics.jsonl") if "loss" in line]
        for name in ("diagonal_divergence", "semigroup_divergence"):
            assert all(0.0 < line[name] < 10.0 for line in steps[1:]) and len({line[name] for line in steps}) == len(steps)

    def test_the_clock_was_refitted_and_is_in_the_checkpoint(self, trained):
        directory = trained("coded")
        before, after = (checkpoints.open_checkpoint(checkpoints.folder(directory, step)).tensors("stage") for step in (30, 40))
        assert set(after) == {"profile_total", "profile_weight", "profile_edges", "profile_named", "clock_times", "clock_tau"}
        assert not torch.equal(before["profile_total"], after["profile_total"])

    def test_the_console_tells_what_the_metrics_do(self, cli, config, tmp_path):
        command = ("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "train.steps=4", "train.validate_every=2")
        told = cli(*command).err
        checks = [line for line in runs.lines(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in line]
        for line in checks:
            assert f"run  step {line['step']}  validation_loss {line['validation_loss']:.4g}  validation_standard_error" in told
        last = [line for line in runs.lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line][-1]
        assert f"loss {last['loss']:.4f}  norm {last['grad_norm']:.3g}  rate {last['learning_rate']:.2e}  " in told and len(checks) == 2

    def test_where_it_pauses_is_a_line(self, train):
        """A halving decides by it."""
        found = runs.lines(train("coded", "flow", "train.steps=9", "log.every=4", "train.pause_at=5", code=STOPPED) / "metrics.jsonl")
        assert [line["step"] for line in found if "loss" in line] == [4, 5]

    def test_metrics_every_few_steps(self, train):
        directory = train("coded", "flow", "train.steps=7", "log.every=3")
        assert list(losses(directory)) == [3, 6, 7]  # and the last


class TestOverrides:
    @pytest.mark.parametrize("kind", [pytest.param("char", marks=pytest.mark.long), "coded"])
    @pytest.mark.parametrize(
        "override",
        [
            "run.seed=5",
            "model.layers=1",
            "model.hidden=48",
            "model.heads=1",
            "model.mlp_ratio=2",
            "model.belief_dim=4",
            "model.attention=plain",
            "model.input=linear",
            "model.input=belief",
            "model.input=both",
            "flow.code=frame",
            "flow.code=identity",
            "flow.code_dim=8",
            "flow.skip=off",
            "flow.skip=on",
            "flow.clock.uniform_share=1",
            "flow.clock.refit_every=1",
            "flow.clock.bins=20",
            "flow.clock.memory=0",
            "optim.name=muon",
            "optim.schedule=constant",
            "optim.schedule=linear",
            "optim.warmup_steps=50",
            "optim.weight_decay=0.1",
            "optim.clip_norm=0",
            "optim.ema_decay=0",
            "parallel.zero=1",
            "parallel.zero=2",
            "train.steps=1",
            "train.global_batch=1",
            "train.global_batch=3",
            "train.micro_batch=3",
            "train.precision=bf16",
            "train.checkpoint_every=1",
            "train.validate_every=1",
            "train.validation_rows=1",
            "model.family=autoregressive",
        ],
    )
    def test_every_single_one_trains(self, train, kind, override):
        directory = train(kind, "flow", *([] if "train.steps" in override else ["train.steps=3"]), override)
        found = losses(directory)
        assert len(found) == (1 if "train.steps" in override else 3) and all(map(math.isfinite, found.values()))

    @pytest.mark.parametrize(
        "override",
        [
            "distill.diagonal_fraction=0.1",
            "distill.diagonal_fraction=0.75",
            "distill.boundary_fraction=0",
            "distill.boundary_fraction=0.7",
            "distill.weighting=none",
            "distill.state_input=linear",
            "distill.state_input=none",
            "optim.name=muon",
            "parallel.zero=1",
            "train.precision=bf16",
            "train.global_batch=4",
        ],
    )
    def test_every_single_one_distills(self, train, override):
        found = losses(train("coded", "flow_map", "train.steps=2", override))
        assert len(found) == 2 and all(map(math.isfinite, found.values()))


class TestLayouts:
    @pytest.mark.parametrize("kind, family", BIT_FOR_BIT)
    @pytest.mark.parametrize("zero", [0, 2])
    def test_accumulation_changes_no_loss(self, train, kind, family, zero):
        """Eight rows at once, or two at a time: the gradient is the mean over all counted tokens either way."""
        whole, parts = (
            losses(train(kind, family, "train.steps=6", f"parallel.zero={zero}", f"train.micro_batch={micro}", name=f"micro-{micro}"))
            for micro in (8, 2)
        )
        assert parts == pytest.approx(whole, rel=1e-5)

    @pytest.mark.parametrize("zero", [0, 1])
    def test_bf16_learns_and_its_fp32_weights_survive_a_restart(self, train, zero):
        overrides = ("train.precision=bf16", f"parallel.zero={zero}")
        directory = train("coded", "autoregressive", *overrides)
        undisturbed = losses(directory)
        assert sum(undisturbed[step] for step in range(36, 41)) < sum(undisturbed[step] for step in range(1, 6)) - 0.5
        weights = checkpoints.newest(directory).tensors("weights")
        assert any((value != value.bfloat16().float()).any() for value in weights.values())
        set_back(directory, 30)
        assert losses(train("coded", "autoregressive", *overrides)) == undisturbed
        assert all(torch.equal(value, weights[name]) for name, value in checkpoints.newest(directory).tensors("weights").items())


def set_back(directory: Path, step: int) -> None:
    """The run as it was after an earlier checkpoint, with the lines that were logged since."""
    for later in checkpoints.steps(directory):
        if later > step:
            shutil.rmtree(checkpoints.folder(directory, later))
    (directory / "summary.json").unlink()


class TestResume:
    @pytest.mark.parametrize("kind, family", BIT_FOR_BIT)
    def test_from_a_checkpoint_on_every_number_is_the_same(self, copied, train, trained, kind, family):
        """Losses, norms, rates, validations, weights, averages, moments, clock: all of it, to the last bit."""
        directory = train(kind, family, "run.dir=" + str(copied(kind, family)))  # finished: nothing happens
        directory = directory.parent / f"copy-{kind}-{family}"
        set_back(directory, 30)
        train(kind, family, "run.dir=" + str(directory))
        for ours, theirs in zip(runs.lines(directory / "metrics.jsonl"), runs.lines(trained(kind, family) / "metrics.jsonl"), strict=True):
            assert {k: v for k, v in ours.items() if k not in SPEED} == {k: v for k, v in theirs.items() if k not in SPEED}
        ours, theirs = (checkpoints.newest(path) for path in (directory, trained(kind, family)))
        assert ours.names() == theirs.names() and all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.names())

    def test_a_finished_run_run_again_does_nothing(self, copied, cli, config):
        directory = copied("coded")
        before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and "checkpoints" in str(path)}
        curve = (directory / "metrics.jsonl").read_bytes()
        told = cli("pretrain", config("coded"), f"run.dir={directory}")
        assert told.code == 0 and "finished at step 40; nothing to do (a larger train.steps goes on)" in told.err
        assert {path: path.stat().st_mtime_ns for path in before} == before and (directory / "metrics.jsonl").read_bytes() == curve

    def test_more_steps_go_on_from_the_end(self, copied, train, trained):
        directory = copied("coded")
        train("coded", "flow", f"run.dir={directory}", "train.steps=55")
        found = losses(directory)
        assert list(found) == list(range(1, 56)) and {step: found[step] for step in range(1, 41)} == losses(trained("coded"))
        assert json.loads((directory / "summary.json").read_text())["steps"] == 55
        assert checkpoints.steps(directory) == [50, 55]

    def test_a_damaged_checkpoint_is_passed_over_and_the_curve_is_the_same(self, copied, train, trained, capfd):
        directory = copied("coded")
        (directory / "summary.json").unlink()
        file = checkpoints.folder(directory, 40) / "moments-00000-of-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 255
        file.write_bytes(content)
        train("coded", "flow", f"run.dir={directory}")
        assert f"warning: {file}: not the file that was written" in capfd.readouterr().err
        assert losses(directory) == losses(trained("coded"))

    @pytest.mark.parametrize("damage", ["gone", "changed"])
    def test_a_finished_run_that_has_lost_its_end_comes_to_it_again(self, copied, train, trained, damage):
        directory = copied("coded")
        last = checkpoints.folder(directory, 40)
        if damage == "gone":
            shutil.rmtree(last)
        else:
            content = bytearray((last / "averaged-00000-of-00001.safetensors").read_bytes())
            (last / "averaged-00000-of-00001.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
        train("coded", "flow", f"run.dir={directory}")
        assert checkpoints.newest(directory).state["step"] == 40 and losses(directory) == losses(trained("coded"))

    def test_a_run_that_was_killed_before_its_summary_is_summed_up(self, copied, train):
        directory = copied("coded")
        (directory / "summary.json").unlink()
        train("coded", "flow", f"run.dir={directory}")
        assert json.loads((directory / "summary.json").read_text())["steps"] == 40

    @pytest.mark.parametrize(
        "kind, family", [each if each[0] == "coded" else pytest.param(*each, marks=pytest.mark.long) for each in BIT_FOR_BIT]
    )
    def test_only_what_begins_draws_weights_and_measures_a_profile(self, train, monkeypatch, kind, family):
        """At a vocabulary of 50,000 a minute, which a run that goes on does not spend: all of it comes with the checkpoint."""
        overrides = ("train.steps=6", "train.checkpoint_every=4")
        directory = train(kind, family, *overrides)
        undisturbed = losses(directory)
        (directory / "summary.json").unlink()
        shutil.rmtree(checkpoints.folder(directory, 6))
        monkeypatch.setattr(parts, "initial_profile", None)
        if family != "flow_map":  # which starts from its teacher's
            monkeypatch.setattr(build, "draw", None)
        assert losses(train(kind, family, *overrides)) == undisturbed and len(undisturbed) == 6

    @pytest.mark.parametrize("kind, family", [("coded", "flow"), pytest.param("coded", "flow_map", marks=pytest.mark.long)])
    @pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
    def test_a_default_run_goes_on_under_other_zero_stages(self, train, kind, family, precision):
        """Unclipped, every number is that of a run without sharding to the last bit: weights, averages, moments and losses."""
        moved, undisturbed = self.under_every_zero_stage(train, kind, family, f"train.precision={precision}", "optim.clip_norm=0")
        assert losses(moved) == losses(undisturbed)
        ours, theirs = (checkpoints.newest(path) for path in (moved, undisturbed))
        assert {name.partition(".")[0] for name in ours.tensors("moments")} == {"exp_avg", "exp_avg_sq", "momentum_buffer"}
        assert ours.names() == theirs.names() and all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.names())

    def test_a_clipped_default_run_does_so_to_rounding(self, train):
        """ZeRO sums the gradient's norm up in another order."""
        moved, undisturbed = self.under_every_zero_stage(train, "coded", "flow")
        assert losses(moved) == pytest.approx(losses(undisturbed), rel=1e-5)

    def under_every_zero_stage(self, train, kind: str, family: str, *overrides: str) -> tuple[Path, Path]:
        """A run of eight steps without sharding, eight under ZeRO 1, eight under ZeRO 2 and eight without; and one without all along."""
        overrides = ("optim.name=auto", "optim.schedule=constant", "optim.warmup_steps=4", *overrides)
        undisturbed = train(kind, family, *overrides, "train.steps=32", name="undisturbed")
        for steps, zero in ((8, 0), (16, 1), (24, 2), (32, 0)):
            moved = train(kind, family, *overrides, f"train.steps={steps}", f"parallel.zero={zero}")
        return moved, undisturbed


class TestWhatIsNotFinite:
    """A step whose loss, and gradient with it, is not a number: passed over where the config says so, and in no other way felt."""

    @pytest.fixture
    def planted(self, monkeypatch):
        """planted(factor, step, …): these steps (1, 2, …) have their loss times a factor."""
        true = FlowStage.loss

        def plant(factor: float, *steps: int) -> None:
            def loss(stage, batch):
                value, observed = true(stage, batch)
                return (value * factor, observed * factor) if batch.step + 1 in steps else (value, observed)

            monkeypatch.setattr(FlowStage, "loss", loss)

        return plant

    def test_nothing_of_a_step_that_is_passed_over_is_kept(self, train, planted):
        """Weights, averages, moments and clock after it are those before it; its line says which samples were passed over."""
        planted(math.nan, 4)
        words = "train.skip_nonfinite=1", "train.checkpoint_every=1", "train.keep_checkpoints=9"
        for steps in (4, 6):
            directory = train("coded", "flow", *words, f"train.steps={steps}")
        before, after = (checkpoints.open_checkpoint(checkpoints.folder(directory, step)) for step in (3, 4))
        for group in ("weights", "averaged", "moments", "stage"):
            ours, theirs = after.tensors(group), before.tensors(group)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert after.state["step"] == 4 and after.state["tokens"] == before.state["tokens"] + 8 * 16
        assert list(losses(directory)) == [1, 2, 3, 5, 6]
        skipped = [line for line in runs.lines(directory / "metrics.jsonl") if "skipped" in line]
        assert skipped == [{"step": 4, "tokens": 4 * 8 * 16, "skipped": 1, "first_sample": 24, "last_sample": 31}]
        assert [line["passes"] for line in runs.lines(directory / "spikes.jsonl")] == [[[24, 31, None]]]

    def test_a_run_that_goes_on_after_one_has_the_losses_of_one_that_never_stopped(self, train, planted):
        """The moments' own count, by which AdamW corrects them, is of steps that were taken."""
        planted(math.nan, 2)
        overrides = (
            "train.skip_nonfinite=1",
            "train.steps=8",
            "train.checkpoint_every=4",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
        )
        directory = train("coded", "flow", *overrides)
        undisturbed, before = losses(directory), checkpoints.newest(directory)
        (directory / "summary.json").unlink()
        shutil.rmtree(checkpoints.folder(directory, 8))
        train("coded", "flow", *overrides)
        after = checkpoints.newest(directory)
        assert losses(directory) == undisturbed and list(undisturbed) == [1, 3, 4, 5, 6, 7, 8]
        assert before.state["taken"] == after.state["taken"] == 7
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.names())

    def test_no_checkpoint_takes_the_place_of_a_good_one_meanwhile(self, cli, config, planted, tmp_path):
        """A run that diverges keeps what it had before, however many steps it may pass over."""
        planted(math.nan, *range(5, 40))
        words = "train.skip_nonfinite=20", "train.checkpoint_every=2", "train.keep_checkpoints=2"
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", *words)
        assert told.code == 1 and f"the last good checkpoint is {checkpoints.folder(tmp_path / 'run', 4)}" in told.err
        assert checkpoints.steps(tmp_path / "run") == [2, 4]

    def test_the_limit_counts_steps_in_a_row(self, cli, config, planted, tmp_path):
        """Over a restart too: two, one and two are passed over where three in a row are not."""
        planted(math.nan, 2, 3, 5, 7, 8)
        words = ("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "train.skip_nonfinite=2", "train.checkpoint_every=1")
        assert cli(*words, "train.steps=8").code == 0
        planted(math.nan, 9)
        told = cli(*words, "train.steps=10")
        assert told.code == 1 and "the loss of step 9 is nan, after 2 in a row that were passed over; the last good" in told.err
        assert list(losses(tmp_path / "run")) == [1, 4, 6]

    def test_a_step_that_stands_out_is_written_down(self, cli, config, planted, tmp_path):
        """With its samples, pass by pass; and said in a line."""
        planted(50.0, 25)
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "train.steps=30", "train.micro_batch=4")
        assert told.code == 0 and told.err.count("warning: step 25: loss") == 1 and "samples 192 to 199 (spikes.jsonl)" in told.err
        (line,) = runs.lines(tmp_path / "run" / "spikes.jsonl")
        curve = losses(tmp_path / "run")
        assert line["step"] == 25 and line["loss"] == curve[25] and line["median_loss"] == median(curve[step] for step in range(1, 25))
        assert [part[:2] for part in line["passes"]] == [[192, 195], [196, 199]]
        assert sum(part[2] for part in line["passes"]) / 2 == pytest.approx(line["loss"], rel=1e-6)


class TestRefusals:
    def refused(self, told, *words: str, code: int = 2) -> None:
        sentence = [line for line in told.err.splitlines() if line.startswith("megaflow: ")]
        assert told.code == code and len(sentence) == 1 and "Traceback" not in told.err, told.err
        assert all(word in sentence[0] for word in words), sentence[0]

    def test_a_loss_that_is_not_finite_before_any_checkpoint(self, cli, config, tmp_path):
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "optim.learning_rate=1e30")
        self.refused(told, "the loss of step 2 is nan", "there is no checkpoint yet", "optim.learning_rate", code=1)

    def test_a_loss_that_is_not_finite_later(self, cli, config, tmp_path):
        """A rate that grows in the warm-up until the weights overflow: the sentence names the step and a checkpoint that is there."""
        told = cli(
            "pretrain",
            config("coded"),
            f"run.dir={tmp_path / 'run'}",
            "train.checkpoint_every=1",
            "optim.learning_rate=1e38",
            "optim.clip_norm=0",
            "optim.weight_decay=0.5",
            "optim.warmup_steps=40",
        )
        self.refused(told, "the last good checkpoint is", code=1)
        step, path = re.search(r"the loss of step (\d+) is \S+; the last good checkpoint is (\S+);", told.err).groups()
        assert int(step) > 1 and checkpoints.open_checkpoint(Path(path)).state["step"] == int(step) - 1
        assert all(map(math.isfinite, losses(tmp_path / "run").values()))

    def test_weights_that_are_lost_in_the_last_step(self, cli, config, tmp_path):
        """No loss comes after it; the validation shows it, and the run is not finished."""
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "optim.learning_rate=1e30", "train.steps=1")
        self.refused(told, "the validation loss of step 1 is nan", "there is no checkpoint yet", code=1)
        assert not (tmp_path / "run" / "summary.json").exists()
        assert [line for line in runs.lines(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in line] == []

    def test_weights_that_are_not_finite_are_not_saved(self, cli, config, copied, monkeypatch):
        """The last checkpoint that is named is one that a run can go on from."""
        directory = copied("coded")

        def lost(deep, take):
            torch.nn.init.constant_(next(deep.module.parameters()), math.nan)
            return 1.0

        monkeypatch.setattr(engine, "step", lost)
        told = cli("pretrain", config("coded"), f"run.dir={directory}", "train.steps=60", "train.checkpoint_every=1")
        self.refused(told, "after step 41 not all weights are finite", f"{checkpoints.folder(directory, 40)}", code=1)
        assert checkpoints.steps(directory) == [30, 40]

    def test_a_norm_that_is_not_finite(self, cli, config, copied, monkeypatch):
        """The run ends there, and its last checkpoint is named."""
        directory = copied("coded")
        monkeypatch.setattr(engine, "step", lambda deep, take: math.inf)
        told = cli("pretrain", config("coded"), f"run.dir={directory}", "train.steps=60")
        self.refused(told, "the gradient's norm of step 41 is inf", f"{checkpoints.folder(directory, 40)}", code=1)
        assert checkpoints.steps(directory) == [30, 40] and max(losses(directory)) == 40

    def test_shards_made_anew_of_other_text(self, cli, config, shards, texts, tmp_path):
        """The 27 letters have the same tokenizer whatever the text: it is the shards that are not the same."""
        data, directory = tmp_path / "data", tmp_path / "run"
        shutil.copytree(shards("char"), data)
        command = ("pretrain", config("char"), f"run.dir={directory}", f"data.path={data}")
        assert cli(*command, "train.steps=2").code == 0
        shutil.rmtree(data)
        source = [f"data.path={data}", f"data.source={texts['sentences']}", "data.validation_fraction=0.2"]
        prepare(load(config("char"), source).config.data)
        told = f"{directory}: its shards have been made anew from other text since"
        self.refused(cli(*command, "train.steps=3"), told)
        self.refused(cli("evaluate", directory), told)  # the text that it would be compared with may be what it has learned
        assert not (directory / "evaluation.json").exists()

    @pytest.mark.parametrize("name", ["flow.safetensors", "shards"])
    def test_a_file_that_checkpoints_depend_on_is_lost(self, cli, config, copied, name):
        """Made anew it might be another one; before the first checkpoint it may."""
        directory = copied("coded")
        shutil.rmtree(directory / name) if (directory / name).is_dir() else (directory / name).unlink()
        command = ("pretrain", config("coded"), f"run.dir={directory}", "train.steps=60")
        self.refused(cli(*command), f"{directory / name} is missing, and the run's checkpoints were trained with it")
        shutil.rmtree(directory / "checkpoints")
        assert cli(*command).code == 0 and (directory / name).exists() and max(losses(directory)) == 60

    def test_a_damaged_shard(self, cli, config, shards, tmp_path):
        data = Path(shutil.copytree(shards("coded"), tmp_path / "data"))
        damaged = next((data / "train").glob("*.mds"))
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # as a crash of the machine leaves it
        damaged.write_bytes(content)
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", f"data.path={data}")
        self.refused(told, f"{damaged} is not what prepare wrote (sha256 differs)")

    def test_shards_of_another_tokenizer(self, cli, config, shards, texts, tmp_path):
        """The same path and the same vocabulary size, another BPE: neither going on nor distilling takes it for the first."""
        data, directory = tmp_path / "data", tmp_path / "run"
        shutil.copytree(shards("coded"), data)
        command = ("pretrain", config("coded"), f"run.dir={directory}", f"data.path={data}", "train.steps=2")
        assert cli(*command).code == 0
        shutil.rmtree(data)
        prepare(load(config("coded"), [f"data.path={data}", f"data.source={texts['sentences']}"]).config.data)
        self.refused(cli(*command[:-1], "train.steps=3"), str(directory), "tokenizer", "differs from the model's")
        distill = ("distill", config("coded", "flow_map"), f"distill.teacher={directory}", f"run.dir={tmp_path / 'map'}", "train.steps=2")
        self.refused(cli(*distill), str(directory), "differs from the model's")
        assert json.loads((directory / "summary.json").read_text())["steps"] == 2  # a refusal takes nothing away

    def test_shards_that_contradict_the_config(self, cli, config, shards, tmp_path):
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", f"data.path={shards('documents')}")
        self.refused(told, "coded-flow.yaml: data.length=16 contradicts the shards", "made with 48")

    def test_a_teacher_that_has_moved_on(self, copied, cli, config, tmp_path):
        """With the fixed clock nothing else would show it."""
        teacher, command = tmp_path / "teacher", ["distill", config("coded", "flow_map"), f"run.dir={tmp_path / 'map'}"]
        flow = ["pretrain", config("coded"), f"run.dir={teacher}", "flow.clock.name=uniform"]
        command.append(f"distill.teacher={teacher}")
        assert cli(*flow, "train.steps=5").code == 0 and cli(*command, "train.steps=2").code == 0
        assert cli(*command, "train.steps=3").code == 0
        assert cli(*flow, "train.steps=6").code == 0
        self.refused(cli(*command, "train.steps=4"), f"its teacher {teacher} has changed since (step 5 then, 6 now)", "another run.dir")

    def test_a_distill_config_is_not_pretrained(self, cli, config, trained, tmp_path):
        told = cli("pretrain", config("coded", "flow_map"), f"run.dir={tmp_path / 'run'}")
        self.refused(told, "flow_map.yaml: distill.teacher is set", "megaflow distill")

    @pytest.mark.parametrize("family", ["flow", "autoregressive"])
    def test_what_only_distill_reads_is_not_ignored(self, cli, config, tmp_path, family):
        told = cli("pretrain", config("coded", family), f"run.dir={tmp_path / 'run'}", "distill.weighting=none")
        self.refused(told, "command line: distill.weighting is set; this is a config for megaflow distill")

    def test_a_run_s_own_config_is_one_of_another_run_whatever_the_defaults_were(self, cli, config, tmp_path):
        """Earlier versions wrote distill.weighting=adaptive into it."""
        assert cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "train.steps=1", "train.validate_every=1").code == 0
        written = (tmp_path / "run" / "config.yaml").read_text()
        (tmp_path / "mine.yaml").write_text(written.replace("weighting: auto", "weighting: adaptive"))
        assert "weighting: adaptive" in (tmp_path / "mine.yaml").read_text()
        assert cli("pretrain", tmp_path / "mine.yaml", f"run.dir={tmp_path / 'again'}").code == 0

    def test_the_start_says_which_attention(self, cli, config, tmp_path):
        command = ("pretrain", config("coded"), "train.steps=1", "model.attention=sdpa")
        told = cli(*command, f"run.dir={tmp_path / 'one'}")
        assert re.search(r"attention +sdpa\n", told.err)
        told = cli(*command, f"run.dir={tmp_path / 'capped'}", "model.softcap=20")
        assert re.search(r"attention +written out in chunks, since scores are capped\n", told.err)

    def test_ctrl_c_says_what_is_kept(self, cli, config, tmp_path, monkeypatch):
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "accumulate", interrupted)
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "train.steps=2")
        assert told.code == 130 and "goes on from the last checkpoint, if there is one (SIGTERM and SIGUSR1 save" in told.err

    def test_the_config_that_a_run_has_written_starts_it_again(self, cli, config, tmp_path):
        """Its config.yaml says every value, defaults among them; another run.dir repeats the run, its own one finds it finished."""
        directories = {"pretrain": tmp_path / "flow", "distill": tmp_path / "map"}
        assert cli("pretrain", config("coded"), f"run.dir={directories['pretrain']}", "train.steps=3").code == 0
        teacher = f"distill.teacher={directories['pretrain']}"
        assert cli("distill", config("coded", "flow_map"), f"run.dir={directories['distill']}", teacher, "train.steps=3").code == 0
        for command, directory in directories.items():
            told = cli(command, directory / "config.yaml")
            assert told.code == 0 and "finished at step 3; nothing to do" in told.err, told.err
            assert cli(command, directory / "config.yaml", f"run.dir={tmp_path / 'again'}/{command}").code == 0
            curves = [
                [line["loss"] for line in runs.lines(run / "metrics.jsonl") if "loss" in line]
                for run in (directory, tmp_path / "again" / command)
            ]
            assert curves[0] == curves[1] and len(curves[0]) == 3

    def test_what_is_refused_at_the_start_is_no_run_yet(self, cli, config, tmp_path):
        command = ("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "train.steps=2")
        self.refused(cli(*command, "model.attention=flash"), "model.attention=flash needs")
        never = "flow.clock.name=logit_normal:mean=40", "flow.clock.uniform_share=0"
        self.refused(cli(*command, *never), "command line: flow.clock.name=logit_normal:mean=40 draws 0 % of its times where")
        self.refused(cli(*command, "flow.weighting=sigmoid:bias=1000"), "flow.weighting=sigmoid:bias=1000 is next to nothing where tokens")
        self.refused(cli(*command, "flow.code_dim=2"), "command line: flow.code_dim=2 is too few dimensions for 300 tokens")
        assert not (tmp_path / "run").exists() and cli(*command).code == 0

    def test_a_warm_up_longer_than_the_run_is_said_to_be(self, cli, config, tmp_path):
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "train.steps=2", "optim.warmup_steps=5")
        assert told.code == 0 and "warning: optim.warmup_steps=5 of train.steps=2: the run ends before" in told.err
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'another'}", "train.steps=2", "optim.warmup_steps=2")
        assert told.code == 0 and "warning: optim" not in told.err  # its last step has the whole rate

    def test_wandb_sees_one_run_however_often_it_is_started(self, cli, config, tmp_path):
        command = ("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "log.wandb=offline")
        assert cli(*command, "train.steps=2").code == 0
        time.sleep(1.0)  # its directories are named by the second
        assert cli(*command, "train.steps=3").code == 0
        written = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
        assert len({name.rsplit("-", 1)[1] for name in written}) == 1, written

    def test_wandb_without_an_account(self, cli, config, tmp_path, monkeypatch):
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        told = cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "log.wandb=online")
        self.refused(told, "log.wandb=online: ", "log.wandb=offline")

    def test_no_shards(self, cli, config, tmp_path):
        self.refused(
            cli("pretrain", config("coded"), f"run.dir={tmp_path / 'run'}", "data.path=nowhere"),
            "there is no folder nowhere",
            "megaflow prepare",
        )

    def test_a_changed_key(self, copied, cli, config):
        told = cli("pretrain", config("coded"), f"run.dir={copied('coded')}", "model.layers=3", "run.seed=1")
        self.refused(told, "run.seed (was 0, now 1)", "model.layers (was 2, now 3)", "choose another run.dir")

    def test_fewer_steps(self, copied, cli, config):
        self.refused(cli("pretrain", config("coded"), f"run.dir={copied('coded')}", "train.steps=39"), "may grow from 40, not shrink to 39")

    def test_a_run_that_another_process_works_on(self, copied, cli, config):
        directory = copied("coded")
        held = runs.lock(directory)
        self.refused(cli("pretrain", config("coded"), f"run.dir={directory}", "train.steps=60"), "is already working on this run")
        held.close()

    def test_a_disk_that_refuses_a_checkpoint(self, copied, cli, config):
        directory = copied("coded")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        try:
            told = cli("pretrain", config("coded"), f"run.dir={directory}", "train.steps=60")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        self.refused(told, "step-00000050: the checkpoint could not be written", "earlier checkpoints are intact")
        assert checkpoints.newest(directory).state["step"] == 40

    @pytest.mark.parametrize(
        "teacher, words",
        [
            (None, ["distill.teacher is not set"]),
            ("nowhere", ["nowhere: no such directory"]),
            (("coded", "autoregressive"), ["is a baseline, model.family=autoregressive"]),
            (("coded", "flow_map"), ["is a flow map already"]),
        ],
    )
    def test_teachers_that_are_none(self, cli, config, trained, tmp_path, teacher, words):
        named = "" if teacher is None else teacher if isinstance(teacher, str) else trained(*teacher)
        self.refused(cli("distill", config("coded", "flow_map"), f"run.dir={tmp_path / 'run'}", f"distill.teacher={named}"), *words)

    def test_a_map_of_another_shape_than_its_teacher(self, cli, config, trained, tmp_path):
        told = cli(
            "distill", config("coded", "flow_map"), f"run.dir={tmp_path / 'run'}", f"distill.teacher={trained('coded')}", "model.layers=3"
        )
        self.refused(told, "model.layers=3 contradicts the teacher's 2")

    def test_attention_is_the_machines_and_not_the_teachers(self, cli, config, copied, tmp_path):
        """One that was trained where flash-attn is can be distilled where it is not."""
        teacher, words = copied("coded"), ["distill", config("coded", "flow_map"), f"run.dir={tmp_path / 'run'}", "train.steps=2"]
        file = teacher / "config.yaml"
        file.write_text(file.read_text().replace("attention: auto", "attention: flash"))
        if not torch.cuda.is_available():
            self.refused(cli(*words, f"distill.teacher={teacher}"), "model.attention=flash needs", "use auto or sdpa")
        for kernel in ("sdpa", "plain"):
            assert cli(*words, f"distill.teacher={teacher}", f"model.attention={kernel}").code == 0

    def test_a_converted_model_is_no_teacher_and_no_run(self, cli, config, trained, tmp_path):
        assert cli("convert", trained("coded"), tmp_path / "new" / "model").code == 0
        model = tmp_path / "new" / "model"
        words = f"{model}: it has a config.yaml and no run.json, as a converted model has"
        self.refused(cli("distill", config("coded", "flow_map"), f"run.dir={tmp_path / 'run'}", f"distill.teacher={model}"), words)
        self.refused(cli("pretrain", config("coded"), f"run.dir={model}"), words)

    def test_a_full_disk_is_named_from_the_first_file_on(self, cli, config, full):
        told = cli("pretrain", config("coded"), f"run.dir={full / 'run'}", "train.steps=2")
        assert told.code == 2 and told.err == f"megaflow: {full / 'run' / '.lock'}: No space left on device; nothing finished is lost\n"


def validation_part(path: str, rows: int, tensor: int) -> tuple[list[int], int, float]:
    """(places that this process reads, of how many, the sum of all weights over the processes)."""
    with meshes.join(tensor) as mesh:
        config = load(path, [f"train.validation_rows={rows}"]).config
        batch, total = loop.validation_rows(config, mesh, None, Contexts(config, open_prepared(config.data.path)))
        return batch.places.tolist(), batch.rows, total(batch.weight.double().sum()).item()


class TestValidationRows:
    @pytest.mark.parametrize(
        "rows, tensor, parts",
        [
            (8, 1, [[0, 1], [2, 3], [4, 5], [6, 7]]),
            (8, 2, [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]),
            (6, 1, [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]),  # equal parts, whatever does not divide
            (3, 1, [[0, 1, 2]] * 4),
        ],
    )
    def test_data_parallel_processes_share_them(self, ranks, config, rows, tensor, parts):
        found = ranks(4, validation_part, str(config("documents")), rows, tensor)
        assert [places for places, _, _ in found] == parts
        assert all(of == rows and weight == pytest.approx(1.0, rel=1e-6) for _, of, weight in found)
