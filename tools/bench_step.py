"""How long a training step takes, as ratios within one run: `python tools/bench_step.py [--json FILE]`.

    dense_over_code            V-wide one-hot state against coded state, both with belief input: time and peak memory of a whole step
    flow_over_autoregressive   a flow's step against the baseline's on the same trunk
    distill_over_flow          a step of stage 2, half of its rows diagonal, against a step of stage 1 on as many rows of that trunk

Every side is a process of its own, as a training run is, and has its memory to itself. Their steps alternate, so that whatever else the
machine does falls on all; a ratio is the median over rounds of steps and its spread the quartiles. A step is what costs time in the
loop: draws, forward, backward, clipping and the default optimizer (Muon and AdamW together), without DeepSpeed, averages and logs. FLOPs
are counted by PyTorch's FlopCounterMode. Memory is the peak of resident memory during a step above what was resident before it (on a GPU
the allocator's peak).
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from megaflow import process

process.settle()

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megaflow.config.check import resolve  # noqa: E402
from megaflow.config.load import assemble  # noqa: E402
from megaflow.files import out_file, write_atomically  # noqa: E402
from megaflow.flow import code as codes  # noqa: E402
from megaflow.flow.likelihood import Range  # noqa: E402
from megaflow.model import build  # noqa: E402
from megaflow.model.parts import Parts, fit_clock, initial_profile  # noqa: E402
from megaflow.parallel import random  # noqa: E402
from megaflow.parallel.mesh import ALONE, Mesh  # noqa: E402
from megaflow.progress import Progress  # noqa: E402
from megaflow.train.optimizer import make  # noqa: E402
from megaflow.train.stage import Batch  # noqa: E402
from megaflow.train.stage_autoregressive import AutoregressiveStage  # noqa: E402
from megaflow.train.stage_flow import FlowStage  # noqa: E402
from megaflow.train.stage_map import MapStage  # noqa: E402

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
    same = {"model.family": family, "flow.code": code_name, "flow.clock.bins": 20, "optim.learning_rate": 1e-4}
    config = resolve(assemble([("benchmark", values | same)]), vocab).config
    log_prior = torch.log_softmax(-torch.log1p(torch.arange(vocab, dtype=torch.float32)), 0)  # Zipf's law
    torch.manual_seed(0)
    if family == "autoregressive":
        network = build.baseline_network(config, log_prior, device)
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
            clock = fit_clock(config.flow.clock, fixed, initial_profile(fixed, config.flow.clock, seed=0))  # a flow's own at its start
            stage = MapStage(config, network, fixed, clock, teacher)
        else:
            stage = FlowStage(config, network, fixed, initial_profile(fixed, config.flow.clock, seed=0))
    return Side(stage, make(network, config.optim, Mesh(ALONE, ALONE, ALONE, device)), config.train.global_batch, length)


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


class Measured(NamedTuple):
    """Of one side: seconds of each step, floating-point operations and tokens of one."""

    seconds: list[float]
    flops: int
    tokens: int


def alternate(title: str, sides: dict[str, tuple[dict[str, Any], int]], budget: float, sets: int = 1) -> dict[str, Measured]:
    """Rounds of one step of every side until the budget of seconds is spent, three at least. sides: kind -> config values, row length.

    `sets` times over with new processes, where a process's luck with its memory counts.
    """
    found: dict[str, Measured] = {}
    for index in range(sets):
        label = title if sets == 1 else f"{title}, processes {index + 1} of {sets}"
        for kind, measured in _alternate(label, sides, budget / sets).items():
            before = found[kind].seconds if kind in found else []
            found[kind] = measured._replace(seconds=before + measured.seconds)
    return found


def _alternate(title: str, sides: dict[str, tuple[dict[str, Any], int]], budget: float) -> dict[str, Measured]:
    spawn, found, pipes, processes = multiprocessing.get_context("spawn"), {}, {}, []
    for kind, (values, length) in sides.items():  # one after the other: their first steps are not to disturb each other
        pipes[kind], other = spawn.Pipe()
        processes.append(spawn.Process(target=_steps, args=(other, kind, values, length, torch.get_num_threads()), daemon=True))
        processes[-1].start()
        other.close()
        found[kind] = Measured([], *pipes[kind].recv())
    progress, began, rounds = Progress(title, budget, "s"), time.perf_counter(), 0
    while time.perf_counter() - began < budget or rounds < 3:
        rounds += 1
        for kind, pipe in pipes.items():
            pipe.send(1 + rounds)
            found[kind].seconds.append(pipe.recv())
        progress.update(min(time.perf_counter() - began, budget))
    progress.update(budget)
    for pipe, process_of_side in zip(pipes.values(), processes, strict=True):
        pipe.send(None)
        process_of_side.join()
    return found


def _steps(pipe: Any, kind: str, values: dict[str, Any], length: int, threads: int) -> None:
    """The process of a side: sends FLOPs and tokens of a step, then answers each number of a step with the seconds that it took."""
    torch.set_num_threads(threads)
    one = side(kind, values, VOCAB, length)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
        step(one, 0)  # the first steps warm up, and are not timed
    step(one, 1)
    pipe.send((counter.get_total_flops(), one.rows * one.length))
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        step(one, number)
        pipe.send(time.perf_counter() - start)


def ratio(name: str, upper: Measured, lower: Measured) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(upper.seconds, lower.seconds, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        name: statistics.median(ratios),
        f"{name}_spread": [quartiles[0], quartiles[2]],
        f"{name}_rounds": len(ratios),
        f"{name}_flops": upper.flops / lower.flops,
        f"{name}_tokens_per_second": [one.tokens / statistics.median(one.seconds) for one in (upper, lower)],
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
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what is free but was kept would hide as much of the step's memory
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark of the highest resident size starts anew
    before = _status("VmRSS")
    step(one, 1)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=out_file, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="budget of the small comparison; the large has twice as much (default 90)"
    )
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
    }
    small = alternate("dense, code", dict.fromkeys(("dense", "code"), (SMALL, SMALL_LENGTH)), arguments.seconds, sets=3)
    found |= ratio("dense_over_code_step", small["dense"], small["code"])
    memory = {kind: peak_memory(kind) for kind in ("dense", "code")}
    found |= {"dense_over_code_memory": memory["dense"] / memory["code"], "peak_step_memory_bytes": memory}
    kinds = ("autoregressive", "code", "map")
    large = alternate("autoregressive, flow, map", dict.fromkeys(kinds, (LARGE, LARGE_LENGTH)), 2.0 * arguments.seconds)
    found |= ratio("flow_over_autoregressive", large["code"], large["autoregressive"])
    found |= ratio("distill_over_flow", large["map"], large["code"])
    for name, value in found.items():
        print(f"{name:<46}{value:.3f}" if isinstance(value, float) else f"{name:<46}{value}")
    if arguments.json:
        write_atomically(arguments.json, json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
