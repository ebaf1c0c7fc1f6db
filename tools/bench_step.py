"""How long a training step takes, as ratios within one run: `python tools/bench_step.py [--json FILE]`.

    dense_over_code        V-wide one-hot state against coded state, both with belief input: time and peak memory of a whole step
    flow_over_autoregressive   a flow's step against the baseline's on the same trunk
    distill_over_flow      a step of stage 2, half of its rows diagonal, against a step of stage 1 on as many rows

Steps of the two sides alternate, so that whatever else the machine does falls on both; a ratio is the median over pairs of steps and
its spread the quartiles. A step is what the loop does: draws, forward, backward, clipping, AdamW. FLOPs are counted by PyTorch's
FlopCounterMode. Memory is the peak of resident memory during a step above what was resident before it, each side in a process of its
own (on a GPU the allocator's peak).
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from megaflow.config.check import resolve
from megaflow.config.load import assemble
from megaflow.flow import code as codes
from megaflow.flow.likelihood import Range
from megaflow.model import build
from megaflow.model.parts import Parts
from megaflow.parallel import random
from megaflow.progress import Progress
from megaflow.train.stage import Batch
from megaflow.train.stage_autoregressive import AutoregressiveStage
from megaflow.train.stage_flow import FlowStage
from megaflow.train.stage_map import MapStage

SMALL = {"model.layers": 4, "model.hidden": 256, "model.heads": 4, "train.global_batch": 16}
LARGE = {"model.layers": 12, "model.hidden": 512, "model.heads": 8, "train.global_batch": 8}
VOCAB, SMALL_LENGTH, LARGE_LENGTH = 50257, 128, 512


def in_place_product(added: list[int], left: list[int], right: list[int], out_shape: Any = None, **_: Any) -> int:
    """FLOPs of addmm_, which the counter does not know by itself."""
    return 2 * left[0] * left[1] * right[1]


class Side(NamedTuple):
    """One side of a comparison: a stage, its optimizer and the length of its rows."""

    stage: Any
    optimizer: torch.optim.Optimizer
    rows: int
    length: int


def side(kind: str, values: dict[str, Any], vocab: int, length: int) -> Side:
    """kind: dense, code, autoregressive or map."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = "autoregressive" if kind == "autoregressive" else "flow"
    code_name = "identity" if kind == "dense" else "frame"
    loaded = assemble([("benchmark", {**values, "model.family": family, "flow.code": code_name, "flow.clock.bins": 20})])
    config = resolve(loaded, vocab).config
    log_prior = torch.log_softmax(-torch.log1p(torch.arange(vocab, dtype=torch.float32)), 0)  # Zipf's law
    torch.manual_seed(0)
    if family == "autoregressive":
        network = build.autoregressive_network(config, log_prior, device)
        network.initialize()
        stage: Any = AutoregressiveStage(config, network)
    else:
        code = codes.identity(vocab) if kind == "dense" else codes.frame(vocab, config.flow.code_dim, random.generator(0, "code"), rounds=3)
        fixed = Parts(code.to(device), log_prior.to(device), Range(-3.0, 14.0))
        network = build.flow_network(config, fixed, device, is_map=kind == "map")
        network.initialize()
        if kind == "map":
            teacher = build.flow_network(config, fixed, device)
            teacher.initialize()
            from megaflow.flow.clock import uniform

            stage = MapStage(config, network, teacher, fixed, uniform())
        else:
            stage = FlowStage(config, network, fixed)
    return Side(stage, torch.optim.AdamW(network.parameters(), lr=1e-4), config.train.global_batch, length)


def step(one: Side, number: int) -> None:
    """A whole training step on random tokens."""
    vocab, device = one.stage.network.weight.shape[0], one.stage.network.weight.device
    ids = torch.randint(vocab, (one.rows, one.length), generator=random.generator(0, "ids", number)).to(device)
    weight = torch.full((ids.numel(),), 1.0 / ids.numel(), device=device)
    loss, _ = one.stage.loss(Batch(ids, None, torch.arange(one.rows), number, one.rows, weight))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(one.stage.network.parameters(), 1.0)
    one.optimizer.step()
    one.optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(name: str, upper: Side, lower: Side, budget: float) -> dict[str, Any]:
    """Alternate steps of both sides until the budget of seconds is spent (three pairs at least). The ratio is upper over lower."""
    flops = []
    for one in (upper, lower):  # the first step of each warms up and is counted, not timed
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
            step(one, 0)
        flops.append(counter.get_total_flops())
    seconds: tuple[list[float], list[float]] = ([], [])
    progress, began = Progress(name, budget, "s"), time.perf_counter()
    while (spent := time.perf_counter() - began) < budget or len(seconds[0]) < 3:
        for times, one in zip(seconds, (upper, lower), strict=True):
            start = time.perf_counter()
            step(one, 1 + len(times))
            times.append(time.perf_counter() - start)
        progress.update(min(spent, budget))
    progress.update(budget)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 2 else [min(ratios), 0.0, max(ratios)]
    tokens = [one.rows * one.length / statistics.median(times) for one, times in zip((upper, lower), seconds, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "spread": [quartiles[0], quartiles[2]],
        "pairs": len(ratios),
        "flops_ratio": flops[0] / flops[1],
        "tokens_per_second": tokens,
    }


def peak_memory(kind: str) -> int:
    """Bytes that a step of this kind needs at its peak above what is resident before it; in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (kind, torch.get_num_threads()))


def _peak_memory(kind: str, threads: int) -> int:
    torch.set_num_threads(threads)
    one = side(kind, SMALL, VOCAB, SMALL_LENGTH)
    step(one, 0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(one, 1)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark of the highest resident size starts anew
    before = _status("VmRSS")
    step(one, 1)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each comparison (default 60)")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
    }
    code = side("code", SMALL, VOCAB, SMALL_LENGTH)
    found["dense_over_code"] = compare("dense/code", side("dense", SMALL, VOCAB, SMALL_LENGTH), code, arguments.seconds)
    found["distill_over_flow"] = compare("distill/flow", side("map", SMALL, VOCAB, SMALL_LENGTH), code, arguments.seconds)
    del code
    memory = {kind: peak_memory(kind) for kind in ("dense", "code")}
    large = side("code", LARGE, VOCAB, LARGE_LENGTH), side("autoregressive", LARGE, VOCAB, LARGE_LENGTH)
    found["flow_over_autoregressive"] = compare("flow/autoregressive", *large, arguments.seconds)
    found["dense_over_code_step"] = found["dense_over_code"]["ratio"]
    found["dense_over_code_memory"] = memory["dense"] / memory["code"]
    found["peak_step_memory_bytes"] = memory
    for name in ("distill_over_flow", "flow_over_autoregressive", "dense_over_code"):
        figures = found.pop(name)
        found |= {name: figures["ratio"]} if name != "dense_over_code" else {}
        found |= {f"{name}_{key}": value for key, value in figures.items() if key != "ratio"}
    for name, value in found.items():
        print(f"{name:<46}{value:.3f}" if isinstance(value, float) else f"{name:<46}{value}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
