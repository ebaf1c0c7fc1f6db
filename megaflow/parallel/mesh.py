"""The mesh: the only source of ranks, groups, sizes and devices.

Processes stand on a grid of data x tensor: those that differ in `tensor` hold the parts of one network and see the same rows, those
that differ in `data` hold the same part and see other rows. Neighbours in rank are tensor-parallel, since these talk most. One process
needs no launcher, no port and no network; under torchrun every process joins the group that the launcher describes.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megaflow.errors import UserError
from megaflow.parallel import rendezvous

T = TypeVar("T")

NAMED = 6
"""Ranks, or names of what differs, that a sentence lists before it stops."""


@dataclass(frozen=True)
class Axis:
    """The processes that differ in one direction of the mesh only: this one's rank among them, how many, and their group."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


ALONE = Axis()
"""The axis of a process that shares nothing with others."""


@dataclass(frozen=True)
class Mesh:
    """world: all processes; tensor: those with the other parts of this one's network; data: those with the same part and other rows."""

    world: Axis
    tensor: Axis
    data: Axis
    device: torch.device
    timeout: timedelta | None = None
    """How long collectives wait for other processes; None: as torch has it."""

    @property
    def first(self) -> bool:
        """True on the one process that writes a run's files and speaks to the console."""
        return self.world.rank == 0


def processes() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def restarted() -> bool:
    """Whether the launcher has started this job before, and it failed: the one of this host, which may be new to the job."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def check(tensor: int, total: int) -> None:
    """Refuse a number of processes that no mesh can be made of. Raises UserError."""
    if total % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide {total} processes: every network needs {tensor} of them; "
            f"start a multiple of {tensor}, or change parallel.tensor"
        )


@contextlib.contextmanager
def gather(patience: float | None = None) -> Iterator[Mesh]:
    """Join the process group (gloo on CPUs, NCCL on GPUs), and leave it at the end: a mesh of which only the world is laid out yet.

    A group that is there already is taken as it is, and left alone. patience: seconds that a collective waits for other processes, by
    default as many as torch's own; give more than whoever watches over hangs (watch.py) allows, who can say more about them.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", _gpu(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count())) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield _everyone(device)
        return
    backend = "nccl" if cuda else "gloo"
    timeout = None if patience is None else timedelta(seconds=patience)
    if patience is not None:  # torch's own watch over NCCL aborts a process before anybody has found out which other one is gone
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    if "RANK" in os.environ:
        store, rank, size = rendezvous.meet(timeout or dist.distributed_c10d.default_pg_timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield _everyone(device, timeout)
    finally:
        dist.destroy_process_group()


def _gpu(place: int, there: int) -> int:
    """The GPU of a host's process at `place`, of so many that it sees. A launcher may show each its own alone. Raises UserError."""
    if there == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        return 0
    if place >= there:
        raise UserError(
            f"process {place + 1} of {os.uname().nodename} has no GPU, there are {there}; start as many processes on a host as GPUs"
        )
    return place


def _everyone(device: torch.device, timeout: timedelta | None = None) -> Mesh:
    return Mesh(Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), ALONE, ALONE, device, timeout)


@contextlib.contextmanager
def join(tensor: int = 1) -> Iterator[Mesh]:
    """Join the process group as a mesh with `tensor` processes a network, and leave it at the end.

    Raises UserError where the number of processes is not a multiple of `tensor`.
    """
    check(tensor, processes())
    with gather() as everyone:
        yield grid(tensor, everyone.device)


def agree(mesh: Mesh, facts: dict[str, Any]) -> None:
    """Refuse processes that were started with different facts, name to value. Needs only the world. Raises UserError, on all of them."""
    digests = exchanged(mesh, hashlib.blake2b(repr(sorted(facts.items())).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everyones = exchanged(mesh, (os.uname().nodename, {name: repr(value) for name, value in facts.items()}))
    differ = []
    for name in dict.fromkeys(name for _, facts in everyones for name in facts):
        holders: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(everyones):
            holders.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            differ.append(f"{name} is " + ", ".join(f"{value} on {_listed(ranks, everyones)}" for value, ranks in holders.items()))
    more = f"; and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
    raise UserError(f"the processes do not agree: {'; '.join(differ[:NAMED])}{more}; start all of them with the same config and packages")


def _listed(ranks: list[int], everyones: list[tuple[str, Any]]) -> str:
    hosts = ", ".join(dict.fromkeys(everyones[rank][0] for rank in ranks))
    few = ", ".join(map(str, ranks[:NAMED])) + (", …" if len(ranks) > NAMED else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {few} ({hosts})"


def grid(tensor: int, device: torch.device, timeout: timedelta | None = None) -> Mesh:
    """The mesh over a process group that is there. Every process makes every group, in the same order, as torch asks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [list(range(start, start + tensor)) for start in range(0, size, tensor)]
    columns = [list(range(offset, size, tensor)) for offset in range(tensor)]
    return Mesh(Axis(rank, size, dist.group.WORLD), _axis(rows, rank, timeout), _axis(columns, rank, timeout), device, timeout)


def _axis(lines: list[list[int]], rank: int, timeout: timedelta | None) -> Axis:
    groups = [dist.new_group(line, timeout=timeout) for line in lines]
    return next(Axis(line.index(rank), len(line), group) for line, group in zip(lines, groups, strict=True) if rank in line)


def total(axis: Axis, value: Tensor, device: torch.device) -> Tensor:
    """Sum of a tensor over an axis, where it lay; the tensor itself with one process. Without derivatives."""
    if axis.size == 1:
        return value
    moved = value.to(device, copy=True)
    dist.all_reduce(moved, group=axis.group)
    return moved.to(value.device)


def shared(mesh: Mesh, value: T) -> T:
    """The first process's value, on every process."""
    if mesh.world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=mesh.device if mesh.device.type == "cuda" else None)
    return box[0]


def exchanged(mesh: Mesh, value: T) -> list[T]:
    """Every process's value, by rank, on every process."""
    if mesh.world.size == 1:
        return [value]
    found: list[Any] = [None] * mesh.world.size
    dist.all_gather_object(found, value)
    return found


def barrier(mesh: Mesh) -> None:
    """Wait for every process."""
    if mesh.world.size > 1:
        dist.barrier()
