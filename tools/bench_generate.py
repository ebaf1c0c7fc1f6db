"""How fast text is written, against the autoregressive baseline with its cache: `python tools/bench_generate.py [--json FILE]`.

For every length and number of texts at once: a flow map's texts in 1, 2, 4, 16 and 64 steps, and the baseline's, of the same trunk, in fp32
on a CPU and bf16 on a GPU, by the samplers of `megaflow sample`. Weights are random, which changes nothing of the time. The sides alternate
in rounds; a ratio is the median over rounds of the baseline's seconds over a map's.

Beside each stands its roofline: the seconds in which this machine could have done the floating-point operations that were counted
(PyTorch's FlopCounterMode), or read the weights and the cache as often as they are read, whichever are more, at the peaks that are measured
in the same run: a large product of matrices, and of a matrix and a vector. `reached` is roofline over seconds. The speed-up that a map in
one step can have at one text is near FLOP/s / bandwidth x (bytes of a weight / 2): the baseline reads all weights for every token. Of the
baseline's attention, one query at a time, the counter counts nothing: where reading decides, as here, no figure hangs on it.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaflow import process

process.settle()

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from megaflow.config.check import resolve  # noqa: E402
from megaflow.config.load import assemble  # noqa: E402
from megaflow.evaluate.flow_text import BATCH  # noqa: E402
from megaflow.evaluate.generate import generate  # noqa: E402
from megaflow.evaluate.loaded import Run  # noqa: E402
from megaflow.evaluate.settings import Settings  # noqa: E402
from megaflow.files import out_file, write_atomically  # noqa: E402
from megaflow.flow import code as codes  # noqa: E402
from megaflow.flow.likelihood import Range  # noqa: E402
from megaflow.model import build  # noqa: E402
from megaflow.model.parts import Parts, fit_clock, initial_profile  # noqa: E402
from megaflow.parallel import random  # noqa: E402

PEAK_SIZE = 2048


def run_of(kind: str, values: dict[str, Any], vocab: int, length: int) -> Run:
    """A run of random weights. kind: flow_map or autoregressive."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = "autoregressive" if kind == "autoregressive" else "flow"
    config = resolve(
        assemble(
            [
                (
                    "benchmark",
                    values | {"model.family": family, "flow.clock.bins": 20, "flow.code": "frame", "distill.state_input": "hot_belief"},
                )
            ]
        ),
        vocab,
    ).config
    log_prior = torch.log_softmax(-torch.log1p(torch.arange(vocab, dtype=torch.float32)), 0)  # Zipf's law
    manifest = {"length": length, "packing": "wrap", "settings": {}, "tokenizer": {"end_id": None}}
    torch.manual_seed(0)
    parts = clock = None
    if family == "autoregressive":
        network: Any = build.baseline_network(config, log_prior, device)
    else:
        code = codes.frame(vocab, config.flow.code_dim, random.generator(0, "code"), rounds=3)
        parts = Parts(code.to(device), log_prior.to(device), Range(-3.0, 14.0))
        clock = fit_clock(config.flow.clock, parts, initial_profile(parts, config.flow.clock, seed=0))
        network = build.flow_network(config, parts, device, is_map=True)
    network.initialize()
    return Run(Path("benchmark"), config, kind == "flow_map", network, parts, clock, manifest, None, 0, "", {})


