"""What is asked of the machine before a run begins: one folder on all hosts, a compiler."""

import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megaflow.errors import UserError
from megaflow.parallel import mesh as meshes
from megaflow.train import run, stages


def folders(directories: list[str], hosts: list[str]) -> str:
    """What each process is told whose run.dir and host these are."""
    mesh = meshes.grid(1, torch.device("cpu"))
    directory, held = Path(directories[mesh.world.rank]), None
    there = SimpleNamespace(nodename=hosts[mesh.world.rank])
    with mock.patch.object(os, "uname", lambda: there), mock.patch.object(stages, "SHARED_WITHIN", 1.0):
        if mesh.first:
            held = run.lock(directory)
        try:
            stages.in_one_folder(directory, mesh)
        except UserError as error:
            return str(error)
        finally:
            if held is not None:
                held.close()
    return ""


class TestOneFolder:
    def test_hosts_that_share_it(self, ranks, tmp_path):
        assert ranks(2, folders, [str(tmp_path / "run")] * 2, ["a", "b"]) == ["", ""]

    @pytest.mark.parametrize("stale", [False, True])
    def test_a_host_that_has_a_folder_of_its_own_is_named(self, ranks, tmp_path, stale):
        """Left by another run too."""
        if stale:
            (tmp_path / "other").mkdir()
            (tmp_path / "other" / ".lock").write_text("17 on b")
        told = ranks(2, folders, [str(tmp_path / "run"), str(tmp_path / "other")], ["a", "b"])
        assert [text.partition(": ")[2] for text in told] == [
            "b and a do not see the same folder; all hosts of a job need run.dir on a file system that they share"
        ] * 2


class TestCompiler:
    def test_what_is_compiled_is_kept_in_the_run(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        stages.compiles(torch.device("cpu"), tmp_path)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")

    @pytest.mark.parametrize("device, names", [("cpu", "g++, c++, clang++"), ("cuda", "gcc, cc, clang")])
    def test_none_is_said(self, monkeypatch, tmp_path, device, names):
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(
            UserError, match="parallel.compile=true needs a compiler, and on .* there is none of " + names.replace("+", "[+]")
        ):
            stages.compiles(torch.device(device), tmp_path)

    def test_one_that_is_asked_for_and_not_there_is_said(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(UserError, match="no-such-compiler is not there"):
            stages.compiles(torch.device("cpu"), tmp_path)
