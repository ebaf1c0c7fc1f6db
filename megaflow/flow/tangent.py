"""How what a head says moves: the logits' derivative along a way of state and times, and what flow maps are trained by with it.

With z the logits of psi_{s,t} and v - <psi, v> the deviation of a vector from its mean, the exact map obeys (DFM, section 3)

    Lagrangian   psi_{s,t} ~ psi_{t,t}(X_{s,t}) / (1 + g dev(d_t z)),                 g   = Xi_{s,t} / lam_t
    Eulerian     psi_{s,t} ~ psi_{s,s} / (1 - dev(D_s z) / k),                        1/k = Xi_{s,t} / (Gamma_{s,t} lam_s)

with D_s z = d_s z + J_y z b_s along the flow. Their right sides are targets on the simplex, without gradient. The residual itself, squared,
has one through d_t psi (Categorical Flow Maps):

    r = (d_t X_{s,t} - b_t(X_{s,t})) / lam_t = psi_{s,t} - psi_{t,t}(X_{s,t}) + g d_t psi_{s,t}

Like those of head.py and losses.py, functions take flat tokens in chunks; of a cut vocabulary they are the same for every part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow.channel import chunks, evidence_tangent, row_products
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import Interpolant, move, slope, velocity_terms
from megaflow.flow.losses import Reweight
from megaflow.flow.vocabulary import Vocabulary, log_softmax_, softmax_, total

FLOOR = 1e-4
"""Least factor that a target is divided by: it is a ratio of probabilities, and a network that is not there yet may say a negative one."""


@dataclass(frozen=True)
class Moved:
    """Tangents of a Read, per token: of hidden (n, d), and where the state moves of y (n, d_c) and its level (n, 2)."""

    hidden: Tensor
    y: Tensor | None = None
    level: Tensor | None = None

    def __getitem__(self, part: slice) -> "Moved":
        return Moved(*(None if x is None else x[part] for x in (self.hidden, self.y, self.level)))  # type: ignore[arg-type]


def lagrangian_gain(path: Interpolant, s: Tensor, t: Tensor) -> Tensor:
    """g of times s < t < 1, any shape; (t - s)(1 - t) / (1 - s) on the linear path."""
    return move(path, s, t)[1] / velocity_terms(path, t)[1]


def eulerian_gain(path: Interpolant, s: Tensor, t: Tensor) -> Tensor:
    """1/k of times s < t < 1; (1 - s)(t - s) / (1 - t) on the linear path. It grows without bound towards t = 1."""
    kept, gained = move(path, s, t)
    return gained / (kept * velocity_terms(path, s)[1])


def reader(head: Head) -> Callable[[Read, Moved], tuple[Tensor, Tensor]]:
    """A function of Read and Moved -> logits (n, V) and their tangents, made once for many chunks."""
    plain = heads.reader(head)
    channel = evidence_tangent(head.code) if head.skip and head.code is not None else None

    def f(read: Read, moved: Moved) -> tuple[Tensor, Tensor]:
        z = plain(read)
        dz = (moved.hidden @ head.weight.T).to(z.dtype)
        if channel is not None and moved.y is not None and moved.level is not None:
            dz = dz + channel(read.y, read.level, moved.y, moved.level)
        return z, dz

    return f


def deviation(v: Vocabulary, p: Tensor, x: Tensor) -> Tensor:
    """x - <p, x> of every row: p, x (n, V)."""
    return x - total(v, row_products(p, x))[:, None]


def divided(v: Vocabulary, q: Tensor, factor: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The law (n, V) that goes as q over a factor, which is FLOOR at least, and what p has where it would be less (n,)."""
    ratio = q / factor.clamp(min=FLOOR)
    whole, held = total(v, torch.stack([ratio.sum(-1), (p * (factor < FLOOR)).sum(-1)]))
    return ratio / whole[:, None], held


def lagrangian_target(v: Vocabulary, at_end: Tensor, p: Tensor, dz: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) from psi_{t,t}(X), psi_{s,t} and d_t z, (n, V) each, and g (n,); and the share (n,) of psi_{s,t} that FLOOR answers."""
    return divided(v, at_end, 1.0 + gain[:, None] * deviation(v, p, dz), p)


def eulerian_target(v: Vocabulary, at_start: Tensor, p: Tensor, dz: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) from psi_{s,s}, psi_{s,t} and D_s z, (n, V) each, and 1/k (n,); and the share (n,) of psi_{s,t} that FLOOR answers."""
    return divided(v, at_start, 1.0 - gain[:, None] * deviation(v, p, dz), p)


