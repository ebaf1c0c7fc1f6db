"""The vocabulary, or the part of it that is here, and what is joined with the parts that others hold.

Everything V wide in a flow (logits, posteriors, tables, codes, the dense one-hot state) may be cut along V over several processes. What
crosses the cut is narrow: two numbers a token for a softmax, d_c of them for a mean. `flow` knows only that there are others; how sums
reach them is handed in (parallel/collectives.py). With the whole vocabulary here every function is the plain one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Vocabulary:
    """Entries start … stop - 1 of `size` are here; this is part number `place`, and no part has more than `widest`.

    total(x): the sum of x over the holders of all parts, on each of them, which all compute the same with it; shared(x): x itself, the same
    on all, which each uses for its own entries, so that its gradient is the sum of theirs; stack(x): (holders, *x.shape), in the order of
    their parts, without derivatives. All None where everything is here.
    """

    size: int
    start: int
    stop: int
    place: int
    widest: int
    total: Callable[[Tensor], Tensor] | None = None
    stack: Callable[[Tensor], Tensor] | None = None
    shared: Callable[[Tensor], Tensor] | None = None

    @property
    def here(self) -> int:
        return self.stop - self.start


def whole(size: int) -> Vocabulary:
    """All of it, here."""
    return Vocabulary(size, 0, size, 0, size)


def total(v: Vocabulary, x: Tensor) -> Tensor:
    """Sum over the parts of something that each gives its share of."""
    return x if v.total is None else v.total(x)


def shared(v: Vocabulary, x: Tensor) -> Tensor:
    """What is the same everywhere, for what each part does with it."""
    return x if v.shared is None else v.shared(x)


def log_sum(v: Vocabulary, z: Tensor) -> Tensor:
    """log sum_k exp z_k over the whole vocabulary: z (n, here) -> (n,)."""
    ours = torch.logsumexp(z, -1)
    return ours if v.stack is None else torch.logsumexp(v.stack(ours), 0)


def softmax_(v: Vocabulary, z: Tensor) -> Tensor:
    """The probabilities (n, here) of logits z, written over them."""
    return torch.softmax(z, -1, out=z) if v.stack is None else log_softmax_(v, z).exp_()


def log_softmax_(v: Vocabulary, z: Tensor) -> Tensor:
    """Their logarithms, written over them."""
    return torch.log_softmax(z, -1, out=z) if v.stack is None else z.sub_(log_sum(v, z)[:, None])


def own_ids(v: Vocabulary, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where among the entries here tokens are, 0 for those that are elsewhere, and which are here (bool)."""
    inside = (ids >= v.start) & (ids < v.stop)
    return (ids - v.start) * inside, inside


def pick(v: Vocabulary, z: Tensor, ids: Tensor) -> Tensor:
    """z[i, ids[i]] for every i, wherever the token is: z (n, here), ids (n,) -> (n,)."""
    if v.total is None:
        return z.gather(1, ids[:, None])[:, 0]
    local, inside = own_ids(v, ids)
    return v.total(torch.where(inside, z.gather(1, local[:, None])[:, 0], 0.0))


def look_up(v: Vocabulary, column: Tensor, ids: Tensor) -> Tensor:
    """column[ids] of something that has a number for every entry: column (here,), ids (…,) -> (…,)."""
    if v.total is None:
        return column[ids]
    local, inside = own_ids(v, ids)
    return v.total(torch.where(inside, column[local], 0.0))


def largest(v: Vocabulary, z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of z (n, here) in falling order and which tokens they belong to, both (n, count or fewer).

    With count = 1 it is the first of equals, as argmax is.
    """
    few = min(count, z.shape[-1])
    values, ids = z.max(-1, keepdim=True) if few == 1 else z.topk(few, -1)
    ids = ids + v.start
    if v.stack is None:
        return values, ids
    values, ids = (torch.cat(list(v.stack(x)), -1) for x in (_filled(v, values, count, -torch.inf), _filled(v, ids, count, 0)))
    values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    kept = min(count, v.size)
    return values[:, :kept], ids.gather(-1, order)[:, :kept]


def _filled(v: Vocabulary, x: Tensor, count: int, filling: float) -> Tensor:
    """Parts of unequal size give equally many columns."""
    missing = count - x.shape[-1]
    return x if missing == 0 else torch.cat([x, x.new_full((len(x), missing), filling)], -1)
