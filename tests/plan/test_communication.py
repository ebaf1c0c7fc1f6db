"""What a step sends: the closed formula is what real processes are recorded to send, and hardly more than Megatron-LM's minimum."""

from pathlib import Path
from typing import Any

import pytest

from megaflow.config.check import resolve
from megaflow.config.load import load
from megaflow.flow.interpolant import LINEAR
from megaflow.model.flops import hot_until
from megaflow.parallel import mesh as meshes
from megaflow.parallel.recorder import Sent, totals
from megaflow.plan import communication
from megaflow.plan.layout import layout_of, weights
from tests.plan.steps import recorded, resolved

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "model.layers": 4,
    "model.hidden": 64,
    "model.heads": 4,
    "model.belief_dim": 16,
    "data.length": 64,
    "flow.code_dim": 8,
    "flow.clock.bins": 20,
    "train.global_batch": 8,
    "train.micro_batch": 8,
    "optim.name": "adamw",
}
HALF = {"train.precision": "bf16", "parallel.zero": 1, "data.length": 128}
TWO, FOUR = {"parallel.tensor": 2}, {"parallel.tensor": 4}
AGREED = 100
"""Bytes a step at most of the few numbers that the formula leaves out."""


def cases() -> dict[str, tuple[int, str, int, dict[str, Any]]]:
    """Processes, kind of stage, vocabulary, what is set."""
    dense, accumulated = {"model.input": "linear", "flow.code_dim": "auto"}, {"train.micro_batch": 2}
    return {
        "coded flow": (4, "flow", 400, FOUR),
        "coded flow in half precision": (2, "flow", 400, TWO | HALF),
        "dense flow": (2, "flow", 100, TWO | dense),
        "flow that reads both": (2, "flow", 400, TWO | accumulated | {"model.input": "both"}),
        "baseline": (4, "autoregressive", 400, FOUR | accumulated | HALF),
        "many bins": (4, "flow", 400, TWO | accumulated | {"flow.clock.bins": 200}),
        "blocks computed again": (2, "flow", 400, TWO | {"parallel.recompute": "full"}),
        "a baseline's computed again": (2, "autoregressive", 400, TWO | {"parallel.recompute": "full"}),
        "cheap parts computed again": (2, "flow", 400, TWO | {"parallel.recompute": "selective"}),
        "squared errors": (2, "flow", 400, TWO | {"flow.objective": "endpoint_mse", "flow.weighting": "adaptive"}),
        "squared errors, dense": (2, "flow", 100, TWO | dense | {"flow.objective": "likelihood"}),
        "learned code": (2, "flow", 400, TWO | accumulated | {"flow.code": "learned", "model.input": "both"}),
        "embedding": (2, "flow", 400, TWO | {"flow.code": "embedding", "flow.objective": "likelihood"}),
        "another trunk": (2, "flow", 400, TWO | {"model.time": "none", "model.qk_norm": False, "parallel.recompute": "full"}),
        "beside the text": (2, "flow", 400, TWO | {"model.time": "tokens", "model.registers": 4}),
        "told before": (2, "flow", 400, TWO | {"flow.self_conditioning": 0.5}),
        "told before, dense": (2, "flow", 100, TWO | dense | {"flow.self_conditioning": 0.25, "model.input": "both"}),
        "token times": (2, "flow", 400, TWO | accumulated | {"flow.times": "tokens", "model.registers": 2}),
        "contexts": (2, "flow", 400, TWO | {"flow.context.share": 0.5}),
        "hidden tokens": (2, "masked", 400, TWO | accumulated | {"model.time": "none"}),
        "replaced tokens": (2, "uniform", 400, TWO | accumulated),
        "tied head": (2, "flow", 400, TWO | {"model.head": "tied", "model.belief_dim": "auto", "parallel.zero": 1}),
        "simplex": (2, "flow", 400, TWO | {"flow.prior": "vertices"}),
        "tensor x data, ZeRO 1": (4, "flow", 401, TWO | {"parallel.zero": 1}),
        "tensor x data, ZeRO 2": (4, "autoregressive", 400, TWO | {"parallel.zero": 2, "train.micro_batch": 2}),
        "ZeRO 0 with Muon": (4, "flow", 400, TWO | {"optim.name": "muon"}),
        "ZeRO 1 with Muon": (4, "flow", 400, TWO | {"optim.name": "muon", "parallel.zero": 1}),
        "ZeRO 1 with Muon in half precision": (4, "flow", 400, TWO | HALF | {"optim.name": "muon"}),
        "ZeRO 3": (2, "flow", 2000, {"parallel.zero": 3, "model.hidden": 160, "model.layers": 2, "train.micro_batch": 2, "data.length": 8}),
        "tensor x data, ZeRO 3": (4, "flow", 400, TWO | {"parallel.zero": 3, "data.length": 16}),
        "tensor x data, ZeRO 3 in half precision": (4, "autoregressive", 400, TWO | HALF | {"parallel.zero": 3, "train.micro_batch": 2}),
        "ZeRO 3 with Muon": (2, "flow", 400, {"parallel.zero": 3, "optim.name": "muon", "data.length": 16}),
    }


