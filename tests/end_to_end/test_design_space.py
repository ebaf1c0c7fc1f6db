"""Every value of the design space by itself, on the repository's own config: it trains, goes on after a stop with the same losses, writes
text, has a bound where one exists, and is distilled."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from megaflow.config.check import resolve
from megaflow.config.load import ConfigError, flatten, load
from megaflow.config.schema import entries, keys
from megaflow.errors import UserError
from megaflow.evaluate.evaluation import evaluate
from megaflow.evaluate.generate import sample
from megaflow.evaluate.loaded import load_run
from megaflow.export.convert import convert
from megaflow.flow import choice
from megaflow.flow import code as codes
from megaflow.parallel import random as numbers
from megaflow.train import checkpoint as checkpoints
from megaflow.train import code_start, stages
from megaflow.train import run as runs
from tests.conftest import DATA, NETWORK, ROOT, TRAINING

PAGE = ROOT / "docs" / "design-space.md"
SHARES = {"flow.clock.name": "argmax=0.9,uniform=0.1", "flow.context.law": "prefix=1,suffix=1,infilling=1,random=1"}
VALUES = [
    (name, value.replace("NAME=SHARE,…", SHARES.get(name, "")))
    for name, item in keys().items()
    if item.metadata["table"] and not name.startswith("distill.")
    for value in choice.described(entries(item))
]
VALUES += [("flow.code", value) for value in keys()["flow.code"].metadata["choices"] if value != "auto"]
VALUES += [
    ("flow.skip", "off"),
    ("model.input", "both"),
    ("flow.self_conditioning", "0.5"),
    ("flow.times", "tokens"),
    ("model.family", "masked"),
    ("model.family", "uniform"),
    ("model.time", "tokens"),
    ("model.time", "none"),
    ("model.registers", "4"),
    ("model.qk_norm", "false"),
    ("model.head", "tied"),
]
"""Of every key that chooses from a table, each entry with its options; the codes; and what a trunk may be."""
MAPS = [("distill.objective", value) for value in choice.described(entries(keys()["distill.objective"]))]
MAPS += [
    ("distill.weighting", "learned"),
    ("distill.weighting", "learned_start"),
    ("distill.weighting", "none"),
    ("distill.between", "uniform"),
    ("distill.times", "end"),
    ("distill.anchor", "data"),
    ("distill.surgery", "true"),
]
"""The same of stage 2."""
RESOLVE_NOTHING = ("flm", "dfm", "cdcd", "cfm")
"""Recipes that read the state linearly and say nothing of the channel: in a few steps no token is resolved, and there is no bound."""
NO_BOUND = ("vertices", "dirichlet", "off")
"""Noise without a channel; and without the channel term a few steps resolve no token."""


def losses(directory: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in runs.lines(directory / "metrics.jsonl") if "loss" in line}


def test_the_values_are_those_of_the_tables():
    assert {"flow.interpolant", "flow.prior", "flow.objective", "flow.weighting", "flow.clock.name"} <= {name for name, _ in VALUES}
    assert ("flow.weighting", "min_snr:gamma=5") in VALUES and ("flow.clock.name", "mixture:argmax=0.9,uniform=0.1") in VALUES


@pytest.mark.parametrize(("name", "value"), VALUES, ids=lambda x: x)
def test_every_value_trains_goes_on_and_writes(config, tmp_path, name, value):
    directory = tmp_path / "run"

    def train(*overrides: str) -> None:
        command = [f"run.dir={directory}", f"{name}={value}", "train.steps=5", "train.checkpoint_every=3", "train.validate_every=5"]
        command += ["model.belief_dim=auto"] if value == "tied" else []  # the small config's is another
        command += ["flow.context.share=0.5"] if name == "flow.context.law" else []
        assert stages.pretrain(str(config("coded")), [*command, "flow.clock.refit_every=2", "train.validation_rows=8", *overrides]) == 0

    train()
    whole, lines = losses(directory), runs.lines(directory / "metrics.jsonl")
    assert len(whole) == 5 and all(map(math.isfinite, whole.values()))
    last = lines[-1]
    assert math.isfinite(last["validation_loss"]) and ("validation_standard_error" in last) == (not value.startswith(NO_BOUND))
    shutil.rmtree(checkpoints.folder(directory, 5))
    (directory / "summary.json").unlink()
    train()
    assert losses(directory) == whole
    written = sample(directory, count=2, steps=3)
    assert len(written["tokens"]) == 2 and written["method"] == ("ancestral" if name == "model.family" else "ode") and all(written["texts"])
    found = evaluate(str(directory), steps=[2], samples=2, rows=8, draws=2, seed=0)["likelihood"]
    assert found["kind"] == "none" if value.startswith(NO_BOUND) else found["kind"] == "bound" and math.isfinite(found["nats_per_token"])
    if name in ("flow.prior", "flow.code", "model.head", "model.family"):  # what a run keeps of its own goes with it
        convert(directory, tmp_path / "model")
        assert sample(tmp_path / "model", count=2, steps=3)["tokens"] == written["tokens"]
    if name != "model.family" and (name, value) != ("model.time", "none"):
        own = [f"run.dir={tmp_path / 'map'}", f"distill.teacher={directory}", "train.steps=2", "train.validate_every=2"]
        assert stages.distill(str(config("coded", "flow_map")), own) == 0
        assert all(map(math.isfinite, losses(tmp_path / "map").values()))
        assert all(sample(tmp_path / "map", count=2, steps=steps)["texts"] for steps in (1, 2))
        assert json.loads((tmp_path / "map" / "summary.json").read_text())["steps"] == 2


def test_a_code_from_a_trained_run(config, trained, shards, tmp_path):
    """flow.code_from: the frame nearest to what most of the differences of that run's output weights lie in; of the same tokens alone."""
    source, directory = trained("coded", "autoregressive"), tmp_path / "run"
    common = ["flow.code=semantic", f"flow.code_from={source}", "train.steps=2", "train.validate_every=2", "train.validation_rows=8"]
    assert stages.pretrain(str(config("coded")), [f"run.dir={directory}", *common]) == 0
    code = load_run(directory).parts.code.matrix
    wanted = code_start.from_weights(stages.trained(source).read("averaged/weight"), code.shape[1])
    expected = codes.frame(len(code), code.shape[1], numbers.generator(0, "code"), start=wanted).matrix
    torch.testing.assert_close(code, expected, rtol=0, atol=1e-5)
    assert (code - codes.frame(len(code), code.shape[1], numbers.generator(0, "code")).matrix).abs().max() > 0.1
    assert all(sample(directory, count=2, steps=2)["texts"])
    with pytest.raises(UserError, match="use the shards that run was started on, or a flow.code_from that was trained on these shards"):
        stages.pretrain(str(config("documents")), [f"run.dir={tmp_path / 'other'}", *common])


