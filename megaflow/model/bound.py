"""The likelihood bound of a network on rows of tokens: flow/likelihood.py with a Text-DiT put into it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow import likelihood
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup
from megaflow.flow.context import told
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import level, log_snr, noisy_state, time_of
from megaflow.flow.likelihood import Estimate, NoBound
from megaflow.flow.vocabulary import Vocabulary, look_up
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT, of_tokens
from megaflow.parallel import random
from megaflow.progress import Progress


@torch.no_grad()
def bound_of_rows(
    network: TextDiT,
    parts: Parts,
    clock: Clock,
    ids: Tensor,
    lengths: Tensor | None,
    draws: int,
    seed: int,
    batch: int = 64,
    double: bool = True,
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
    """The bound on rows (R, L), `draws` times and noises each, in nats per counted token.

    Several processes may share rows: then `places` (R,) are the numbers of these among `all_rows`, total(x) is the sum of x over the
    processes, which all call this, and each has the bound of all rows.

    The network is told how long a row is, by what it may attend to. Where rows differ in length a bound of -log p(row) therefore has
    -log p(length) too: log_length (L + 1,), of data.shards. Without it the bound is that of rows whose lengths are known. In the same
    way documents (B, L) tell where one ends, by the token `closing`, and -log p of that is that of a coin at each token but the last, as
    likely to fall as that token is frequent.

    given: (R, L) tokens that are known from the start: the bound is then one of -log p of the others, given these, in nats per token of
    the others (and of the row's length, where that has a law, as if the given tokens told nothing of it).

    stretches: into how many of log-SNR the bound is parted besides (one process only).
    keys: of rows that are questions of their own (one process only): a row's value is then a function of the seed, its key and itself, and
    not of the rows beside it: its strata of time are its own, and the control variate is not fitted (flow.likelihood.estimate).

    The channel's terms are in fp64, or with `double` off in fp32, twice as fast and good for watching a training run.
    Raises flow.likelihood.NoBound where the noise is not Gaussian, or the network has no bound on the flow's range.
    """
    if parts.prior.law != "gaussian":
        raise NoBound(f"flow.prior={parts.prior.name}: the bound is one of Gaussian noise")
    own, width = ids.shape
    rows = own if all_rows is None else all_rows
    places = torch.arange(own) if places is None else places
    assert (documents is None) == (closing is None)
    whole, counted = counting(ids, lengths, given)
    ours, channel, levels = torch.zeros(3, draws, own, dtype=torch.float64)
    last, last_channel = torch.zeros(2, own, dtype=torch.float64)
    cells, total_cells, offset = strata(places, rows, draws, seed, keys)
    noises = places.tolist() if keys is None else keys
    # rare tokens that resolve late make the integrand heavy where the clock is thin
    law = clocks.mixture([clock, clocks.uniform_log_snr(parts.path, parts.bounded.low, parts.bounded.high)], [0.5, 0.5])
    for start in range(0, own, batch):
        part = slice(start, min(start + batch, own))
        some, of, known = (None if x is None else x[part] for x in (lengths, documents, given))

        def sums(per_token: Tensor, part: slice = part) -> Tensor:
            return (per_token.view(-1, width) * counted[part]).sum(1).cpu().double()

        for draw in range(draws):
            times, weight = likelihood.integration_times(parts.path, law, parts.bounded, cells[draw, part], total_cells, offset[part])
            (_, error), (_, channel_error) = _integrands(
                network, parts, ids[part], some, of, known, noises[part], times, seed, draw, double
            )
            ours[draw, part], channel[draw, part] = sums(error) * weight, sums(channel_error) * weight
            levels[draw, part] = log_snr(parts.path, times)
        end = time_of(parts.path, torch.full((part.stop - start,), parts.bounded.high, dtype=torch.float64))
        (nll, _), (channel_nll, _) = _integrands(network, parts, ids[part], some, of, known, noises[part], end, seed, draws, double)
        last[part], last_channel[part] = sums(nll), sums(channel_nll)
        if progress is not None:
            progress.update(part.stop)
    first = (likelihood.prior_term(parts.code, ids, parts.bounded) * counted).sum(1).cpu().double()
    unigram = -(look_up(parts.code.part, parts.log_prior, ids).double() * counted).sum(1).cpu()
    tokens = counted.sum(1).cpu()
    shape = structure(ids, whole, counted, log_length, closing, parts.code.part, parts.log_prior)
    told_apart = None
    if stretches:
        edges = torch.linspace(parts.bounded.low, parts.bounded.high, stretches + 1, dtype=torch.float64)
        told_apart = likelihood.by_stretch(levels, ours, channel, tokens, edges, first, last, shape)
    everyones = torch.zeros(2 * draws + 3, rows, dtype=torch.float64)
    everyones[:, places] = torch.cat([ours + first + last + shape, channel + first + last_channel, unigram[None], tokens[None], last[None]])
    ours, channel, (unigram, tokens, last) = total(everyones).split([draws, draws, 3])
    return replace(
        likelihood.estimate(ours, channel, unigram, tokens, (last.sum() / tokens.sum()).item(), keys is not None), parts=told_apart
    )


def strata(places: Tensor, rows: int, draws: int, seed: int, keys: list[int] | None) -> tuple[Tensor, int, Tensor]:
    """Cells of the times of rows (R,), (draws, R), of how many, and the offset within them of each row (R,): the draws of all rows spread
    over time together, or with keys each row's by itself."""
    if keys is None:
        order = random.permutation(rows * draws, seed, "bound cells")
        offset = torch.full((len(places),), random.uniform(seed, "bound offset"), dtype=torch.float64)
        return order[places * draws + torch.arange(draws)[:, None]], rows * draws, offset
    orders = [random.permutation(draws, seed, "bound cells", key) for key in keys]
    offsets = [random.uniform(seed, "bound offset", key) for key in keys]
    return torch.stack(orders, 1), draws, torch.tensor(offsets, dtype=torch.float64)


def counting(ids: Tensor, lengths: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens of each row (R,), on the CPU, and which of them count (R, L) as 0 and 1: those that are there and not given."""
    there = torch.ones_like(ids) if lengths is None else (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    return there.sum(1).cpu(), there if given is None else there * ~given


def structure(
    ids: Tensor,
    whole: Tensor,
    counted: Tensor,
    log_length: np.ndarray | None,
    closing: int | None,
    part: Vocabulary,
    log_prior: Tensor,
) -> Tensor:
    """What a bound charges besides its tokens, in nats (R,): lengths of rows, and where documents end, as far as a network is told them."""
    cost = torch.zeros(len(ids), dtype=torch.float64) if log_length is None else -torch.from_numpy(log_length)[whole]
    return cost if closing is None else cost + boundary_cost(ids, closing, part, log_prior, whole, counted)


def boundary_cost(ids: Tensor, closing: int, part: Vocabulary, log_prior: Tensor, whole: Tensor, counted: Tensor) -> Tensor:
    """-log p, in nats (R,), of where documents end within rows of `whole` tokens, were every token's being an end a coin as likely as the
    law has it: of those that count, and have one behind them, whose document tells it."""
    log_p = look_up(part, log_prior, torch.full((1,), closing, device=ids.device)).double()
    cost = torch.where(ids[:, :-1] == closing, -log_p, -torch.log1p(-log_p.exp())) * counted[:, :-1]
    behind = torch.arange(1, ids.shape[1]) < whole[:, None]
    return (cost.cpu() * behind).sum(1)


def _integrands(
    network: TextDiT,
    parts: Parts,
    ids: Tensor,
    lengths: Tensor | None,
    documents: Tensor | None,
    given: Tensor | None,
    places: list[int],
    times: Tensor,
    seed: int,
    draw: int,
    double: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(cross-entropy, squared error) per token (B L,), of the network and of the channel alone, at the same noisy states."""
    code = parts.code.double() if double else parts.code
    shape, columns = (ids.shape[1], code.dim), codes.columns(code)
    noise = random.normal(places, shape, seed, "bound noise", draw, columns=columns).to(ids.device)
    times = told(times.to(ids.device), given)
    y = noisy_state(parts.path, lookup(parts.code, ids), noise, times)
    hidden = network.settled(y, times, lengths, documents)
    wide = torch.float64 if double else y.dtype
    flat, seen = y.to(wide).flatten(0, 1), of_tokens(level(parts.path, times).to(wide), y)
    ours = replace(network.head(), code=code)
    channel = Head(network.weight.new_zeros(code.part.here, 1), parts.log_prior, code, True, code.part)
    read = Read(hidden.flatten(0, 1), flat, seen)
    without = Read(hidden.new_zeros(len(flat), 1), flat, seen)
    return heads.denoising_error(ours, read, ids.flatten()), heads.denoising_error(channel, without, ids.flatten())
