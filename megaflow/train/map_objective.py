"""Objectives of stage 2: what rows with s < t are trained by. OBJECTIVES has each by its name in configs.

    psd        the semigroup identity, KL (FMLM, DFM)                                     no derivative
    fmlm_mse   the same by least squares in the state's dimensions (FMLM's first form)    no derivative
    lsd        the Lagrangian identity in logits, KL (DFM)                                one in t, inside the target
    esd        the Eulerian identity in logits, KL (DFM)                                  one along the flow, inside the target
    lsd_cfm    the Lagrangian residual, squared (CFM)                                     one in t, with gradient through it
    ecld       a bound on that residual (CFM)                                             the same
    dmd        the law of one-step texts, reverse KL by an auxiliary denoiser (DMD);      no derivative
               inner rows by psd, which is what DMD regresses on noise and text for

One is either a target, which has no gradient, or a loss of its own. A target's function makes the passes that it needs for some rows, and
returns a function of a chunk's place among their tokens to the target there (n, V), to be asked for once a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megaflow.flow import flow_map, interpolant, losses, tangent
from megaflow.flow import head as heads
from megaflow.flow.code import Code, mean
from megaflow.flow.context import told
from megaflow.flow.flow_map import Times
from megaflow.flow.head import Read
from megaflow.flow.interpolant import Interpolant, along, noisy_state, transport, velocity_terms
from megaflow.flow.losses import Reweight
from megaflow.flow.tangent import Moved
from megaflow.flow.vocabulary import softmax_
from megaflow.model.text_dit import Seen, TextDiT, differentiable, of_tokens

Target = Callable[[slice], Tensor]
"""A chunk's place among tokens -> the target there (n, V)."""


class Rows(NamedTuple):
    """Rows of a batch: states y (B, L, d_c), their times, told as the network is told them, (B,) or (B, L), and times of the rows alone,
    (B,); seen: what the states say; weight: (B, L) of tokens; places: (B,) of the rows in the run's order; given: (B, L) or None;
    ease: (B,) w of weights exp(-w) that are learned, None where they are not."""

    y: Tensor
    told: Times
    times: Times
    seen: Seen
    lengths: Tensor | None
    documents: Tensor | None
    weight: Tensor
    places: Tensor
    given: Tensor | None = None
    ease: Tensor | None = None

    def part(self, rows: slice | Tensor) -> "Rows":
        told, times = (Times(*(x[rows] for x in each)) for each in (self.told, self.times))
        lengths, documents, given, ease = (None if x is None else x[rows] for x in (self.lengths, self.documents, self.given, self.ease))
        places = self.places[rows if isinstance(rows, slice) else rows.cpu()]
        return Rows(self.y[rows], told, times, self.seen[rows], lengths, documents, self.weight[rows], places, given, ease)

    def tokens(self, of_rows: Tensor) -> Tensor:
        """(B L,) of something that rows have (B,)."""
        return of_rows.repeat_interleave(self.y.shape[1])


Fresh = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(places of rows, which of several) -> real times (B,) on the clock and the prior's noise (B, L, d_c), drawn anew."""


@dataclass(frozen=True)
class Models:
    """The network in training, its frozen teacher if it has one, the auxiliary denoiser of `dmd`, and noise for it."""

    network: TextDiT
    teacher: TextDiT | None = None
    auxiliary: TextDiT | None = None
    fresh: Fresh | None = None


Loss = Callable[..., tuple[Tensor, Tensor]]
"""(models, rows, reweight) -> the loss with weights, and of every token its loss without them (n,)."""