@pytest.mark.parametrize("joint", [pytest.param(False, id="distilled"), pytest.param(True, id="joint", marks=pytest.mark.long)])
@pytest.mark.parametrize(("name", "value"), MAPS, ids=lambda x: x)
def test_every_value_of_a_map_trains_goes_on_and_writes(config, trained, tmp_path, name, value, joint):
    directory = tmp_path / "run"
    if joint and (name == "distill.anchor" or value.startswith("dmd")):
        pytest.skip("joint training has no teacher")

    def train() -> None:
        command = [f"run.dir={directory}", f"{name}={value}", "train.steps=5", "train.checkpoint_every=3", "train.validate_every=5"]
        if joint:
            command += ["train.joint=true", "flow.clock.refit_every=2", "train.validation_rows=8"]
            assert stages.pretrain(str(config("coded")), command) == 0
        else:
            command += [f"distill.teacher={trained('coded', 'flow')}", "train.validation_rows=8"]
            assert stages.distill(str(config("coded", "flow_map")), command) == 0

    train()
    whole, lines = losses(directory), runs.lines(directory / "metrics.jsonl")
    assert len(whole) == 5 and all(map(math.isfinite, whole.values())) and math.isfinite(lines[-1]["validation_bound"])
    assert ("gradient_cosine" in lines[0]) == (name == "distill.surgery") and ("cross_entropy" in lines[0]) == (joint or value == "data")
    shutil.rmtree(checkpoints.folder(directory, 5))
    (directory / "summary.json").unlink()
    train()
    assert losses(directory) == whole
    written = [sample(directory, count=2, steps=steps) for steps in (1, 2)]
    assert all(each["method"] == "flow_map" and all(each["texts"]) for each in written)
    convert(directory, tmp_path / "model")
    assert sample(tmp_path / "model", count=2, steps=2)["tokens"] == written[1]["tokens"]
    if joint:
        with pytest.raises(ConfigError, match="is a flow map already"):
            stages.distill(str(config("coded", "flow_map")), [f"distill.teacher={directory}", f"run.dir={tmp_path / 'map'}"])


