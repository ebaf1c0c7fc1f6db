"""What a run says of its speed: tokens a second, model FLOPs, MFU, waiting for data and checkpoints, memory."""

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaflow.config.check import is_map
from megaflow.config.schema import Config
from megaflow.model import devices, flops
from megaflow.parallel.mesh import Mesh

SPEED = ("tokens_per_second", "data_wait", "memory_bytes", "mfu")
"""Metrics of a step that are of the machine, and differ from one start to the next."""


@dataclass
class Meter:
    """flops: model FLOPs of a token's training step (model/flops.py), None of objectives that it does not count; peak: FLOP/s of one
    device, None where it is not known."""

    mesh: Mesh
    flops: float | None
    peak: float | None

    def line(self, tokens: int, seconds: float, data_wait: float) -> dict[str, float]:
        """Of one step on all devices together: the metrics of metrics.jsonl. data_wait: seconds of the step spent waiting for rows."""
        speed = tokens / seconds
        found = {"tokens_per_second": speed, "data_wait": data_wait / seconds, "memory_bytes": float(memory(self.mesh.device))}
        if self.flops is None:
            return found
        found |= {"model_flops_per_token": self.flops}
        mfu = devices.mfu(self.flops, speed, self.peak, self.mesh.world.size)
        return found if mfu is None else found | {"mfu": mfu}


def meter_of(config: Config, stage: Any, mesh: Mesh) -> Meter:
    """A meter for a stage. On a CPU it measures a matrix product first, half a second long, which MFU is then against."""
    of_map = is_map(config)
    vocab = stage.network.code.vocab if hasattr(stage.network, "code") else stage.network.part.size
    hot = flops.hot_until(stage.parts.path, stage.clock, stage.network.code) if of_map else 1.0
    peak = devices.peak(mesh.device, config.train.precision)
    counted = None if flops.uncounted(config) else flops.of_step(config, vocab, of_map, hot).model
    return Meter(mesh, counted, peak)


def memory(device: torch.device) -> int:
    """Bytes that this process has now: a GPU's allocated tensors, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize()
