"""Networks cut over tensor-parallel processes against the whole one, in float64: value, gradient, tangent, gradient through the tangent.

Eleven tokens over two or four processes leave padding at the end of the last part; the sequence is cut between the layers.
"""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.config.schema import Config
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow import losses
from megaflow.flow import vocabulary as vocabularies
from megaflow.flow.interpolant import LINEAR, noisy_state
from megaflow.model import build
from megaflow.model import parts as made
from megaflow.model.parts import Parts
from megaflow.parallel import random
from megaflow.parallel.cut import cut_of, draw, logical_shape, put
from megaflow.parallel.layers import whole
from megaflow.parallel.mesh import ALONE, Axis

VOCAB, LENGTH, ROWS = 11, 8, 3
COUNTS = np.array([50, 30, 12, 7, 5, 3, 2, 1, 1, 1, 0])
CPU = torch.device("cpu")
KINDS = ("coded", "dense", "both", "coded map", "dense map", "baseline")


def axis_here() -> Axis:
    return Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD) if dist.is_initialized() else ALONE


def config_of(kind: str, multiple: int) -> Config:
    config = Config()
    config.model.layers, config.model.hidden, config.model.heads, config.model.belief_dim = 2, 16, 4, 6
    config.model.neighbors, config.model.attention = 1, "plain"
    config.model.input = {"coded": "belief", "dense": "linear", "both": "both"}.get(kind.split()[0], "belief")
    config.model.family = "autoregressive" if kind == "baseline" else "flow"
    dense = kind.startswith("dense")
    config.flow.code, config.flow.code_dim, config.flow.skip = ("identity", VOCAB, "on") if dense else ("frame", 5, "on")
    config.distill.state_input = "linear" if dense else "hot_belief"
    config.parallel.vocab_multiple = multiple
    return config


@cache
def fixed(dense: bool) -> Parts:
    return made.make(config_of("dense" if dense else "coded", 1).flow, COUNTS, 0)


def network_of(kind: str, axis: Axis, multiple: int = 1) -> tuple[nn.Module, Parts | None]:
    """A network in float64 whose zeros are stirred up, the same logical one on every axis."""
    config, parts = config_of(kind, multiple), None
    if kind == "baseline":
        network = build.baseline_network(config, made.unigram(COUNTS), CPU, axis)
    else:
        whole_parts = fixed(config.flow.code == "identity")
        double = Parts(whole_parts.code.double(), whole_parts.log_prior.double(), whole_parts.span)
        parts = build.cut_parts(config, double, axis)
        network = build.flow_network(config, parts, CPU, kind.endswith("map"), axis)
    network = network.double()
    build.draw(network, 0)
    for name, p in network.named_parameters():
        stir = torch.randn(logical_shape(p), generator=random.generator(1, name), dtype=torch.float64)
        held = p.detach().clone()
        put(p, 0.1 * stir)
        with torch.no_grad():
            p.add_(held)
    return network, parts


def states(code: codes.Code) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, what is here of their noisy states, and times s and t."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    s = torch.tensor([0.0, 0.35, 0.6], dtype=torch.float64)
    noise = torch.randn(ROWS, LENGTH, code.dim, generator=generator, dtype=torch.float64)[..., codes.columns(code)]
    return ids, noisy_state(LINEAR, codes.lookup(code, ids), noise, s), s, s + 0.5 * (1.0 - s)


def logical(network: nn.Module, gradients: list[Tensor | None]) -> dict[str, Tensor | None]:
    named = zip(network.named_parameters(), gradients, strict=True)
    return {name: None if g is None else whole(g, cut_of(p)) for (name, p), g in named}


def measure(hidden: Tensor) -> Tensor:
    """A loss of hidden states that every process takes its own share of, as the head does of the vocabulary: shares add up to it."""
    axis, weight = axis_here(), torch.linspace(-1.0, 1.0, hidden.numel(), dtype=torch.float64).view_as(hidden)
    return (weight * hidden.sin()).sum() / axis.size


