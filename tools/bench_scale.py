"""How a training step scales over the processes of this machine, as ratios within one run: `python tools/bench_scale.py [--json FILE]`.

    weak_data_N         rows of every process kept: time of a step on 1 process over that on N data-parallel ones; 1 is perfect
    strong_data_N       rows of the step kept: N times as many processes, each with an Nth of the rows; speed-up over N; 1 is perfect
    strong_tensor_N     rows of the step kept: N tensor-parallel processes hold the network together; the same
    tensor_over_data_N  time of a step with N tensor-parallel processes over that with N data-parallel ones, of the same rows
    checkpoint_stall    share of its time that a run with a checkpoint in ten minutes waits for them: how long a save keeps the step from
                        going on, over 600 s; of the model of --config, with weights, averages and moments

Every side is a group of processes of its own, joined by gloo or NCCL as a run's are, that stays for the whole benchmark; their steps
alternate, so that whatever else the machine does falls on all. A step is a run's: draws, forward, backward, reduction of the gradients,
clipping, optimizer and average, by DeepSpeed. A ratio is the median over rounds, its spread the quartiles. Where there are more processes
than cores (or GPUs), they share them, and a ratio says what that costs; `cores` is printed beside.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megaflow import process

process.settle()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megaflow.config.check import resolve  # noqa: E402
from megaflow.config.load import assemble, load  # noqa: E402
from megaflow.config.schema import Config  # noqa: E402
from megaflow.files import out_file, write_atomically  # noqa: E402
from megaflow.flow import code as codes  # noqa: E402
from megaflow.flow.likelihood import Range  # noqa: E402
from megaflow.model import build, parts  # noqa: E402
from megaflow.model.parts import Parts, initial_profile  # noqa: E402
from megaflow.parallel import mesh as meshes  # noqa: E402
from megaflow.parallel import random  # noqa: E402
from megaflow.progress import Progress  # noqa: E402
from megaflow.train import checkpoint_writer, engine, engine_state  # noqa: E402
from megaflow.train.checkpoint_writer import Piece, Writer  # noqa: E402
from megaflow.train.stage import Batch  # noqa: E402
from megaflow.train.stage_flow import FlowStage  # noqa: E402

INTERVAL = 600.0
SIZES = {"model.layers": 4, "model.hidden": 256, "model.heads": 4, "data.length": 128, "optim.name": "adamw", "flow.clock.bins": 20}
VOCAB, ROWS = 8192, 8


class Trainer:
    """A flow under DeepSpeed on random tokens, as a run trains it."""

    def __init__(self, config: Config, vocab: int, mesh: meshes.Mesh, rows: int) -> None:
        self.mesh, self.rows, self.length, self.vocab = mesh, rows, config.data.length, vocab
        code = codes.frame(vocab, config.flow.code_dim, random.generator(0, "code"), rounds=3)
        log_prior = torch.log_softmax(-torch.log1p(torch.arange(vocab, dtype=torch.float32)), 0)  # Zipf's law
        whole = Parts(code, log_prior, Range(-3.0, 14.0))
        ours = parts.to(build.cut_parts(config, whole, mesh.tensor), mesh.device)
        network = build.flow_network(config, ours, mesh.device, axis=mesh.tensor)
        build.draw(network, 0)
        self.stage = FlowStage(config, network, ours, initial_profile(whole, config.flow.clock, 0))
        self.engine = engine.start(network, config, mesh, rows // mesh.data.size, 1)

    def step(self, number: int) -> None:
        own = self.rows // self.mesh.data.size
        places = torch.arange(own) + self.mesh.data.rank * own
        ids = torch.randint(self.vocab, (own, self.length), generator=random.generator(0, "ids", number, self.mesh.data.rank))
        weight = torch.full((ids.numel(),), 1.0 / (self.rows * self.length))
        device = self.mesh.device
        loss, _ = self.engine(self.stage.loss, Batch(ids.to(device), None, places, number, self.rows, weight.to(device)))
        self.engine.backward(loss * float(self.mesh.data.size))
        engine.step(self.engine)
        engine_state.update_average(self.engine, 0.9)
        if device.type == "cuda":
            torch.cuda.synchronize()


def work(pipe: Any, rank: int, tensor: int, data: int, rows: int, store: str, threads: int) -> None:
    """A process of a side: takes its first steps, then answers each number of a step with the seconds that it took."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tensor * data))
    torch.set_num_threads(threads)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=tensor * data)
    config = resolve(assemble([("benchmark", SIZES | {"parallel.tensor": tensor})]), VOCAB).config
    with meshes.join(tensor) as mesh:
        trainer = Trainer(config, VOCAB, mesh, rows)
        for number in (0, 1):  # the first steps warm up, and are not timed
            trainer.step(number)
        pipe.send(None)
        while (number := pipe.recv()) is not None:
            meshes.barrier(mesh)
            start = time.perf_counter()
            trainer.step(number)
            pipe.send(time.perf_counter() - start)
    dist.destroy_process_group()