def formula(kind: str, vocab: int, values: dict[str, Any], processes: int, hot: float = 1.0) -> list[communication.Send]:
    config = resolved(kind, vocab, values).config
    return communication.of_step(config, vocab, layout_of(config, processes), kind == "map", hot)


def by_axis_and_kind(sends: list[communication.Send]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for send in sends:
        found[send.axis, send.kind] = found.get((send.axis, send.kind), 0.0) + send.bytes
    return found


QUICK = (
    "coded flow",
    "many bins",
    "dense flow",
    "a baseline's computed again",
    "tensor x data, ZeRO 1",
    "ZeRO 1 with Muon in half precision",
    "ZeRO 3",
)


@pytest.mark.parametrize("case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in cases()])
def test_the_formula_is_what_is_recorded(ranks, case):
    """To the byte, but for what is agreed on. Of Muon it is that of the process that sends most."""
    size, kind, vocab, values = cases()[case]
    values = SMALL | values
    expected = by_axis_and_kind(formula(kind, vocab, values, size))
    found = [totals(Sent(*one) for one in sent) for sent in ranks(size, recorded, kind, vocab, values)]
    for key in {*expected, *(key for one in found for key in one)}:
        most = max(one.get(key, 0.0) for one in found)
        assert most == pytest.approx(expected.get(key, 0.0), rel=1e-6, abs=AGREED), key


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model.input": "linear", "flow.code_dim": "auto", "distill.weighting": "none"},
        *(pytest.param({"parallel.zero": zero}, marks=pytest.mark.long) for zero in (1, 2, 3)),
    ],
)
def test_the_formula_of_a_flow_map_is_what_is_recorded(ranks, values):
    """Which rows have hot beliefs is drawn; on average it is what the formula says."""
    values, vocab = SMALL | {"parallel.tensor": 2, "train.global_batch": 16, "distill.boundary_fraction": 0.25} | values, 100
    hot = ranks(2, hot_share, vocab, values)[0]
    expected = by_axis_and_kind(formula("map", vocab, values, 4, hot))
    found = [totals(Sent(*one) for one in sent) for sent in ranks(4, recorded, "map", vocab, values, 2)]
    for key, size in expected.items():
        mean = sum(one[key] for one in found) / len(found) / 2
        assert mean == pytest.approx(size, rel=0.02 if key == ("tensor", "all-reduce") else 0.002, abs=AGREED), key
    assert len(expected) >= 4


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.long) for kind in ("flow", "autoregressive")), "map"])
def test_a_network_too_large_to_be_kept_is_gathered_once_for_each_pass(ranks, monkeypatch, kind):
    """Under ZeRO 3, where the next use of each weight is far: forward, backward, and twice for the targets of a flow map."""
    values = SMALL | {"parallel.zero": 3, "model.hidden": 192, "data.length": 16, "train.micro_batch": 4}
    config, far = resolved(kind, 100, values).config, 1_500_000
    assert sum(w.numel for w in weights(config, 100, 1, kind == "map")) > far  # of 1.8M
    monkeypatch.setattr(communication, "REUSED", far)
    expected = by_axis_and_kind(formula(kind, 100, values, 2))["data", "all-gather"]
    for sent in ranks(2, recorded, kind, 100, values, 1, {"max_reuse_distance": far, "prefetch_bucket_size": 0}):
        assert totals(Sent(*one) for one in sent)["data", "all-gather"] == pytest.approx(expected, rel=1e-6, abs=AGREED)
    minimum = communication.megatron_minimum(config, 100, layout_of(config, 2), kind == "map")
    assert expected <= communication.total(minimum, "data", "all-gather")


