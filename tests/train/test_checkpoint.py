"""Checkpoints as readers meet them: whole or not there, compared with what was written, any box of any tensor from any layout's files."""

import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megaflow.errors import UserError
from megaflow.files import hashed
from megaflow.parallel import boxes
from megaflow.train import checkpoint as checkpoints
from megaflow.train import checkpoint_writer, tensor_file
from megaflow.train.checkpoint import Checkpoint, Damaged
from megaflow.train.checkpoint_writer import Piece, Writer
from tests.parallel.test_boxes import SHAPES, any_box, partition
from tests.train.writers import pieces, state, tensors

FILES = [f"{group}-00001-of-00002.safetensors" for group in ("weights", "averaged", "moments")] + ["stage-00000-of-00002.safetensors"]


def saved(run: Path, step: int, size: int = 1, keep: int = 9) -> Path:
    """A checkpoint that `size` processes have written, here writers of this one."""
    writers = [Writer(run, keep, rank, size, "job") for rank in range(size)]
    for rank, writer in enumerate(writers):
        writer.save(pieces(step, rank, size), state(step))
    for writer in writers:
        writer.finish()
    return checkpoints.folder(run, step)


def same(found: Checkpoint, step: int) -> bool:
    expected = tensors(step)
    equal = all(torch.equal(found.read(name), value) and found.dtype(name) == value.dtype for name, value in expected.items())
    return found.names() == sorted(expected) and equal and found.state == state(step)


def change(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncated":
        path.write_bytes(content[:-1])
    else:
        path.unlink()


class TestReading:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
    def test_what_is_read_is_what_was_saved(self, tmp_path, size):
        path = saved(tmp_path, 7, size)
        assert path == tmp_path / "checkpoints" / "step-00000007"
        found = checkpoints.open_checkpoint(path)
        assert same(found, 7)
        assert found.shape("weights/qkv") == (36, 5) and found.names("stage/") == ["stage/clock_times", "stage/none"]
        assert found.tensors("weights").keys() == {"rows", "columns", "qkv", "flat", "bias", "half"}
        assert torch.equal(found.tensors("averaged")["qkv"], tensors(7)["averaged/qkv"])

    @pytest.mark.parametrize("wrote", [1, 2, 3, 4])
    @pytest.mark.parametrize("read", [1, 2, 3, 4])
    def test_every_layout_reads_its_pieces_from_every_other_s_files(self, tmp_path, wrote, read):
        found = checkpoints.open_checkpoint(saved(tmp_path, 5, wrote))
        for rank in range(read):
            for piece in pieces(5, rank, read):
                assert torch.equal(found.read(piece.name, piece.at), piece.tensor), (piece.name, piece.at)

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_any_box_from_any_partition_over_any_processes(self, tmp_path_factory, data):
        shape = data.draw(SHAPES)
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        size, run = data.draw(st.integers(1, 3)), tmp_path_factory.getbasetemp() / "any-partition"
        held = [[] for _ in range(size)]
        for at in data.draw(partition(shape)):
            held[data.draw(st.integers(0, size - 1))].append(Piece("weights/a", shape, at, whole[boxes.slices(at)]))
        writers = [Writer(run, 1, rank, size, "job") for rank in range(size)]
        for writer, its in zip(writers, held, strict=True):
            writer.save(its, {"step": 1})
        for writer in writers:
            writer.finish()
        at = data.draw(any_box(shape))
        assert torch.equal(checkpoints.open_checkpoint(checkpoints.folder(run, 1)).read("weights/a", at), whole[boxes.slices(at)])

    def test_only_the_bytes_asked_for_are_read(self, tmp_path, monkeypatch):
        found, read = checkpoints.open_checkpoint(saved(tmp_path, 5, 2)), []
        fill = tensor_file._fill
        monkeypatch.setattr(tensor_file, "_fill", lambda file, target, *rest: (read.append(len(target)), fill(file, target, *rest)))
        found.read("weights/rows", ((10, 14), (1, 3)))  # a row has 4 numbers; the files meet at row 12
        assert sum(read) == 4 * 2 * 4

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_blocks_laid_end_to_end_are_the_tensor_or_a_box_of_it(self, tmp_path_factory, data):
        run = tmp_path_factory.getbasetemp() / "blocks"
        found = checkpoints.open_checkpoint(checkpoints.folder(run, 5) if run.exists() else saved(run, 5, 3))
        name = data.draw(st.sampled_from(found.names()))
        at = data.draw(st.one_of(st.none(), any_box(found.shape(name))))
        most = data.draw(st.integers(1, 200))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "BLOCK", most)
            blocks = list(found.blocks(name, at))
        whole = found.read(name, at)
        assert torch.equal(torch.cat([whole.new_zeros(0), *(block.reshape(-1) for _, block in blocks)]), whole.reshape(-1))
        assert all(block.nbytes <= max(most, whole.itemsize) for _, block in blocks)
        assert all(torch.equal(block, tensors(5)[name][boxes.slices(box)]) for box, block in blocks)

    def test_files_are_safetensors_that_any_library_opens(self, tmp_path):
        path = saved(tmp_path, 5, 2)
        assert torch.equal(load_file(path / "averaged-00001-of-00002.safetensors")["rows[12:24,0:4]"], tensors(5)["averaged/rows"][12:])
        alone = checkpoint_writer.save(tmp_path, tensors(6), state(6), keep=2)
        assert load_file(alone / "averaged-00000-of-00001.safetensors").keys() == {"rows", "columns", "qkv", "flat", "bias"}

    def test_who_may_read_the_folder_may_read_the_files(self, tmp_path):
        path = saved(tmp_path, 7, 2)
        assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}

    def test_a_copy_under_another_name_is_none_of_the_run_s(self, tmp_path):
        path = saved(tmp_path, 7)
        for name in ("step-00000007.bak", "step-last"):
            path.with_name(name).mkdir()
        assert checkpoints.steps(tmp_path) == [7] and checkpoints.newest(tmp_path).state["step"] == 7

    def test_newest(self, tmp_path):
        assert checkpoints.newest(tmp_path) is None
        for step in (3, 20, 100):
            saved(tmp_path, step)
        assert checkpoints.steps(tmp_path) == [3, 20, 100]
        assert same(checkpoints.newest(tmp_path), 100)

    def test_what_it_does_not_have_is_said(self, tmp_path):
        found = checkpoints.open_checkpoint(saved(tmp_path, 7))
        with pytest.raises(UserError, match="it has no weights/new; another version of megaflow"):
            found.read("weights/new")
        with pytest.raises(ValueError, match=r"is no box of weights/rows, whose shape is \(24, 4\)"):
            found.read("weights/rows", ((0, 25), (0, 4)))


