"""What a semantic code starts from: vectors of tokens out of the training text, or out of a trained run."""

import torch
from torch import Tensor

from megaflow.config.schema import Config
from megaflow.data.stream import TokenStream
from megaflow.flow.semantic import Pairs, vectors
from megaflow.progress import Progress

ROWS = 2048
TOKENS = 20_000_000
"""Tokens of the training split that are counted, from its beginning."""


def from_text(config: Config, vocab: int) -> Tensor:
    """(V, code_dim) vectors by what tokens stand beside in the training split."""
    stream, pairs = TokenStream(config.data.path, "train", config.run.seed, shuffle=False), Pairs(vocab)
    count = min(len(stream), max(TOKENS // stream.length, 1))
    progress = Progress("what tokens stand beside", count, "rows", patience=3.0)
    for start in range(0, count, ROWS):
        stop = min(start + ROWS, count)
        ids, lengths = stream.rows(torch.arange(start, stop))
        pairs.add(ids.numpy(), lengths.numpy())
        progress.update(stop)
    return vectors(pairs, int(config.flow.code_dim), config.run.seed)


def from_weights(weight: Tensor, dim: int) -> Tensor:
    """(V, dim): what most of the differences between output weights (V, d) lie in, their first principal components."""
    centred = weight.double() - weight.double().mean(0)
    left, size, _ = torch.linalg.svd(centred, full_matrices=False)
    found = left[:, :dim] * size[:dim]
    return torch.nn.functional.pad(found, (0, dim - found.shape[1])).float()
