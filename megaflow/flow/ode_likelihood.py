"""The likelihood bound of a probability flow as an ordinary differential equation, by the change of variables along it.

In z = y / alpha and sigma = beta / alpha every path is z = sigma C_x + n with n standard normal, and its probability flow is

    dz / dsigma = D(z, sigma) = psi_{t,t}(alpha z) C                from z_0 ~ N(0, 1) at sigma = 0, where nothing is singular

(the velocity is E[C_x | z]; the Euler steps of sampler.ode are those of this equation). The density q of z at the last sigma_b follows
from the change of variables (Chen et al. 2018, theorem 1; Grathwohl et al. 2019, eq. 4):

    log q(z_b) = log N(z_0; 0, 1) - int_0^sigma_b div D(z_sigma, sigma) dsigma         with z_0 the point that the flow takes to z_b

The model of text is: z_b ~ q, then every token from its own posterior psi(. | z_b). With r(z_b | x) = N(sigma_b C_x, 1), the law of the
noisy state, Jensen's inequality gives, for every text x,

    -log p(x) <= E_r [ log r(z_b | x) - log q(z_b) - sum_l log psi(x_l | z_b) ]
              =  E_n [ (|z_0|^2 - |n|^2) / 2 + int_0^sigma_b div D dsigma + sum_l CE_l(sigma_b) ],      z_b = sigma_b C_x + n.

The entropy of r is not put in as its mean, L d_c (1 + log 2 pi) / 2, but at the drawn n: the expectation is the same, and for the exact
posterior of independent tokens the bracket is -log pi(x) at every n, by Bayes' rule, so that the draws have no variance at all. For an
exact denoiser of any law the bound exceeds the entropy by what the tokens still tell of each other at sigma_b, KL(p(x | z_b) ||
prod_l psi_l).

Which way it errs. The bound is one from above, for any network whose field is smooth. Hutchinson's estimate of the divergence has the
right mean, and the bound is linear in it. Heun's steps have an error of second order in their size and of either sign: a value at few
steps is no bound, and is to be read beside the one at half as many.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megaflow.flow import clock as clocks
from megaflow.flow.clock import Clock
from megaflow.flow.interpolant import Interpolant, time_of
from megaflow.flow.likelihood import Range

Field = Callable[[Tensor, float, int], tuple[Tensor, Tensor]]
"""(state y (B, L, d_c), time, number of the node) -> (psi C (B, L, d_c), its divergence by y (B,)); zero where a position does not move."""


class Way(NamedTuple):
    """start: z at t = 0 (B, L, d_c); divergence: its integral over sigma along the way (B,)."""

    start: Tensor
    divergence: Tensor


def nodes(path: Interpolant, clock: Clock, span: Range, steps: int) -> Tensor:
    """(steps + 1,) times: 0, then evenly on the clock from the lowest to the highest log-SNR of a range; fp64; two steps or more."""
    ends = time_of(path, torch.tensor([span.low, span.high], dtype=torch.float64))
    inner = clocks.inverse(clocks.within(path, clock, span.low, span.high), torch.linspace(0.0, 1.0, steps, dtype=torch.float64)[1:-1])
    return torch.cat([torch.zeros(1, dtype=torch.float64), ends[:1], inner, ends[1:]])


def backwards(field: Field, path: Interpolant, z: Tensor, times: Tensor, numbers: Sequence[int]) -> Way:
    """From z (B, L, d_c) at the last of the times (N + 1,), below 1, to the first, by Heun's method in sigma; `numbers` of the nodes are
    handed to the field, for what it draws there. The field is asked twice a step."""
    levels, alphas = (path.beta(times) / path.alpha(times)).tolist(), path.alpha(times).tolist()
    total = z.new_zeros(len(z))

    def at(z: Tensor, node: int) -> tuple[Tensor, Tensor]:
        mean, divergence = field(alphas[node] * z, times[node].item(), numbers[node])
        return mean, alphas[node] * divergence

    for node in range(len(times) - 1, 0, -1):
        step = levels[node] - levels[node - 1]
        here, spread = at(z, node)
        there, narrower = at(z - step * here, node - 1)
        z = z - 0.5 * step * (here + there)
        total = total + 0.5 * step * (spread + narrower)
    return Way(z, total)


def nats(way: Way, noise: Tensor, last: Tensor) -> Tensor:
    """The bracket of the bound (B,), from the noise n (B, L, d_c) that z began with and the cross-entropies (B,) of the tokens there."""
    return 0.5 * (way.start.square() - noise.square()).sum((1, 2)) + way.divergence + last
