"""Text-DiT: the flow network. It reads beliefs and writes beliefs.

    state y (B, L, d_c) -> belief embedding (+ a linear reading of y) -> trunk, conditioned on (s, t) -> hidden (B, L, d) -> head

The condition is a fixed bounded function of the real times: log-SNR, clipped to the range of the bound and scaled to [0, 1], ends
included; never a clock that is being refitted. A flow map adds an embedding of t whose last layer starts at zero, so that it starts
as its teacher's denoiser at s. The table that beliefs are embedded by stays its teacher's: what a state says is seen once, for the
teacher and for every end t.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.flow import code as codes
from megaflow.flow import interpolant
from megaflow.flow.channel import belief_embedding
from megaflow.flow.code import Code
from megaflow.flow.head import Head, Read, expectation
from megaflow.flow.interpolant import Interpolant, along
from megaflow.flow.likelihood import Range
from megaflow.flow.prior import Moments
from megaflow.flow.vocabulary import shared
from megaflow.model.reading import CONDITION, LossWeight, Reading, TimeEmbedding, real, windows
from megaflow.model.trunk import Trunk
from megaflow.parallel.collectives import own, scattered_with_neighbors
from megaflow.parallel.cut import draw, padded, parameter
from megaflow.parallel.mesh import ALONE, Axis

AUXILIARY = "auxiliary."
"""Names of weights that a map has in training alone: of the denoiser that tells its texts from its teacher's (train/map_objective.py)."""
HOT_GAIN = 3.0
HEAD_STD = 0.1
"""Spread of an initial logit: the first loss is the channel's own, and every row of the head has a direction."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a network: what its weights depend on. vocab_multiple: every process holds a multiple of so many entries, with padding;
    timed: norms are moved by the time; time_tokens, registers: tokens beside the text, those that tell the time and those that tell
    nothing; tied: the head's weights are the table too, which then has their width."""

    vocab: int
    layers: int
    hidden: int
    heads: int
    mlp_ratio: int
    belief_dim: int
    neighbors: int = 0
    vocab_multiple: int = 1
    timed: bool = True
    time_tokens: int = 0
    registers: int = 0
    qk_norm: bool = True
    tied: bool = False

    @property
    def window(self) -> int:
        """Positions whose embeddings enter one position of the trunk."""
        return 2 * self.neighbors + 1


@dataclass(frozen=True)
class Seen:
    """What a state says, embedded by the table: the part of reading it that costs a pass over the vocabulary.

    belief: (B, L/T + 2 neighbors, d_e), of this process's positions and their neighbours, None where no beliefs are read; hot: the same of
    a flow map's hot belief, None where it reads none.
    """

    belief: Tensor | None
    hot: Tensor | None

    def __getitem__(self, rows: slice | Tensor) -> "Seen":
        return Seen(None if self.belief is None else self.belief[rows], None if self.hot is None else self.hot[rows])