@dataclass(frozen=True)
class MapObjective:
    """One objective of stage 2.

    measures: what metrics.jsonl calls the loss of rows with s < t, without weights.

    target: of inner rows; None where it is the semigroup's. Rows from 0 to 1 have that one always: at t = 1 the Eulerian identity says
    nothing, and the Lagrangian one what the diagonal does. It puts into a list the share (n,) of each chunk that a floor answers.
    loss: of inner rows instead, with passes of its own.
    squared: whether targets are compared by their means in the state's dimensions, and not by KL.
    derivative: where forward-mode derivatives are: '', 'target', or 'loss', with a gradient through them. Inner rows then end within
    the range of log-SNR.
    one_step: whether `loss` is of boundary rows, and inner rows have the semigroup's target; it asks for Models.auxiliary.
    """

    measures: str
    target: Callable[[TextDiT, Rows, list[Tensor]], Target] | None = None
    loss: Loss | None = None
    squared: bool = False
    derivative: str = ""
    one_step: bool = False

    @property
    def apart(self) -> bool:
        """Whether inner rows are trained otherwise than by the semigroup's target."""
        return (self.target is not None or self.loss is not None) and not self.one_step


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
def lagrangian(network: TextDiT, rows: Rows, held: list[Tensor]) -> Target:
    """psi_{t,t}(X_{s,t}) over 1 + g dev(d_t z) (DFM, the logit form of Lagrangian distillation)."""
    hidden, moved = by_end(network, rows)
    read = network.read(hidden, rows.y, rows.told.s)
    gain = rows.tokens(tangent.lagrangian_gain(network.path, rows.times.s, rows.times.t)).to(rows.y)
    end, still = at_the_end(network, rows, read), Moved(moved.flatten(0, 1))
    return _derived(tangent.lagrangian_target, network, end, read, still, gain, held)


@torch.no_grad()
def eulerian(network: TextDiT, rows: Rows, held: list[Tensor]) -> Target:
    """psi_{s,s} over 1 - dev(D_s z) / k, along the network's own flow (DFM, the logit form of Eulerian distillation)."""
    path, y, (s, _, t) = network.path, rows.y, rows.told
    start = network.read(network(y, s, lengths=rows.lengths, seen=rows.seen, documents=rows.documents), y, s)
    clean = heads.expectation(network.head().frozen(), start).view(y.shape)
    fall, lam = velocity_terms(path, rows.times.s)
    moving = (s < 1.0).to(s.dtype)
    velocity = (along(fall, y) * y + along(lam, y) * clean) * along(moving, y)

    def at(y: Tensor, s: Tensor) -> Tensor:
        return network(y, s, t, rows.lengths, documents=rows.documents)

    with differentiable(network):
        hidden, moved = torch.func.jvp(at, (y, s), (velocity, moving))[:2]
    level = torch.func.jvp(lambda s: interpolant.level(path, s), (s,), (moving,))[1]
    read = network.read(hidden, y, s)
    way = Moved(moved.flatten(0, 1), velocity.flatten(0, 1), of_tokens(level.to(y.dtype), y))
    gain = rows.tokens(tangent.eulerian_gain(path, rows.times.s, rows.times.t)).to(y)
    return _derived(tangent.eulerian_target, network, start, read, way, gain, held)


def _derived(
    of: Callable[..., tuple[Tensor, Tensor]],
    network: TextDiT,
    there: Read,
    read: Read,
    way: Moved,
    gain: Tensor,
    held: list[Tensor],
) -> Target:
    """The target `of` (tangent.py) what psi says where it leads to or comes from, `there`, and of psi at `read` with its derivative along
    `way`; of each chunk what the floor answers is put into `held`."""
    logits, psi, v = tangent.reader(network.head().frozen()), heads.probabilities(network.head()), network.code.part

    @torch.no_grad()
    def target(tokens: slice) -> Tensor:
        z, dz = logits(read[tokens], way[tokens])
        law, by_floor = of(v, psi(there[tokens]), softmax_(v, z), dz, gain[tokens])
        held.append(by_floor)
        return law

    return target


def means(code: Code, target: Target) -> Target:
    """A target's mean in the state's dimensions, (n, d_c)."""
    return lambda tokens: mean(code, target(tokens))


def squared_residual(models: Models, rows: Rows, reweight: Reweight | None) -> tuple[Tensor, Tensor]:
    """|r|^2 of the Lagrangian residual, with gradient through d_t psi (CFM)."""
    network, path, y = models.network, models.network.path, rows.y.flatten(0, 1)
    read, moved, without, end = _by_end_and_there(network, rows)
    frozen = network.head().frozen()
    mean, at_end = heads.expectation(frozen, without), heads.expectation(frozen, end)
    terms = tangent.residual_terms(path, y, rows.tokens(rows.times.s), rows.tokens(rows.times.t), mean, at_end)
    return tangent.lagrangian_residual(network.head(), read, moved, *terms, rows.weight.flatten(), reweight)


