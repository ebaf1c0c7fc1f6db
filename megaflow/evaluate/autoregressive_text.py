"""Text from the autoregressive baseline, token by token."""

from collections.abc import Callable

import torch
from torch import Tensor

from megaflow.evaluate.loaded import Run, ends
from megaflow.evaluate.settings import Settings
from megaflow.evaluate.template import Template
from megaflow.flow import head as heads
from megaflow.flow.head import Read
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.trunk import Cache
from megaflow.parallel import random
from megaflow.train.stage import end_of_documents


def write(run: Run, settings: Settings, places: list[int], template: Template | None, tick: Callable[[], None]) -> Tensor:
    """(B, L) tokens drawn one after another, keys and values cached; those that a template gives are taken from it."""
    network, cache, width = run.network, Cache(), run.manifest["length"]
    assert isinstance(network, Autoregressive)
    uniform = torch.stack([torch.rand(width, generator=random.generator(settings.seed, "token draws", place)) for place in places])
    previous, columns, end = None, [], end_of_documents(run.config, run.manifest)
    known, given = (None, None) if template is None else template.rows(places, network.weight.device)
    for position in range(width):
        hidden = network.step(previous, len(places), cache, end)
        previous, _ = heads.draw(network.head(), Read(hidden), uniform[:, position].to(hidden.device), settings.temperature)
        if known is not None and given is not None:
            previous = torch.where(given[:, position], known[:, position], previous)
        columns.append(previous)
        tick()
    return torch.stack(columns, 1)


def written_lengths(run: Run, ids: Tensor, drawn: list[int]) -> list[int]:
    """How far a baseline wrote each row (B, L) of one document: up to its end token, which counts. Without such a token it cannot
    say where a text ends, which is then as long as is `drawn` for a flow."""
    end = run.manifest["tokenizer"]["end_id"]
    if end is None:
        return drawn
    ended = (ids == end) & ((ids == end).cumsum(1) == ends(run))
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1]).tolist()