class Side:
    """tensor x data processes on `rows` rows a step."""

    def __init__(self, tensor: int, data: int, rows: int, folder: Path, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes, self.seconds = [], [], []
        store = str(folder / f"{tensor}-{data}-{rows}")
        for rank in range(tensor * data):
            ours, theirs = spawn.Pipe()
            self.processes.append(spawn.Process(target=work, args=(theirs, rank, tensor, data, rows, store, threads), daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()

    def step(self, number: int) -> None:
        for pipe in self.pipes:
            pipe.send(number)
        self.seconds.append(max(pipe.recv() for pipe in self.pipes))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for one in self.processes:
            one.join()


def ratio(name: str, upper: list[float], lower: list[float], factor: float = 1.0) -> dict[str, Any]:
    ratios = [factor * a / b for a, b in zip(upper, lower, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {name: statistics.median(ratios), f"{name}_spread": [quartiles[0], quartiles[2]], f"{name}_rounds": len(ratios)}


def scaling(most: int, seconds: float, threads: int) -> dict[str, Any]:
    """All ratios of steps, for 2, 4, … up to `most` processes."""
    counts = [n for n in (2, 4, 8) if n <= most]
    with tempfile.TemporaryDirectory() as folder:
        layouts = {(1, 1, ROWS)} | {(1, n, rows) for n in counts for rows in (ROWS, n * ROWS)} | {(n, 1, ROWS) for n in counts}
        sides = {key: Side(*key, Path(folder), threads) for key in sorted(layouts)}
        progress, began, rounds = Progress("steps", seconds, "s"), time.perf_counter(), 0
        while time.perf_counter() - began < seconds or rounds < 4:
            rounds += 1
            for side in sides.values():
                side.step(1 + rounds)
            progress.update(min(time.perf_counter() - began, seconds))
        progress.update(seconds)
        for side in sides.values():
            side.close()
    found: dict[str, Any] = {}
    one = sides[1, 1, ROWS].seconds
    for n in counts:
        found |= ratio(f"weak_data_{n}", one, sides[1, n, n * ROWS].seconds)
        found |= ratio(f"strong_data_{n}", one, sides[1, n, ROWS].seconds, 1.0 / n)
        found |= ratio(f"strong_tensor_{n}", one, sides[n, 1, ROWS].seconds, 1.0 / n)
        found |= ratio(f"tensor_over_data_{n}", sides[n, 1, ROWS].seconds, sides[1, n, ROWS].seconds)
    return found


def stall(path: str, vocab: int, saves: int) -> dict[str, Any]:
    """What saving keeps a step from going on with, on one process: of the first save, which makes its buffers, and of later ones."""
    config = resolve(load(path, ["train.precision=fp32", "parallel.zero=0", "optim.name=adamw", "flow.clock.bins=20"]), vocab).config
    config.data.length = 64
    with meshes.join() as mesh, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, vocab, mesh, 1)
        (Path(folder) / "checkpoints").mkdir()
        writer, waits, writing = Writer(Path(folder), keep=1), [], []
        progress = Progress("checkpoints", saves, "saves")
        for number in range(saves):
            trainer.step(number)
            began = time.perf_counter()
            assert engine_state.finite(trainer.engine)
            kept = [Piece(*piece) for piece in engine_state.pieces(trainer.engine)]
            kept += checkpoint_writer.whole("stage", trainer.stage.state())
            writer.save(kept, {"step": number + 1})
            waits.append(time.perf_counter() - began)
            writer.finish()
            writing.append(time.perf_counter() - began)
            progress.update(number + 1)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {
        "checkpoint_parameters": build.parameters(trainer.stage.network),
        "checkpoint_bytes": size,
        "checkpoint_stall": statistics.median(waits[1:]) / INTERVAL,
        "checkpoint_stall_first": waits[0] / INTERVAL,
        "checkpoint_seconds_in_background": statistics.median(writing),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=out_file, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--seconds", type=float, default=120.0, help="budget of the steps (default 120)")
    parser.add_argument("--processes", type=int, default=None, help="most processes (default: GPUs, or cores, 4 at least)")
    parser.add_argument("--config", default="configs/model/145m.yaml", help="model of checkpoint_stall (default configs/model/145m.yaml)")
    parser.add_argument("--vocab", type=int, default=50257, help="its vocabulary (default 50257)")
    parser.add_argument("--saves", type=int, default=4, help="its saves, 2 at least (default 4)")
    arguments = parser.parse_args()
    cuda, cores = torch.cuda.is_available(), len(os.sched_getaffinity(0))
    most = arguments.processes or (torch.cuda.device_count() if cuda else max(cores, 4))
    found: dict[str, Any] = {
        "device": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if cuda else f"{platform.machine()} CPU",
        "cores": cores,
        "torch": torch.__version__,
    }
    found |= scaling(most, arguments.seconds, threads=torch.get_num_threads() if cuda else 1)
    found |= stall(arguments.config, arguments.vocab, max(arguments.saves, 2))
    for name, value in found.items():
        print(f"{name:<36}{value:.4f}" if isinstance(value, float) else f"{name:<36}{value}")
    if arguments.json:
        write_atomically(arguments.json, json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
