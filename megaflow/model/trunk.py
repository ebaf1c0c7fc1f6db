"""The trunk: pre-norm transformer blocks with rotary positions and, if asked, query-key normalisation.

With a condition vector, of a row or of every position, every block's norms are shifted, scaled and gated by it (adaptive layer norm, DiT);
without one the norms have learned gains. Flow, flow map and baselines are this same trunk.

Initial values, compared at small scale before they were settled (docs/pretraining.md): gates start open at 1 and the projections back
into the residual stream small, which learns faster in short runs than gates of zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megaflow.model.attention import prepare
from megaflow.parallel.collectives import copied_together, gathered, own
from megaflow.parallel.layers import ColumnParallel, RowParallel
from megaflow.parallel.mesh import ALONE, Axis

RESIDUAL_SCALE = 0.3
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Cache:
    """Keys and values of the positions seen so far, one (B, H, K, d_head) pair a block, and the last positions' embeddings; for
    autoregressive sampling."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    recent: Tensor | None = None
    documents: Tensor | None = None
    """(B, K) which document each position is of, where others' are not seen."""

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if block == len(self.keys):
            self.keys.append(k)
            self.values.append(v)
        else:
            self.keys[block] = torch.cat([self.keys[block], k], 2)
            self.values[block] = torch.cat([self.values[block], v], 2)
        return self.keys[block], self.values[block]


def rotary(places: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, head_dim / 2) of positions (L,) (Su et al. 2021)."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=places.device, dtype=torch.float32) / head_dim)
    angle = places.float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of dimensions of x (B, H, L, d_head) by the angles of their position."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Modulation(nn.Linear):
    """What a condition moves norms by, for a process's own positions: of rows (B, c) to (B, 1, outputs), of those positions (B, L/T, c) to
    (B, L/T, outputs). The gradient of its weights is the whole one everywhere; by `copied` that of rows, which is handed on."""

    def __init__(self, condition: int, outputs: int, axis: Axis) -> None:
        super().__init__(condition, outputs)
        self.axis = axis

    def forward(self, condition: Tensor) -> Tensor:
        if condition.ndim == 2:
            return super().forward(condition)[:, None]
        return F.linear(condition, *copied_together([self.weight, self.bias], self.axis))


