"""The flow map by its semigroup identity (FMM; FMLM and DFM in KL form on the mean denoiser).

    psi_{s,t}(x) = a psi_{s,u}(x) + (1 - a) psi_{u,t}( X_{s,u}(x) ),     a = Gamma_{u,t} Xi_{s,u} / Xi_{s,t}

holds exactly for the true flow map, for real times s < u < t; on the linear path a = (u - s)(1 - t) / ((t - s)(1 - u)). Stage 2 trains
the left side towards the right one, whose two terms come from the live network without gradient. At t = 1 the first share is zero and the
target is psi_{u,1} alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megaflow.flow import clock as clocks
from megaflow.flow.clock import Clock
from megaflow.flow.interpolant import Interpolant, move


def semigroup_share(path: Interpolant, s: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """a in [0, 1], the share of psi_{s,u} in psi_{s,t}; real times s < u < t, any shape (DFM, appendix A); 0 where nothing moves, s = t."""
    (kept, _), (_, first), (_, both) = move(path, u, t), move(path, s, u), move(path, s, t)
    return torch.where(both > 0.0, kept * first / torch.where(both > 0.0, both, 1.0), 0.0).clamp(0.0, 1.0)


class Times(NamedTuple):
    """Real times of every row, s <= u <= t, each (B,) fp64; on diagonal rows all three are equal."""

    s: Tensor
    u: Tensor
    t: Tensor


def counts(total: int, diagonal_fraction: float, boundary_fraction: float) -> tuple[int, int]:
    """How many of `total` rows are diagonal, and how many of the others run from 0 to 1: exact counts of a global batch.

    A positive fraction gets at least one row where there are any, so that small batches keep their boundary rows.
    """
    diagonal = round(total * diagonal_fraction)
    others = total - diagonal
    boundary = round(others * boundary_fraction)
    if boundary_fraction > 0.0 and others > 0:
        boundary = max(boundary, 1)
    return diagonal, boundary


def draw_times(clock: Clock, kind: Tensor, first: Tensor, second: Tensor, between: Tensor | None = None, law: str = "gap") -> Times:
    """Times of rows from two uniform draws each, on the clock. u is the midpoint there (PSD-M), or the share `between` (B,) of the way
    (PSD-U; Boffi et al. 2025).

    kind: (B,) 0 diagonal, 1 inner, 2 boundary; first, second: (B,) in [0, 1). By the law `gap` (FMLM+) an inner row has gap `first` and
    starts at `second` of what room the gap leaves; by `end` (CFM) it ends at `first` and starts at `second` of the way there. A diagonal
    row has the single time `first`.
    """
    start, gap = (second * (1.0 - first), first) if law == "gap" else (second * first, (1.0 - second) * first)
    s_clock = torch.where(kind == 1, start, first)
    t_clock = torch.where(kind == 1, start + gap, first)
    u_clock = (s_clock + t_clock) / 2.0 if between is None else s_clock + between * (t_clock - s_clock)
    s, u, t = (clocks.inverse(clock, x) for x in (s_clock, u_clock, t_clock))
    zero = torch.zeros_like(s)
    middle = clocks.inverse(clock, torch.full_like(s, 0.5) if between is None else between)
    boundary = kind == 2
    return Times(torch.where(boundary, zero, s), torch.where(boundary, middle, u), torch.where(boundary, zero + 1.0, t))


def adaptive_weight(square_distance: Tensor, power: float, constant: float) -> Tensor:
    """(|q - p|^2 + c)^-r, detached (DFM, appendix B). square_distance: (n,)."""
    return (square_distance.detach() + constant).pow(-power)
