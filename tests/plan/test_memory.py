"""What a step holds in memory: the closed formula against the tensors of real steps."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch

from megaflow.parallel import mesh as meshes
from megaflow.parallel import reduction
from megaflow.plan import memory
from megaflow.plan.layout import layout_of
from megaflow.train import engine
from megaflow.train.stage import Batch
from tests.plan import allocated
from tests.plan.steps import Run, resolved, stage_of

SMALL: dict[str, Any] = {
    "model.layers": 4,
    "model.hidden": 64,
    "model.heads": 4,
    "model.belief_dim": 16,
    "data.length": 32,
    "flow.clock.bins": 20,
    "train.global_batch": 8,
    "train.micro_batch": 8,
    "optim.name": "adamw",
}


def kept(kind: str, vocab: int, values: dict[str, Any]) -> int:
    """Bytes that autograd keeps of a forward pass, but for weights and what is fixed in a flow."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, storage)
        return tensor

    with meshes.join() as mesh:
        stage = stage_of(kind, vocab, values, mesh)
    config = stage.config
    if config.train.precision == "bf16":
        stage.network.bfloat16()
    fixed = {p.untyped_storage()._cdata for p in stage.network.parameters()}
    if kind in ("flow", "map"):
        fixed |= {t.untyped_storage()._cdata for t in (stage.parts.log_prior, stage.parts.code.leverage)}
    rows, length = config.train.global_batch, config.data.length
    ids, weight = torch.randint(vocab, (rows, length)), torch.full((rows * length,), 1.0 / (rows * length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = stage.loss(Batch(ids, None, torch.arange(rows), 0, rows, weight))
    del loss
    return sum(storage.nbytes() for key, storage in storages.items() if key not in fixed)


SIZES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "flow": ("flow", 400, {}),
    "baseline": ("autoregressive", 400, {}),
    "map": ("map", 400, {}),
    "flow in half precision": ("flow", 400, {"train.precision": "bf16"}),
    "wide": ("flow", 400, {"model.hidden": 160, "model.layers": 2, "model.mlp_ratio": 2}),
    "long rows": ("autoregressive", 400, {"data.length": 200, "train.global_batch": 2}),
    "large vocabulary": ("flow", 3000, {"model.layers": 1}),
    "dense flow": ("flow", 100, {"model.input": "linear"}),
    "both read": ("flow", 400, {"model.input": "both", "model.neighbors": 2}),
    "dense map": ("map", 100, {"model.input": "linear"}),
    "beside the text": ("flow", 400, {"model.time": "tokens", "model.registers": 4}),
    "token times": ("flow", 400, {"flow.times": "tokens"}),
    "token times, wide": ("flow", 400, {"flow.times": "tokens", "model.hidden": 160, "model.registers": 2}),
    "hidden tokens": ("masked", 400, {"model.time": "none"}),
    "replaced tokens": ("uniform", 400, {}),
    "no time": ("flow", 400, {"model.time": "none"}),
    "queries and keys as they are": ("flow", 400, {"model.qk_norm": False}),
    "tied head": ("flow", 400, {"model.head": "tied", "model.belief_dim": "auto"}),
    "attention written out": ("flow", 400, {"model.attention": "plain", "data.length": 100, "train.global_batch": 2}),
}


@pytest.mark.parametrize("recompute", ["off", "selective", "full"])
@pytest.mark.parametrize("size", SIZES)
def test_activations_are_what_autograd_keeps(size, recompute):
    kind, vocab, values = SIZES[size]
    values = SMALL | values | {"parallel.recompute": recompute}
    config = resolved(kind, vocab, values).config
    found = kept(kind, vocab, values)
    formula = memory.of_activations(config, vocab, layout_of(config, 1), kind == "map", "cpu", again=False)
    assert formula == pytest.approx(found, rel=0.05)


def test_recomputed_blocks_are_there_one_at_a_time():
    few, many = (resolved("flow", 400, SMALL | {"parallel.recompute": "full", "model.layers": n}).config for n in (4, 8))
    sizes = [memory.of_activations(config, 400, layout_of(config, 1), device="cpu") for config in (few, many)]
    assert sizes[1] - sizes[0] == 4 * 8 * 32 * 64 * 4


STEPS: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "activations": (1, "flow", 400, {"data.length": 64, "train.global_batch": 16}),
    "activations in half precision": (1, "autoregressive", 400, {"train.precision": "bf16", "data.length": 64}),
    "map": (1, "map", 400, {"data.length": 64, "train.global_batch": 16}),
    "logits": (1, "flow", 6000, {"model.layers": 1}),
    "weights": (1, "autoregressive", 100, {"model.hidden": 256, "data.length": 4}),
    "weights in half precision": (1, "autoregressive", 100, {"model.hidden": 256, "data.length": 4, "train.precision": "bf16"}),
}
WIDE = {"model.hidden": 256, "model.layers": 2, "data.length": 8}
for zero in (0, 1, 2, 3):
    for precision in ("fp32", "bf16"):
        STEPS[f"ZeRO {zero} in {precision}"] = 2, "flow", 400, WIDE | {"parallel.zero": zero, "train.precision": precision}
STEPS |= {
    "accumulated": (2, "flow", 400, WIDE | {"parallel.zero": 1, "train.micro_batch": 1}),
    "Muon": (2, "flow", 400, WIDE | {"parallel.zero": 1, "optim.name": "muon"}),
    "tensor": (2, "flow", 400, {"parallel.tensor": 2, "data.length": 64, "train.global_batch": 16, "train.micro_batch": 16}),
}


