"""Processes that stay: a group of ranks, started once a session, that runs functions of test modules and hands back what each returns.

Starting a process costs seconds, a function on one that is there milliseconds. What they run is imported by name in each of them.
"""

import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Ranks:
    """`size` real processes with a gloo group over a file; call(f, *arguments) runs f(*arguments) on all of them."""

    def __init__(self, size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
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
        """What the function returns on each rank, in their order; what it raises on any is raised here."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        answers = [pipe.recv() for pipe in self.pipes]
        failed = [text for good, text in answers if not good]
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join(5)
            process.kill()
        self.folder.cleanup()


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
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