def endpoint_bound(models: Models, rows: Rows, reweight: Reweight | None) -> tuple[Tensor, Tensor]:
    """A bound on the same (CFM). Both its terms are of a token: one summed over the row would outweigh the other by the row's length."""
    network, head = models.network, models.network.head()
    read, moved, _, end = _by_end_and_there(network, rows)
    gain, psi = rows.tokens(tangent.lagrangian_gain(network.path, rows.times.s, rows.times.t)), heads.probabilities(head)
    return tangent.endpoint_bound(head, read, moved, lambda tokens: psi(end[tokens]), gain, rows.weight.flatten(), reweight)


def _by_end_and_there(network: TextDiT, rows: Rows) -> tuple[Read, Tensor, Read, Read]:
    """Of psi_{s,t} what is read and its derivative by t (n, d), the same without gradient, and what psi_{t,t} reads where it leads."""
    hidden, moved = by_end(network, rows)
    read = network.read(hidden, rows.y, rows.told.s)
    without = Read(read.hidden.detach(), read.y, read.level)
    return read, moved.flatten(0, 1), without, at_the_end(network, rows, without)


def matched_law(draws: int, models: Models, rows: Rows, reweight: Reweight | None) -> tuple[Tensor, Tensor]:
    """Reverse KL between the law of what psi_{0,1} writes, noised again, and the teacher's (DMD, Yin et al. 2024), of boundary rows.

    With x = psi_{0,1} C of a row, y' = beta x + alpha n at a time drawn anew, and m, m' the means that teacher and auxiliary denoiser
    predict there, the divergence's gradient by x is (m' - m) beta^2 / alpha^2: both scores are (beta m - y') / alpha^2. Here its weight is
    one, or the reweighting's by |m' - m|^2: x moves towards x - (m' - m), by least squares. The auxiliary denoiser learns x by least
    squares, since x is no vertex yet, and a sharp channel would have no finite KL from it; from `draws` noisy copies, over which m' - m is
    a mean. Noted is |m' - m|^2.
    """
    network, teacher, auxiliary = models.network, models.teacher, models.auxiliary
    assert teacher is not None and auxiliary is not None and models.fresh is not None
    weight, path = rows.weight.flatten(), network.path
    hidden = network(rows.y, rows.told.s, rows.told.t, rows.lengths, rows.seen, rows.documents)
    read = network.read(hidden, rows.y, rows.told.s)
    without = Read(read.hidden.detach(), read.y, read.level)
    x = heads.expectation(network.head().frozen(), without)
    written = x.view(rows.y.shape) if rows.given is None else torch.where(rows.given[..., None], rows.y, x.view(rows.y.shape))
    away, of_auxiliary = torch.zeros_like(x), torch.zeros((), device=x.device)
    for draw in range(draws):
        times, noise = models.fresh(rows.places, draw)
        t = told(times.to(x.device), rows.given)
        y = noisy_state(path, written, noise, t)
        with torch.no_grad():
            true = teacher.read(teacher.settled(y, t, rows.lengths, rows.documents), y, t)
        said = auxiliary.read(auxiliary.settled(y, t, rows.lengths, rows.documents), y, t)
        loss, _ = losses.endpoint_distance(auxiliary.head(), said, lambda tokens: x[tokens], weight)
        of_auxiliary = of_auxiliary + loss / draws
        still = Read(said.hidden.detach(), said.y, said.level)
        away += (heads.expectation(auxiliary.head().frozen(), still) - heads.expectation(teacher.head(), true)) / draws
    loss, squares = losses.endpoint_distance(network.head(), read, lambda tokens: (x - away)[tokens], weight, reweight)
    return loss + of_auxiliary, squares


def dmd(*, draws: float = 1.0) -> MapObjective:
    return MapObjective("distance_of_laws", loss=partial(matched_law, round(draws)), one_step=True)


OBJECTIVES: dict[str, Callable[..., MapObjective]] = {
    "psd": lambda: MapObjective("semigroup_divergence"),
    "fmlm_mse": lambda: MapObjective("semigroup_distance", squared=True),
    "lsd": lambda: MapObjective("lagrangian_divergence", lagrangian, derivative="target"),
    "esd": lambda: MapObjective("eulerian_divergence", eulerian, derivative="target"),
    "lsd_cfm": lambda: MapObjective("lagrangian_residual", loss=squared_residual, derivative="loss"),
    "ecld": lambda: MapObjective("endpoint_bound", loss=endpoint_bound, derivative="loss"),
    "dmd": dmd,
}