BETWEEN = {"model.hidden": 256, "data.length": 64, "train.global_batch": 16}
"""Networks whose activations take about as much as their weights, where neither hides what is said of the other."""
LIKE: dict[str, Any] = {
    f"as many, {kind}, {recompute}": (1, kind, 512, BETWEEN | {"parallel.recompute": recompute})
    for kind in ("flow", "map", "autoregressive")
    for recompute in ("off", "selective", "full")
}
LIKE["as many, Muon"] = 1, "flow", 512, BETWEEN | {"optim.name": "muon"}
LIKE["as many, accumulated"] = 1, "flow", 512, BETWEEN | {"train.micro_batch": 4}
LIKE["as many, dense"] = 1, "flow", 100, BETWEEN | {"model.input": "linear", "flow.code_dim": "auto"}
for zero in (0, 1, 2, 3):
    for recompute in ("off", "full"):
        for precision in ("fp32", "bf16"):
            values = BETWEEN | {"parallel.zero": zero, "parallel.recompute": recompute, "train.precision": precision}
            LIKE[f"as many, ZeRO {zero} in {precision}, {recompute}"] = 2, "flow", 512, values
            if zero or precision == "fp32":
                LIKE[f"as many, tensor, ZeRO {zero} in {precision}, {recompute}"] = 2, "flow", 512, values | {"parallel.tensor": 2}
STEPS |= LIKE
STEPS |= {
    f"design, {name}": (1, "flow", vocab, {"model.layers": 2, "data.length": 64, "train.global_batch": 16} | values)
    for name, vocab, values in (
        ("squared errors", 4000, {"flow.objective": "endpoint_mse"}),
        ("squared errors, dense", 2000, {"flow.objective": "likelihood", "flow.code": "identity"}),
        ("learned code", 4000, {"flow.code": "learned", "model.input": "both"}),
        ("embedding", 4000, {"flow.code": "embedding", "flow.objective": "likelihood"}),
        ("simplex", 4000, {"flow.prior": "dirichlet"}),
    )
}

BOTH = {"parallel.tensor": 2, "model.hidden": 256, "model.layers": 2, "data.length": 16, "train.micro_batch": 4}
for zero in (1, 2, 3):
    for precision in ("fp32", "bf16"):
        STEPS[f"tensor x data, ZeRO {zero} in {precision}"] = 4, "flow", 400, BOTH | {"parallel.zero": zero, "train.precision": precision}
    STEPS[f"a map's, ZeRO {zero}"] = 4, "map", 400, BOTH | {"parallel.zero": zero}
STEPS |= {
    "a baseline's over both axes": (4, "autoregressive", 400, BOTH | {"parallel.zero": 1, "train.precision": "bf16"}),
    "a dense map's over both axes": (4, "map", 100, BOTH | {"parallel.zero": 1, "model.input": "linear", "flow.code_dim": "auto"}),
    "a map's of a large vocabulary": (2, "map", 6000, {"model.layers": 1, "parallel.tensor": 2}),
}


def buckets_of(elements: int) -> contextlib.AbstractContextManager:
    """A block in which gradients are sent in smaller buckets."""
    return mock.patch.multiple(reduction, BUCKET=elements, BUCKET_SHARE=0)


def most(kind: str, vocab: int, values: dict[str, Any], bucket: int = reduction.BUCKET) -> tuple[int, int]:
    """Bytes of this process's tensors between two steps, and at the largest moment of a step."""
    with meshes.join(int(values.get("parallel.tensor", 1))) as mesh, buckets_of(bucket):
        old = list(allocated.living())  # held: what is freed meanwhile would give its address to a tensor of this run, which went uncounted
        before = {storage._cdata for storage in old}
        run = Run(kind, vocab, values, mesh)
        for index in range(2):
            run.step(index)
        stays = allocated.size(storage for storage in allocated.living() if storage._cdata not in before)
        with allocated.Peak() as peak:
            run.step(2)
        engine.close(run.deep)
    return stays, stays + peak.most


QUICK = ("tensor x data, ZeRO 1 in fp32", "a map's of a large vocabulary")
QUICK += ("as many, flow, off", "as many, map, full", "as many, ZeRO 0 in fp32, full", "as many, ZeRO 1 in fp32, full")
LONG = [case for case in STEPS if any(word in case for word in ("axes", "tensor x", "a map's", "as many")) and case not in QUICK]


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long) if case in LONG else case for case in STEPS])
def test_the_largest_moment_of_a_step(ranks, case):
    size, kind, vocab, values = STEPS[case]
    values = SMALL | {"train.micro_batch": 64} | values
    config = resolved(kind, vocab, values).config
    formula = memory.of_step(config, vocab, layout_of(config, size), kind == "map", "cpu")
    for _, found in ranks(size, most, kind, vocab, values):
        assert formula.largest == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "bf16"])
@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), 1, pytest.param(2, marks=pytest.mark.long), 3])
def test_networks_larger_than_the_buckets_of_gradients(ranks, zero, precision):
    """As most are. Under ZeRO 3 processes differ by a tenth; it is the one that holds most."""
    values = SMALL | WIDE | {"parallel.zero": zero, "train.precision": precision, "train.micro_batch": 64}
    config = resolved("flow", 400, values).config
    with buckets_of(300_000):
        formula = memory.of_step(config, 400, layout_of(config, 4), device="cpu")
    found = max(largest for _, largest in ranks(4, most, "flow", 400, values, 300_000))
    assert formula.largest == pytest.approx(found, rel=0.1)
