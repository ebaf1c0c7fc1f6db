"""Targets of stage 2 from the live network or its teacher, without gradient, by chunks of tokens.

Each function makes the passes that its target needs for some rows, and returns a function of a chunk's place among their tokens to the
target there (n, V), to be asked for once a chunk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megaflow.flow import flow_map, interpolant, tangent
from megaflow.flow import head as heads
from megaflow.flow.code import Code, mean
from megaflow.flow.flow_map import Times
from megaflow.flow.head import Read
from megaflow.flow.interpolant import Interpolant, along, transport, velocity_terms
from megaflow.flow.tangent import Moved
from megaflow.flow.vocabulary import softmax_
from megaflow.model.text_dit import Seen, TextDiT, of_tokens

Target = Callable[[slice], Tensor]


class Rows(NamedTuple):
    """Rows of a batch: states y (B, L, d_c), their times, told as the network is told them, (B,) or (B, L), and times of the rows alone,
    (B,); seen: what the states say; weight: (B, L) of tokens."""

    y: Tensor
    told: Times
    times: Times
    seen: Seen
    lengths: Tensor | None
    documents: Tensor | None
    weight: Tensor

    def part(self, rows: slice | Tensor) -> "Rows":
        told, times = (Times(*(x[rows] for x in each)) for each in (self.told, self.times))
        lengths, documents = (None if x is None else x[rows] for x in (self.lengths, self.documents))
        return Rows(self.y[rows], told, times, self.seen[rows], lengths, documents, self.weight[rows])

    def tokens(self, of_rows: Tensor) -> Tensor:
        """(B L,) of something that rows have (B,)."""
        return of_rows.repeat_interleave(self.y.shape[1])


@contextmanager
def differentiable(network: TextDiT) -> Iterator[None]:
    """While the block runs the network's attention has forward-mode derivatives, which fused kernels have none of."""
    kernel, network.trunk.kernel = network.trunk.kernel, "plain"
    try:
        yield
    finally:
        network.trunk.kernel = kernel


def share(path: Interpolant, rows: Rows) -> Tensor:
    """a of the semigroup identity, (B L, 1) of tokens."""
    found = flow_map.semigroup_share(path, *rows.told).to(rows.y.dtype)
    return (found if found.ndim == 2 else found[:, None].expand(rows.y.shape[:2])).reshape(-1, 1)


@torch.no_grad()
def diagonal(teacher: TextDiT, rows: Rows) -> Target:
    """The frozen teacher's posterior at (y, s)."""
    hidden = teacher.settled(rows.y, rows.told.s, rows.lengths, rows.documents, rows.seen)
    psi, read = heads.probabilities(teacher.head()), teacher.read(hidden, rows.y, rows.told.s)
    return lambda tokens: psi(read[tokens])


@torch.no_grad()
def semigroup(network: TextDiT, rows: Rows) -> Target:
    """a psi_{s,u}(y) + (1 - a) psi_{u,t}(X_{s,u}(y)) in two passes of the network, whatever the number of rows.

    Hidden states at s and at u are kept, posteriors are too large for that: those at s are taken twice, for the state at u that they lead
    to, and for the mixture.
    """
    (s, u, t), y, path, head = rows.told, rows.y, network.path, network.head().frozen()
    at_s = network.read(network(y, s, u, rows.lengths, rows.seen, rows.documents), y, s)
    midway = transport(path, y, s, u, heads.expectation(head, at_s).view(y.shape))
    at_u = network.read(network(midway, u, t, rows.lengths, documents=rows.documents), midway, u)
    from_s, from_u, a = heads.probabilities(head), heads.probabilities(head), share(path, rows)
    return lambda tokens: from_u(at_u[tokens]).lerp_(from_s(at_s[tokens]), a[tokens])


