"""The bound of discrete diffusion on rows of tokens: flow/discrete.py with a network put into it."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaflow.flow import clock as clocks
from megaflow.flow import discrete, likelihood, losses
from megaflow.flow import head as heads
from megaflow.flow.likelihood import Estimate
from megaflow.flow.vocabulary import look_up
from megaflow.model.bound import counting, strata, structure
from megaflow.model.discrete import Discrete
from megaflow.parallel import random
from megaflow.progress import Progress


class Noised(NamedTuple):
    """seen: (B, L) tokens; hidden: (B, L) which are not seen, None with uniform noise; times: (B,) fp64; worth: (B,) of the times drawn."""

    seen: Tensor
    hidden: Tensor | None
    times: Tensor
    worth: Tensor


def noised(network: Discrete, ids: Tensor, u: Tensor, places: list[int], seed: int, purpose: str, *numbers: int) -> Noised:
    """Tokens (B, L) as they are at the times of draws u (B,) in [0, 1), each row's noise a function of its own place."""
    length, vocab = ids.shape[1], network.part.size
    sources = [random.generator(seed, purpose, *numbers, place) for place in places]
    chance = torch.stack([torch.rand(length, generator=source, dtype=torch.float64) for source in sources]).to(ids.device)
    times, worth = (x.to(ids.device) for x in discrete.times(u))
    if network.mask is not None:
        return Noised(ids, discrete.hidden(times, chance), times, worth)
    others = torch.stack([torch.randint(vocab, (length,), generator=source) for source in sources]).to(ids.device)
    return Noised(discrete.replaced(ids, times, chance, others), None, times, worth)


def terms(network: Discrete, ids: Tensor, noisy: Noised, lengths: Tensor | None, documents: Tensor | None) -> Tensor:
    """One draw of the bound's integrand of every token, (B, L) fp64, without gradient."""
    read = network.read(network(noisy.seen, noisy.times, noisy.hidden, lengths, documents))
    if noisy.hidden is not None:
        nll = heads.negative_log_likelihood(network.head(), read, ids.flatten()).view(ids.shape)
        return nll.double() * noisy.hidden * (noisy.worth * discrete.masked_weight(noisy.times))[:, None]
    each = noisy.times.repeat_interleave(ids.shape[1])
    found = losses.jump_divergence(network.head(), read, ids.flatten(), noisy.seen.flatten(), each, torch.ones_like(each))[1]
    return found.view(ids.shape).double() * noisy.worth[:, None] + discrete.prior_divergence(network.part.size)


@torch.no_grad()
def bound_of_rows(
    network: Discrete,
    ids: Tensor,
    lengths: Tensor | None,
    draws: int,
    seed: int,
    batch: int = 64,
    progress: Progress | None = None,
    log_length: np.ndarray | None = None,
    documents: Tensor | None = None,
    closing: int | None = None,
    places: Tensor | None = None,
    all_rows: int | None = None,
    total: Callable[[Tensor], Tensor] = lambda value: value,
    given: Tensor | None = None,
    stretches: int = 0,
    keys: list[int] | None = None,
) -> Estimate:
    """The bound on rows (R, L), `draws` times and noises each, in nats per counted token; arguments as of model/bound.py.

    Of a masked network the same draws under the unigram law, whose mean is its entropy, are the control variate; given tokens are never
    hidden, and count for nothing. stretches: into how many of time the bound is parted besides (one process only).
    keys: as of model/bound.py.
    """
    own = len(ids)
    rows = own if all_rows is None else all_rows
    places = torch.arange(own) if places is None else places
    assert (documents is None) == (closing is None)
    whole, counted = counting(ids, lengths, given)
    nll = -look_up(network.part, network.log_prior, ids).double()
    ours, channel, levels = torch.zeros(3, draws, own, dtype=torch.float64)
    cells, total_cells, offset = strata(places, rows, draws, seed, keys)
    noises = places.tolist() if keys is None else keys
    for start in range(0, own, batch):
        part = slice(start, min(start + batch, own))
        some, of = (None if x is None else x[part] for x in (lengths, documents))
        for draw in range(draws):
            u = clocks.stratified(cells[draw, part], total_cells, offset[part])
            noisy = noised(network, ids[part], u, noises[part], seed, "bound noise", draw)
            if noisy.hidden is not None and given is not None:
                noisy = noisy._replace(hidden=noisy.hidden & ~given[part])
            found = terms(network, ids[part], noisy, some, of)
            levels[draw, part] = noisy.times.cpu()
            ours[draw, part] = (found * counted[part]).sum(1).cpu()
            known = nll[part]
            if noisy.hidden is not None:
                known = known * noisy.hidden * (noisy.worth * discrete.masked_weight(noisy.times))[:, None]
            channel[draw, part] = (known * counted[part]).sum(1).cpu()
        if progress is not None:
            progress.update(part.stop)
    tokens = counted.sum(1).cpu()
    shape = structure(ids, whole, counted, log_length, closing, network.part, network.log_prior)
    told_apart = None
    if stretches:
        edges = torch.linspace(0.0, 1.0, stretches + 1, dtype=torch.float64)
        told_apart = likelihood.by_stretch(levels, ours, channel, tokens, edges, rest=shape)
    everyones = torch.zeros(2 * draws + 2, rows, dtype=torch.float64)
    everyones[:, places] = torch.cat([ours + shape, channel, (nll * counted).sum(1).cpu()[None], tokens[None]])
    ours, channel, (unigram, tokens) = total(everyones).split([draws, draws, 2])
    return replace(likelihood.estimate(ours, channel, unigram, tokens, 0.0, keys is not None), parts=told_apart)
