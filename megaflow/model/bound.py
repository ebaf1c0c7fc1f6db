"""The likelihood bound of a network on rows of tokens: flow/likelihood.py with a Text-DiT put into it."""

import torch
from torch import Tensor

from megaflow.flow import head as heads
from megaflow.flow import likelihood
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import noisy_state, time_of
from megaflow.flow.likelihood import Estimate
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT
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
) -> Estimate:
    """The bound on rows (R, L), `draws` times and noises each, in nats per counted token.

    The channel's terms are in fp64, or with `double` off in fp32, twice as fast and good for watching a training run.
    Raises flow.likelihood.RangeTooShort where the network has no bound on the flow's range.
    """
    rows, width = ids.shape
    counted = torch.ones_like(ids) if lengths is None else (torch.arange(width, device=ids.device) < lengths[:, None]).long()
    differences = torch.zeros(draws, rows, dtype=torch.float64)
    last, last_channel = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    order, offset = random.permutation(rows * draws, seed, "bound cells"), random.uniform(seed, "bound offset")
    for start in range(0, rows, batch):
        part = slice(start, min(start + batch, rows))
        places = torch.arange(part.start, part.stop)
        some = None if lengths is None else lengths[part]
        for draw in range(draws):
            cell = order[places * draws + draw]
            times, weight = likelihood.integration_times(clock, parts.span, cell, rows * draws, offset)
            ours, channel = _integrands(network, parts, ids[part], some, places, times, seed, draw, double)
            difference = (ours[1] - channel[1]).view(-1, width) * counted[part]
            differences[draw, part] = difference.sum(1).cpu() * weight
        end = time_of(torch.full((len(places),), parts.span.high, dtype=torch.float64))
        ours, channel = _integrands(network, parts, ids[part], some, places, end, seed, draws, double)
        last[part] = (ours[0].view(-1, width) * counted[part]).sum(1).cpu()
        last_channel[part] = (channel[0].view(-1, width) * counted[part]).sum(1).cpu()
        if progress is not None:
            progress.update(part.stop)
    differences += (last - last_channel)[None]
    unigram = -(parts.log_prior.to(ids.device)[ids].double() * counted).sum(1).cpu()
    tokens = counted.sum(1).cpu()
    return likelihood.estimate(unigram, differences, tokens, (last.sum() / tokens.sum()).item())


def _integrands(
    network: TextDiT, parts: Parts, ids: Tensor, lengths: Tensor | None, places: Tensor, times: Tensor, seed: int, draw: int, double: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(cross-entropy, squared error) per token (B L,), of the network and of the channel alone, at the same noisy states."""
    code = parts.code.double() if double else parts.code
    noise = random.normal(places.tolist(), (ids.shape[1], code.dim), seed, "bound noise", draw).to(ids.device)
    times = times.to(ids.device)
    y = noisy_state(lookup(parts.code, ids), noise, times)
    hidden = network(y, times, lengths=lengths)
    wide = torch.float64 if double else y.dtype
    flat, s = y.to(wide).flatten(0, 1), times.to(wide)[:, None].expand(ids.shape).flatten()
    ours = Head(network.weight, network.bias, code, network.skip)
    channel = Head(network.weight.new_zeros(code.vocab, 1), parts.log_prior, code, True)
    read = Read(hidden.flatten(0, 1), flat, s)
    without = Read(hidden.new_zeros(len(flat), 1), flat, s)
    return heads.denoising_error(ours, read, ids.flatten()), heads.denoising_error(channel, without, ids.flatten())
