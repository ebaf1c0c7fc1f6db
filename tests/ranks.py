"""Processes that stay: a group of ranks, started once a session, that runs functions of test modules and hands back what each returns.

Starting a process costs seconds, a function on one that is there milliseconds. What they run is imported by name in each of them.
"""

import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

GRACE = 15.0
"""Seconds that the others have to answer once one has failed."""
THREADS = 100
"""A group is replaced once a process of it has more. Engines under ZeRO 3 leave their process groups for as long as a process lives, whose
threads wake up a hundred times a second: a thousand of them, and nothing else gets on."""


class Ranks:
    """`size` real processes with a gloo group over a file; call(f, *arguments) runs f(*arguments) on all of them."""

    def __init__(self, size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.answers, self.folder = True, tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = spawn.Pipe()
            arguments = theirs, rank, size, str(Path(self.folder.name) / "store")
            self.processes.append(spawn.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def call(self, function: Callable, *arguments: Any) -> list[Any]:
        """What the function returns on each rank, in their order; what it raises on any is raised here.

        A group of which some wait for one that has raised is of no more use.
        """
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        answers: dict[Any, tuple[bool, Any]] = {}
        while waiting := [pipe for pipe in self.pipes if pipe not in answers]:
            failing = any(not good for good, _ in answers.values())
            ready = wait(waiting, GRACE if failing else None)
            if not ready:
                self.answers = False  # they wait in a collective for one that has failed
                break
            answers |= {pipe: pipe.recv() for pipe in ready}
        failed = [text for good, text in answers.values() if not good]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answers[pipe][1] for pipe in self.pipes]

    def usable(self) -> bool:
        """Whether another function can be called, and will find processes that have not collected too much."""
        return self.answers and all(len(os.listdir(f"/proc/{process.pid}/task")) <= THREADS for process in self.processes)

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join(5 if self.answers else 0)
            process.kill()
        self.folder.cleanup()


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    local = rank % (torch.cuda.device_count() or size)  # they share GPUs where there are fewer
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*arguments)))
        except Exception:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
        for group in list(dist.distributed_c10d._world.pg_map):  # a run's own, whose threads would keep waking up
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
