"""The recorder: every collective of real processes with its kind, axis, size and bytes in a ring."""

import pytest
import torch
import torch.distributed as dist

from megaflow.parallel import collectives
from megaflow.parallel import mesh as meshes
from megaflow.parallel.recorder import Recorder, Sent, totals


def everything_once() -> list[tuple]:
    """A collective of each kind of 6 x 4 fp32 numbers, 96 bytes, the whole tensor each time."""
    x = torch.ones(6, 4)
    with meshes.join(1) as mesh, Recorder(mesh) as recorder:
        dist.all_reduce(x)
        dist.all_gather(list(x.split(3)), torch.ones(3, 4))
        collectives.gathered(torch.ones(3, 4), mesh.world, 0)
        collectives.scattered(x, mesh.world, 1)
        dist.broadcast(x, 0)
        dist.reduce(x, 0)
        dist.barrier()
    return [tuple(one) for one in recorder.sent]


def test_every_kind_is_recorded_with_the_size_of_the_whole(ranks):
    kinds = ["all-reduce", "all-gather", "all-gather", "reduce-scatter", "broadcast", "reduce"]
    for found in ranks(2, everything_once):
        assert [Sent(*one) for one in found] == [Sent(kind, "data", 2, 96) for kind in kinds]


def on_every_axis(backward: bool) -> list[tuple]:
    """Collectives over the axes of a mesh of 2 x 2, the second of them in a backward pass."""
    with meshes.join(2) as mesh, Recorder(mesh) as recorder:
        x = torch.ones(8, requires_grad=True)
        y = collectives.copied(collectives.scattered(x, mesh.tensor, 0), mesh.data)
        if backward:
            y.sum().backward()
        dist.all_reduce(torch.ones(3))
        dist.all_reduce(torch.ones(5), group=dist.new_group([dist.get_rank()], use_local_synchronization=True))
    return [tuple(one) for one in recorder.sent]


@pytest.mark.parametrize("backward", [False, True])
def test_axes_are_those_of_the_mesh(ranks, backward):
    expected = [Sent("reduce-scatter", "tensor", 2, 32), Sent("all-reduce", "world", 4, 12)]
    if backward:
        expected[1:1] = [Sent("all-reduce", "data", 2, 16), Sent("all-gather", "tensor", 2, 32)]
    for found in ranks(4, on_every_axis, backward):
        assert [Sent(*one) for one in found] == expected  # a group of one sends nothing


def unknown() -> str:
    with meshes.join(1) as mesh, Recorder(mesh):
        try:
            dist.all_to_all_single(torch.ones(2), torch.ones(2))
        except RuntimeError as error:
            return str(error)
    return ""


def test_a_collective_that_is_not_known_is_not_missed(ranks):
    assert all("alltoall_base_" in told for told in ranks(2, unknown))


def test_bytes_of_a_ring():
    assert Sent("all-reduce", "data", 4, 800).bytes == 1200.0
    assert Sent("all-gather", "data", 4, 800).bytes == Sent("reduce-scatter", "data", 4, 800).bytes == 600.0
    some = [Sent("all-gather", "data", 2, 8), Sent("all-gather", "data", 2, 4), Sent("all-gather", "tensor", 2, 4)]
    assert totals(some) == {("data", "all-gather"): 6.0, ("tensor", "all-gather"): 2.0}