class TextDiT(nn.Module):
    """code, log_prior (V,), span and path are fixed parts of the flow, kept in fp32 beside the weights; of a cut vocabulary, its part.

    reads: which of 'belief' and 'linear' (a linear reading of y) enter the trunk; map_reads: None for a plain flow, else what a flow map
    reads besides, times the share of psi in its step and therefore silent on the diagonal: 'linear', 'hot_belief' (where beliefs are
    read) or 'none'. A flow map's table gets no gradient, unless `joint`: then there is no teacher, and all is trained together.

    recalls: whether it reads what an earlier pass has said of the text (self-conditioning, Chen et al. 2023).
    map_weights: of how many times, s or s and t, weights of a map's losses are learned; 0: of none.
    trained_code: 'learned' or 'embedding' where C is made of weights of the network's own, anew at every `refresh`.
    """

    def __init__(
        self,
        shape: Shape,
        code: Code,
        log_prior: Tensor,
        span: Range,
        path: Interpolant,
        skip: bool,
        reads: tuple[str, ...],
        map_reads: str | None,
        kernel: str,
        axis: Axis = ALONE,
        uncertain: bool = False,
        moments: Moments | None = None,
        trained_code: str | None = None,
        recalls: bool = False,
        joint: bool = False,
        map_weights: int = 0,
    ) -> None:
        super().__init__()
        self.auxiliary: TextDiT | None = None
        self.moments = Moments(float(code.dim), 0.0) if moments is None else moments
        self.code, self.log_prior, self.span, self.path, self.skip = code, log_prior, span, path, skip
        self.reads, self.map_reads, self.neighbors, self.axis = reads, map_reads, shape.neighbors, axis
        rows = padded(0, shape.vocab, axis, shape.vocab_multiple)
        dense = code.matrix is None
        self.table = self.widen = None
        self.table_scale = math.sqrt(shape.hidden) / HEAD_STD if shape.tied else 1.0
        if "belief" in reads:
            stays = map_reads is not None and not joint
            if not shape.tied or stays:  # a map's table stays, and its head does not
                self.table = parameter((shape.vocab, shape.belief_dim), rows).requires_grad_(not stays)
            self.widen = Reading(shape.window, shape.belief_dim, shape.hidden, axis, None)
        multiple = shape.vocab_multiple if dense else None
        self.trained_code = trained_code
        self.code_weight = None if trained_code is None else parameter((shape.vocab, code.dim), rows)
        self.state = Reading(1, code.dim, shape.hidden, axis, multiple) if "linear" in reads else None
        self.recall = Reading(1, code.dim, shape.hidden, axis, multiple) if recalls else None
        self.map_state = Reading(shape.window, code.dim, shape.hidden, axis, multiple) if map_reads == "linear" else None
        self.map_widen = Reading(shape.window, shape.belief_dim, shape.hidden, axis, None) if map_reads == "hot_belief" else None
        self.time = TimeEmbedding(path, span) if shape.timed or shape.time_tokens else None
        self.time_tokens = nn.Linear(CONDITION, shape.time_tokens * shape.hidden) if shape.time_tokens else None
        self.registers = nn.Parameter(torch.empty(shape.registers, shape.hidden)) if shape.registers else None
        self.timed = shape.timed
        self.map_time = TimeEmbedding(path, span) if map_reads is not None else None
        self.uncertainty = nn.Linear(CONDITION, 1) if uncertain else None
        self.map_weights = LossWeight(map_weights) if map_weights else None
        self.trunk = Trunk(
            shape.layers, shape.hidden, shape.heads, shape.mlp_ratio, CONDITION if shape.timed else None, kernel, axis, shape.qk_norm
        )
        self.weight = parameter((shape.vocab, shape.hidden), rows)
        self.bias = parameter((shape.vocab,), rows)

    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator."""
        if self.table is not None:
            draw(self.table, 1.0 / self.table_scale)
        if self.widen is not None:
            draw(self.widen.weight, (self.widen.weight.shape[1] / self.widen.window) ** -0.5)
        if self.code_weight is not None and self.code.matrix is not None:
            with torch.no_grad():
                real(self.code_weight, self.code.part).copy_(self.code.matrix)
        if self.state is not None:
            draw(self.state.weight, self.code.dim**-0.5)
        if self.time is not None:
            self.time.initialize(zero=False)
        if self.time_tokens is not None:
            nn.init.normal_(self.time_tokens.weight, std=CONDITION**-0.5)
            nn.init.zeros_(self.time_tokens.bias)
        if self.registers is not None:
            nn.init.normal_(self.registers)
        self.trunk.initialize()
        self.initialize_map()
        draw(self.weight, HEAD_STD * self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)
        if self.skip or self.reads != ("linear",):
            with torch.no_grad():
                real(self.bias, self.code.part).copy_(self.log_prior)

    def initialize_map(self) -> None:
        """What is to change nothing at first: the parts that only a flow map has, which then is its teacher's denoiser at s, the weights of
        losses, and the reading of what an earlier pass has said."""
        if self.recall is not None:
            nn.init.zeros_(self.recall.weight)
        if self.uncertainty is not None:
            nn.init.zeros_(self.uncertainty.weight)
            nn.init.zeros_(self.uncertainty.bias)
        if self.map_time is not None:
            self.map_time.initialize(zero=True)
        if self.map_weights is not None:
            self.map_weights.initialize()
        if self.map_state is not None:
            nn.init.zeros_(self.map_state.weight)
        if self.map_widen is not None:
            nn.init.zeros_(self.map_widen.weight)

    def refresh(self) -> Code:
        """The code as the weights have it now, with gradient; the network reads and writes by it until the next call."""
        if self.code_weight is not None and self.trained_code is not None:
            self.code = codes.TRAINED[self.trained_code](real(self.code_weight, self.code.part), self.code.vocab, self.code.part)
        return self.code

    @property
    def embeds(self) -> list[Tensor]:
        """The trained table by which beliefs are embedded before the network is called, in joint training: once for all its passes."""
        table = self.weight if self.table is None else self.table
        return [table] if self.map_reads is not None and self.widen is not None and table.requires_grad else []

    def head(self) -> Head:
        part = self.code.part
        return Head(real(self.weight, part), real(self.bias, part), self.code, self.skip, part)

    def uncertainty_at(self, s: Tensor) -> Tensor:
        """w of the weight exp(-w) of a loss at times s, of rows or tokens (flow/weighting.py, learned); it says nothing of the network's
        own scores, which have no gradient by it."""
        assert self.uncertainty is not None and self.time is not None
        with torch.no_grad():
            condition = F.silu(self.time(s))
        return self.uncertainty(condition)[..., 0]

    def ease(self, s: Tensor, t: Tensor) -> Tensor:
        """The same of a map's losses, from s to t, (B,); w is learned of s alone where it has one time."""
        assert self.map_weights is not None and self.time is not None
        with torch.no_grad():
            embedded = [F.silu(self.time(x)) for x in (s, t)[: self.map_weights.first.in_features // CONDITION]]
        return self.map_weights(*embedded).float()

    def read(self, hidden: Tensor, y: Tensor, s: Tensor) -> Read:
        """Flat tokens for the head: hidden (B, L, d), state y (B, L, d_c) and its time s, (B,) or (B, L)."""
        y = shared(self.code.part, y) if self.code.trained and self.skip else y
        return Read(hidden.flatten(0, 1), y.flatten(0, 1), self.level(s, y))

    def level(self, s: Tensor, y: Tensor) -> Tensor:
        """What the channel is read by at times of rows (B,) or tokens (B, L): (B L, 2) of tokens, in the state's precision."""
        return of_tokens(interpolant.level(self.path, s).to(y.dtype), y)

    def forward(
        self,
        y: Tensor,
        s: Tensor,
        t: Tensor | None = None,
        lengths: Tensor | None = None,
        seen: Seen | None = None,
        documents: Tensor | None = None,
        said: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, d) of psi_{s,t} at y (B, L, d_c). s, t: real times, fp64, of rows (B,) or of tokens (B, L), where a given
        one has the time 1; t = None is the diagonal.

        lengths: (B,) positions of each row that there are; documents: (B, L) which document each is of, where others' are not seen.
        `seen` is `see(y, s, t)` where the caller has it already, for this end t or any other after s; said: (B, L, d_c) the mean psi C of
        an earlier pass, zero or None where there was none, of a network that recalls.
        """
        seen = self.see(y, s, t) if seen is None else seen
        entering: list[Tensor] = []
        if self.widen is not None:
            entering.append(self.widen(self.beside(seen.belief, self.widen, lengths, documents)))
        if self.state is not None:
            entering.append(self.state(self.around(self.sized(y, s), self.state, lengths, documents)))
        if self.recall is not None and said is not None:
            size = math.sqrt(self.code.dim / self.code.mean_leverage)
            entering.append(self.recall(self.around(said * size, self.recall, lengths, documents)))
        condition = None if self.time is None else self.time(s)
        if condition is not None and self.map_time is not None:
            condition = condition + self.map_time(s if t is None else t)
        if t is not None and self.map_reads not in (None, "none"):
            if self.map_state is not None:
                ahead = self.map_state(self.around(self.sized(y, s), self.map_state, lengths, documents))
            else:
                assert self.map_widen is not None
                ahead = self.map_widen(self.beside(seen.hot, self.map_widen, lengths, documents))
            _, share = interpolant.move(self.path, s, t)
            share = share if s.ndim == 1 else own(share, self.axis, 1)
            entering.append(along(share, ahead) * ahead)
        told = None if condition is None else F.silu(condition)
        x, extra = sum(entering[1:], entering[0]), self.extra(told, len(y))
        moving = None if told is None or not self.timed else told if s.ndim == 1 else own(told, self.axis, 1)
        return self.trunk(x, moving, lengths=lengths, documents=documents, extra=extra)

    def settled(
        self, y: Tensor, s: Tensor, lengths: Tensor | None = None, documents: Tensor | None = None, seen: Seen | None = None
    ) -> Tensor:
        """Hidden states of the denoiser psi_{s,s}: of a network that recalls by two passes over the same state, the second told what the
        first has said, without gradient. That is a function of the state alone, and has a bound (flow/likelihood.py)."""
        if self.recall is None:
            return self(y, s, lengths=lengths, seen=seen, documents=documents)
        with torch.no_grad():
            first = self(y, s, lengths=lengths, seen=seen, documents=documents)
            said = expectation(self.head(), self.read(first, y, s)).view(y.shape)
        return self(y, s, lengths=lengths, seen=seen, documents=documents, said=said)

    def extra(self, told: Tensor | None, rows: int) -> Tensor | None:
        """Tokens beside the text (B, R, d): those of the time, which is one of rows, then registers; None where there are none."""
        found = []
        if self.time_tokens is not None:
            found.append(self.time_tokens(told).unflatten(1, (-1, self.weight.shape[1])))
        if self.registers is not None:
            found.append(self.registers.expand(rows, -1, -1))
        return torch.cat([x.to(self.weight.dtype) for x in found], 1) if found else None

    def see(self, y: Tensor, s: Tensor, t: Tensor | None = None) -> Seen:
        """What states y (B, L, d_c) at times s, (B,) or (B, L), say; with ends t, also what a flow map reads besides where s < t.

        The hot belief is the posterior of a channel read as if it were sharper, c at least HOT_GAIN over the code's mean norm. Where c is
        that large the two are the same, and cost nothing; nor does the hot belief of a row that stays, which does not enter.
        """
        if self.widen is None:
            return Seen(None, None)
        belief = self.embed_belief(y, self.level(s, y))
        if t is None or self.map_widen is None:
            return Seen(belief, None)
        gain = HOT_GAIN / math.sqrt(self.code.mean_leverage)
        level = interpolant.level(self.path, s)
        blunt = (t > s) & (level[..., 0] < gain)
        sharper = torch.where(blunt[..., None], torch.stack([torch.full_like(s, gain), gain * self.path.beta(s)], -1), level)
        rows = blunt if s.ndim == 1 else blunt.any(1)
        hot, some = belief.clone(), y[rows]
        hot[rows] = self.embed_belief(some, of_tokens(sharper[rows].to(y.dtype), some))
        return Seen(belief, hot)

    def embed_belief(self, y: Tensor, level: Tensor) -> Tensor:
        """belief @ table, (B, L/T + 2 neighbors, d_e), of a channel of this level (B L, 2)."""
        table = self.weight if self.table is None else self.table
        y = shared(self.code.part, y) if self.code.trained else y
        share = belief_embedding(self.code, self.log_prior, y.flatten(0, 1), level, real(table, self.code.part))
        share = share if self.table_scale == 1.0 else share * self.table_scale
        return scattered_with_neighbors(share.view(*y.shape[:2], share.shape[-1]), self.axis, self.neighbors, self.neighbors)

    def beside(self, x: Tensor | None, layer: "Reading", lengths: Tensor | None, documents: Tensor | None) -> Tensor:
        """Every position of this process beside its neighbours: (B, L/T + 2 neighbors, d) to (B, L/T, window d), in the precision of the
        layer that reads it."""
        assert x is not None
        first = self.axis.rank * (x.shape[1] - 2 * self.neighbors)
        return windows(x.to(layer.weight.dtype), self.neighbors, self.neighbors, first, lengths, documents)

    def around(self, x: Tensor, layer: "Reading", lengths: Tensor | None, documents: Tensor | None) -> Tensor:
        """The same of a state (B, L, d) that every process has, or has columns of, in the precision of the layer that reads it, and as
        many neighbours as it reads: of this process's positions, or of all where inputs are cut."""
        count = self.neighbors if layer.window > 1 else 0
        beside = windows(F.pad(x.to(layer.weight.dtype), (0, 0, count, count)), count, count, 0, lengths, documents)
        return beside if layer.cut is not None else own(beside, self.axis, 1)

    def sized(self, y: Tensor, s: Tensor) -> Tensor:
        """A state (B, L, d_c) as linear readings take it: at size one, and that of a learned code in its weights' coordinates."""
        y = y * self.state_scale(s)
        return y if self.code.mixing is None else y @ self.code.mixing

    def state_scale(self, s: Tensor) -> Tensor:
        """One over the rms of y at time s, where E |y|^2 = beta^2 mean leverage + alpha^2 E |n|^2 + 2 alpha beta E n . E x."""
        alpha, beta = self.path.alpha(s), self.path.beta(s)
        square = beta**2 * self.code.mean_leverage + alpha**2 * self.moments.square + 2.0 * alpha * beta * self.moments.overlap
        scale = (square / self.code.dim).rsqrt().to(self.code.leverage.dtype)
        return scale.reshape(scale.shape + (1,) * (3 - scale.ndim))


def of_tokens(level: Tensor, y: Tensor) -> Tensor:
    """(B L, 2) of tokens from (B, 2) of rows or (B, L, 2)."""
    level = level if level.ndim == 3 else level[:, None].expand(*y.shape[:2], 2)
    return level.flatten(0, 1)


@contextmanager
def differentiable(network: TextDiT) -> Iterator[None]:
    """While the block runs the network's attention has forward-mode derivatives, which fused kernels have none of."""
    kernel, network.trunk.kernel = network.trunk.kernel, "plain"
    try:
        yield
    finally:
        network.trunk.kernel = kernel
