"""FLOPs of a training step: the closed formula is what PyTorch counts in the real stages, and what MFU is made of."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megaflow.config.check import resolve
from megaflow.config.load import assemble
from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow.interpolant import LINEAR, level
from megaflow.flow.likelihood import Range
from megaflow.model import build, devices
from megaflow.model.flops import hot_until, of_step, uncounted
from megaflow.model.parts import Parts, fit_clock, initial_profile
from megaflow.model.text_dit import HOT_GAIN
from megaflow.parallel import random
from megaflow.train.stage import Batch
from megaflow.train.stage_autoregressive import AutoregressiveStage
from megaflow.train.stage_discrete import DiscreteStage
from megaflow.train.stage_flow import FlowStage
from megaflow.train.stage_map import MapStage

SMALL: dict[str, Any] = {
    "model.layers": 2,
    "model.hidden": 32,
    "model.heads": 2,
    "model.belief_dim": 16,
    "model.attention": "plain",  # SDPA's kernel for CPUs is unknown to the counter
    "data.length": 16,
    "flow.clock.bins": 20,
    "train.global_batch": 8,
}
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    "characters": (27, {}),
    "coded": (400, {}),
    "more layers": (400, {"model.layers": 5}),
    "wide": (400, {"model.hidden": 96, "model.mlp_ratio": 2}),
    "long rows": (400, {"data.length": 80}),
    "large vocabulary": (3000, {"flow.code_dim": 8}),
    "no neighbours": (400, {"model.neighbors": 0, "model.belief_dim": 48}),
    "both read": (400, {"model.input": "both", "model.neighbors": 2}),
    "linear, one-hot": (100, {"model.input": "linear"}),
    "linear, coded": (400, {"model.input": "linear", "flow.code_dim": 40}),
    "one-hot of many": (400, {"flow.code": "identity"}),
}
DESIGNS: dict[str, tuple[int, dict[str, Any]]] = {
    "squared errors": (400, {"flow.objective": "endpoint_mse"}),
    "squared errors, one-hot": (100, {"flow.objective": "likelihood", "flow.code": "identity"}),
    "errors for the clock": (400, {"flow.clock.name": "variance", "flow.weighting": "learned"}),
    "learned code": (400, {"flow.code": "learned", "model.input": "both"}),
    "published": (400, {"flow.code": "learned", "model.input": "linear", "flow.skip": "off"}),
    "embedding": (400, {"flow.code": "embedding", "flow.objective": "likelihood"}),
    "simplex": (400, {"flow.prior": "vertices"}),
    "beside the text": (400, {"model.time": "tokens", "model.registers": 3}),
    "told before": (400, {"flow.self_conditioning": 0.5}),
    "told before, one-hot": (100, {"flow.self_conditioning": 0.25, "flow.code": "identity", "model.input": "linear"}),
    "token times": (400, {"flow.times": "tokens", "model.registers": 3, "flow.weighting": "learned"}),
    "no time": (400, {"model.time": "none"}),
    "tied head": (400, {"model.head": "tied", "model.belief_dim": "auto"}),
}
every_size = pytest.mark.parametrize("size", SIZES)


def made(kind: str, vocab: int, values: dict[str, Any]) -> Any:
    """A stage of a kind: a baseline by its family, flow or map, with fresh weights and the clock that a flow starts with."""
    ours = {
        "model.family": "flow" if kind == "map" else kind,
        "distill.teacher": "runs/flow" if kind == "map" and not values.get("train.joint") else "",
    }
    config = resolve(assemble([("test", SMALL | values | ours)]), vocab).config
    log_prior, cpu = torch.log_softmax(-torch.log1p(torch.arange(vocab, dtype=torch.float32)), 0), torch.device("cpu")
    torch.manual_seed(0)
    if kind not in ("flow", "map"):
        network = build.baseline_network(config, log_prior, cpu)
        network.initialize()
        return (AutoregressiveStage if kind == "autoregressive" else DiscreteStage)(config, network)
    one_hot, dim = config.flow.code == "identity", config.flow.code_dim
    code = codes.identity(vocab) if one_hot else codes.frame(vocab, dim, random.generator(0, "code"), rounds=3)
    code = codes.spread(code) if config.flow.code == "embedding" else code
    parts = Parts(code, log_prior, Range(-3.0, 14.0))
    flow = build.flow_network(config, parts, cpu)
    flow.initialize()
    if kind == "flow":
        return FlowStage(config, flow, parts, initial_profile(parts, config.flow.clock, seed=0))
    network = build.flow_network(config, parts, cpu, is_map=True)
    network.initialize()
    clock = fit_clock(config.flow.clock, parts, initial_profile(parts, config.flow.clock, seed=0))
    if config.distill.anchor == "teacher":
        return MapStage(config, network, parts, clock, flow)
    return MapStage(
        config, network, parts, clock, None, FlowStage(config, network, parts, initial_profile(parts, config.flow.clock, seed=0))
    )


def in_place_product(added: list[int], left: list[int], right: list[int], out_shape: Any = None, **_: Any) -> int:
    """FLOPs of addmm_, which the counter does not know by itself."""
    return 2 * left[0] * left[1] * right[1]


def counted(stage: Any, vocab: int, steps: int = 1) -> float:
    """FLOPs per token of forward and backward passes on random tokens, by PyTorch's counter."""
    rows, length = stage.config.train.global_batch, stage.config.data.length
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
        for step in range(steps):
            ids = torch.randint(vocab, (rows, length), generator=random.generator(0, "ids", step))
            loss, _ = stage.loss(Batch(ids, None, torch.arange(rows), step, rows, torch.full((rows * length,), 1.0 / (rows * length))))
            loss.backward()
    return counter.get_total_flops() / (steps * rows * length)


