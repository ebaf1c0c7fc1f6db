"""The balance of a map's one-step text: offsets of its tokens, a function of its weights alone (flow/balance.py).

They are found by a hundred rounds of counting argmaxes, which make much of the last digit of a logit: of a converted model they are kept
in the folder, so that every program that opens it writes the same text.
"""

from pathlib import Path

import torch
from torch import Tensor

from megaflow.data.shards import drawn_lengths, read_description
from megaflow.export import verify
from megaflow.export.source import Source
from megaflow.flow import balance
from megaflow.flow import head as heads
from megaflow.model.parts import Parts, draw_noise
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import random
from megaflow.progress import Progress
from megaflow.train.stages import SHARDS

TOKENS = 2**14
"""Positions that the offsets are found on, or four for every entry of the vocabulary where that is more."""
BATCH = 64
"""Rows that the network is asked for at a time, or fewer of TOKENS positions together."""
ACTIVATIONS = 64
"""Bytes for each of a batch's positions and hidden dimensions: sixteen numbers, four of them the widest part of a block's MLP."""


@torch.no_grad()
def offsets(network: TextDiT, parts: Parts, folder: Path, name: str) -> Tensor:
    """b (V,) of a flow map, on noise of its own. folder: what its shards say of themselves; name: what its progress is called."""
    width, law = read_description(folder)["length"], parts.log_prior.exp()
    total = -(-max(TOKENS, 4 * len(law)) // width)
    batch, progress, found = min(BATCH, max(1, TOKENS // width)), Progress(f"balance {name}", total, "rows"), []
    for start in range(0, total, batch):
        places = list(range(start, min(start + batch, total)))
        lengths = drawn_lengths(folder, [random.uniform(0, "length", place) for place in places])
        counted = None if lengths is None else torch.tensor(lengths, device=law.device)
        y = parts.path.scale * draw_noise(parts, places, width, 0, "balance noise")
        zero = torch.zeros(len(y), dtype=torch.float64, device=law.device)
        read = network.read(network(y, zero, zero + 1.0, counted), y, zero)
        logits, ids = heads.likeliest(network.head(), read)
        here = slice(None) if counted is None else (torch.arange(width, device=law.device) < counted[:, None]).flatten()
        found.append((logits[here], ids[here]))
        progress.update(places[-1] + 1)
    logits, ids = (torch.cat(column) for column in zip(*found, strict=True))
    return balance.offsets(logits, ids, law.to(logits))


def of_source(source: Source, group: str, name: str) -> Tensor | None:
    """Those of a map with the weights of a group; None of what is no map, and of one that does not fit in memory with a batch."""
    if source.kind != "flow_map":
        return None
    needed = source.network(group).bytes + ACTIVATIONS * TOKENS * source.loaded.config.model.hidden
    if needed > verify.memory():
        return None
    device = "cuda" if torch.cuda.is_available() and needed <= torch.cuda.mem_get_info()[0] else "cpu"  # as evaluate has it
    network, parts = source.opened(group, torch.device(device))
    assert isinstance(network, TextDiT) and parts is not None
    return offsets(network, parts, source.run / SHARDS, name).cpu()