def semigroup_by_rows(network: TextDiT, rows: Rows) -> Target:
    """The same by chunks of whole rows, and two passes for each: psi_{s,u} is followed to the next state and mixed with psi_{u,t} there
    while it is at hand, and nothing is computed twice."""
    length, path = rows.y.shape[1], network.path
    first, second = heads.probabilities(network.head()), heads.probabilities(network.head())

    @torch.no_grad()
    def target(tokens: slice) -> Tensor:
        some = rows.part(slice(tokens.start // length, tokens.stop // length))
        (s, u, t), y = some.told, some.y
        from_s = first(network.read(network(y, s, u, some.lengths, some.seen, some.documents), y, s))
        midway = transport(path, y, s, u, mean(network.code, from_s).view(y.shape))
        from_u = second(network.read(network(midway, u, t, some.lengths, documents=some.documents), midway, u))
        return from_u.lerp_(from_s, share(path, some))

    return target


def by_end(network: TextDiT, rows: Rows) -> tuple[Tensor, Tensor]:
    """Hidden states of psi_{s,t} (B, L, d) and their derivative by t, with gradient where that is on; given tokens do not move."""
    s, t = rows.told.s, rows.told.t

    def at(t: Tensor) -> Tensor:
        return network(rows.y, s, t, rows.lengths, rows.seen, rows.documents)

    with differentiable(network):
        found = torch.func.jvp(at, (t,), ((t < 1.0).to(t.dtype),))
    return found[0], found[1]


@torch.no_grad()
def at_the_end(network: TextDiT, rows: Rows, read: Read) -> Read:
    """What psi_{t,t} reads at X_{s,t}(y), where `read` is what psi_{s,t} does at y."""
    psi = heads.expectation(network.head().frozen(), read).view(rows.y.shape)
    x = transport(network.path, rows.y, rows.told.s, rows.told.t, psi)
    return network.read(network(x, rows.told.t, lengths=rows.lengths, documents=rows.documents), x, rows.told.t)


@torch.no_grad()
def lagrangian(network: TextDiT, rows: Rows) -> Target:
    """psi_{t,t}(X_{s,t}) over 1 + g dev(d_t z) (DFM, the logit form of Lagrangian distillation)."""
    hidden, moved = by_end(network, rows)
    read = network.read(hidden, rows.y, rows.told.s)
    end, logits = at_the_end(network, rows, read), tangent.reader(network.head().frozen())
    psi, still = heads.probabilities(network.head()), Moved(moved.flatten(0, 1))
    gain, v = rows.tokens(tangent.lagrangian_gain(network.path, rows.times.s, rows.times.t)).to(rows.y), network.code.part

    @torch.no_grad()
    def target(tokens: slice) -> Tensor:
        z, dz = logits(read[tokens], still[tokens])
        return tangent.lagrangian_target(v, psi(end[tokens]), softmax_(v, z), dz, gain[tokens])

    return target


@torch.no_grad()
def eulerian(network: TextDiT, rows: Rows) -> Target:
    """psi_{s,s} over 1 - dev(D_s z) / k, along the network's own flow (DFM, the logit form of Eulerian distillation)."""
    path, y, (s, _, t) = network.path, rows.y, rows.told
    start = network.read(network(y, s, lengths=rows.lengths, seen=rows.seen, documents=rows.documents), y, s)
    clean = heads.expectation(network.head().frozen(), start).view(y.shape)
    fall, gain = velocity_terms(path, rows.times.s)
    moving = (s < 1.0).to(s.dtype)
    velocity = (along(fall, y) * y + along(gain, y) * clean) * along(moving, y)

    def at(y: Tensor, s: Tensor) -> Tensor:
        return network(y, s, t, rows.lengths, documents=rows.documents)

    with differentiable(network):
        hidden, moved = torch.func.jvp(at, (y, s), (velocity, moving))[:2]
    level = torch.func.jvp(lambda s: interpolant.level(path, s), (s,), (moving,))[1]
    read = network.read(hidden, y, s)
    way = Moved(moved.flatten(0, 1), velocity.flatten(0, 1), of_tokens(level.to(y.dtype), y))
    logits, psi, v = tangent.reader(network.head().frozen()), heads.probabilities(network.head()), network.code.part
    rate = rows.tokens(tangent.eulerian_gain(path, rows.times.s, rows.times.t)).to(y)

    @torch.no_grad()
    def target(tokens: slice) -> Tensor:
        z, dz = logits(read[tokens], way[tokens])
        return tangent.eulerian_target(v, psi(start[tokens]), softmax_(v, z), dz, rate[tokens])

    return target


def means(code: Code, target: Target) -> Target:
    """A target's mean in the state's dimensions, (n, d_c)."""
    return lambda tokens: mean(code, target(tokens))
