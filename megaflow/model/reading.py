"""What enters the trunk: linear readings with their neighbours, and the time as features."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.flow.interpolant import Interpolant, log_snr
from megaflow.flow.likelihood import Range
from megaflow.flow.vocabulary import Vocabulary
from megaflow.parallel.collectives import copied_together, scattered
from megaflow.parallel.cut import padded, parameter
from megaflow.parallel.mesh import Axis

CONDITION = 128
FREQUENCIES = 16


class TimeEmbedding(nn.Module):
    """(…,) times in [0, 1] to (…, CONDITION): Fourier features of the scaled log-SNR and a small MLP."""

    def __init__(self, path: Interpolant, span: Range) -> None:
        super().__init__()
        self.path, self.span = path, span
        self.first = nn.Linear(2 * FREQUENCIES, CONDITION)
        self.second = nn.Linear(CONDITION, CONDITION)

    def initialize(self, zero: bool) -> None:
        nn.init.normal_(self.first.weight, std=self.first.in_features**-0.5)
        nn.init.zeros_(self.first.bias)
        nn.init.normal_(self.second.weight, std=0.0 if zero else self.second.in_features**-0.5)
        nn.init.zeros_(self.second.bias)

    def forward(self, t: Tensor) -> Tensor:
        scaled = ((log_snr(self.path, t.double()) - self.span.low) / (self.span.high - self.span.low)).clamp(0.0, 1.0)
        frequency = 0.5 * torch.logspace(0, 5, FREQUENCIES, base=2.0, dtype=torch.float64, device=t.device)
        angle = math.pi * scaled[..., None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], -1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(features)))


class LossWeight(nn.Module):
    """Embedded times, (B, CONDITION) each, to w (B,) of a loss's weight exp(-w); one of all times at first."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first = nn.Linear(times * CONDITION, CONDITION)
        self.second = nn.Linear(CONDITION, 1)

    def initialize(self) -> None:
        nn.init.normal_(self.first.weight, std=self.first.in_features**-0.5)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, *embedded: Tensor) -> Tensor:
        return self.second(F.silu(self.first(torch.cat(embedded, -1))))[..., 0]


class Reading(nn.Module):
    """A linear layer into the stream, without bias: (B, L/T, window * inputs) to (B, L/T, d), this process's positions.

    vocab_multiple: of inputs that are the columns of a dense state, cut along the vocabulary, and come for all positions; None where every
    process has all inputs.
    """

    def __init__(self, window: int, inputs: int, hidden: int, axis: Axis, vocab_multiple: int | None) -> None:
        super().__init__()
        self.window, self.axis = window, axis
        self.cut = None if vocab_multiple is None else padded(1, window * inputs, axis, vocab_multiple, blocks=window)
        self.weight = parameter((hidden, window * inputs), self.cut)

    def forward(self, x: Tensor) -> Tensor:
        if self.cut is None:
            (weight,) = copied_together([self.weight], self.axis)
            return F.linear(x, weight)
        weight = self.weight
        if self.cut.real < self.cut.part:  # padding is no input
            weight = weight.unflatten(1, (self.cut.blocks, self.cut.part))[:, :, : self.cut.real].flatten(1)
        return scattered(F.linear(x, weight), self.axis, 1)


def real(p: Tensor, part: Vocabulary) -> Tensor:
    """A table's rows without the padding at its end."""
    return p if len(p) == part.here else p[: part.here]


def windows(x: Tensor, before: int, after: int, first: int, lengths: Tensor | None, documents: Tensor | None) -> Tensor:
    """Every position beside its neighbours, zeros beyond the ends of a row or document: (B, n, (before + 1 + after) d) of positions
    first … first + n - 1, from x (B, before + n + after, d), which has their neighbours too, zeros where there are none.

    A causal decoder's residual stream holds the last token from the start, so that it learns bigrams at once; a bidirectional one
    has to find its neighbours by attention first, and sits on the unigram plateau until it has. This hands them over.
    """
    if before == after == 0:
        return x
    count = x.shape[1] - before - after
    if lengths is not None:
        place = torch.arange(first - before, first + count + after, device=x.device)
        x = x * (place < lengths[:, None])[..., None]
    shifted = [x[:, i : i + count] for i in range(before + 1 + after)]
    if documents is not None:
        of, ours = F.pad(documents, (before, after), value=-1)[:, first:], documents[:, first : first + count]
        shifted = [part * (of[:, i : i + count] == ours)[..., None] for i, part in enumerate(shifted)]
    return torch.cat(shifted, -1)
