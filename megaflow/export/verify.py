"""What was written against what it was made of: every tensor, and what the two networks compute.

Tensors are compared block by block, by their bytes, after the rounding that was asked for: of any size. Logits are those of fixed inputs,
by one network after the other, in fp32 on the CPU: equal where nothing was rounded, else to what the precision leaves.
"""

import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaflow.errors import UserError
from megaflow.export.folder import PRECISIONS
from megaflow.flow import head as heads
from megaflow.flow.code import lookup
from megaflow.flow.interpolant import noisy_state
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.build import Baseline
from megaflow.model.discrete import Discrete
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import random
from megaflow.train.stage import documents_of

ROWS, POSITIONS = 3, 32
ENDS = [8, 9, 20]
"""Positions at which documents of the probe end, one of them of a single token."""
TIMES = ((0.0, 1.0), (0.2, 0.6), (0.5, 1.0))
"""Times (s, t) of the rows: a flow is asked at s, a flow map also for the way from s to t."""
TOLERANCE = {"fp32": 0.0, **{name: 8 * torch.finfo(PRECISIONS[name]).eps for name in ("bf16", "fp16")}}
"""Largest root mean square of the logits' differences, over the spread (standard deviation) of the logits: eight steps of the precision."""
WORKING = 2**28
"""Bytes beside a network's own that computing the logits is given."""


@dataclass(frozen=True)
class Network:
    """A network to be computed with: its logits of fixed inputs, for which it is loaded, and how many numbers it has in all and in its
    largest tensor."""

    logits: Callable[[], Tensor]
    numbers: int
    largest: int

    @property
    def bytes(self) -> int:
        """What loading it and computing the logits takes."""
        return 4 * (self.numbers + 2 * self.largest) + WORKING


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits: NaN is itself, and 0 is not -0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def compare_blocks(out: Path, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Compare (name, what is read back, what it should be). Raises UserError at the first that differs."""
    for name, written, wanted in pairs:
        if not same_bytes(written, wanted):
            raise UserError(failed(out, f"{name} read back is not what was written"))


def compare_logits(out: Path, before: Network, after: Network, allowed: float, what: str) -> dict[str, Any]:
    """Logits of both networks on fixed inputs: what was found, for export.json and for a person. allowed: root mean square of their
    differences over their spread, which `what` is allowed. Raises UserError where they differ by more. Networks that do not fit in memory
    are not compared, and that is said."""
    free = memory()
    if max(before.bytes, after.bytes) > free:
        return {"logits": None, "reason": f"the network takes {_size(before.bytes)} of memory and {_size(free)} are free"}
    one, other = before.logits(), after.logits()
    spread, difference = one.std().item(), (one - other).square().mean().sqrt().item()
    relative = difference / spread if difference else 0.0
    if not relative <= allowed:
        raise UserError(
            failed(out, f"logits differ by {relative:.2g} of their spread, and {what} is allowed {allowed:.2g} of their spread")
        )
    return {"logits": one.numel(), "difference_over_spread": relative, "allowed": allowed}


class Probe(NamedTuple):
    """Fixed inputs: ids (B, L), times s and t (B,), which tokens are hidden (B, L), noise (B, L, d_c), and where documents do not see each
    other which one every token is of (B, L)."""

    ids: Tensor
    s: Tensor
    t: Tensor
    hidden: Tensor
    noise: Tensor
    documents: Tensor | None


def probe(vocab: int, dim: int = 0, end: int | None = None, seed: int = 0) -> Probe:
    """Inputs that every network is asked for its logits of; dim: d_c of a flow; end: the token that ends a document, where documents do not
    see each other."""
    source, (s, t) = random.generator(seed, "verification"), torch.tensor(TIMES, dtype=torch.float64).unbind(1)
    ids = torch.randint(vocab, (ROWS, POSITIONS), generator=source)
    hidden = torch.rand(ids.shape, generator=source) < 0.5
    noise = torch.randn(ROWS, POSITIONS, dim, generator=source)
    if end is not None:
        ids[:, ENDS] = end
    return Probe(ids, s, t, hidden, noise, None if end is None else documents_of(ids, end))


@torch.no_grad()
def logits(network: TextDiT | Baseline, fixed: Parts | None, end: int | None) -> Tensor:
    """(N, V) logits in fp32 of the probe: of the diagonal, and of a flow map also of the ways ahead."""
    ids, s, t, hidden, noise, documents = probe(len(network.log_prior), 0 if fixed is None else fixed.code.dim, end)
    if isinstance(network, Autoregressive):
        return heads.logits(network.head(), network.read(network(ids, documents=documents)))
    if isinstance(network, Discrete):
        return heads.logits(network.head(), network.read(network(ids, s, hidden, documents=documents)))
    assert fixed is not None
    y = noisy_state(fixed.path, lookup(network.refresh(), ids), noise, s)
    ways = [None, t] if network.map_time else [None]
    return torch.cat([heads.logits(network.head(), network.read(network(y, s, to, documents=documents), y, s)) for to in ways])


def told(found: dict[str, Any]) -> list[str]:
    """What was compared, a line each."""
    lines = [f"{found['tensors']} tensors read back: equal to the checkpoint's" + ("" if found["exact"] else ", rounded as asked")]
    lines.append(told_logits("the network before and after", found))
    return [*lines, told_logits("the run and of transformers", found["transformers"])] if "transformers" in found else lines


def told_logits(whose: str, found: dict[str, Any]) -> str:
    """What compare_logits has found."""
    if found["logits"] is None:
        return f"logits of {whose} not compared: {found['reason']}"
    if found["allowed"] == 0.0:
        return f"{found['logits']:,} logits of {whose}: equal"
    relative = f"{found['difference_over_spread']:.2g} of their spread, {found['allowed']:.2g} is allowed"
    return f"{found['logits']:,} logits of {whose}: they differ by {relative}"


def failed(out: Path, what: str) -> str:
    return f"{out}: verification failed, {what}; it is removed, and the run is as it was; try again, on another disk if it stays so"


def memory() -> int:
    """Bytes that this process may still take: of the machine, of its control group, of its own limit."""
    found = [_number("/proc/meminfo", "MemAvailable:") * 1024]
    group = Path("/sys/fs/cgroup")
    if (limit := _number(group / "memory.max")) and (used := _number(group / "memory.current")):
        found.append(limit - used)
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    if own != resource.RLIM_INFINITY:
        found.append(own - _number("/proc/self/status", "VmSize:") * 1024)
    return max(min(found), 0)


def _number(file: str | Path, name: str = "") -> int:
    """The number that follows a name at the start of a line; 0 where there is none."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except OSError:
        return 0
    words = next((line[len(name) :].split() for line in lines if line.startswith(name)), [])
    return int(words[0]) if words and words[0].isdecimal() else 0


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