def copied_scales(scales: Tensor, condition: Tensor | None, others: list[Tensor], axis: Axis) -> list[Tensor]:
    """`copied_together` of scales, where they are of rows or learned, and of others."""
    if condition is None or condition.ndim == 2:
        return copied_together([scales, *others], axis)
    return [scales, *(copied_together(others, axis) if others else [])]


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the stream and added back to it.

    The stream holds a tensor-parallel process's own positions; attention sees all of them, for the process's own heads.
    """

    def __init__(self, hidden: int, heads: int, mlp_ratio: int, condition: int | None, axis: Axis = ALONE, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim, self.axis = heads // axis.size, hidden // heads, axis
        self.recompute = "off"
        self.qkv = ColumnParallel(hidden, 3 * hidden, axis, bias=False, blocks=3)
        self.out = RowParallel(hidden, hidden, axis, bias=False)
        self.up = ColumnParallel(hidden, mlp_ratio * hidden, axis, bias=True)
        self.down = RowParallel(mlp_ratio * hidden, hidden, axis, bias=True)
        self.query_gain = nn.Parameter(torch.ones(hidden // heads)) if qk_norm else None
        self.key_gain = nn.Parameter(torch.ones(hidden // heads)) if qk_norm else None
        self.modulation = None if condition is None else Modulation(condition, 6 * hidden, axis)
        self.gains = nn.Parameter(torch.ones(2, hidden)) if condition is None else None

    def initialize(self) -> None:
        for layer, spread in ((self.qkv, 1.0), (self.up, 1.0), (self.out, RESIDUAL_SCALE), (self.down, RESIDUAL_SCALE)):
            layer.initialize(spread)
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            with torch.no_grad():  # shift 0, scale 0 (added to 1), gate 1
                self.modulation.bias.copy_(torch.tensor([0.0, 0.0, 1.0]).repeat_interleave(self.out.inputs).repeat(2))

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        cache: Cache | None,
        index: int,
    ) -> Tensor:
        assert self.down.bias is not None
        scales = self.gains if self.modulation is None else self.modulation(condition)
        assert scales is not None
        # these meet this process's positions or heads only
        normalising = [gain for gain in (self.query_gain, self.key_gain) if gain is not None]
        scales, bias, *gains = copied_scales(scales, condition, [self.down.bias, *normalising], self.axis)
        if self.modulation is None:
            x = x + self.attention(self.cheap(normed, x, scales[0]), gains, angles, attend, cache, index)
            return x + self.mlp(self.cheap(normed, x, scales[1]), bias)
        shift1, scale1, gate1, shift2, scale2, gate2 = scales.chunk(6, -1)
        x = torch.addcmul(x, gate1, self.attention(self.cheap(modulated, x, shift1, scale1), gains, angles, attend, cache, index))
        return torch.addcmul(x, gate2, self.mlp(self.cheap(modulated, x, shift2, scale2), bias))

    def attention(
        self,
        x: Tensor,
        gains: list[Tensor],
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        cache: Cache | None,
        index: int,
    ) -> Tensor:
        q, k, v = self.cheap(self.split, self.qkv(x), *angles, *gains)
        if cache is not None:
            k, v = cache.extend(index, k, v)
        out = attend(q, k, v).transpose(1, 2)
        return self.out(out.reshape(*out.shape[:2], -1))

    def split(self, qkv: Tensor, cos: Tensor, sin: Tensor, *gains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H/T, L, d_head), the first two normalised, where there are gains of theirs, and rotated."""
        batch, length, _ = qkv.shape
        q, k, v = qkv.view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if gains:
            q, k = (F.rms_norm(x, x.shape[-1:], gain) for x, gain in zip((q, k), gains, strict=True))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def mlp(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.cheap(self.activated, self.up(x), bias)

    def activated(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.down(F.gelu(x, approximate="tanh"), bias)

    def cheap(self, function: Callable, *arguments: Any) -> Any:
        """function(*arguments), whose results are computed again in the backward pass rather than kept, if `recompute` is selective.

        It stops at the last tensor that is needed: before the product that ends `activated`, and before any collective.
        """
        if self.recompute == "selective" and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class Trunk(nn.Module):
    """layers blocks and a last norm: a process's positions (B, L/T, d) and a condition to all hidden states (B, L, d)."""

    def __init__(
        self,
        layers: int,
        hidden: int,
        heads: int,
        mlp_ratio: int,
        condition: int | None,
        kernel: str,
        axis: Axis = ALONE,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim, self.kernel, self.axis = hidden // heads, kernel, axis
        self.blocks = nn.ModuleList(Block(hidden, heads, mlp_ratio, condition, axis, qk_norm) for _ in range(layers))
        self.last_modulation = None if condition is None else Modulation(condition, 2 * hidden, axis)
        self.last_gain = nn.Parameter(torch.ones(hidden)) if condition is None else None
        self.recompute, self.softcap = "off", 0.0

    def settle(self, recompute: str, compiled: bool) -> None:
        """What the backward pass computes again: 'off' nothing, 'selective' what is elementwise, 'full' every block. compiled: the blocks
        by torch.compile."""
        self.recompute = recompute
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = recompute
            if compiled:
                block.compile(dynamic=False)

    def initialize(self) -> None:
        for block in self.blocks:
            block.initialize()  # type: ignore[operator]  # torch does not type the members of a ModuleList
        if self.last_modulation is not None:
            nn.init.zeros_(self.last_modulation.weight)
            nn.init.zeros_(self.last_modulation.bias)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        causal: bool = False,
        lengths: Tensor | None = None,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """condition: (B, c) of rows, (B, L/T, c) of a process's positions, or None. lengths: (B,) tokens that may be seen in each row, None
        where all are; documents: (B, L) which document each position is of, where others' are not to be seen. With a cache, x holds the
        positions after it.

        extra: (B, R, d) tokens without a place in the text, the same on every process, which all positions see (registers; without
        causality and documents). They are cut like the text, every process has its own before its positions, and come out no more.
        Beside positions with conditions of their own theirs is zero.
        """
        start, length = 0 if cache is None else cache.length, x.shape[1] * self.axis.size
        places = torch.arange(start, start + length, device=x.device)
        keys = None if lengths is None else torch.arange(length, device=x.device) < lengths[:, None]
        if extra is not None:
            x = torch.cat([own(extra.to(x.dtype), self.axis, 1), x], 1)
            if condition is not None and condition.ndim == 3:
                condition = F.pad(condition, (0, 0, x.shape[1] - condition.shape[1], 0))
            places = self.beside(places, extra.shape[1], 0)
            keys = None if keys is None else self.beside(keys, extra.shape[1], True)
            length += extra.shape[1]
        angles = rotary(places, self.head_dim)
        attend = prepare(self.kernel, x, self.head_dim, causal, keys, documents, self.softcap, start, length)
        whole_again = self.recompute == "full" and torch.is_grad_enabled() and cache is None
        for index, block in enumerate(self.blocks):
            if whole_again:
                again = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
                x = again(x, condition, angles, attend, cache, index)
            else:
                x = block(x, condition, angles, attend, cache, index)
        if extra is not None:
            x = x[:, extra.shape[1] // self.axis.size :]
            condition = condition[:, -x.shape[1] :] if condition is not None and condition.ndim == 3 else condition
        last = self.last_gain if self.last_modulation is None else self.last_modulation(condition)
        assert last is not None
        (scales,) = copied_scales(last, condition, [], self.axis)
        if self.last_modulation is None:
            return gathered(normed(x, scales), self.axis, 1)
        return gathered(modulated(x, *scales.chunk(2, -1)), self.axis, 1)

    def beside(self, of_text: Tensor, count: int, value: Any) -> Tensor:
        """Something of every position (…, L), with a value for `count` extra ones, in the order in which processes have them."""
        parts = of_text.unflatten(-1, (self.axis.size, -1))
        return F.pad(parts, (count // self.axis.size, 0), value=value).flatten(-2)