def everything(kind: str, multiple: int = 1) -> dict[str, object]:
    """All that must not depend on the number of processes."""
    axis = axis_here()
    network, parts = network_of(kind, axis, multiple)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for p in network.parameters():
        p.requires_grad_(True)
    parameters = list(network.parameters())
    found: dict[str, object] = {}
    weight = torch.linspace(0.5, 1.5, ROWS * LENGTH, dtype=torch.float64)
    lengths = torch.tensor([LENGTH, LENGTH - 3, LENGTH])
    if parts is None:
        ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
        read = network.read(network(ids))
        found["hidden"] = read.hidden.detach()
    else:
        ids, y, s, t = states(parts.code)
        ends = t if kind.endswith("map") else None
        hidden = network(y, s, ends, lengths)
        read = network.read(hidden, y, s)
        found["hidden"] = hidden.detach()

        def moved(y: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return network(y, s, t if kind.endswith("map") else None)

        at = y, s, t
        direction = y.cos(), 0.1 + s, 0.2 - t
        if kind == "dense" or kind == "dense map":
            direction = (y.cos(), *direction[1:])
        value, tangent = torch.func.jvp(moved, at, direction)
        second = torch.autograd.grad(measure(tangent), parameters, allow_unused=True)
        found |= {"tangent": tangent.detach(), "second": logical(network, second)}
        target = torch.softmax(torch.randn(ROWS * LENGTH, VOCAB, generator=random.generator(0, "target"), dtype=torch.float64), -1)
        part = parts.code.part
        own = target[:, part.start : part.stop].contiguous()
        divergence, apart = losses.divergence(network.head(), read, lambda tokens: own[tokens], weight, lambda d: (d + 0.01) ** -0.5)
        found |= {"divergence": divergence.detach(), "apart": apart}
        found["divergence gradients"] = logical(network, torch.autograd.grad(divergence, parameters, retain_graph=True, allow_unused=True))
        mean, token, confidence = heads.posterior(network.head(), read, 0.8)
        if parts.code.matrix is None:  # a dense state's own columns
            columns = torch.zeros(len(mean), VOCAB, dtype=torch.float64)
            columns[:, codes.columns(parts.code)] = mean
            mean = vocabularies.total(part, columns)
        drawn, probability = heads.draw(network.head(), read, torch.linspace(0.0, 0.999, ROWS * LENGTH), 0.8)
        errors = heads.denoising_error(network.head(), read, ids.flatten())
        found |= {"mean": mean, "token": token, "confidence": confidence, "drawn": drawn, "probability": probability}
        found |= {"nll": errors[0], "error": errors[1], "likeliest": heads.likeliest(network.head(), read)[0]}
    loss, nll = losses.cross_entropy(network.head(), read, ids.flatten(), weight)
    found |= {"loss": loss.detach(), "losses": nll, "gradients": logical(network, torch.autograd.grad(loss, parameters, allow_unused=True))}
    return found


def same(ours: object, theirs: object, where: str) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            same(ours[name], value, f"{where} {name}")
    elif theirs is None:
        assert ours is None, where
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda text: f"{where}: {text}")


@cache
def alone(kind: str) -> dict[str, object]:
    return everything(kind)


QUICK = [(2, kind) for kind in KINDS] + [(4, "coded"), (4, "dense map"), (4, "baseline")]
EVERY = [(size, kind) for size in (2, 4) for kind in KINDS]


@pytest.mark.parametrize("size, kind", [case if case in QUICK else pytest.param(*case, marks=pytest.mark.long) for case in EVERY])
def test_a_cut_network_is_the_whole_one(ranks, size, kind):
    for rank, found in enumerate(ranks(size, everything, kind)):
        same(found, alone(kind), f"rank {rank}")
    moved = [name for name, g in alone(kind)["gradients"].items() if g is not None and g.abs().max() > 1e-6]
    assert len(moved) > 20


@pytest.mark.parametrize("kind", ["coded", "dense map", "baseline"])
def test_padding_changes_nothing(ranks, kind):
    """Multiples of 4: the second of two processes has 3 tokens and 5 rows of padding, whose gradients are zero."""
    for rank, found in enumerate(ranks(2, everything, kind, 4)):
        same(found, alone(kind), f"rank {rank}")
    same(everything(kind, 4), alone(kind), "one process")


def padding(kind: str) -> list[tuple[str, float, float]]:
    """(name, largest weight, largest gradient) of the padding that this process holds."""
    network, parts = network_of(kind, axis_here(), 4)
    ids, y, s, t = states(parts.code)
    read = network.read(network(y, s, t), y, s)
    losses.cross_entropy(network.head(), read, ids.flatten(), torch.ones(ROWS * LENGTH, dtype=torch.float64))[0].backward()
    found = []
    for name, p in network.named_parameters():
        cut = cut_of(p)
        if cut is None or cut.real == cut.part or p.grad is None:
            continue
        blocks = (x.detach().movedim(cut.dim, 0).unflatten(0, (cut.blocks, cut.part))[:, cut.real :] for x in (p, p.grad))
        found.append((name, *(block.abs().max().item() for block in blocks)))
    return found


@pytest.mark.parametrize("kind", ["both", "dense map"])
def test_padding_is_zero_and_gets_no_gradient(ranks, kind):
    first, second = ranks(2, padding, kind)
    assert not first and len(second) >= 3 and all(weight == gradient == 0.0 for _, weight, gradient in second)


@pytest.mark.parametrize("size, kind", list(itertools.product((2, 4), ("coded", "dense"))))
def test_nobody_holds_the_vocabulary(ranks, size, kind):
    """No process has a parameter or a buffer of the code as long as the vocabulary."""
    widest = -(-VOCAB // size)
    for longest in ranks(size, longest_table, kind):
        assert longest == widest


def longest_table(kind: str) -> int:
    network, parts = network_of(kind, axis_here())
    tables = [network.weight, network.bias, parts.log_prior, parts.code.leverage]
    tables += [network.table] if network.table is not None else [network.state.weight.T]
    return max(len(table) for table in tables)


def test_draws_are_slices_of_one_logical_draw():
    from megaflow.parallel import cut as cuts

    whole_draw = nn.Parameter(torch.empty(12, 4))
    torch.manual_seed(5)
    draw(whole_draw, 0.5)
    held = []
    for rank in range(2):
        p = cuts.parameter((12, 4), cuts.even(0, 12, Axis(rank, 2), blocks=3))
        torch.manual_seed(5)
        draw(p, 0.5)
        held.append(p.detach())
    assert cuts.even(0, 12, Axis(0, 2), blocks=3).join(held).equal(whole_draw.detach())
    assert held[0].equal(whole_draw.detach()[[0, 1, 4, 5, 8, 9]])