@every_size
@pytest.mark.parametrize("kind", ["autoregressive", "masked", "uniform", "flow"])
def test_the_formula_is_what_is_counted(kind, size):
    vocab, values = SIZES[size]
    stage = made(kind, vocab, {name: value for name, value in values.items() if kind == "flow" or not name.startswith("flow.")})
    flops = of_step(stage.config, vocab)
    assert flops.model + flops.recomputed == pytest.approx(counted(stage, vocab), rel=1e-4)
    assert flops.targets == 0.0


@pytest.mark.parametrize("design", DESIGNS)
def test_the_formula_is_what_is_counted_of_every_design(design):
    vocab, values = DESIGNS[design]
    stage = made("flow", vocab, values)
    flops = of_step(stage.config, vocab)
    assert flops.model + flops.recomputed == pytest.approx(counted(stage, vocab), rel=1e-4)
    assert (flops.targets > 0.0) == ("told before" in design)


@every_size
@pytest.mark.parametrize("fractions", [(0.5, 0.03125), (0.25, 0.5)])
def test_the_formula_of_a_flow_map_is_what_is_counted(size, fractions):
    """Which rows need a hot belief is drawn; on average it is what the formula says."""
    vocab, values = SIZES[size]
    of_batch = {"train.global_batch": 32, "distill.diagonal_fraction": fractions[0], "distill.boundary_fraction": fractions[1]}
    stage = made("map", vocab, values | of_batch)
    flops = of_step(stage.config, vocab, is_map=True, hot=hot_until(LINEAR, stage.clock, stage.parts.code))
    assert flops.model + flops.recomputed == pytest.approx(counted(stage, vocab, steps=2), rel=0.02)


@pytest.mark.parametrize("reads", ["linear", "none"])
def test_what_a_flow_map_reads_besides_is_counted(reads):
    stage = made("map", 400, {"distill.state_input": reads})
    flops = of_step(stage.config, 400, is_map=True)
    assert flops.model + flops.recomputed == pytest.approx(counted(stage, 400), rel=1e-4)


JOINT = {"train.joint": True, "train.global_batch": 32, "distill.boundary_fraction": 0.25}
MAPS = {
    "joint": (400, JOINT),
    "joint, linear ahead": (400, JOINT | {"distill.state_input": "linear", "distill.diagonal_fraction": 0.75}),
    "joint, dense": (27, JOINT),
    "joint, tied": (400, JOINT | {"model.head": "tied", "model.belief_dim": "auto"}),
    "joint, linear, by squares": (400, JOINT | {"model.input": "linear", "distill.objective": "fmlm_mse"}),
    "by squares": (400, {"train.global_batch": 32, "distill.objective": "fmlm_mse", "distill.anchor": "data"}),
}


@pytest.mark.parametrize("design", MAPS)
def test_the_formula_of_other_ways_to_a_map_is_what_is_counted(design):
    vocab, values = MAPS[design]
    stage = made("map", vocab, values)
    hot = hot_until(LINEAR, stage.clock, stage.parts.code)
    flops = of_step(stage.config, vocab, is_map=True, hot=hot)
    assert not uncounted(stage.config)
    assert flops.model + flops.recomputed == pytest.approx(counted(stage, vocab, steps=2), rel=0.02)


@pytest.mark.parametrize(
    "values, name",
    [
        ({"distill.objective": "esd"}, "distill.objective=esd"),
        ({"distill.objective": "dmd:draws=2"}, "distill.objective=dmd:draws=2"),
        ({"distill.surgery": True}, "distill.surgery=true"),
        ({"distill.weighting": "learned"}, "distill.weighting=learned"),
        ({"distill.anchor": "data", "flow.objective": "endpoint_mse"}, "flow.objective=endpoint_mse"),
        ({"distill.anchor": "data", "flow.clock.name": "variance"}, "flow.clock.name=variance"),
        ({"flow.objective": "endpoint_mse"}, ""),
        ({"distill.anchor": "data", "flow.weighting": "min_snr:gamma=2"}, ""),
    ],
)
def test_what_the_formula_does_not_know_is_named(values, name):
    config = resolve(assemble([("test", {"distill.teacher": "runs/flow", **values})]), 400).config
    assert uncounted(config) == name


