"""The mesh: the only source of ranks, sizes and devices.

One process needs no launcher, no port and no network; under torchrun every process joins the group that the launcher describes.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """rank and size of the data-parallel processes, and this process's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one process that writes files and speaks to the console."""
        return self.rank == 0


@contextlib.contextmanager
def join() -> Iterator[Mesh]:
    """Join the process group (gloo on CPUs, NCCL on GPUs) and leave it at the end."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Mesh(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def total(mesh: Mesh, value: Tensor) -> Tensor:
    """Sum of a tensor over all processes; the tensor itself with one process."""
    if mesh.size == 1:
        return value
    moved = value.to(mesh.device, copy=True)
    dist.all_reduce(moved)
    return moved.to(value.device)


def agree(mesh: Mesh, flag: bool) -> bool:
    """True on every process if it is true on any."""
    return bool(total(mesh, torch.tensor(float(flag))).item() > 0)


def shared(mesh: Mesh, value: T) -> T:
    """The first process's value, on every process."""
    if mesh.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=mesh.device if mesh.device.type == "cuda" else None)
    return box[0]


def barrier(mesh: Mesh) -> None:
    """Wait for every process."""
    if mesh.size > 1:
        dist.barrier()
