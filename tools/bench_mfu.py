"""Tokens per second, MFU and memory of training steps on one device: `python tools/bench_mfu.py [--json FILE] [SIZE …]`.

For every size (a file of configs/model without .yaml; default: 145m, 400m, 800m and 1.7b on a GPU, 1m and 10m on a CPU), attention kernel
that can run here, with and without torch.compile: the step of a flow on random tokens, as bench_scale.py takes it, in bf16 on a GPU and
fp32 on a CPU. Each is a process of its own, so that one's memory is not another's, and what does not fit says so. Seconds are the median
of --steps steps after three that warm up, with their quartiles; MFU is model FLOPs (megaflow/model/flops.py) against the device's peak
for dense products (megaflow/model/devices.py), on a CPU against a matrix product measured in the same process. Memory is the allocator's
peak on a GPU, beside it what `megaflow plan` says of it; on a CPU what the process has resident. A size that by the plan does not fit
into a GPU with --rows has half as many, or a quarter.
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
from typing import Any

from megaflow import process

process.settle()

import torch  # noqa: E402

from megaflow.files import out_file, write_atomically  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))

ROOT = Path(__file__).resolve().parents[1]


def measure(size: str, kernel: str, compiled: bool, rows: int, length: int, vocab: int, steps: int, threads: int) -> dict[str, Any]:
    """One line of the table; `failed` says why there is none."""
    from bench_scale import Trainer

    from megaflow.config.check import resolve
    from megaflow.config.load import load
    from megaflow.errors import UserError
    from megaflow.model import build
    from megaflow.model.attention import choose
    from megaflow.parallel import mesh as meshes
    from megaflow.plan import memory
    from megaflow.plan.layout import layout_of
    from megaflow.train.meter import meter_of

    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {"size": size, "attention": kernel, "compile": compiled}
    values = [f"train.precision={'bf16' if cuda else 'fp32'}", f"parallel.zero={1 if cuda else 0}", f"model.attention={kernel}"]
    values += [f"data.length={length}", f"train.global_batch={rows}", f"train.micro_batch={rows}"]
    values += ["optim.name=adamw", "flow.clock.bins=20"]
    config = resolve(load(ROOT / "configs" / "model" / f"{size}.yaml", values), vocab).config
    if cuda:
        config.train.global_batch = config.train.micro_batch = rows = fitting(config, vocab, rows)
    found["rows"] = rows
    try:
        with meshes.join() as mesh:
            choose(kernel, mesh.device, cuda, config.model.hidden // config.model.heads)
            trainer = Trainer(config, vocab, mesh, rows)
            trainer.stage.network.trunk.settle("off", compiled)
            seconds = []
            for number in range(3 + steps):
                start = time.perf_counter()
                trainer.step(number)
                seconds.append(time.perf_counter() - start)
            taken = statistics.quantiles(seconds[3:], n=4)
            meter = meter_of(config, trainer.stage, mesh)
            line = meter.line(rows * length, statistics.median(seconds[3:]), 0.0)
            found |= {"parameters": build.parameters(trainer.stage.network), "seconds": taken[1], "quartiles": [taken[0], taken[2]]}
            found |= {"tokens_per_second": line["tokens_per_second"], "mfu": line.get("mfu"), "model_flops_per_token": meter.flops}
            found["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if cuda else int(line["memory_bytes"])
            found["planned_memory_bytes"] = memory.of_step(config, vocab, layout_of(config, 1)).largest if cuda else None
    except UserError as error:
        found["failed"] = str(error)
    except torch.cuda.OutOfMemoryError:
        found["failed"] = "out of memory"
    return found


def fitting(config: Any, vocab: int, most: int) -> int:
    """Rows of a step: `most`, or the first half of halves of it that by the plan fits into the GPU's memory."""
    from megaflow.plan import memory
    from megaflow.plan.layout import layout_of
    from megaflow.plan.planner import USABLE

    capacity, rows = torch.cuda.get_device_properties(0).total_memory, most
    while rows > 1:
        config.train.global_batch = config.train.micro_batch = rows
        if memory.of_step(config, vocab, layout_of(config, 1)).largest <= USABLE * capacity:
            break
        rows //= 2
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help="files of configs/model, without .yaml")
    parser.add_argument("--json", type=out_file, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--rows", type=int, default=None, help="most rows of a step (default 16 on a GPU, 2 on a CPU)")
    parser.add_argument("--length", type=int, default=None, help="tokens of a row (default 1024 on a GPU, 128 on a CPU)")
    parser.add_argument("--vocab", type=int, default=None, help="vocabulary (default 50257 on a GPU, 4096 on a CPU)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed, 2 at least (default 10)")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    sizes = arguments.sizes or (["145m", "400m", "800m", "1.7b"] if cuda else ["1m", "10m"])
    rows, length, vocab = (
        given or default
        for given, default in zip(
            (arguments.rows, arguments.length, arguments.vocab), (16, 1024, 50257) if cuda else (2, 128, 4096), strict=True
        )
    )
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores"
    print(f"{device}, torch {torch.__version__}, rows of {length} tokens, vocabulary {vocab}", flush=True)
    print(
        f"{'size':<8}{'attention':<11}{'compile':<9}{'rows':>5}{'seconds':>9}{'tokens/s':>12}{'MFU':>8}{'memory GB':>11}{'planned':>9}",
        flush=True,
    )
    lines = []
    for size in sizes:
        for kernel in ("flash", "sdpa") if cuda else ("sdpa",):
            for compiled in (False, True):
                work = size, kernel, compiled, rows, length, vocab, max(arguments.steps, 2), torch.get_num_threads()
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    lines.append(pool.apply(measure, work))
                show(lines[-1])
    if arguments.json:
        write_atomically(arguments.json, json.dumps({"device": device, "torch": torch.__version__, "lines": lines}, indent=1))


def show(line: dict[str, Any]) -> None:
    head = f"{line['size']:<8}{line['attention']:<11}{'yes' if line['compile'] else 'no':<9}"
    if "failed" in line:
        print(head + line["failed"], flush=True)
        return
    mfu = "unknown" if line["mfu"] is None else f"{line['mfu']:.3f}"
    rest = f"{line['rows']:>5}{line['seconds']:>9.3f}{line['tokens_per_second']:>12,.0f}{mfu:>8}{line['peak_memory_bytes'] / 1e9:>11.2f}"
    rest += f"{line['planned_memory_bytes'] / 1e9:>9.2f}" if line["planned_memory_bytes"] else f"{'':>9}"
    print(head + rest, flush=True)


if __name__ == "__main__":
    sys.exit(main())
