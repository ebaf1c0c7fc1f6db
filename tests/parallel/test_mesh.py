"""The mesh: one process needs no launcher and leaves nothing behind; several stand on a grid of data x tensor."""

import pytest
import torch
import torch.distributed as dist

from megaflow.errors import UserError
from megaflow.parallel import mesh as meshes


class TestOneProcess:
    def test_joining_and_leaving(self):
        for _ in range(2):  # and again: nothing of the first is left
            with meshes.join() as mesh:
                axes = [(axis.rank, axis.size) for axis in (mesh.world, mesh.tensor, mesh.data)]
                assert axes == [(0, 1)] * 3 and mesh.first and dist.is_initialized()
            assert not dist.is_initialized()

    def test_it_is_left_when_the_work_fails(self):
        with pytest.raises(RuntimeError, match="work"), meshes.join():
            raise RuntimeError("work")
        assert not dist.is_initialized()

    def test_sums_and_agreements_are_its_own(self):
        with meshes.join() as mesh:
            value = torch.tensor([1.5, 2.0])
            assert torch.equal(meshes.total(mesh.data, value, mesh.device), value)
            assert meshes.shared(mesh, {"a": 1}) == {"a": 1} and meshes.exchanged(mesh, "a") == ["a"]
            meshes.barrier(mesh)


def place(tensor: int) -> tuple:
    """(tensor rank, data rank, sums of the world rank over each axis, what is shared, what is exchanged)."""
    mesh = meshes.grid(tensor, torch.device("cpu"))
    rank = torch.tensor([float(mesh.world.rank)], dtype=torch.float64)
    sums = [meshes.total(axis, rank, mesh.device).item() for axis in (mesh.tensor, mesh.data, mesh.world)]
    meshes.barrier(mesh)
    return mesh.tensor.rank, mesh.data.rank, sums, meshes.shared(mesh, ["of", mesh.world.rank]), meshes.exchanged(mesh, mesh.world.rank)


class TestGrid:
    def test_neighbours_hold_a_network_together(self, ranks):
        """Four processes as 2 x 2: ranks 0 and 1 are one network, ranks 0 and 2 hold the same part of it."""
        rest = ["of", 0], [0, 1, 2, 3]
        assert ranks(4, place, 2) == [
            (0, 0, [1.0, 2.0, 6.0], *rest),
            (1, 0, [1.0, 4.0, 6.0], *rest),
            (0, 1, [5.0, 2.0, 6.0], *rest),
            (1, 1, [5.0, 4.0, 6.0], *rest),
        ]

    @pytest.mark.parametrize("tensor", [1, 2, 4])
    def test_every_process_has_a_place_of_its_own(self, ranks, tensor):
        places = [(tensor_rank, data_rank) for tensor_rank, data_rank, *_ in ranks(4, place, tensor)]
        assert places == [(rank % tensor, rank // tensor) for rank in range(4)]

    def test_what_does_not_divide_is_refused(self):
        meshes.check(2, 4)
        with pytest.raises(UserError, match="parallel.tensor=3 does not divide 4 processes"):
            meshes.check(3, 4)


def test_two_processes(process, tmp_path):
    """Sums add up and the first process's value is shared; all on a port of the launcher's choice."""
    (tmp_path / "work.py").write_text(
        """
import torch
from megaflow.parallel import mesh as meshes

def work():  # no group outlives it: one that is left to the end of the interpreter may abort it
    with meshes.join() as mesh:
        rank = mesh.world.rank
        total = meshes.total(mesh.data, torch.tensor([1.0 + rank, 10.0], dtype=torch.float64), mesh.device)
        answers = total.tolist(), meshes.shared(mesh, ["of", rank])
        meshes.barrier(mesh)
        assert mesh.data.size == 2 and mesh.first == (rank == 0)
        open(f"answers-{rank}", "w").write(repr(answers))

work()
"""
    )
    done = process("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "work.py")
    assert done.returncode == 0, done.stderr
    assert {(tmp_path / f"answers-{rank}").read_text() for rank in (0, 1)} == {"([3.0, 20.0], ['of', 0])"}


class TestGpus:
    def test_a_process_takes_the_one_at_its_place(self, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert [meshes._gpu(place, 4) for place in range(4)] == [0, 1, 2, 3]

    def test_a_launcher_may_show_each_process_its_own_alone(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
        assert meshes._gpu(5, 1) == 0

    @pytest.mark.parametrize("there", [1, 4])
    def test_more_processes_than_gpus_are_refused(self, monkeypatch, there):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        with pytest.raises(UserError, match=f"process {there + 1} of .* has no GPU, there are {there}"):
            meshes._gpu(there, there)
