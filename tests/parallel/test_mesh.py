"""The mesh of one process: no launcher, no port, and nothing left behind."""

import pytest
import torch
import torch.distributed as dist

from megaflow.parallel import mesh as meshes


class TestOneProcess:
    def test_joining_and_leaving(self):
        for _ in range(2):  # and again: nothing of the first is left
            with meshes.join() as mesh:
                assert (mesh.rank, mesh.size, mesh.first) == (0, 1, True) and dist.is_initialized()
            assert not dist.is_initialized()

    def test_it_is_left_when_the_work_fails(self):
        with pytest.raises(RuntimeError, match="work"), meshes.join():
            raise RuntimeError("work")
        assert not dist.is_initialized()

    def test_sums_and_agreements_are_its_own(self):
        with meshes.join() as mesh:
            value = torch.tensor([1.5, 2.0])
            assert torch.equal(meshes.total(mesh, value), value)
            assert meshes.agree(mesh, True) and not meshes.agree(mesh, False)
            assert meshes.shared(mesh, {"a": 1}) == {"a": 1}
            meshes.barrier(mesh)


def test_two_processes(process, tmp_path):
    """Sums add up, one true flag is everybody's, the first process's value is shared; all on a port of the launcher's choice."""
    (tmp_path / "work.py").write_text(
        """
import torch
from megaflow.parallel import mesh as meshes
with meshes.join() as mesh:
    total = meshes.total(mesh, torch.tensor([1.0 + mesh.rank, 10.0], dtype=torch.float64))
    answers = total.tolist(), meshes.agree(mesh, mesh.rank == 1), meshes.agree(mesh, False), meshes.shared(mesh, ["of", mesh.rank])
    meshes.barrier(mesh)
    assert mesh.size == 2 and mesh.first == (mesh.rank == 0)
    open(f"answers-{mesh.rank}", "w").write(repr(answers))
"""
    )
    done = process("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "work.py")
    assert done.returncode == 0, done.stderr
    assert {(tmp_path / f"answers-{rank}").read_text() for rank in (0, 1)} == {"([3.0, 20.0], True, False, ['of', 0])"}
