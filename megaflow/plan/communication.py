"""What a process sends in a training step: a closed formula of config and layout, which is what parallel/recorder.py counts.

Sizes are of whole tensors in bytes, of which a ring sends its share (recorder.RINGS). With n tokens and b rows a pass, width d, p bytes a
number of the precision of training, T tensor-parallel processes and the two directions of the trunk's layers

    forward     a block    2 all-gathers, 2 reduce-scatters of n d p                              the end   an all-gather of n d p
    backward    a block    the same; an all-reduce of its modulations' and gains' gradients       the end   a reduce-scatter
                           with parallel.recompute=full, the forward pass's again
    input       belief: a reduce-scatter of n' d_e p, log-sum-exp n T numbers; backward, where tables learn, an all-gather of n' d_e p;
                n' = n (1 + 2 neighbors T / L), since every process needs the neighbours of its positions
                dense state: a reduce-scatter of n d p, backward an all-gather; of a frame, the state itself: an all-reduce of n d_c numbers
    head        log-sum-exp n T numbers, the token's own logit: an all-reduce of n
    targets     of a flow map: forward passes, each with its log-sum-exp, under ZeRO 3 that at s twice, and the mean of a frame, an
                all-reduce of n d_c numbers

Over data-parallel processes go gradients, in fp32 as DeepSpeed is told to, and under ZeRO the weights that they have moved; over all of
them what has been observed: flags, losses of passes, and a flow's losses by its clock's bins, in fp64.
Parts of a flow map's rows are those of the global batch, which a process has on average.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from megaflow.config.check import TIME_TOKENS
from megaflow.config.schema import Config
from megaflow.flow import code as codes
from megaflow.flow import flow_map
from megaflow.flow.objective import measures_error
from megaflow.flow.prior import on_simplex
from megaflow.model.flops import hot_shares, times_of_tokens
from megaflow.model.reading import CONDITION
from megaflow.parallel.recorder import RINGS
from megaflow.plan.layout import Layout, Weight, weights

SINGLE = 4
"""Bytes of a number in fp32: of the channel, of log-sum-exps, and of gradients on their way."""
DOUBLE = 8
"""Bytes of a number in fp64: of what is observed."""
PERSISTENT = 100_000
"""ZeRO 3 leaves parameters of so few elements whole on every process (DeepSpeed's stage3_param_persistence_threshold)."""
REUSED = 1_000_000_000
"""ZeRO 3 keeps what is used again before so many elements have been gathered (stage3_max_reuse_distance)."""


class Send(NamedTuple):
    """Collectives of a step, one kind on one axis. what: trunk, input, head, targets, gradients, weights, muon or observed; size: bytes of
    the whole tensors, summed."""

    what: str
    axis: str
    kind: str
    processes: int
    size: float

    @property
    def bytes(self) -> float:
        """Bytes that a process sends, in a ring."""
        return RINGS[self.kind] * (self.processes - 1) / self.processes * self.size


class Rows(NamedTuple):
    """Of a step's rows of a process: how many there are, and of a flow map how many have s = t, and have s < t with a hot belief, at s
    and at u."""

    all: float
    diagonal: float = 0.0
    hot_at_s: float = 0.0
    hot_at_u: float = 0.0

    @property
    def moving(self) -> float:
        return self.all - self.diagonal


def of_step(
    config: Config, vocab: int, layout: Layout, is_map: bool = False, hot: float = 1.0, held: list[Weight] | None = None
) -> list[Send]:
    """What a process sends in a training step of a resolved config; of a flow map if `is_map`.

    hot: as for flops.of_step. held: `weights`, where the caller has them. Left out are the few numbers of padding and of gradients' norms,
    under a hundred bytes a step.
    """
    held = weights(config, vocab, layout.tensor, is_map) if held is None else held
    sends = _over_tensor(config, layout, is_map, hot) + _over_data(held, layout, _targets(config, layout, is_map))
    sends.append(_observed(config, layout, is_map))
    if layout.muon:
        sends += _muon(held, layout)
    return [send for send in sends if send.processes > 1 and send.size > 0]


def _observed(config: Config, layout: Layout, is_map: bool) -> Send:
    axis = "tensor" if layout.data == 1 else "data" if layout.tensor == 1 else "world"
    of_stage = 8 if is_map else 0 if config.model.family != "flow" else 4 * config.flow.clock.bins
    return Send("observed", axis, "all-reduce", layout.processes, DOUBLE * (3 + of_stage + layout.data * layout.accumulation))


def total(sends: list[Send], axis: str | None = None, kind: str | None = None) -> float:
    """Bytes that a process sends, of an axis and of a kind where they are given."""
    return math.fsum(s.bytes for s in sends if axis in (None, s.axis) and kind in (None, s.kind))


def _of_choices(config: Config, n: float, passes: int, p: int, tensor: int, send: Callable[[str, str, float], None]) -> None:
    """What choices of stage 1 send besides over the tensor axis: squared errors, weights by distance, noise of a simplex, trained codes."""
    flow, model = config.flow, config.model
    dim, dense, trained = int(flow.code_dim), flow.code == "identity", flow.code in codes.TRAINED
    if measures_error(flow.objective, flow.clock.name):
        send("head", "all-reduce", (2 if dense else 2 * dim) * n * SINGLE)
    if share := flow.self_conditioning:  # a pass without gradient, and a reading that is replicated
        longer = 1.0 + (model.registers + (TIME_TOKENS if model.time == "tokens" else 0)) / config.data.length
        through = share * n * model.hidden * p
        send("targets", "all-gather", (2 * model.layers * longer + 1) * through)
        send("targets", "reduce-scatter", (2 * model.layers * longer + int(dense and model.input != "belief")) * through)
        send("targets", "all-gather", share * n * tensor * SINGLE * (1 + (model.input != "linear")))
        send("targets", "all-reduce", (not dense) * share * n * dim * SINGLE)
        beside = (1 + 2 * model.neighbors * tensor / config.data.length) * model.belief_dim
        send("targets", "reduce-scatter", (model.input != "linear") * share * n * beside * p)
        send("input", "all-reduce", (not dense) * passes * dim * model.hidden * SINGLE)
        send("input", "reduce-scatter", dense * n * model.hidden * p)
        send("input", "all-gather", dense * n * model.hidden * p)
    if flow.weighting.startswith("adaptive"):
        send("head", "all-reduce", n * SINGLE)
    if on_simplex(flow.prior) and not dense:
        send("input", "all-reduce", n * dim * SINGLE)
    if trained:  # the state's gradients, and of beliefs the sum over the vocabulary that theirs need
        send("head", "all-reduce", (flow.skip == "on") * n * dim * SINGLE)
        send("input", "all-reduce", (model.input in ("belief", "both")) * n * (dim + 1) * SINGLE)
        send("input", "all-gather", (model.input in ("linear", "both")) * n * dim * p)
    if flow.code == "learned":
        send("input", "all-reduce", passes * dim**2 * (2 * DOUBLE + SINGLE))


def rows_of(config: Config, layout: Layout, is_map: bool, hot: float) -> Rows:
    rows = layout.micro * layout.accumulation
    if not is_map:
        return Rows(rows)
    distill, whole = config.distill, config.train.global_batch
    diagonal, boundary = (count / whole for count in flow_map.counts(whole, distill.diagonal_fraction, distill.boundary_fraction))
    at_s, at_u = hot_shares(hot)
    inner = 1.0 - diagonal - boundary
    return Rows(rows, rows * diagonal, rows * (inner * at_s + boundary), rows * (inner * at_u + boundary * (hot > 0.5)))


def _over_tensor(config: Config, layout: Layout, is_map: bool, hot: float) -> list[Send]:
    """The tensor axis. Sizes go with tokens and rows, but for the gradients of replicated readings, which every pass sums."""
    model, length, d, p = config.model, config.data.length, config.model.hidden, layout.width
    rows = rows_of(config, layout, is_map, hot)
    n, passes = rows.all * length, layout.accumulation
    baseline = model.family != "flow" and not is_map
    embedded = (2 * model.neighbors + 1) * model.belief_dim
    beside = (1 + 2 * model.neighbors * layout.tensor / length) * model.belief_dim  # a process's positions come with their neighbours
    sends: list[Send] = []

    def send(what: str, kind: str, size: float) -> None:
        sends.append(Send(what, "tensor", kind, layout.tensor, size))

    def log_sum(what: str, tokens: float) -> None:
        send(what, "all-gather", tokens * layout.tensor * SINGLE)

    def see(what: str, tokens: float) -> None:
        log_sum(what, tokens)
        send(what, "reduce-scatter", tokens * beside * p)

    gated = (is_map or model.family != "autoregressive") and model.time == "adaptive"
    of_tokens = gated and not baseline and times_of_tokens(config, is_map)
    one = passes * (CONDITION + 1) * d if of_tokens else rows.all * d  # gradients of weights, or of what is made of a row's time
    modulations, last = (6 * one, 2 * one) if gated else (2 * passes * d, passes * d)
    gains = passes * (d + (2 * d // int(model.heads) if model.qk_norm else 0))
    # a block that is computed again stops at the last result that its backward pass needs: of a gated one the last scatter's
    again = (2, 2 if gated else 1) if layout.recompute == "full" else (0, 0)
    extra = 0 if baseline else model.registers + (TIME_TOKENS if model.time == "tokens" else 0)
    longer = 1.0 + extra / length
    send("trunk", "all-gather", ((4 + again[0]) * model.layers * longer + 1) * n * d * p)
    send("trunk", "reduce-scatter", ((4 + again[1]) * model.layers * longer + 1) * n * d * p)
    send("trunk", "all-gather", of_tokens * n * CONDITION * p)  # gradients of what they are told
    send("trunk", "all-gather", rows.all * extra * d * p)  # gradients of what is beside the text
    send("trunk", "all-reduce", (model.layers * (modulations + gains) + last) * SINGLE)
    log_sum("head", n)
    if baseline:
        send("head", "all-reduce", (4 if model.family == "uniform" else 1) * n * SINGLE)
        send("input", "reduce-scatter", n * beside * p)
        send("input", "all-gather", n * beside * p)
        vector = model.belief_dim if model.family != "uniform" else 0  # of a start, or of what is hidden
        send("input", "all-reduce", passes * (embedded * d + vector) * SINGLE)
        return sends

    dim, dense = int(config.flow.code_dim), config.flow.code == "identity"
    belief, linear = model.input in ("belief", "both"), model.input in ("linear", "both")
    ahead = config.distill.state_input if is_map else "none"
    dense_readings = int(dense) * (int(linear) + int(ahead == "linear"))
    # of readings that are replicated, the gradients
    replicated = embedded * (int(belief) + int(ahead == "hot_belief"))
    if not dense:
        replicated += dim * (int(linear) + (2 * model.neighbors + 1) * int(ahead == "linear"))
        send("input", "all-reduce", n * dim * SINGLE)  # the code of the tokens
    send("input", "all-reduce", passes * replicated * d * SINGLE)
    send("input", "reduce-scatter", dense_readings * n * d * p)
    send("input", "all-gather", dense_readings * n * d * p)
    if belief:
        see("input", n)
    if not is_map:
        _of_choices(config, n, passes, p, layout.tensor, send)
        send("head", "all-reduce", n * SINGLE)
        if belief:  # backward: beliefs computed again, and gradients of the table
            log_sum("input", n)
            send("input", "all-gather", n * beside * p)
        return sends

    # a diagonal row's target is a pass of the teacher, which stays in fp32; another's are two of the map
    still, moving, adaptive = rows.diagonal * length, rows.moving * length, config.distill.weighting == "adaptive"
    send("head", "all-reduce", (2 if adaptive else 1) * n * SINGLE)
    through = (still * SINGLE + 2 * moving * p) * d
    send("targets", "all-gather", (2 * model.layers + 1) * through)
    send("targets", "reduce-scatter", 2 * model.layers * through)
    send("targets", "reduce-scatter", (int(dense and linear) * still * SINGLE + 2 * dense_readings * moving * p) * d)
    log_sum("targets", still + (3 if layout.zero == 3 else 2) * moving)
    if not dense:
        send("targets", "all-reduce", moving * dim * SINGLE)
    if belief:
        see("targets", moving)
        if ahead == "hot_belief":
            see("input", rows.hot_at_s * length)
            see("targets", rows.hot_at_u * length)
    return sends


def _targets(config: Config, layout: Layout, is_map: bool) -> int:
    """Passes without gradient beside one with, under ZeRO 3: as many as a flow map's rows with s < t need, of this process or another."""
    return 2 if is_map and rows_of(config, layout, is_map, 0.0).moving > 0.0 else 0


def _over_data(held: list[Weight], layout: Layout, targets: int) -> list[Send]:
    """The data axis: gradients, and under ZeRO the weights. targets: passes of a flow map without gradient, before each of the others."""
    trained = sum(w.numel for w in held if w.trained)

    def send(what: str, kind: str, size: float) -> Send:
        return Send(what, "data", kind, layout.data, size)

    if layout.zero == 0:
        return [send("gradients", "all-reduce", trained * SINGLE)]
    if layout.zero < 3:
        reductions = layout.accumulation if layout.zero == 2 else 1
        return [send("gradients", "reduce", reductions * trained * SINGLE), send("weights", "all-gather", trained * layout.width)]
    small = sum(w.numel for w in held if w.numel <= PERSISTENT)
    gathered = small + layout.accumulation * _gathered(held, targets)
    return [
        send("gradients", "reduce-scatter", layout.accumulation * trained * SINGLE),
        send("weights", "all-gather", gathered * layout.width),
    ]


def _gathered(held: list[Weight], targets: int) -> float:
    """Elements that a forward and a backward pass under ZeRO 3 gather: a weight anew for every use that is too far from the one before.

    What belongs to the network itself, its tables, is held from its first use to its last.
    """
    whole, passed, found = sum(w.numel for w in held), 0, 0
    for weight in held:
        passed += weight.numel
        again = 0
        if "." in weight.name:
            again = targets * (whole >= REUSED) + (2 * (whole - passed) >= REUSED)
        found += weight.numel * (1 + again) * (weight.numel > PERSISTENT)
    return found


def muon_holders(matrices: list[int], layout: Layout) -> list[range]:
    """Of matrices of these sizes the data-parallel processes that hold some of each, and orthogonalise all of it."""
    if layout.data == 1 or layout.zero in (0, 3):
        return [range(layout.data) for _ in matrices]
    slice_ = math.ceil(sum(matrices) / (2 * layout.data)) * 2
    ends = itertools.accumulate(matrices)
    return [range((end - size) // slice_, (end - 1) // slice_ + 1) for size, end in zip(matrices, ends, strict=True)]


def _muon(held: list[Weight], layout: Layout) -> list[Send]:
    """What Muon puts together: over the tensor axis every matrix of which a process has some, over the data axis those that a border
    between two slices cuts. Of the data-parallel process that has most; in the precision of training, in which they are orthogonalised."""
    matrices = [w.numel for w in held if w.matrix]
    holders = muon_holders(matrices, layout)
    split = sum(size for size, some in zip(matrices, holders, strict=True) if len(some) > 1) if layout.zero else 0
    most = max(sum(size for size, some in zip(matrices, holders, strict=True) if rank in some) for rank in range(layout.data))
    return [
        Send("muon", "tensor", "all-gather", layout.tensor, most * layout.tensor * layout.width),
        Send("muon", "data", "all-reduce", layout.data, split * layout.width),
    ]


def megatron_minimum(config: Config, vocab: int, layout: Layout, is_map: bool = False) -> list[Send]:
    """What Megatron-LM sends at least for the same trunk, rows and layout (Shoeybi et al. 2019; Korthikanti et al. 2022).

    Its trunk is the same; tokens come in by a vocabulary-parallel embedding (a reduce-scatter, backward an all-gather of n d p) and go out
    by a vocabulary-parallel cross-entropy: maximum, sum and the token's own logit, an all-reduce of n each. Its forward passes without
    gradient, where a flow map has targets, are trunk and embedding alone. Over data-parallel processes it sums gradients in fp32 once a
    step; with a distributed optimizer (ZeRO 1 and 2) by a reduce-scatter, with weights gathered after; sharded (ZeRO 3) gradients and
    weights go once a pass, weights twice, and once more in every pass without
    gradient. It gathers the inputs of layers a second time in its backward pass, to keep less: not counted.
    """
    model, d, p = config.model, config.model.hidden, layout.width
    rows = rows_of(config, layout, is_map, 0.0)
    n, layers = rows.all * config.data.length, model.layers
    without = rows.diagonal * config.data.length * SINGLE / p + 2 * rows.moving * config.data.length if is_map else 0
    trained = sum(w.numel for w in weights(config, vocab, layout.tensor, is_map) if w.trained)
    passes = layout.accumulation if layout.zero == 3 else 1
    sends = [
        Send("trunk", "tensor", "all-gather", layout.tensor, ((4 * layers + 1) * n + (2 * layers + 1) * without) * d * p),
        Send("trunk", "tensor", "reduce-scatter", layout.tensor, ((4 * layers + 1) * n + 2 * layers * without) * d * p),
        Send("input", "tensor", "all-gather", layout.tensor, n * d * p),
        Send("input", "tensor", "reduce-scatter", layout.tensor, (n + without) * d * p),
        Send("head", "tensor", "all-reduce", layout.tensor, 3 * (n + without) * SINGLE),
    ]
    if layout.zero == 0:
        sends.append(Send("gradients", "data", "all-reduce", layout.data, trained * SINGLE))
    else:
        gathers = (2 + _targets(config, layout, is_map)) * passes if layout.zero == 3 else 1
        sends.append(Send("gradients", "data", "reduce-scatter", layout.data, passes * trained * SINGLE))
        sends.append(Send("weights", "data", "all-gather", layout.data, gathers * trained * p))
    return [send for send in sends if send.processes > 1]