class _MovingLoss(torch.autograd.Function):
    """Sum over tokens of a loss of logits and their tangents, with its gradients taken chunk by chunk in the forward pass, as in losses.py.

    `measure(z, dz, part)` returns per-token losses, what is to be logged, and the gradients of the summed loss by z and dz, (n, V) each.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, moved: Tensor, weight: Tensor, bias: Tensor, head: Head, read: Read, measure: Callable
    ) -> tuple[Tensor, Tensor]:
        read_chunk = reader(heads.Head(weight, bias, head.code, head.skip, head.part))
        wide = torch.promote_types(weight.dtype, torch.float32)
        grads = [
            torch.empty_like(hidden),
            torch.empty_like(moved),
            torch.zeros_like(weight, dtype=wide),
            torch.zeros_like(bias, dtype=wide),
        ]
        loss, logged = torch.zeros((), dtype=torch.float64, device=hidden.device), []
        for part in chunks(len(hidden), head.part.widest, hidden.device):
            some = Read(hidden[part], *(None if x is None else x[part] for x in (read.y, read.level)))
            losses, values, by_z, by_dz = measure(*read_chunk(some, Moved(moved[part])), part)
            loss += losses.double().sum()
            logged.append(values)
            by_z, by_dz = by_z.to(weight.dtype), by_dz.to(weight.dtype)
            grads[0][part], grads[1][part] = by_z @ weight, by_dz @ weight
            grads[2] += by_z.T @ hidden[part] + by_dz.T @ moved[part]
            grads[3] += by_z.sum(0)
        ctx.save_for_backward(*grads[:2], grads[2].to(weight.dtype), grads[3].to(bias.dtype))
        values = torch.cat(logged)
        ctx.mark_non_differentiable(values)
        return loss.to(torch.float32 if hidden.dtype != torch.float64 else torch.float64), values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *(g * gradients[0].to(g.dtype) for g in ctx.saved_tensors), None, None, None


def _by_logits(v: Vocabulary, p: Tensor, dz: Tensor, a: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by z and dz of sum_k p_k a_k + sum_k dp_k e_k, dp = p (dz - <p, dz>), where a and e (n, V) do not move."""
    moving, tilted = deviation(v, p, dz), deviation(v, p, e)
    both = moving * tilted  # dz and e about their means: their covariance is what the second sum is
    by_z = p * (deviation(v, p, a) + deviation(v, p, both))
    return by_z, p * tilted


def lagrangian_residual(
    head: Head, read: Read, moved: Tensor, rate: Tensor, gain: Tensor, base: Tensor, weight: Tensor, reweight: Reweight | None = None
) -> tuple[Tensor, Tensor]:
    """sum_i w_i |r_i|^2 in the state's dimensions, and the unweighted squares (n,): Lagrangian self-distillation (CFM), differentiable in
    hidden and its tangent `moved` (n, d), E and bias.

    r = rate psi C + gain (d_t psi) C + base, of `residual_terms`: rate, gain (n,); base: (n, d_c), without gradient; w is `weight` times
    `reweight(|r|^2)`, detached.
    """
    code = head.code
    assert code is not None

    def measure(z: Tensor, dz: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p = softmax_(head.part, z)
        dp = p * deviation(head.part, p, dz)
        by_mean, by_tangent = (x[part, None].to(p.dtype) for x in (rate, gain))
        r = by_mean * codes.mean(code, p) + by_tangent * codes.mean(code, dp) + base[part].to(p.dtype)
        square = r.square().sum(-1)
        square = square if code.matrix is not None else total(head.part, square)
        w = weight[part].to(p.dtype) * (1.0 if reweight is None else reweight(square))
        along = 2.0 * w[:, None] * r
        along = along if code.matrix is None else along @ code.matrix.T.to(p.dtype)
        return w * square, square, *_by_logits(head.part, p, dz, by_mean * along, by_tangent * along)

    return _MovingLoss.apply(read.hidden, moved, head.weight, head.bias, head, read, measure)


def residual_terms(path: Interpolant, y: Tensor, s: Tensor, t: Tensor, mean: Tensor, at_end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rate, gain, base) of `lagrangian_residual` from states y (n, d_c) at s, times (n,), s < t < 1, psi_{s,t} C and psi_{t,t}(X) C."""
    kept, gained = move(path, s, t)
    fall, lam = velocity_terms(path, t)
    of_state, of_mean = slope(lambda t: move(path, s, t)[0], t), slope(lambda t: move(path, s, t)[1], t)
    x = kept[:, None].to(y) * y + gained[:, None].to(y) * mean
    base = (of_state / lam)[:, None].to(y) * y - (fall / lam)[:, None].to(y) * x - at_end
    return of_mean / lam, gained / lam, base


def endpoint_bound(
    head: Head, read: Read, moved: Tensor, target: Callable[[slice], Tensor], gain: Tensor, weight: Tensor, reweight: Reweight | None = None
) -> tuple[Tensor, Tensor]:
    """sum_i w_i [4 KL(psi_{t,t}(X) || psi_{s,t}) + 2 g^2 |d_t psi_{s,t}|^2], and the terms without weights (n,): the endpoint-consistent
    bound on |r|^2 (CFM), by |a + b|^2 <= 2 |a|^2 + 2 |b|^2 and Pinsker's inequality, of one-hot states, and of frames, in which nothing is
    longer; of embeddings, whose vectors are, it is a loss of the laws alone. Its second term is least where psi does not move, which the
    exact map does: it bounds, and is not consistent. target: psi_{t,t}(X) by chunks, without gradient; gain: g (n,); w is `weight` times
    `reweight` of |psi_{s,t} - target|^2, detached.
    """

    def measure(z: Tensor, dz: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        v = head.part
        log_p, q = log_softmax_(v, z), target(part)
        log_q = q.clamp(min=torch.finfo(q.dtype).tiny).log()
        p = log_p.exp()
        dp = p * deviation(v, p, dz)
        apart, energy = total(v, torch.stack([(q * (log_q - log_p)).sum(-1), dp.square().sum(-1)]))
        w, square = weight[part].to(p.dtype), gain[part].to(p.dtype).square()
        if reweight is not None:
            w = w * reweight(total(v, (p - q).square().sum(-1)))
        by_z, by_dz = _by_logits(v, p, dz, torch.zeros_like(p), (4.0 * w * square)[:, None] * dp)
        by_z = by_z + (4.0 * w)[:, None] * (p - q)
        bound = 4.0 * apart + 2.0 * square * energy
        return w * bound, bound, by_z, by_dz

    return _MovingLoss.apply(read.hidden, moved, head.weight, head.bias, head, read, measure)