def hot_share(vocab: int, values: dict[str, Any]) -> float:
    from tests.plan.steps import stage_of

    with meshes.join(1) as mesh:
        stage = stage_of("map", vocab, values | {"parallel.tensor": 1}, mesh)
    return hot_until(LINEAR, stage.clock, stage.parts.code)


class TestMegatron:
    """The least that Megatron-LM sends for the same trunk and layout, and what is sent here over it."""

    KINDS = {"coded": ("flow", 400, {}), "dense": ("flow", 100, {"model.input": "linear", "flow.code_dim": "auto"})}
    KINDS |= {"baseline": ("autoregressive", 400, {}), "map": ("map", 400, {})}

    def over(self, kind: str, values: dict[str, Any], processes: int) -> float:
        family, vocab, own = self.KINDS[kind]
        values = SMALL | own | values
        config = resolved(family, vocab, values).config
        minimum = communication.megatron_minimum(config, vocab, layout_of(config, processes), family == "map")
        return communication.total(formula(family, vocab, values, processes)) / communication.total(minimum)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("hidden", [64, 128])
    @pytest.mark.parametrize("tensor", [2, 4])
    @pytest.mark.parametrize("kind", KINDS)
    def test_hardly_more_is_sent(self, kind, tensor, hidden, precision):
        own = {"fp32": {}, "bf16": HALF}[precision]
        values = own | {"parallel.tensor": tensor, "model.hidden": hidden, "model.belief_dim": hidden // 4}
        assert self.over(kind, values, tensor) <= 1.05
        for zero in {"fp32": (0, 1, 2), "bf16": (1, 2)}[precision]:
            assert self.over(kind, values | {"parallel.zero": zero}, 2 * tensor) <= 1.05

    @pytest.mark.parametrize("tensor", [2, 4])
    @pytest.mark.parametrize("family", ["flow", "autoregressive"])
    @pytest.mark.parametrize("name, vocab", [("quickstart", 4096), ("char", 27)])
    def test_hardly_more_is_sent_by_what_is_shipped(self, name, vocab, family, tensor):
        """As the configs are, with AdamW."""
        words = [f"parallel.tensor={tensor}", "optim.name=adamw"]
        config = resolve(load(ROOT / "configs" / name / f"{family}.yaml", words), vocab).config
        for processes in (tensor, 2 * tensor):
            layout = layout_of(config, processes)
            sent, minimum = (f(config, vocab, layout) for f in (communication.of_step, communication.megatron_minimum))
            assert communication.total(sent) <= 1.05 * communication.total(minimum)

    def test_the_gradient_of_a_modulation_counts_in_short_rows(self):
        """It is 6 d numbers a row and block in fp32, against 8 L d in the precision of training."""
        assert self.over("coded", TWO | HALF | {"data.length": 32}, 2) > self.over("coded", TWO | HALF | {"data.length": 256}, 2) + 0.02

    def test_zero_2_sends_gradients_in_every_pass(self):
        accumulated = {"train.micro_batch": 1}
        assert self.over("baseline", {"parallel.zero": 1} | accumulated, 2) <= 1.05
        assert self.over("baseline", {"parallel.zero": 2} | accumulated, 2) == pytest.approx((4 * 4 + 4) / (4 + 4), rel=0.01)

    def test_muon_gathers_every_matrix_of_a_block_in_fp32(self):
        family, vocab, _ = self.KINDS["coded"]
        with_, without = (formula(family, vocab, SMALL | FOUR | {"optim.name": name}, 4) for name in ("muon", "adamw"))
        matrices = SMALL["model.layers"] * 12 * SMALL["model.hidden"] ** 2
        assert communication.total(with_) - communication.total(without) == 3 / 4 * matrices * 4