class TestIdentity:
    def test_it_does_not_depend_on_the_layout(self, tmp_path):
        assert len({checkpoints.open_checkpoint(saved(tmp_path / str(size), 7, size)).sha256 for size in (1, 2, 3, 4)}) == 1

    @pytest.mark.parametrize(
        "name, another", [("averaged/rows", True), ("stage/clock_times", True), ("weights/rows", False), ("moments/rows", False)]
    )
    def test_it_is_of_what_evaluation_sees(self, tmp_path, name, another):
        one = checkpoint_writer.save(tmp_path, tensors(7), state(7), keep=9)
        changed = {**tensors(7), name: 0.5 * tensors(7)[name]}
        other = checkpoint_writer.save(tmp_path, changed, state(8), keep=9)
        assert (checkpoints.open_checkpoint(one).sha256 != checkpoints.open_checkpoint(other).sha256) == another


class TestDamage:
    @pytest.fixture
    def run(self, tmp_path):
        for step in (10, 20):
            saved(tmp_path, step, 2)
        return tmp_path

    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
    def test_a_damaged_file_is_named_and_an_older_checkpoint_taken(self, run, capsys, file, how):
        path = checkpoints.folder(run, 20) / file
        change(path, how)
        with pytest.raises(Damaged, match=str(path)):
            checkpoints.open_checkpoint(path.parent)
        assert same(checkpoints.newest(run), 10)
        said = capsys.readouterr().err
        assert said.startswith(f"warning: {path}: not the file that was written (") and said.count("\n") == 1

    def test_every_flipped_bit_of_a_manifest_is_seen(self, run):
        path = checkpoints.folder(run, 20) / "manifest.json"
        content = path.read_bytes()
        for place in range(0, len(content), 97):
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            assert checkpoints.newest(run).state["step"] == 10, place
        path.write_bytes(content)
        assert checkpoints.newest(run).state["step"] == 20

    @pytest.mark.parametrize("content", [None, "", '{"sha256": ', "{}", "[]", "7"])
    def test_a_manifest_that_is_none(self, run, capsys, content):
        path = checkpoints.folder(run, 20) / "manifest.json"
        path.unlink() if content is None else path.write_text(content)
        assert same(checkpoints.newest(run), 10)
        assert str(path.parent) in capsys.readouterr().err

    def test_damage_in_a_group_that_is_not_read_does_not_matter(self, run):
        change(checkpoints.folder(run, 20) / "moments-00001-of-00002.safetensors", "removed")
        assert checkpoints.newest(run, checkpoints.SEEN).state["step"] == 20
        assert checkpoints.newest(run).state["step"] == 10

    def test_none_intact_is_an_error_and_not_a_fresh_start(self, run):
        for step in (10, 20):
            change(checkpoints.folder(run, step) / FILES[0], "truncated")
        with pytest.raises(Damaged, match="delete this checkpoint"):
            checkpoints.newest(run)

    def test_a_file_that_goes_while_the_checkpoint_is_open(self, run):
        found = checkpoints.newest(run)
        change(found.path / FILES[1], "removed")
        with pytest.raises(Damaged, match=f"{found.path / FILES[1]}: cannot be read .*No such file"):
            found.read("averaged/rows")

    def test_an_earlier_version_s_are_told_apart(self, run):
        """They were four files of full tensors, and a manifest of their hashes."""
        for step in (10, 20):
            path = checkpoints.folder(run, step)
            (path / "manifest.json").write_text(json.dumps({"weights.safetensors": {"sha256": "0", "bytes": 1}, "state.json": {}}))
        with pytest.raises(Damaged, match="an earlier version of megaflow, which kept full tensors, has written it"):
            checkpoints.newest(run)

    def test_a_later_version_s_too(self, run, monkeypatch):
        monkeypatch.setattr(checkpoints, "VERSION", 3)
        saved(run, 30)
        monkeypatch.undo()
        with pytest.raises(Damaged, match="version 3 of checkpoints, and this megaflow reads version 2"):
            checkpoints.open_checkpoint(checkpoints.folder(run, 30))

    def test_a_manifest_that_points_elsewhere_is_refused(self, run):
        """Somebody else's checkpoint names only files of its own folder."""
        path = checkpoints.folder(run, 20) / "manifest.json"
        content = json.loads(path.read_text())["checkpoint"]
        content["files"]["../step-00000010/" + FILES[0]] = content["files"].pop(FILES[0])
        path.write_text(json.dumps({"sha256": hashed(content), "checkpoint": content}))
        with pytest.raises(Damaged, match="manifest.json is missing or damaged"):
            checkpoints.open_checkpoint(path.parent)

    def test_boxes_that_do_not_make_up_a_tensor_are_refused(self, run):
        path = checkpoints.folder(run, 20) / "manifest.json"
        content = json.loads(path.read_text())["checkpoint"]
        content["tensors"]["weights/rows"]["boxes"].pop()
        path.write_text(json.dumps({"sha256": hashed(content), "checkpoint": content}))
        found = checkpoints.open_checkpoint(path.parent)
        with pytest.raises(Damaged, match="the boxes of weights/rows do not make it up"):
            found.read("weights/rows")


