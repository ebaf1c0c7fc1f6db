"""Context: which tokens of a row are given, and which are to be written; each law is one function of a row, in CONTEXTS by name.

prefix      the row begins with what is given                                            (continuation)
suffix      it ends with it
infilling   all but one span of it
random      each token by itself, with a probability that is uniform in [0, 1]           (FMLM+: per-token clean context)
source      all up to the first end token: pairs of what is given and what belongs to it
mixture     each row by one of the others, 'mixture:prefix=.5,infilling=.5'

A given token is clean: it has the time 1, whatever the time of the others. One token of every row at least is left to be written, and of
the first three laws how many are given is uniform.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaflow.flow import choice


@dataclass(frozen=True)
class Row:
    """ids: (n,) the tokens that count, on the CPU; end: the token that ends a document, None where there is none; source: of draws."""

    ids: Tensor
    end: int | None
    source: torch.Generator

    def uniform(self) -> float:
        return torch.rand((), generator=self.source, dtype=torch.float64).item()

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return min(int(self.uniform() * count), count - 1)


def prefix(row: Row) -> Tensor:
    """The first k of n tokens, k uniform in 0 … n - 1."""
    return torch.arange(len(row.ids)) < row.below(len(row.ids))


def suffix(row: Row) -> Tensor:
    """The last k of n tokens, k uniform in 0 … n - 1."""
    return prefix(row).flip(0)


def infilling(row: Row) -> Tensor:
    """All but a span of 1 … n tokens, its length uniform, and its place among those that it may have."""
    place, length = torch.arange(len(row.ids)), 1 + row.below(len(row.ids))
    start = row.below(len(row.ids) - length + 1)
    return (place < start) | (place >= start + length)


def random(row: Row) -> Tensor:
    """Every token with one probability, itself uniform in [0, 1]; if that would be all of them, all but one (FMLM+, joint training)."""
    draws = torch.rand(len(row.ids), generator=row.source, dtype=torch.float64)
    return (draws < row.uniform()) & (draws < draws.max())


def source(row: Row) -> Tensor:
    """Everything up to the first end token, itself included; nothing of a row that has no token after it."""
    found = torch.nonzero(row.ids == row.end)[:, 0] if row.end is not None else torch.empty(0)
    place = torch.arange(len(row.ids))
    return place <= found[0] if len(found) and found[0] + 1 < len(row.ids) else place < 0


def mixture(row: Row, **shares: float) -> Tensor:
    """The law of a row by chance, shares over their sum."""
    ends = torch.tensor(list(shares.values()), dtype=torch.float64).cumsum(0)
    chosen = int((row.uniform() * ends[-1] >= ends).sum())
    return choice.call(CONTEXTS, list(shares)[chosen], row)


CONTEXTS: dict[str, Callable[..., Tensor]] = {law.__name__: law for law in (prefix, suffix, infilling, random, source, mixture)}


def laws(name: str) -> set[str]:
    """The laws by which a config's value gives tokens: itself, or what it is mixed of."""
    return choice.mixed(CONTEXTS, name)


def needs_end(name: str) -> bool:
    """Whether a config's value reads where documents end."""
    return "source" in laws(name)


def told(times: Tensor, given: Tensor | None) -> Tensor:
    """Times (B,) or (B, L) as a network is told them: 1 of tokens that are given, (B, L) then."""
    if given is None:
        return times
    return torch.where(given, 1.0, times if times.ndim == 2 else times[:, None])
