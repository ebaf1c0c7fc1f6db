"""Model FLOPs of a training step, per token: a closed formula of the config.

As in PaLM (Chowdhery et al. 2022, appendix B): products of matrices alone, a multiplication and an addition each, forward and backward,
every position seen by every other, causal or not; what is computed twice to save memory counts once, and is told apart as `recomputed`.
Both together are what PyTorch's FlopCounterMode counts of model.attention=plain, once it is told what addmm_ is. With

    N = layers (4 + 2 mlp_ratio) d^2        weights of the blocks
    A = 2 layers L d                        scores and values of attention
    M = c (6 layers + 2) d / L              modulation by the condition, c wide; once a row, as are
    T = (f + c) c / L                       its layers on f features of time
    W = (2 neighbors + 1) d_e d             input layer on beliefs, or on tokens
    S = d_c d                               input layer on the state, where it is read
    B = V d_e                               beliefs times their table
    Q = V (d_c + 2)                         a frame's products with the state, for a belief or for the skip; 0 for the one-hot state
    H = V d                                 head

the multiplications of a token are (layers that read what nothing is learned in have half a backward pass; V is the head's bias)

    baseline          forward N + A + W + H                           backward 2 (N + A + W + H) + V
    flow              forward N + A + M + T + W + S + B + 2 Q + H     backward 2 (N + A + M + W + H) + V + S + B + (f + 2 c) c / L

A baseline of discrete diffusion that is told the time has M and T besides; that of uniform noise V forward, in its loss.

Where tokens have times of their own, or some are given, M and T are of every token, and of what is beside the text.

A flow map has two time embeddings, reads W or S once more ahead, and has a frozen table, in joint training a trained one. Of its
targets, a diagonal row's takes a forward pass of the teacher, towards the data none; another's two of the map, on one set of beliefs
more and with the product V d_c of a frame's mean between them (of fmlm_mse one more for the target, and two for the loss; under ZeRO 3
the posteriors at s, H + Q, are computed a second time). Hot beliefs, B + Q each, are of rows with s < t, at s and at u, where the
channel is not as sharp itself: before the place h on the clock. Of the inner rows' draws (flow_map.draw_times) that is

    P(s < h) = h (1 - log h)        P(u < h) = h + (1/2 - h) log |1 - 2 h|
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from megaflow.config.check import TIME_TOKENS, is_map
from megaflow.config.schema import Config
from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import flow_map
from megaflow.flow.clock import Clock
from megaflow.flow.code import Code
from megaflow.flow.interpolant import Interpolant, time_of_strength
from megaflow.flow.laws import needs_error
from megaflow.flow.objective import measures_error
from megaflow.flow.weighting import learns
from megaflow.model.reading import CONDITION, FREQUENCIES
from megaflow.model.text_dit import HOT_GAIN


def uncounted(config: Config) -> str:
    """The choice whose passes the formula does not know, 'key=value'; empty where it knows all."""
    distill, flow = config.distill, config.flow
    on_data = distill.anchor == "data"
    unknown = {
        f"distill.objective={distill.objective}": distill.objective not in ("psd", "fmlm_mse"),
        f"distill.weighting={distill.weighting}": distill.weighting.startswith("learned"),
        "distill.surgery=true": distill.surgery,
        f"distill.between={distill.between}": distill.between != "middle" and distill.state_input == "hot_belief",
        f"distill.times={distill.times}": distill.times != "gap" and distill.state_input == "hot_belief",
        f"flow.objective={flow.objective}": on_data and measures_error(flow.objective, "uniform"),
        f"flow.weighting={flow.weighting}": on_data and learns(flow.weighting),
        f"flow.clock.name={flow.clock.name}": on_data and needs_error(flow.clock.name),
    }
    return next((name for name, is_unknown in unknown.items() if is_unknown and is_map(config)), "")


class Flops(NamedTuple):
    """FLOPs per token. targets: of the passes without gradient that stage 2 takes its targets from; recomputed: what is computed again
    rather than kept, which is no part of `model`."""

    forward: float
    backward: float
    targets: float
    recomputed: float

    @property
    def model(self) -> float:
        return self.forward + self.backward + self.targets


def hot_until(path: Interpolant, clock: Clock, code: Code) -> float:
    """The place h on the clock where the channel is as sharp as the one that hot beliefs are read with."""
    time = time_of_strength(path, HOT_GAIN / math.sqrt(code.mean_leverage))
    return clocks.forward(clock, torch.tensor(time, dtype=torch.float64)).item()


def hot_shares(hot: float) -> tuple[float, float]:
    """P(s < h) and P(u < h) of inner rows."""
    at_s = hot - hot * math.log(hot) if hot > 0.0 else 0.0
    return at_s, hot + (0.5 - hot) * math.log(abs(1.0 - 2.0 * hot)) if hot != 0.5 else 0.5


def times_of_tokens(config: Config, is_map: bool) -> bool:
    """Whether a network is told a time for every token: of stage 1 if it is asked to, or where some are given."""
    return config.flow.context.share > 0.0 or config.flow.times == "tokens" and not is_map


def _of_choices(config: Config, vocab: int) -> Iterator[tuple[float, float]]:
    """Products of (forward, backward) passes a token that choices of stage 1 have besides: squared errors, weights and codes that are
    trained. Of a learned code's, taken once a pass, a process is thought to hold train.micro_batch rows."""
    flow, model, length = config.flow, config.model, config.data.length
    dim, framed = int(flow.code_dim), flow.code != "identity"
    errors = measures_error(flow.objective, flow.clock.name)
    belief, linear = model.input in ("belief", "both"), model.input in ("linear", "both")
    if flow.self_conditioning:
        yield dim * model.hidden, dim * model.hidden
    if errors:
        yield (vocab * dim, vocab * dim) if framed else (vocab, 0)
    if learns(flow.weighting):
        rows = 1 if flow.times == "tokens" else length
        yield (2 * FREQUENCIES * CONDITION + CONDITION**2 + CONDITION) / rows, CONDITION / rows
    if flow.code not in codes.TRAINED:
        return
    by_channel = 2 * vocab * dim + vocab
    yield 0, (flow.skip == "on") * by_channel + belief * (by_channel + vocab * (model.belief_dim + 1)) + errors * vocab * dim
    yield 0, linear * dim * model.hidden
    if flow.code == "learned":
        once = vocab * dim**2 / (min(config.train.micro_batch, config.train.global_batch) * length)
        inverse = 2 * once * dim / vocab  # of the Gram matrix, backward
        yield 3 * once + (1 + linear) * dim**2, 5 * once + inverse + (1 + 2 * linear) * dim**2