class TestTogether:
    """Processes that share the hashing, here threads that exchange values at a barrier."""

    def newest(self, run: Path, size: int) -> list[Checkpoint | Damaged | None]:
        values, results, meeting = [None] * size, [None] * size, threading.Barrier(size)

        def work(rank: int) -> None:
            def exchange(own):
                values[rank] = own
                meeting.wait(timeout=30)
                seen = list(values)
                meeting.wait(timeout=30)
                return seen

            try:
                results[rank] = checkpoints.newest(run, None, rank, size, exchange)
            except Damaged as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def test_each_file_is_hashed_once(self, tmp_path, monkeypatch):
        saved(tmp_path, 10, 2)
        hashed, sha256 = [], tensor_file.sha256
        monkeypatch.setattr(tensor_file, "sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
        assert [found.state["step"] for found in self.newest(tmp_path, 3)] == [10, 10, 10]
        files = sorted(path.name for path in checkpoints.folder(tmp_path, 10).glob("*.safetensors"))
        assert sorted(hashed) == files and len(files) == 7

    @pytest.mark.parametrize("file", FILES)
    def test_damage_that_one_process_sees_is_damage_to_all(self, tmp_path, capsys, file):
        for step in (10, 20):
            saved(tmp_path, step, 2)
        change(checkpoints.folder(tmp_path, 20) / file, "flipped")
        assert [found.state["step"] for found in self.newest(tmp_path, 3)] == [10, 10, 10]
        assert capsys.readouterr().err.count("warning: ") == 1
        change(checkpoints.folder(tmp_path, 10) / file, "flipped")
        assert [str(found) for found in self.newest(tmp_path, 3)] == [
            f"{checkpoints.folder(tmp_path, 10) / file}: not the file that was written (its hash differs); "
            "restore it, or delete this checkpoint to go on from an earlier one or, without one, from the start"
        ] * 3

    def test_none_yet(self, tmp_path):
        assert self.newest(tmp_path, 3) == [None] * 3