def test_beliefs_that_are_computed_again_are_no_model_flops():
    stage = made("flow", 3000, {"flow.code_dim": 8})
    flops = of_step(stage.config, 3000)
    assert flops.recomputed == 2 * 3000 * (8 + 2)
    assert flops.model < 0.99 * counted(stage, 3000)


def test_posteriors_of_a_flow_map_that_are_computed_again_are_no_model_flops():
    """Those at s of the rows with s < t, by head and skip, under ZeRO 3."""
    assert of_step(made("map", 3000, {}).config, 3000, is_map=True).recomputed == 0.0
    stage = made("map", 3000, {"distill.diagonal_fraction": 0.25, "train.global_batch": 8, "parallel.zero": 3})
    flops, dim = of_step(stage.config, 3000, is_map=True, hot=hot_until(LINEAR, stage.clock, stage.parts.code)), stage.config.flow.code_dim
    assert flops.recomputed == 2 * 0.75 * (3000 * stage.config.model.hidden + 3000 * (dim + 2))
    found = counted(stage, 3000)
    assert flops.model < 0.99 * found and flops.model + flops.recomputed == pytest.approx(found, rel=0.02)


def test_six_flops_a_weight_and_twelve_of_attention():
    """PaLM, appendix B: 6 N + 12 layers hidden length, N the weights but for the table of tokens, which is not multiplied by; and 2 a
    token of the vocabulary for the gradient of the head's bias."""
    stage = made("autoregressive", 400, {})
    skipped = {"table", "start", "bias"}
    weights = sum(p.numel() for name, p in stage.network.named_parameters() if p.dim() > 1 and name not in skipped and "gain" not in name)
    assert of_step(stage.config, 400).model == 6 * weights + 12 * 2 * 32 * 16 + 2 * 400


@pytest.mark.parametrize("vocab", [100, 400])
def test_hot_beliefs_end_where_the_channel_is_as_sharp(vocab):
    stage = made("map", vocab, {})
    time = clocks.inverse(stage.clock, torch.tensor(hot_until(LINEAR, stage.clock, stage.parts.code)))
    expected = HOT_GAIN / stage.parts.code.leverage.mean().sqrt().item()
    assert level(LINEAR, time)[0].item() == pytest.approx(expected, rel=1e-4)


def test_shares_of_hot_beliefs_are_those_of_the_draws():
    """At h = 0, 1/2 and 1 the formula has its limits; between, the share of draws before h."""
    stage = made("map", 400, {"train.global_batch": 1000, "distill.boundary_fraction": 0.0})
    stage.config.distill.diagonal_fraction = 0.0  # no run may have it: nothing would hold the map to its flow
    none, half, near, whole = (of_step(stage.config, 400, is_map=True, hot=h) for h in (0.0, 0.5, 0.5 + 1e-9, 1.0))
    see = 2.0 * (400 * (64 + 2) + 400 * 16)
    assert whole.forward - none.forward == pytest.approx(see) and whole.targets - none.targets == pytest.approx(see)
    assert half.targets - none.targets == pytest.approx(0.5 * see)
    assert near.targets == pytest.approx(half.targets) and near.forward == pytest.approx(half.forward)
    first, second = torch.rand(2, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = second * (1.0 - first)
    for h in (0.2, 0.7):
        at = of_step(stage.config, 400, is_map=True, hot=h)
        assert (at.forward - none.forward) / see == pytest.approx((s < h).double().mean().item(), abs=0.005)
        assert (at.targets - none.targets) / see == pytest.approx((s + first / 2 < h).double().mean().item(), abs=0.005)


def test_boundary_rows_start_in_noise_and_change_in_the_middle_of_the_clock():
    """Their first belief is always hot; that at u = 1/2 where hot beliefs go further."""
    config = made("map", 400, {}).config
    config.distill.diagonal_fraction, config.distill.boundary_fraction = 0.0, 1.0  # no run may have these
    short, far = (of_step(config, 400, is_map=True, hot=h) for h in (0.4, 0.6))
    assert short.forward == far.forward
    assert far.targets - short.targets == pytest.approx(2.0 * (400 * (64 + 2) + 400 * 16))


def test_mfu_is_the_share_of_the_peak():
    assert devices.mfu(flops=3e9, tokens_per_second=1e5, peak=1e15, count=2) == pytest.approx(0.15)
    assert devices.mfu(flops=3e9, tokens_per_second=1e5, peak=None, count=2) is None