def writer(run: Run, steps: int | None, texts: int) -> Callable[[int], None]:
    """write(seed) writes so many texts at once; one step without balance, which is found once a run."""
    way = "autoregressive" if steps is None else "flow_map"

    def write(seed: int) -> None:
        device = run.network.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            generate(run, texts, Settings(steps, way, seed=seed), unbalanced=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return write


def counted(write: Callable[[int], None]) -> int:
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        write(0)
    return counter.get_total_flops()


def bytes_read(run: Run, steps: int | None, texts: int, size: int) -> float:
    """Of weights, once for every pass of the network over as many texts as are written at once, and of the baseline's cache, all that is
    there at every token. The tables that tokens and beliefs are embedded by: of a baseline the rows that are looked up."""
    length, config = run.manifest["length"], run.config.model
    weights = math.ceil(texts / BATCH) * sum(p.numel() for p in run.network.parameters()) * size
    if steps is not None:
        return steps * weights
    tables = sum(p.numel() for name, p in run.network.named_parameters() if name.endswith("table")) * size * math.ceil(texts / BATCH)
    cache = 2 * config.layers * config.hidden * texts * length * (length + 1) / 2 * size
    return length * (weights - tables) + cache


def peaks() -> dict[str, float]:
    """Measured FLOP/s of a product of matrices and bytes/s of one of a matrix and a vector, the best of ten each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    wide = 4 * PEAK_SIZE if device.type == "cuda" else PEAK_SIZE
    a, b = torch.randn(2, wide, wide, device=device).to(kind)
    tall, vector = torch.randn(16 * PEAK_SIZE, PEAK_SIZE, device=device).to(kind), torch.randn(PEAK_SIZE, device=device).to(kind)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(10):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    return {
        "flops_per_second": 2.0 * wide**3 / best(lambda: a @ b),
        "bytes_per_second": tall.numel() * tall.element_size() / best(lambda: tall @ vector),
    }


def measured(
    values: dict[str, Any], vocab: int, length: int, texts: int, counts: list[int], budget: float, peak: dict[str, float]
) -> dict[str, Any]:
    """Of the baseline and of every number of steps: seconds, tokens a second, roofline, and the ratio to the baseline."""
    runs = {"autoregressive": run_of("autoregressive", values, vocab, length), "flow_map": run_of("flow_map", values, vocab, length)}
    size = 2 if torch.cuda.is_available() else 4
    sides: dict[str, tuple[Run, int | None]] = {"autoregressive": (runs["autoregressive"], None)}
    sides |= {str(steps): (runs["flow_map"], steps) for steps in counts}
    writers = {name: writer(run, steps, texts) for name, (run, steps) in sides.items()}
    flops = {name: counted(write) for name, write in writers.items()}  # which warms up too
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    began, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - began < budget:
        rounds += 1
        for name, write in writers.items():
            start = time.perf_counter()
            write(rounds)
            seconds[name].append(time.perf_counter() - start)
        print(f"length {length}, {texts} at once: round {rounds}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    found: dict[str, Any] = {}
    for name, (run, steps) in sides.items():
        middle = statistics.median(seconds[name])
        floor = max(flops[name] / peak["flops_per_second"], bytes_read(run, steps, texts, size) / peak["bytes_per_second"])
        found[name] = {"seconds": middle, "tokens_per_second": length * texts / middle, "flops": flops[name], "roofline_seconds": floor}
        found[name] |= {"reached": floor / middle, "rounds": rounds}
        ratios = [base / own for base, own in zip(seconds["autoregressive"], seconds[name], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        found[name] |= {"speedup": statistics.median(ratios), "speedup_spread": [quartiles[0], quartiles[2]]}
    for name in found:
        found[name]["roofline_speedup"] = found["autoregressive"]["roofline_seconds"] / found[name]["roofline_seconds"]
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| tokens, texts at once | steps | seconds | tokens/s | of roofline | speed-up | roofline's |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for name, entry in case["sides"].items():
            steps = "one token after another" if name == "autoregressive" else name
            low, high = entry["speedup_spread"]
            speedup = (
                "" if name == "autoregressive" else f"{entry['speedup']:.1f} ({low:.1f} to {high:.1f}) | {entry['roofline_speedup']:.1f}"
            )
            cells = f"{entry['seconds']:.3g} | {entry['tokens_per_second']:,.0f} | {entry['reached']:.0%} | {speedup or ' | '}"
            lines.append(f"| {case['length']:,}, {case['texts']} | {steps} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8], help="at once")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each length and number of texts")
    parser.add_argument("--json", type=out_file, default=None)
    arguments = parser.parse_args()
    values = {"model.layers": arguments.layers, "model.hidden": arguments.hidden}
    peak = peaks()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        **peak,
        "model": values | {"vocab": arguments.vocab},
        "cases": [
            {
                "length": length,
                "texts": texts,
                "sides": measured(values, arguments.vocab, length, texts, arguments.steps, arguments.seconds, peak),
            }
            for length in arguments.lengths
            for texts in arguments.texts
        ],
    }
    print(f"{result['device']}, {peak['flops_per_second'] / 1e9:,.0f} GFLOP/s, {peak['bytes_per_second'] / 1e9:.1f} GB/s")
    print(table(result))
    if arguments.json:
        write_atomically(arguments.json, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
