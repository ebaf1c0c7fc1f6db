"""The trunk: pre-norm transformer blocks with rotary positions and query-key normalisation.

With a condition vector every block's norms are shifted, scaled and gated by it (adaptive layer norm, DiT); without one the norms
have learned gains. Flow, flow map and baselines are this same trunk.

Initial values, compared at small scale before they were settled (docs/pretraining.md): gates start open at 1 and the projections back
into the residual stream small, which learns faster in short runs than gates of zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.model.attention import prepare
from megaflow.parallel.collectives import copied_together, gathered
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


def rotary(start: int, length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_dim / 2) of positions start, start + 1, … (Su et al. 2021)."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of dimensions of x (B, H, L, d_head) by the angles of their position."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the stream and added back to it.

    The stream holds a tensor-parallel process's own positions; attention sees all of them, for the process's own heads.
    """

    def __init__(self, hidden: int, heads: int, mlp_ratio: int, condition: int | None, axis: Axis = ALONE) -> None:
        super().__init__()
        self.heads, self.head_dim, self.axis = heads // axis.size, hidden // heads, axis
        self.qkv = ColumnParallel(hidden, 3 * hidden, axis, bias=False, blocks=3)
        self.out = RowParallel(hidden, hidden, axis, bias=False)
        self.up = ColumnParallel(hidden, mlp_ratio * hidden, axis, bias=True)
        self.down = RowParallel(mlp_ratio * hidden, hidden, axis, bias=True)
        self.query_gain = nn.Parameter(torch.ones(hidden // heads))
        self.key_gain = nn.Parameter(torch.ones(hidden // heads))
        if condition is None:
            self.modulation = None
            self.gains = nn.Parameter(torch.ones(2, hidden))
        else:
            self.modulation = nn.Linear(condition, 6 * hidden)

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
        shape = x.shape[-1:]
        assert self.down.bias is not None
        scales = self.gains if self.modulation is None else self.modulation(condition)
        # these meet this process's positions or heads only
        scales, bias, *gains = copied_together([scales, self.down.bias, self.query_gain, self.key_gain], self.axis)
        seen = (angles, attend, cache, index)
        if self.modulation is None:
            x = x + self.attention(F.layer_norm(x, shape, scales[0]), gains, *seen)
            return x + self.mlp(F.layer_norm(x, shape, scales[1]), bias)
        shift1, scale1, gate1, shift2, scale2, gate2 = scales[:, None].chunk(6, -1)
        x = torch.addcmul(x, gate1, self.attention(torch.addcmul(shift1, F.layer_norm(x, shape), 1 + scale1), gains, *seen))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, F.layer_norm(x, shape), 1 + scale2), bias))

    def attention(
        self,
        x: Tensor,
        gains: list[Tensor],
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        cache: Cache | None,
        index: int,
    ) -> Tensor:
        qkv = self.qkv(x)
        batch, length, _ = qkv.shape
        q, k, v = qkv.view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q = rotate(F.rms_norm(q, q.shape[-1:], gains[0]), *angles)
        k = rotate(F.rms_norm(k, k.shape[-1:], gains[1]), *angles)
        if cache is not None:
            k, v = cache.extend(index, k, v)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(batch, length, -1))

    def mlp(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"), bias)


class Trunk(nn.Module):
    """layers blocks and a last norm: a process's positions (B, L/T, d) and a condition (B, c) or None to all hidden states (B, L, d)."""

    def __init__(
        self, layers: int, hidden: int, heads: int, mlp_ratio: int, condition: int | None, kernel: str, axis: Axis = ALONE
    ) -> None:
        super().__init__()
        self.head_dim, self.kernel, self.axis = hidden // heads, kernel, axis
        self.blocks = nn.ModuleList(Block(hidden, heads, mlp_ratio, condition, axis) for _ in range(layers))
        self.last_modulation = None if condition is None else nn.Linear(condition, 2 * hidden)
        self.last_gain = nn.Parameter(torch.ones(hidden)) if condition is None else None

    def initialize(self) -> None:
        for block in self.blocks:
            block.initialize()  # type: ignore[operator]  # torch does not type the members of a ModuleList
        if self.last_modulation is not None:
            nn.init.zeros_(self.last_modulation.weight)
            nn.init.zeros_(self.last_modulation.bias)

    def forward(
        self, x: Tensor, condition: Tensor | None = None, causal: bool = False, lengths: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """lengths: (B,) tokens that may be seen in each row, None where all are. With a cache, x holds the positions after it."""
        start, length = 0 if cache is None else cache.length, x.shape[1] * self.axis.size
        angles = rotary(start, length, self.head_dim, x.device)
        keys = None if lengths is None else torch.arange(length, device=x.device) < lengths[:, None]
        attend = prepare(self.kernel, x, self.head_dim, causal, keys, past=start, length=length)
        for index, block in enumerate(self.blocks):
            x = block(x, condition, angles, attend, cache, index)
        last = self.last_gain if self.last_modulation is None else self.last_modulation(condition)
        assert last is not None
        (scales,) = copied_together([last], self.axis)
        if self.last_modulation is None:
            return gathered(F.layer_norm(x, x.shape[-1:], scales), self.axis, 1)
        shift, scale = scales[:, None].chunk(2, -1)
        return gathered(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale), self.axis, 1)
