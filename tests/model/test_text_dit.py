"""The flow network: beliefs in and out, times, padding, the flow map it grows into, and that no tensor is tokens times vocabulary."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaflow.config.schema import Config, FlowConfig, ParallelConfig
from megaflow.flow import channel
from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow.interpolant import LINEAR, noisy_state, transport
from megaflow.flow.likelihood import Range, information_range
from megaflow.model import parts as made
from megaflow.model.parts import Parts
from megaflow.model.text_dit import HOT_GAIN, Shape, TextDiT
from megaflow.train.stage import Batch
from megaflow.train.stage_flow import FlowStage
from megaflow.train.stage_map import MapStage
from tests.flow import toy as toys

VOCAB, DIM, LENGTH = 11, 5, 6
COUNTS = np.array([50, 30, 12, 7, 5, 3, 2, 1, 1, 1, 0])
INPUTS = [("belief",), ("linear",), ("belief", "linear")]
MAP_READS = ["linear", "hot_belief", "none"]


def make(
    kind: str = "frame",
    reads: tuple[str, ...] = ("belief",),
    map_reads: str | None = None,
    neighbors: int = 1,
    seed: int = 0,
    recalls: bool = False,
    **shape: Any,
) -> TextDiT:
    flow = FlowConfig(code=kind, code_dim=VOCAB if kind == "identity" else DIM)
    parts = made.make(flow, COUNTS, 0)
    torch.manual_seed(seed)
    sizes = {"layers": 2, "hidden": 16, "heads": 2, "mlp_ratio": 2, "belief_dim": 8, "neighbors": neighbors} | shape
    fixed = parts.code, parts.log_prior, parts.span, LINEAR
    network = TextDiT(Shape(VOCAB, **sizes), *fixed, True, reads, map_reads, "sdpa", recalls=recalls)
    network.initialize()
    return network


def stirred(network: TextDiT, seed: int = 7) -> TextDiT:
    """With random values in place of the zeros that conditions and maps start from."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def some_states(network: TextDiT, rows: int = 4) -> tuple[Tensor, Tensor]:
    """(y, s): noisy random texts at times from 0 on."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
    s = torch.linspace(0.0, 0.8, rows, dtype=torch.float64)
    return noisy_state(LINEAR, codes.lookup(network.code, ids), torch.randn(rows, LENGTH, network.code.dim, generator=generator), s), s


def psi(network: TextDiT, y: Tensor, s: Tensor, t: Tensor | None = None) -> Tensor:
    z = heads.logits(network.head(), network.read(network(y, s, t), y, s))
    return torch.softmax(z, -1).view(*y.shape[:2], VOCAB).detach()


@pytest.mark.parametrize("reads", INPUTS, ids="+".join)
@pytest.mark.parametrize("kind", ["identity", "frame"])
def test_with_a_zero_head_it_says_what_the_channel_says(kind, reads):
    network = make(kind, reads, map_reads="linear")
    with torch.no_grad():
        network.weight.zero_()
    y, s = some_states(network)
    belief = channel.belief(network.code, network.log_prior, y.flatten(0, 1), network.level(s, y)).view(4, LENGTH, VOCAB)
    for t in (None, s, torch.ones_like(s)):
        assert torch.equal(psi(network, y, s, t), belief)  # at the time of the state, whatever the map's end


@pytest.mark.parametrize("map_reads", MAP_READS)
@pytest.mark.parametrize("kind", ["identity", "frame"])
def test_a_fresh_flow_map_is_its_teachers_denoiser(kind, map_reads):
    teacher, student = stirred(make(kind)), make(kind, map_reads=map_reads, seed=5)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("map_") for name in missing)
    student.initialize_map()
    y, s = some_states(teacher)
    for t in (None, s, s + 0.3 * (1.0 - s), torch.ones_like(s)):
        assert torch.equal(student(y, s, t), teacher(y, s))


def entering(network: TextDiT, y: Tensor, s: Tensor, t: Tensor | None = None) -> Tensor:
    """What the network hands to its trunk."""
    caught: list[Tensor] = []
    hook = network.trunk.register_forward_pre_hook(lambda module, arguments: caught.append(arguments[0]))
    network(y, s, t)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("map_reads", ["linear", "hot_belief"])
def test_what_a_map_reads_besides_is_silent_on_the_diagonal(map_reads):
    network = stirred(make(map_reads=map_reads))
    y, s = some_states(network)
    at_rest, part, full = (entering(network, y, s, t) - entering(network, y, s) for t in (s, s + 0.25 * (1.0 - s), torch.ones_like(s)))
    assert (at_rest == 0.0).all() and full.abs().amax((1, 2)).min() > 0.01
    torch.testing.assert_close(part, 0.25 * full, rtol=0, atol=1e-5)


@pytest.mark.parametrize("map_reads", ["linear", "hot_belief"])
def test_what_lies_ahead_is_read_of_the_neighbours_too(map_reads):
    network = stirred(make(map_reads=map_reads, neighbors=1))
    y, s = some_states(network)
    other, end = y.clone(), torch.ones_like(s)
    other[:, 2] += 1.0
    ahead, moved = (entering(network, x, s, end) - entering(network, x, s) for x in (y, other))
    reached = (ahead - moved).abs().amax((0, 2)) > 1e-5
    assert reached.tolist() == [abs(i - 2) <= 1 for i in range(LENGTH)]


def test_the_hot_belief_is_that_of_a_sharper_channel_until_the_channel_is_as_sharp():
    network = stirred(make(map_reads="hot_belief"))
    gain = HOT_GAIN / network.code.leverage.mean().sqrt()
    reached = 0.5 * (2.0 + 1.0 / gain - ((2.0 + 1.0 / gain) ** 2 - 4.0).sqrt()).double()  # where t / (1 - t)^2 is the gain
    s = torch.tensor([0.0, 0.2, reached - 1e-3, reached + 1e-3, 0.9], dtype=torch.float64)
    y = torch.randn(5, LENGTH, DIM, generator=torch.Generator().manual_seed(0))
    seen = network.see(y, s, torch.ones_like(s))
    sharper = torch.stack([gain.expand(5), gain * s.float()], 1).repeat_interleave(LENGTH, 0)
    sharp, own = (channel.belief(network.code, network.log_prior, y.flatten(0, 1), x) for x in (sharper, network.level(s, y)))
    inner = slice(network.neighbors, network.neighbors + LENGTH)  # neighbours beyond the ends of a row are zero
    torch.testing.assert_close(seen.belief[:, inner], (own @ network.table).view(5, LENGTH, -1))
    torch.testing.assert_close(seen.hot[:3, inner], (sharp @ network.table).view(5, LENGTH, -1)[:3])
    apart = (seen.hot - seen.belief).abs().amax((1, 2))
    assert apart[:2].min() > 0.1 and 0.0 < apart[2] < 0.1 and (apart[3:] == 0.0).all()
    assert torch.equal(network.see(y, s, s).hot, seen.belief) and network.see(y, s).hot is None


@pytest.mark.parametrize("map_reads", MAP_READS)
def test_what_is_seen_once_serves_every_end_and_the_teacher(map_reads):
    network, teacher = stirred(make(map_reads=map_reads)), stirred(make(), seed=8)
    with torch.no_grad():
        network.table.copy_(teacher.table)
    y, s = some_states(network)
    seen = network.see(y, s, torch.ones_like(s))
    for t in (None, s, s + 0.3 * (1.0 - s), torch.ones_like(s)):
        some = network(y[1:3], s[1:3], None if t is None else t[1:3], seen=seen[1:3])
        assert torch.equal(network(y, s, t, seen=seen), network(y, s, t))
        torch.testing.assert_close(some, network(y, s, t)[1:3])
    assert torch.equal(teacher(y, s, seen=seen), teacher(y, s))


@pytest.mark.parametrize("map_reads", MAP_READS)
def test_a_map_s_table_is_its_teacher_s_and_gets_no_gradient(map_reads):
    network = make(map_reads=map_reads)
    y, s = some_states(network)
    network(y, s, torch.ones_like(s)).square().sum().backward()
    assert network.table.grad is None and network.widen.weight.grad is not None
    flow = make()
    flow(y, s).square().sum().backward()
    assert flow.table.grad is not None


@pytest.mark.parametrize("map_reads", MAP_READS)
def test_a_map_sees_its_noise_at_time_zero_or_not_at_all(map_reads):
    """The belief at time zero is the prior whatever the noise: without a reading of the state one step writes one text."""
    network = stirred(make(map_reads=map_reads))
    start, end = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    y = torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(0))
    hidden = network(y, start, end)
    assert torch.allclose(hidden[0], hidden[1], atol=1e-6) == (map_reads == "none")
    assert torch.allclose(network(y, start)[0], network(y, start)[1], atol=1e-6)  # the flow itself sees nothing yet


def test_a_trained_map_depends_on_its_end():
    network = stirred(make(map_reads="none"))
    y, s = some_states(network)
    assert torch.equal(network(y, s), network(y, s, s))
    assert (network(y, s, torch.ones_like(s)) - network(y, s)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["identity", "frame"])
def test_the_linear_reading_is_of_unit_size(kind):
    """y over its known rms: exactly, sum_k |t C_k|^2 / V + (1 - t)^2 d_c, over d_c; and so for drawn states."""
    network, generator = make(kind), torch.Generator().manual_seed(0)
    dim, s = network.code.dim, torch.tensor([0.0, 0.3, 0.7, 0.99, 1.0], dtype=torch.float64)
    mean_square = (s**2 * network.code.leverage.double().mean() + (1.0 - s) ** 2 * dim) / dim
    torch.testing.assert_close(network.state_scale(s).flatten(), mean_square.rsqrt().float())
    ids = torch.randint(VOCAB, (5, 4000), generator=generator)
    y = noisy_state(LINEAR, codes.lookup(network.code, ids), torch.randn(5, 4000, dim, generator=generator), s)
    rms = (y * network.state_scale(s)).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(rms, torch.ones(5), rtol=0, atol=0.03)


READINGS = [(reads, map_reads) for reads in INPUTS for map_reads in (None, "linear", "hot_belief")]


@pytest.mark.parametrize("reads, map_reads", [pair for pair in READINGS if pair != (("linear",), "hot_belief")])
@pytest.mark.parametrize("neighbors", [0, 2])
def test_padding_does_not_reach_counted_tokens(reads, map_reads, neighbors):
    network = stirred(make(reads=reads, map_reads=map_reads, neighbors=neighbors))
    y, s = some_states(network)
    t, lengths = (None if map_reads is None else torch.ones_like(s)), torch.tensor([2, 4, 5, 6])
    other = y.clone()
    for row, length in enumerate(lengths):
        other[row, length:] = 9.0
    one, two = network(y, s, t, lengths), network(other, s, t, lengths)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(one[row, :length], two[row, :length])
        alone = network(y[row : row + 1, :length], s[row : row + 1], None if t is None else t[:1])
        torch.testing.assert_close(one[row, :length], alone[0], rtol=1e-4, atol=1e-5)
    assert (one[1, :4] - network(y, s, t)[1, :4]).abs().max() > 1e-4


@pytest.mark.parametrize("neighbors", [0, 1, 2])
def test_the_input_layer_reads_its_neighbours(neighbors):
    network = stirred(make(neighbors=neighbors))
    y, s = some_states(network)
    other = y.clone()
    other[3, 2] += 1.0
    reached = (entering(network, y, s) - entering(network, other, s)).abs().amax(-1)[3] > 0.0
    assert reached.tolist() == [abs(i - 2) <= neighbors for i in range(LENGTH)]


class Recorder(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation returns, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def recorded(step: Callable[[], Tensor]) -> int:
    with Recorder() as recorder:
        step().backward()
    return recorder.largest


MANY, ROWS, WIDTH = 4096, 16, 64  # 1024 tokens of a vocabulary whose chunks hold 512


def large(map_reads: str | None, reads: tuple[str, ...] = ("belief",)) -> TextDiT:
    code = codes.frame(MANY, 16, torch.Generator().manual_seed(0), rounds=2)
    torch.manual_seed(0)
    shape = Shape(MANY, layers=1, hidden=16, heads=2, mlp_ratio=2, belief_dim=8, neighbors=1)
    network = TextDiT(shape, code, torch.full((MANY,), -math.log(MANY)), Range(-1.0, 12.0), LINEAR, True, reads, map_reads, "sdpa")
    network.initialize()
    return network


def large_batch() -> Batch:
    ids = torch.randint(MANY, (ROWS, WIDTH), generator=torch.Generator().manual_seed(0))
    return Batch(ids, None, torch.arange(ROWS), 0, ROWS, torch.full((ROWS * WIDTH,), 1.0 / (ROWS * WIDTH)))


def test_no_tensor_of_tokens_times_vocabulary_exists_in_stage_1():
    network, batch, config = large(None, ("belief", "linear")), large_batch(), Config()
    config.flow.clock.name, config.flow.clock.bins = "ce_linear", 20
    parts = Parts(network.code, network.log_prior, network.span)
    stage = FlowStage(config, network, parts, made.initial_profile(parts, config.flow.clock, 0))

    def dense() -> Tensor:
        s = torch.linspace(0.0, 0.95, ROWS, dtype=torch.float64)
        z = network(torch.randn(ROWS, WIDTH, 16), s) @ network.weight.T + network.bias
        return torch.nn.functional.cross_entropy(z.flatten(0, 1), batch.ids.flatten())

    assert recorded(lambda: stage.loss(batch)[0]) == channel.CHUNK_ELEMENTS["cpu"] < ROWS * WIDTH * MANY
    assert all(p.grad is not None for p in network.parameters())
    assert recorded(dense) >= ROWS * WIDTH * MANY  # the recorder would have seen one


def large_stage_2(map_reads: str, zero: int) -> MapStage:
    network, teacher = large(map_reads), large(None)
    parts = Parts(network.code, network.log_prior, network.span)
    config = Config(parallel=ParallelConfig(zero=zero))
    config.distill.weighting = "adaptive"
    return MapStage(config, network, parts, clocks.uniform(), teacher)


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("map_reads", ["linear", "hot_belief"])
def test_no_tensor_of_tokens_times_vocabulary_exists_in_stage_2(map_reads, zero):
    stage = large_stage_2(map_reads, zero)
    assert recorded(lambda: stage.loss(large_batch())[0]) == channel.CHUNK_ELEMENTS["cpu"] < ROWS * WIDTH * MANY


@pytest.mark.parametrize("map_reads", ["linear", "hot_belief"])
def test_targets_of_all_rows_at_once_are_those_of_each(map_reads, monkeypatch):
    """Under ZeRO 3 the network makes two passes for them, else two for each chunk of rows."""
    monkeypatch.setattr(channel, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(channel, "CHUNK_TOKENS", WIDTH)
    found, passes = [], []
    for zero in (0, 3):
        torch.manual_seed(0)
        stage = large_stage_2(map_reads, zero)
        with torch.no_grad():
            for p in stage.network.parameters():
                p.add_(0.02 * torch.randn_like(p))
        passes.append(0)
        stage.network.register_forward_hook(lambda *_: passes.append(passes.pop() + 1))
        loss, observed = stage.loss(large_batch())
        loss.backward()
        found.append([loss.detach(), observed, *(p.grad for p in stage.network.parameters() if p.requires_grad)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert passes[1] == 3 < passes[0]


@pytest.mark.parametrize(
    "kind, map_reads",
    [
        pytest.param("identity", "linear", marks=pytest.mark.long),
        pytest.param("identity", "hot_belief", marks=pytest.mark.long),
        pytest.param("frame", "linear", marks=pytest.mark.long),
        ("frame", "hot_belief"),
    ],
)
def test_stage_2_finds_the_flow_map_of_a_solved_flow(kind, map_reads):
    """The teacher is the exact denoiser of a toy; the map's one step comes to the true one, which it was never shown."""
    code = codes.identity(4) if kind == "identity" else codes.frame(5, 3, torch.Generator().manual_seed(1))
    toy = toys.make(code, length=2, seed=4)
    parts = Parts(code, toy.marginal.mean(0).log().float(), Range(information_range(code, 0.0).low, 9.0))
    torch.manual_seed(0)
    shape = Shape(code.vocab, layers=2, hidden=48, heads=2, mlp_ratio=2, belief_dim=16, neighbors=1)
    network = TextDiT(shape, code, parts.log_prior, parts.span, LINEAR, True, ("belief",), map_reads, "sdpa")
    network.initialize()
    clock = clocks.uniform_log_snr(LINEAR, -4.0, 5.0)
    config = Config()
    config.distill.weighting = "adaptive"
    stage = MapStage(config, network, parts, clock, toys.Exact(toy, code))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    before, steps, rows = map_error(network, toy), 300, 128
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1.0 - step / steps)
        ids = toys.draw(toy, rows, torch.Generator().manual_seed(step))
        batch = Batch(ids, None, torch.arange(rows), step, rows, torch.full((2 * rows,), 0.5 / rows))
        optimizer.zero_grad()
        stage.loss(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    after = map_error(network, toy)
    assert after < before / 3.0, (before, after)


def map_error(network: TextDiT, toy: toys.Toy) -> float:
    """Mean squared distance of psi_{0,1} from the exact one."""
    y = torch.randn(200, 2, toy.matrix.shape[1], generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    s, t = torch.zeros(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
    with torch.no_grad():
        z = heads.logits(network.head(), network.read(network(y.float(), s, t), y.float(), s))
    ours = torch.softmax(z, -1).view(200, 2, -1).double()
    return (ours - toys.mean_denoiser(toy, y, 0.0, 1.0)).square().sum(-1).mean().item()


@pytest.mark.parametrize("kind", ["identity", "frame"])
def test_a_network_that_recalls_is_told_what_it_says(kind):
    """Settled, it has seen the same state twice; at first the reading is silent, and a network that recalls nothing passes once."""
    fresh, network = make(kind, recalls=True), stirred(make(kind, recalls=True))
    y, s = some_states(network)
    assert torch.equal(fresh(y, s, said=torch.randn_like(y)), fresh(y, s))
    said = psi(network, y, s) @ codes.lookup(network.code, torch.arange(VOCAB))
    torch.testing.assert_close(network.settled(y, s), network(y, s, said=said), rtol=1e-4, atol=1e-5)
    assert (network.settled(y, s) - network(y, s)).abs().max() > 1e-3
    torch.testing.assert_close(network(y, s, said=torch.zeros_like(y)), network(y, s))
    plain = stirred(make(kind))
    assert torch.equal(plain.settled(y, s), plain(y, s)) and plain.recall is None


def test_a_tied_head_embeds_beliefs():
    """One table, at the size that a table of its own would start with; a map's stays as it was, and its head does not."""
    network = make(tied=True, belief_dim=16)
    assert network.table is None and "table" not in dict(network.named_parameters())
    y, s = some_states(network)
    belief = channel.belief(network.code, network.log_prior, y.flatten(0, 1), network.level(s, y))
    inner = slice(network.neighbors, network.neighbors + LENGTH)
    seen = network.see(y, s).belief[:, inner]
    torch.testing.assert_close(seen, (belief @ network.weight * network.table_scale).view(seen.shape), rtol=1e-4, atol=1e-5)
    assert (network.weight * network.table_scale).std().item() == pytest.approx(1.0, abs=0.2)
    network(y, s).sum().backward()
    assert network.weight.grad is not None and network.weight.grad.abs().max() > 0.0
    assert make(tied=True, belief_dim=16, map_reads="hot_belief").table is not None


@pytest.mark.parametrize(
    "shape", [{"timed": False}, {"timed": False, "time_tokens": 4}, {"timed": False, "registers": 2}, {"registers": 3}]
)
def test_the_time_is_told_by_what_there_is(shape):
    """Beliefs and channel know it in any case: held still, a network that is told nothing else says the same at any time."""
    network = stirred(make(reads=("linear",), **shape))
    network.path = SimpleNamespace(alpha=torch.ones_like, beta=torch.ones_like)  # of a state that does not say its time
    y, s = torch.randn(3, LENGTH, DIM), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    differ = (network(y[:1].expand(3, -1, -1), s) - network(y[:1], s[:1])).abs().amax((1, 2))[1:].min()
    assert (differ > 1e-3) == (shape.get("timed", True) or shape.get("time_tokens", 0) > 0)


TIMED = [{}, {"timed": False}, {"registers": 2}, {"timed": False, "registers": 2}]


@pytest.mark.parametrize("reads", INPUTS, ids="+".join)
@pytest.mark.parametrize("map_reads", [None, *MAP_READS])
@pytest.mark.parametrize("shape", [{}, {"timed": False}], ids=["adaptive", "none"])
def test_one_time_for_all_tokens_is_the_time_of_the_row(reads, map_reads, shape):
    if map_reads == "hot_belief" and "belief" not in reads:
        return
    network = stirred(make(reads=reads, map_reads=map_reads, **shape))
    y, s = some_states(network)
    t = None if map_reads is None else (s + 1.0) / 2.0
    each = [None if x is None else x[:, None].expand(y.shape[:2]) for x in (s, t)]
    assert network.read(network(y, s, t), y, s).level.equal(network.read(network(y, s, t), y, each[0]).level)
    torch.testing.assert_close(network(y, *each), network(y, s, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", TIMED, ids=lambda shape: ",".join(shape) or "adaptive")
def test_a_token_of_another_time_changes_what_all_others_hear_of_it(shape):
    """By what its state then says, and by how its own position is moved."""
    network = stirred(make(**shape))
    y, s = some_states(network)
    times = s[:, None].repeat(1, LENGTH)
    later = times.clone()
    later[:, 2] += 0.15
    changed = (network(y, later) - network(y, times)).abs().amax(-1)
    assert (changed > 1e-5).all() and network(y, later).isfinite().all()


@pytest.mark.parametrize("kind", ["identity", "frame"])
@pytest.mark.parametrize("map_reads", [None, "linear", "hot_belief"])
def test_a_given_token_is_known_for_certain_and_does_not_move(kind, map_reads):
    """Its belief is the token alone, for the network and the head, at the time 1 and to the end of any step."""
    network = stirred(make(kind, map_reads=map_reads))
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    clean = codes.lookup(network.code, ids)
    times = torch.tensor([[1.0, 0.2, 0.2, 1.0, 0.2, 0.2]], dtype=torch.float64)
    given = times == 1.0
    y = noisy_state(LINEAR, clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), times)
    assert torch.equal(y[given], clean[given])
    seen = network.embed_belief(y, network.level(times, y))[:, 1:-1]
    assert network.table is not None
    torch.testing.assert_close(seen[given], network.table[ids[given]])
    end = None if map_reads is None else torch.where(given, 1.0, 0.8)
    psi_of = psi(network, y, times, end)
    assert psi_of.isfinite().all() and (psi_of[given].argmax(-1) == ids[given]).all() and (psi_of[given].amax(-1) > 0.9999).all()
    if end is not None:
        moved = transport(LINEAR, y, times, end, psi_of @ codes.lookup(network.code, torch.arange(VOCAB)))
        assert torch.equal(moved[given], y[given]) and (moved[~given] != y[~given]).any()
        network(y, times, end).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
