"""Text from discrete diffusion, by its ancestral samplers."""

from collections.abc import Callable

import torch
from torch import Tensor

from megaflow.evaluate.loaded import Run
from megaflow.evaluate.settings import Settings
from megaflow.evaluate.template import Template
from megaflow.flow import discrete
from megaflow.flow import head as heads
from megaflow.flow.head import Read
from megaflow.model.discrete import Discrete
from megaflow.parallel import random


def write(
    run: Run, settings: Settings, places: list[int], lengths: list[int] | None, template: Template | None, tick: Callable[[], None]
) -> Tensor:
    """(B, L) tokens on even steps of the time, each row a function of the seed and its place; tokens that a template gives are never
    hidden."""
    network, width, steps, temperature, seed = run.network, run.manifest["length"], settings.steps, settings.temperature, settings.seed
    assert isinstance(network, Discrete) and steps is not None
    device, head = network.weight.device, network.head()
    counted = None if lengths is None else torch.tensor(lengths, device=device)
    times = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64).tolist()

    def uniform(purpose: str, time: float) -> Tensor:
        sources = [random.generator(seed, purpose, times.index(time), place) for place in places]
        return torch.stack([torch.rand(width, generator=source, dtype=torch.float64) for source in sources]).to(device)

    def read(ids: Tensor, mask: Tensor | None, s: float) -> Read:
        tick()
        time = torch.full((len(ids),), max(s, discrete.FIRST), dtype=torch.float64, device=device)
        return network.read(network(ids, time, mask, counted))

    if network.mask is None:
        sources = [random.generator(seed, "initial noise", place) for place in places]
        start = torch.stack([torch.randint(network.part.size, (width,), generator=source) for source in sources]).to(device)

        def earlier(ids: Tensor, s: float, t: float) -> Tensor:
            chance = uniform("token draws", s).flatten()
            return discrete.draw_earlier(head, read(ids, None, s), ids.flatten(), s, t, chance, temperature).view(ids.shape)

        return discrete.refine(earlier, start, times)

    def hidden_ones(ids: Tensor, mask: Tensor, s: float) -> Tensor:
        return heads.draw(head, read(ids, mask, s), uniform("token draws", s).flatten(), temperature)[0].view(ids.shape)

    ids, mask = (
        torch.zeros(len(places), width, dtype=torch.int64, device=device),
        torch.ones(len(places), width, dtype=torch.bool, device=device),
    )
    if template is not None:
        ids, given = template.rows(places, device)
        mask = ~given
    return discrete.reveal(hidden_ones, ids, mask, times, lambda step: uniform("reveal", times[step]))