@pytest.fixture(scope="session")
def flow_with_contexts(config, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("contexts") / "flow"
    command = [f"run.dir={directory}", "flow.context.share=0.5", "train.steps=3", "train.validate_every=3", "train.validation_rows=8"]
    assert stages.pretrain(str(config("coded")), command) == 0
    return directory


@pytest.mark.parametrize("objective", ["fmlm_mse", "lsd", "esd", "lsd_cfm", "ecld", "dmd:draws=2"])
def test_a_map_of_a_flow_that_is_given_tokens_fills_in_blanks(config, flow_with_contexts, tmp_path, objective):
    command = [f"run.dir={tmp_path / 'map'}", f"distill.teacher={flow_with_contexts}", f"distill.objective={objective}"]
    command += ["train.steps=3", "train.validate_every=3", "train.validation_rows=8"]
    assert stages.distill(str(config("coded", "flow_map")), command) == 0
    assert all(map(math.isfinite, losses(tmp_path / "map").values()))
    texts = sample(tmp_path / "map", 2, 2, infill="And ___ God", blank=3)["texts"]
    assert all(text.startswith("And") and text.endswith("God") for text in texts)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_published_recipe_trains(shards, config, trained, tmp_path, recipe):
    """Its choices at a small size; a file says where they come from."""
    assert re.search(r"arXiv \d{4}\.\d{5}", recipe.read_text("utf-8")) and str(recipe.relative_to(ROOT)) in PAGE.read_text("utf-8")
    file, directory = tmp_path / "recipe.yaml", tmp_path / "run"
    known = flatten(load(recipe).config)
    kind = "char" if known["flow.code"] == "identity" else "coded"
    dim = "flow: {code_dim: 8}\n" if kind == "coded" else ""
    resolve(load(recipe), 27 if kind == "char" else 50257)  # as it is written
    small = f"{NETWORK[:-2]}}}\n{dim}{TRAINING}parallel: {{zero: 0}}\n"
    file.write_text(f"base: {recipe}\nrun: {{dir: {directory}}}\ndata: {{path: {shards(kind)}, {DATA[kind]}}}\n{small}")
    overrides = ["train.steps=4", "optim.warmup_steps=2", "train.validate_every=4", "train.micro_batch=8", "train.precision=fp32"]
    if known["distill.teacher"]:  # network and data are the small teacher's
        mine = [f"{name}={value}" for name, value in known.items() if name.startswith("distill.") and value != "auto"]
        words = [*mine, *overrides, f"distill.teacher={trained('coded', 'flow')}", f"run.dir={directory}"]
        assert stages.distill(str(config("coded", "flow_map")), words) == 0
    else:
        assert stages.pretrain(str(file), overrides) == 0
    assert len(losses(directory)) == 4 and all(sample(directory, count=2, steps=3)["texts"])
    found = evaluate(str(directory), steps=[2], samples=2, rows=8, draws=2, seed=0)["likelihood"]
    assert found["kind"] == "none" if recipe.stem in RESOLVE_NOTHING else math.isfinite(found["nats_per_token"])
    ours = flatten(load(directory / "config.yaml").config)
    own = ("flow.", "distill.", "train.joint") if known["train.joint"] else "distill." if known["distill.teacher"] else "flow."
    kept = [name for name in known if name.startswith(own) and known[name] != "auto" and name not in ("flow.code_dim", "distill.teacher")]
    assert all(ours[name] == known[name] for name in kept)
