"""What a model is measured to score at each log-SNR: what clocks are fitted to and weights are balanced by."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

CROSS_ENTROPY, ERROR, SQUARE = range(3)
FADED = 1e-12
"""Weight below which a bin fades no further: what has long not been seen keeps its value."""


@dataclass
class Profile:
    """Running averages in K bins of log-SNR. edges: (K + 1,); total: (3, K) and weight: (K,), all fp64.

    The rows of total over weight are the mean cross-entropy of tokens, the mean squared error |C_x - psi C|^2 of tokens, and the mean
    square of a row's own squared error; the last two only where the objective measures them. named: (K,) share of tokens that are the
    most likely ones of the channel alone under a uniform law; it is measured once.

    Before the first step all is the channel's own, which is what an untrained network scores: a clock is fitted from the start, and every
    bin has been seen.
    """

    edges: Tensor
    total: Tensor
    weight: Tensor
    named: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @property
    def centres(self) -> Tensor:
        """(K,) log-SNRs."""
        return (self.edges[1:] + self.edges[:-1]) / 2.0

    def mean(self, row: int) -> Tensor:
        """(K,) of CROSS_ENTROPY, ERROR or SQUARE."""
        return self.total[row] / self.weight

    def observe(self, total: Tensor, weight: Tensor, memory: float) -> None:
        """Take in one step: sums (3, K) and the weight of tokens per bin (K,), as shares of the step's tokens."""
        bins = len(self.weight)
        new_total = memory * self.total + (1.0 - memory) * bins * total
        new_weight = memory * self.weight + (1.0 - memory) * bins * weight
        faded = new_weight < FADED
        self.total, self.weight = torch.where(faded, self.total, new_total), torch.where(faded, self.weight, new_weight)


def state(profile: Profile) -> dict[str, Tensor]:
    """What is kept of it, by name."""
    return {f"profile_{name}": getattr(profile, name) for name in ("total", "weight", "edges", "named")}


def kept(state: dict[str, Tensor]) -> Profile | None:
    """What was kept, None where nothing was."""
    if "profile_edges" not in state:
        return None
    total, edges, weight = (state[f"profile_{name}"] for name in ("total", "edges", "weight"))
    if total.ndim == 1:  # as earlier versions kept it: the cross-entropy alone
        total = torch.stack([total, torch.zeros_like(total), torch.zeros_like(total)])
    return Profile(edges, total, weight, state.get("profile_named", torch.zeros_like(weight)))


def bin_of(edges: Tensor, log_snr: Tensor) -> Tensor:
    """Index of the bin that a log-SNR falls in; what lies outside counts into the first or last. edges: (K + 1,)."""
    return (torch.searchsorted(edges, log_snr.double().contiguous(), right=True) - 1).clamp(0, len(edges) - 2)
