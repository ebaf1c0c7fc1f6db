"""Checkpoints: whole or not there, verified when read, the last few kept, and a disk that refuses does no harm."""

import resource
import shutil
import threading

import pytest
import torch

from megaflow.errors import UserError
from megaflow.train import checkpoint as checkpoints
from megaflow.train.checkpoint import Checkpoint, Damaged


def made(step: int, size: int = 50) -> Checkpoint:
    source = torch.Generator().manual_seed(step)
    tensors = [{"a": torch.randn(size, generator=source), "b.c": torch.randn(3, 4, generator=source)} for _ in range(3)]
    return Checkpoint(
        *tensors, {"edges": torch.linspace(0, 1, 7, dtype=torch.float64)}, {"step": step, "tokens": 10 * step, "seconds": 0.5}
    )


def same(first: Checkpoint, second: Checkpoint) -> bool:
    groups = [(getattr(first, name), getattr(second, name)) for name in checkpoints.TENSORS]
    equal = all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a) for a, b in groups)
    return equal and first.state == second.state


class TestRoundTrip:
    def test_what_is_read_is_what_was_saved(self, tmp_path):
        path = checkpoints.save(tmp_path, made(7), keep=2)
        assert path == tmp_path / "checkpoints" / "step-00000007"
        assert same(checkpoints.read(path), made(7))

    def test_who_may_read_the_folder_may_read_the_weights(self, tmp_path):
        path = checkpoints.save(tmp_path, made(7), keep=2)
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}

    def test_a_copy_under_another_name_is_none_of_the_run_s(self, tmp_path):
        path = checkpoints.save(tmp_path, made(7), keep=2)
        shutil.copytree(path, path.with_name("step-00000007.bak"))
        shutil.copytree(path, path.with_name("step-last"))
        assert checkpoints.steps(tmp_path) == [7] and checkpoints.newest(tmp_path).state["step"] == 7

    def test_tensors_that_are_views_or_transposed_survive(self, tmp_path):
        given = made(1)
        given.weights = {"t": torch.arange(12.0).view(3, 4).T, "v": torch.arange(10.0)[::2], "p": torch.nn.Parameter(torch.ones(2))}
        found = checkpoints.read(checkpoints.save(tmp_path, given, keep=1)).weights
        assert all(torch.equal(found[name], value) for name, value in given.weights.items())

    def test_only_the_files_asked_for_are_read(self, tmp_path):
        path = checkpoints.save(tmp_path, made(7), keep=1)
        (path / "moments.safetensors").unlink()
        found = checkpoints.read(path, ("averaged", "stage"))
        assert found.averaged.keys() == {"a", "b.c"} and found.moments == {} and found.weights == {}

    def test_newest(self, tmp_path):
        assert checkpoints.newest(tmp_path) is None
        for step in (3, 20, 100):
            checkpoints.save(tmp_path, made(step), keep=9)
        assert checkpoints.steps(tmp_path) == [3, 20, 100]
        assert same(checkpoints.newest(tmp_path), made(100))

    @pytest.mark.parametrize("keep, left", [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
    def test_the_last_few_are_kept(self, tmp_path, keep, left):
        for step in range(1, 6):
            checkpoints.save(tmp_path, made(step), keep)
        assert checkpoints.steps(tmp_path) == left

    def test_the_same_step_again_replaces_it(self, tmp_path):
        checkpoints.save(tmp_path, made(5, size=9), keep=2)
        checkpoints.save(tmp_path, made(5), keep=2)
        assert same(checkpoints.newest(tmp_path), made(5))


class TestDamage:
    @pytest.fixture
    def run(self, tmp_path):
        for step in (10, 20):
            checkpoints.save(tmp_path, made(step), keep=2)
        return tmp_path

    @pytest.mark.parametrize(
        "file", ["weights.safetensors", "averaged.safetensors", "moments.safetensors", "stage.safetensors", "state.json"]
    )
    @pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
    def test_a_damaged_file_is_named_and_an_older_checkpoint_taken(self, run, capsys, file, how):
        path = checkpoints.folder(run, 20) / file
        content = bytearray(path.read_bytes())
        if how == "flipped":
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        elif how == "truncated":
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        with pytest.raises(Damaged, match=str(path)):
            checkpoints.read(path.parent)
        assert same(checkpoints.newest(run), made(10))
        assert capsys.readouterr().err.startswith(f"warning: {path}: not the file that was written")

    @pytest.mark.parametrize("content", [None, "", '{"state.json": ', "{}"])
    def test_a_damaged_manifest_too(self, run, capsys, content):
        path = checkpoints.folder(run, 20) / "manifest.json"
        path.unlink() if content is None else path.write_text(content)
        assert same(checkpoints.newest(run), made(10))
        assert str(path.parent) in capsys.readouterr().err

    def test_damage_in_a_file_that_is_not_read_does_not_matter(self, run):
        (checkpoints.folder(run, 20) / "moments.safetensors").write_bytes(b"")
        assert checkpoints.newest(run, ("averaged", "stage")).state["step"] == 20

    def test_none_intact_is_an_error_and_not_a_fresh_start(self, run):
        for step in (10, 20):
            (checkpoints.folder(run, step) / "state.json").write_text("{}")
        with pytest.raises(Damaged, match="delete this checkpoint"):
            checkpoints.newest(run)

    def test_a_damaged_one_ahead_never_costs_an_intact_one(self, run):
        """After going on from 10 past a damaged 20, checkpoint 15 counts from 15 back; the damaged one goes."""
        (checkpoints.folder(run, 20) / "state.json").write_text("{}")
        checkpoints.save(run, made(15), keep=1)
        assert checkpoints.steps(run) == [15]


class TestAtomic:
    def test_a_partial_one_is_none_and_is_cleared_away(self, tmp_path):
        whole = checkpoints.save(tmp_path, made(10), keep=2)
        partial = whole.with_name("step-00000020.partial")
        shutil.copytree(whole, partial)
        assert checkpoints.steps(tmp_path) == [10] and checkpoints.newest(tmp_path).state["step"] == 10
        checkpoints.save(tmp_path, made(30), keep=2)
        assert sorted(path.name for path in whole.parent.iterdir()) == ["step-00000010", "step-00000030"]

    def test_whoever_looks_at_any_moment_sees_a_whole_one(self, tmp_path):
        """A reader beside the writer never meets a folder named step-… that does not verify."""
        checkpoints.save(tmp_path, made(1), keep=50)
        done, seen, bad = threading.Event(), set(), []

        def look() -> None:
            while not done.is_set():
                step = checkpoints.steps(tmp_path)[-1]
                try:
                    checkpoints.read(checkpoints.folder(tmp_path, step))
                    seen.add(step)
                except Damaged as error:
                    bad.append(error)

        reader = threading.Thread(target=look)
        reader.start()
        for step in range(2, 20):
            checkpoints.save(tmp_path, made(step, size=20000), keep=50)
        done.set()
        reader.join(timeout=60)
        assert not bad and len(seen) > 1

    @pytest.mark.parametrize("limit", [10, 600, 4000])
    def test_a_disk_that_refuses_leaves_earlier_ones_intact(self, tmp_path, limit):
        """A limit on the size of files stands in for a full disk: the writes themselves fail, in whichever file they first meet it."""
        checkpoints.save(tmp_path, made(10), keep=1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(
                UserError, match="step-00000020: the checkpoint could not be written .*too large.*earlier checkpoints are intact"
            ):
                checkpoints.save(tmp_path, made(20, size=5000), keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
        assert same(checkpoints.newest(tmp_path), made(10))

    def test_the_same_where_the_disk_says_no_space_is_left(self, tmp_path, monkeypatch):
        checkpoints.save(tmp_path, made(10), keep=1)
        monkeypatch.setattr(checkpoints, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"):
            checkpoints.save(tmp_path, made(20), keep=1)
        assert checkpoints.steps(tmp_path) == [10]
