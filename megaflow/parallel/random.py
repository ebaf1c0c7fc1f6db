"""Randomness as a function of what it is for, never of a shared stream.

A draw depends on (seed, purpose, numbers), say (0, "noise", step, place), and on nothing else: not on the number of processes, the
order of the calls or what was drawn before. Purposes never share a stream: noise correlated with the codes ruins a bound.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator whose whole stream is a function of the arguments."""
    digest = hashlib.blake2b(repr((seed, purpose, *numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """One draw in [0, 1), fp64."""
    return torch.rand((), generator=generator(seed, purpose, *numbers), dtype=torch.float64).item()


def permutation(total: int, seed: int, purpose: str, *numbers: int) -> Tensor:
    """A permutation of range(total): (total,) int64."""
    return torch.randperm(total, generator=generator(seed, purpose, *numbers))


def normal(places: Sequence[int], shape: tuple[int, ...], seed: int, purpose: str, *numbers: int, columns: slice = slice(None)) -> Tensor:
    """Standard normal draws (len(places), *shape), each row a function of its own place; of its last dimension the `columns`."""
    width = len(range(*columns.indices(shape[-1])))
    out, draw = torch.empty(len(places), *shape[:-1], width), torch.empty(shape)
    for row, place in enumerate(places):
        torch.randn(shape, generator=generator(seed, purpose, *numbers, place), out=draw if width < shape[-1] else out[row])
        if width < shape[-1]:
            out[row] = draw[..., columns]
    return out