def of_step(config: Config, vocab: int, is_map: bool = False, hot: float = 1.0) -> Flops:
    """A training step on tokens in rows of data.length; of a flow map if `is_map`. The config must be resolved.

    Rows that are shorter, and documents that do not see each other, count as if they filled their rows and did. hot: `hot_until` of a
    map's clock and code; without it every row with s < t counts with a hot belief.
    """
    model, length, d = config.model, config.data.length, config.model.hidden
    window = 2 * model.neighbors + 1
    extra = model.registers + (TIME_TOKENS if model.time == "tokens" else 0) if model.family == "flow" or is_map else 0
    longer = 1.0 + extra / length
    blocks = longer * model.layers * (4 + 2 * model.mlp_ratio) * d**2
    attention = longer * 2 * model.layers * (length + extra) * d
    embedded, head = window * model.belief_dim * d, vocab * d
    if model.family != "flow" and not is_map:
        products = blocks + attention + embedded + head
        timed = float(model.family != "autoregressive" and model.time == "adaptive") * CONDITION / length
        products += timed * ((6 * model.layers + 2) * d + CONDITION)
        features, along = timed * 2 * FREQUENCIES, vocab if model.family == "uniform" else 0
        return Flops(2.0 * (products + features + along), 4.0 * products + 2.0 * (features + vocab), 0.0, 0.0)

    dim, framed = config.flow.code_dim, config.flow.code != "identity"
    belief = model.input in ("belief", "both")
    linear = dim * d if model.input in ("linear", "both") else 0
    evidence = vocab * (dim + 2) if framed else 0
    see = evidence + vocab * model.belief_dim if belief else 0
    embedded = embedded if belief else 0
    skip = evidence if config.flow.skip == "on" else 0
    timed = model.time != "none"
    wide = 6 * model.layers + 2 if model.time == "adaptive" else TIME_TOKENS if model.time == "tokens" else 0
    per = 1 if times_of_tokens(config, is_map) else length  # tokens of a time
    modulation = CONDITION * (wide + (longer - 1.0) * 6 * model.layers * (per == 1)) * d / per
    features, deep = timed * 2 * FREQUENCIES * CONDITION / per, timed * CONDITION**2 / per

    trained = blocks + attention + modulation + head
    once = trained + features + deep + embedded + linear + skip  # a pass of a flow on beliefs that are there
    if not is_map:
        forward = once + see
        backward = 2 * (trained + deep + embedded) + vocab + features + linear + (see - evidence if belief else 0)
        for more in _of_choices(config, vocab):
            forward, backward = forward + more[0], backward + more[1]
        first = config.flow.self_conditioning * (once + see + (vocab * dim if framed else 0))  # a pass of a share of the rows
        return Flops(2.0 * forward, 2.0 * backward, 2.0 * first, 2.0 * evidence if belief else 0.0)

    distill, rows = config.distill, config.train.global_batch
    ahead = {"hot_belief": window * model.belief_dim * d, "linear": window * dim * d, "none": 0}[distill.state_input]
    of_map = once + features + deep + ahead
    diagonal, boundary = (count / rows for count in flow_map.counts(rows, distill.diagonal_fraction, distill.boundary_fraction))
    moving, inner = 1.0 - diagonal, 1.0 - diagonal - boundary
    before = hot_shares(hot)
    at_s, at_u = inner * before[0] + boundary, inner * before[1] + boundary * (hot > 0.5)
    see_hot = see if distill.state_input == "hot_belief" else 0
    forward = of_map + see + at_s * see_hot
    backward = 2 * (trained + 2 * deep) + vocab + 2 * features + embedded + linear + ahead
    targets = moving * (2 * of_map + see + (vocab * dim if framed else 0)) + at_u * see_hot
    if distill.anchor != "data":
        targets += diagonal * once
    again = moving * (head + skip) if config.parallel.zero == 3 else 0.0
    if distill.objective == "fmlm_mse" and framed:  # means of the target and of psi, and the latter's gradient
        forward, backward, targets = forward + moving * vocab * dim, backward + moving * vocab * dim, targets + moving * vocab * dim
    if config.train.joint and belief:  # the table learns, of hot beliefs too; beliefs are computed again from the state
        learned = 1.0 + (at_s if see_hot else 0.0)
        backward += embedded + (ahead if distill.state_input == "hot_belief" else 0) + learned * (see - evidence)
        again += learned * evidence
    return Flops(2.0 * forward, 2.0 * backward, 2.0 * targets, 2.0 * again)
