"""The bound of a flow's differential equation on rows of tokens: flow/ode_likelihood.py with a Text-DiT put into it.

The divergence is that of the field that is integrated, whatever the network reads: of one that recalls, the two passes over the same
state are differentiated together, the first one's answer included.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow import ode_likelihood, tangent
from megaflow.flow.channel import chunks
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup
from megaflow.flow.context import told
from megaflow.flow.head import Read
from megaflow.flow.interpolant import level, time_of
from megaflow.flow.likelihood import NoBound
from megaflow.flow.ode_likelihood import Field
from megaflow.flow.tangent import Moved
from megaflow.flow.vocabulary import look_up, softmax_
from megaflow.model.bound import counting, structure
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT, differentiable, of_tokens
from megaflow.parallel import random
from megaflow.progress import Progress

EXACT = 512
"""The divergence is taken exactly, dimension by dimension, of rows of at most so many (d_c L)."""
DRAWS = 2
"""Noises a row: their difference is the error."""


@dataclass(frozen=True)
class OdeEstimate:
    """The bound in nats per token, of all draws at `steps` steps.

    standard_error: of noises and probes. integration: mean minus that at half as many steps, at the same noises and probes, and
    integration_error its own. unigram: -log pi on the same tokens; last_cross_entropy: at the end of the range; tokens: how many were
    counted. rows: (R,) nats of each row, errors: (R,) of draws, row_tokens: (R,).
    """

    mean: float
    standard_error: float
    integration: float
    integration_error: float
    unigram: float
    last_cross_entropy: float
    tokens: int
    rows: Tensor = field(compare=False, repr=False)
    errors: Tensor = field(compare=False, repr=False)
    row_tokens: Tensor = field(compare=False, repr=False)


@torch.no_grad()
def ode_bound_of_rows(
    network: TextDiT,
    parts: Parts,
    clock: Clock,
    ids: Tensor,
    lengths: Tensor | None,
    steps: int,
    probes: int | None,
    seed: int,
    draws: int = DRAWS,
    batch: int = 256,
    progress: Progress | None = None,
    log_length: np.ndarray | None = None,
    documents: Tensor | None = None,
    closing: int | None = None,
    given: Tensor | None = None,
) -> OdeEstimate:
    """The bound on rows (R, L) by `steps` steps of Heun's method, an even number of 4 or more, and `probes` of Hutchinson's at every
    evaluation, None for the exact divergence of rows of at most EXACT dimensions.

    The probes are Rademacher draws. Lengths, documents and given tokens are as in bound.bound_of_rows, with the same price. Raises
    flow.likelihood.NoBound where the noise is not Gaussian, and ValueError of other steps or probes.
    """
    if parts.prior.law != "gaussian":
        raise NoBound(f"flow.prior={parts.prior.name}: the bound is one of Gaussian noise")
    own, width = ids.shape
    if steps < 4 or steps % 2 or draws < 2:
        raise ValueError(f"{steps} steps and {draws} draws: the steps are even and 4 or more, the draws 2 or more")
    if (probes is None and parts.code.dim * width > EXACT) or (probes is not None and probes < 1):
        raise ValueError(f"{probes} probes of {parts.code.dim * width} dimensions")
    assert (documents is None) == (closing is None)
    whole, counted = counting(ids, lengths, given)
    law = clocks.mixture([clock, clocks.uniform_log_snr(parts.path, parts.bounded.low, parts.bounded.high)], [0.5, 0.5])
    times = ode_likelihood.nodes(parts.path, law, parts.bounded, steps)
    fine, coarse, last = torch.zeros(3, draws, own, dtype=torch.float64)
    code, end = parts.code.double(), time_of(parts.path, torch.full((), parts.bounded.high, dtype=torch.float64))
    alpha, beta = parts.path.alpha(end).item(), parts.path.beta(end).item()
    copies = parts.code.dim * width if probes is None else probes
    each = max(1, batch // copies)
    for start in range(0, own, each):
        part = slice(start, min(start + each, own))
        some, of, known = (None if x is None else x[part] for x in (lengths, documents, given))
        free, at = counted[part].bool(), list(range(part.start, part.stop))
        clean = lookup(code, ids[part])
        psi = denoiser(network, parts, clean, some, of, known)
        context = (None if x is None else repeated(x, copies) for x in (some, of, known))
        many = denoiser(network, parts, repeated(clean, copies), *context)
        for draw in range(draws):
            noise = random.normal(at, (width, code.dim), seed, "ode bound noise", draw).to(ids.device).double()
            _, read = psi(beta * clean + alpha * noise, end, None)
            cross_entropy = heads.negative_log_likelihood(replace(network.head(), code=code), read, ids[part].flatten())
            last[draw, part] = (cross_entropy.view(free.shape).double() * free).sum(1).cpu()
            z = beta / alpha * clean * free[..., None] + noise  # elsewhere nothing moves, and start and noise are one
            moving = field_of(many, free, at, probes, seed, draw)
            for found, every in ((fine, 1), (coarse, 2)):
                way = ode_likelihood.backwards(moving, parts.path, z, times[::every], range(0, steps + 1, every))
                found[draw, part] = ode_likelihood.nats(way, noise, last[draw, part].to(ids.device)).cpu()
            if progress is not None:
                progress.update(start * draws + (draw + 1) * len(at))
    tokens = counted.sum(1).cpu()
    total = int(tokens.sum())
    shape = structure(ids, whole, counted, log_length, closing, parts.code.part, parts.log_prior)
    unigram = -(look_up(parts.code.part, parts.log_prior, ids).double() * counted).sum().item()
    rows, apart = fine.mean(0) + shape, fine - coarse
    errors, steps_errors = ((x.var(0) / draws).sqrt() for x in (fine, apart))
    return OdeEstimate(
        rows.sum().item() / total,
        errors.square().sum().sqrt().item() / total,
        apart.mean(0).sum().item() / total,
        steps_errors.square().sum().sqrt().item() / total,
        unigram / total,
        last.mean(0).sum().item() / total,
        total,
        rows,
        errors,
        tokens,
    )


Denoise = Callable[[Tensor, Tensor, Tensor | None], tuple[tuple[Tensor, Tensor | None], Read]]
"""(state y (B, L, d_c) in fp64, time (), direction (B, L, d_c) or None) -> psi C and its derivative along it (B, L, d_c), and what the
head has read."""


def denoiser(
    network: TextDiT, parts: Parts, clean: Tensor, lengths: Tensor | None, documents: Tensor | None, given: Tensor | None
) -> Denoise:
    """psi_{t,t} C of rows, whose given tokens are `clean` (B, L, d_c) whatever the state; the channel in fp64, the trunk in its own."""
    code = parts.code.double()
    head, narrow = replace(network.head(), code=code), torch.promote_types(network.weight.dtype, torch.float32)

    def answer(read: Read, way: Moved | None) -> tuple[Tensor, Tensor | None]:
        """psi C and its tangent (n, d_c), chunk by chunk."""
        if way is None:
            return heads.expectation(head, read).double(), None
        logits, means, moves = tangent.reader(head), [], []
        for part in chunks(len(read.hidden), head.part.widest, head.bias.device):
            z, dz = logits(read[part], way[part])
            p = softmax_(head.part, z)
            means.append(codes.mean(code, p.double()))
            moves.append(codes.mean(code, (p * tangent.deviation(head.part, p, dz)).double()))
        return torch.cat(means), torch.cat(moves)

    def psi(y: Tensor, t: Tensor, direction: Tensor | None) -> tuple[tuple[Tensor, Tensor | None], Read]:
        if given is not None:
            y = torch.where(given[..., None], clean, y)
        times = told(t.to(y.device).expand(len(y)), given)
        flat, seen = y.flatten(0, 1), of_tokens(level(parts.path, times), y)
        way = None if direction is None else (direction.flatten(0, 1), torch.zeros_like(seen))

        def at(y: Tensor, said: Tensor | None = None) -> Tensor:
            return network(y, times, lengths=lengths, documents=documents, **({} if said is None else {"said": said}))

        def read(*states: Tensor, along: tuple[Tensor, ...]) -> tuple[Read, Moved | None]:
            if way is None:
                return Read(at(*states).flatten(0, 1), flat, seen), None
            with differentiable(network):
                hidden, moved = torch.func.jvp(at, states, along)[:2]
            return Read(hidden.flatten(0, 1), flat, seen), Moved(moved.flatten(0, 1), *way)

        state: tuple[Tensor, ...] = (y.to(narrow),)
        moving: tuple[Tensor, ...] = () if direction is None else (direction.to(narrow),)
        found = read(*state, along=moving)
        if network.recall is not None:
            said, tells = answer(*found)
            state = (*state, said.view(y.shape).to(narrow))
            moving = () if tells is None else (*moving, tells.view(y.shape).to(narrow))
            found = read(*state, along=moving)
        mean, moved = answer(*found)
        return (mean.view(y.shape), None if moved is None else moved.view(y.shape)), found[0]

    return psi


def field_of(psi: Denoise, free: Tensor, places: list[int], probes: int | None, seed: int, draw: int) -> Field:
    """The field of ode_likelihood at the positions (B, L) that are free, and its divergence: the mean of probes, or exact where None.

    psi is asked for all directions of all rows at once: those of every probe, or of every dimension, (copies B, L, d_c).
    """

    def at(y: Tensor, t: float, node: int) -> tuple[Tensor, Tensor]:
        dims = y[0].numel()
        if probes is None:
            ways = torch.eye(dims, dtype=y.dtype, device=y.device).view(dims, 1, *y.shape[1:]).expand(dims, *y.shape)
        else:
            coins = [
                torch.randint(2, (probes, *y.shape[1:]), generator=random.generator(seed, "probe", draw, node, place)) for place in places
            ]
            ways = torch.stack(coins, 1).to(y) * 2.0 - 1.0
        directions = (ways * free[..., None]).flatten(0, 1)
        (mean, moved), _ = psi(repeated(y, len(ways)), torch.tensor(t, dtype=torch.float64), directions)
        assert moved is not None
        along = (moved * directions).sum((1, 2)).view(len(ways), len(y))
        return mean[: len(y)] * free[..., None], along.sum(0) if probes is None else along.mean(0)

    return at


def repeated(x: Tensor, copies: int) -> Tensor:
    """Rows (B, …) one whole copy after the other, (copies B, …)."""
    return x.repeat(copies, *(1 for _ in x.shape[1:]))
