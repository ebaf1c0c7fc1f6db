"""Writing checkpoints: in the background, by many real processes, and whatever becomes of them or of the disk the earlier ones stay."""

import multiprocessing
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megaflow.errors import UserError
from megaflow.parallel import boxes
from megaflow.train import checkpoint as checkpoints
from megaflow.train import checkpoint_writer, tensor_file
from megaflow.train.checkpoint import Damaged
from megaflow.train.checkpoint_writer import Piece, Writer
from tests.train import writers
from tests.train.test_checkpoint import same, saved
from tests.train.writers import pieces, state, tensors, until

INTACT = "earlier checkpoints are intact"


@pytest.fixture(scope="module")
def start():
    """start(function, …): a process of its own in it, forked from one that has imported torch. Ended with the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.writers"])
    started = []

    def process(target: Callable, *arguments) -> multiprocessing.Process:
        started.append(context.Process(target=target, args=arguments))
        started[-1].start()
        return started[-1]

    yield process
    for each in started:
        each.kill()
        each.join()


def left(run: Path) -> list[str]:
    """What is in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class TestProcesses:
    def test_each_writes_its_part_and_all_agree_that_it_is_there(self, start, tmp_path):
        processes = [start(writers.write, tmp_path, [1, 2, 3], rank, 4) for rank in range(4)]
        until(lambda: not any(each.is_alive() for each in processes))
        assert [(tmp_path / f"end-{rank}").read_text() for rank in range(4)] == ["well"] * 4
        assert left(tmp_path) == ["step-00000002", "step-00000003"]
        assert same(checkpoints.newest(tmp_path), 3) and same(checkpoints.open_checkpoint(checkpoints.folder(tmp_path, 2)), 2)
        owners = {name.split("-")[1] for name in checkpoints.newest(tmp_path).files}
        assert owners == {"00000", "00001", "00002", "00003"}

    def test_one_that_dies_before_its_part_is_named_and_no_checkpoint_appears(self, start, tmp_path):
        saved(tmp_path, 10)
        dead = start(writers.die_at, "write_part", tmp_path, [20], 2, 3)
        second = start(writers.write, tmp_path, [20], 1, 3)
        first = start(writers.write, tmp_path, [20], 0, 3, 0.5, "checkpoints/*.partial/part-00001.json")
        until(lambda: not any(each.is_alive() for each in (dead, second, first)))
        assert dead.exitcode == -signal.SIGKILL
        missed = f"step-00000020: the checkpoint could not be written (process 2 of 3 wrote no part within 0.5 s); {INTACT}"
        assert (tmp_path / "end-0").read_text().endswith(missed)
        assert "the first process has given it up and says why" in (tmp_path / "end-1").read_text()
        assert left(tmp_path) == ["step-00000010"] and same(checkpoints.newest(tmp_path), 10)

    def test_where_the_first_one_dies_the_others_do_not_wait_for_good(self, start, tmp_path):
        saved(tmp_path, 10)
        dead = start(writers.die_at, "complete", tmp_path, [20], 0, 2)
        other = start(writers.write, tmp_path, [20], 1, 2, 0.5)
        until(lambda: not dead.is_alive() and not other.is_alive())
        assert dead.exitcode == -signal.SIGKILL
        end = (tmp_path / "end-1").read_text()
        assert "the first process did not complete it within 1 s" in end and INTACT in end
        assert checkpoints.steps(tmp_path) == [10]

    @pytest.mark.parametrize("moment", ["write_part", "complete", "prune"])
    def test_kill_leaves_whole_ones_and_the_next_start_clears_up(self, start, tmp_path, moment):
        """While parts are written there are those before; when the folder has its name the new one is whole too."""
        saved(tmp_path, 10)
        process = start(writers.wait_at, moment, tmp_path, [20], 0, 1)
        files = "step-00000020" if moment == "prune" else "step-00000020.job.partial" + ("/part-*.json" if moment == "complete" else "")
        until(lambda: list((tmp_path / "checkpoints").glob(files)))
        process.kill()
        process.join()
        assert same(checkpoints.newest(tmp_path), 20 if moment == "prune" else 10)
        assert len(left(tmp_path)) == 2
        Writer(tmp_path, 2)
        assert left(tmp_path) == (["step-00000010", "step-00000020"] if moment == "prune" else ["step-00000010"])

    def test_what_a_process_of_an_earlier_job_still_writes_is_in_no_checkpoint(self, tmp_path):
        every = [Writer(tmp_path, 2, rank, 2, "job") for rank in range(2)]
        late = Writer(tmp_path, 2, 1, 2, "earlier", limit=0.1)
        late.save(pieces(6, 1, 2), state(7))
        until(lambda: list((tmp_path / "checkpoints").glob("step-00000007.earlier.partial/part-00001.json")))
        for rank, writer in enumerate(every):
            writer.save(pieces(7, rank, 2), state(7))
        for writer in every:
            writer.finish()
        assert same(checkpoints.newest(tmp_path), 7)
        with pytest.raises(UserError, match="the first process did not complete it within 0.2 s"):
            late.finish()
        Writer(tmp_path, 2)
        assert left(tmp_path) == ["step-00000007"]

    def test_an_error_in_training_does_not_keep_the_process_for_long(self, start, tmp_path):
        """The interpreter joins the thread, which would wait five minutes for a process that is gone."""
        process = start(writers.fail_in_training, tmp_path, 5)
        process.join(timeout=30)
        assert process.exitcode == 1
        assert checkpoints.steps(tmp_path) == [] and left(tmp_path) == []

    def test_processes_that_write_together_need_a_word(self, tmp_path):
        with pytest.raises(ValueError, match="common word"):
            Writer(tmp_path, 2, 0, 2)


class TestBackground:
    @pytest.fixture
    def held_back(self, monkeypatch):
        """A disk that waits until it is let go."""
        gate, write = threading.Event(), tensor_file.write
        monkeypatch.setattr(tensor_file, "write", lambda *arguments: (gate.wait(60), write(*arguments))[1])
        yield gate
        gate.set()

    def test_the_caller_goes_on_and_may_change_everything(self, tmp_path, held_back):
        writer, mine = Writer(tmp_path, 2), {name: value.clone() for name, value in tensors(5).items()}
        numbers = state(5)
        writer.save([Piece(name, tuple(value.shape), boxes.full(value.shape), value) for name, value in mine.items()], numbers)
        assert checkpoints.steps(tmp_path) == []
        for value in mine.values():
            value.zero_()
        numbers["step"] = 6
        held_back.set()
        writer.finish()
        assert same(checkpoints.newest(tmp_path), 5)

    def test_two_in_a_row_the_second_waits_for_the_first(self, tmp_path, held_back):
        writer = Writer(tmp_path, 2)
        writer.save(pieces(1, 0, 1), state(1))
        began, opening = time.monotonic(), threading.Timer(0.3, held_back.set)
        opening.start()
        writer.save(pieces(2, 0, 1), state(2))
        assert checkpoints.steps(tmp_path) == [1] or checkpoints.steps(tmp_path) == [1, 2]
        assert time.monotonic() - began >= 0.3
        writer.finish()
        assert same(checkpoints.open_checkpoint(checkpoints.folder(tmp_path, 1)), 1) and same(checkpoints.newest(tmp_path), 2)

    def test_copies_are_made_in_the_same_memory_again(self, tmp_path):
        buffers: dict[str, torch.Tensor] = {}
        first = {piece.name: piece.tensor.data_ptr() for piece in checkpoint_writer.copied(pieces(1, 0, 1), buffers)}
        second = checkpoint_writer.copied(pieces(2, 0, 1), buffers)
        assert {piece.name: piece.tensor.data_ptr() for piece in second} == first
        found = {(piece.name, piece.at): piece.tensor for piece in second}
        assert all(torch.equal(found[piece.name, piece.at], piece.tensor) for piece in pieces(2, 0, 1))

    def test_a_failure_comes_up_at_the_next_step_once(self, tmp_path, monkeypatch):
        writer = Writer(tmp_path, 2)
        writer.check()
        monkeypatch.setattr(tensor_file, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        writer.save(pieces(1, 0, 1), state(1))
        until(lambda: writer.failure)
        with pytest.raises(UserError, match=rf"step-00000001: the checkpoint could not be written \(No space left on device\); {INTACT}"):
            writer.check()
        writer.check()
        monkeypatch.undo()
        writer.save(pieces(2, 0, 1), state(2))
        writer.finish()
        assert checkpoints.steps(tmp_path) == [2]

    def test_a_failure_comes_up_at_the_next_save_too(self, tmp_path, monkeypatch):
        writer = Writer(tmp_path, 2)
        monkeypatch.setattr(tensor_file, "write", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        writer.save(pieces(1, 0, 1), state(1))
        with pytest.raises(UserError, match="Input/output error"):
            writer.save(pieces(2, 0, 1), state(2))

    def test_leaving_waits_for_what_is_being_written(self, tmp_path, held_back):
        writer = Writer(tmp_path, 2)
        writer.save(pieces(1, 0, 1), state(1))
        threading.Timer(0.2, held_back.set).start()
        writer.close()
        assert same(checkpoints.newest(tmp_path), 1)

    def test_a_process_that_is_ended_settles_what_it_writes(self, tmp_path, held_back):
        """By another thread, which does not wait for more than it may: what others have not written is left."""
        writer = Writer(tmp_path, 2)
        writer.save(pieces(5, 0, 1), state(5))
        writer.settle(0.1)
        assert checkpoints.steps(tmp_path) == []
        held_back.set()
        writer.settle(60.0)
        assert checkpoints.steps(tmp_path) == [5]

    def test_leaving_does_not_wait_long_for_others_and_raises_nothing(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(checkpoint_writer, "LEAVING", 0.2)
        writer = Writer(tmp_path, 2, 0, 2, "job", limit=300.0)
        writer.save(pieces(1, 0, 2), state(1))
        writer.close()
        assert "process 1 of 2 wrote no part within 0.2 s of this one's leaving" in capsys.readouterr().err
        assert left(tmp_path) == []

    def test_the_wait_of_a_finished_one_is_over(self, tmp_path):
        writer = Writer(tmp_path, 2)
        writer.finish()
        writer.save(pieces(1, 0, 1), state(1))
        writer.finish()
        writer.finish()
        writer.close()
        assert checkpoints.steps(tmp_path) == [1]


class TestParts:
    def saved_as(self, run: Path, *parts: list[Piece]) -> None:
        every = [Writer(run, 2, rank, len(parts), "job", limit=20.0) for rank in range(len(parts))]
        for writer, part in zip(every, parts, strict=True):
            writer.save(part, {"step": 1})
        try:
            every[0].finish()
        finally:
            for writer in every[1:]:
                with pytest.raises(UserError, match="given it up"):
                    writer.finish()

    @staticmethod
    def piece(start: int, stop: int, name: str = "weights/a", count: int = 8, dtype: torch.dtype = torch.float32) -> Piece:
        return Piece(name, (count,), ((start, stop),), torch.ones(stop - start, dtype=dtype))

    def test_a_gap_an_overlap_and_another_shape_or_type_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint_writer, "SETTLING", 0.1)
        saved(tmp_path, 0)
        piece = self.piece
        for parts, words in [
            (([piece(0, 4)], [piece(5, 8)]), "1 of its 8 elements are missing"),
            (([piece(0, 5)], [piece(4, 8)]), r"\(\(0, 5\),\) and \(\(4, 8\),\) overlap"),
            (([piece(0, 8)], [piece(0, 8)]), "overlap"),
            (([piece(0, 4)], [piece(4, 9, count=9)]), "one process says"),
            (([piece(0, 4)], [piece(4, 8, dtype=torch.float64)]), "one process says"),
        ]:
            with pytest.raises(ValueError, match=f"weights/a.*{words}"):
                self.saved_as(tmp_path, *parts)
            assert left(tmp_path) == ["step-00000000"]

    def test_processes_that_hold_nothing(self, tmp_path):
        every = [Writer(tmp_path, 2, rank, 3, "job") for rank in range(3)]
        for writer, part in zip(every, ([], [self.piece(0, 8)], [self.piece(3, 3)]), strict=True):
            writer.save(part, {"step": 1})
        for writer in every:
            writer.finish()
        found = checkpoints.newest(tmp_path)
        assert list(found.files) == ["weights-00001-of-00003.safetensors"] and found.read("weights/a").tolist() == [1.0] * 8

    @pytest.mark.parametrize(
        "wrong", [Piece("a", (2,), ((0, 2),), torch.ones(2)), Piece("weights/a", (2,), ((0, 2),), torch.ones(3)),
                  Piece("weights/a", (2,), ((1, 3),), torch.ones(2))]
    )  # fmt: skip
    def test_a_piece_that_is_none_is_refused_where_it_is_given(self, tmp_path, wrong):
        with pytest.raises(ValueError, match="box .* of a tensor"):
            Writer(tmp_path, 2).save([wrong], {"step": 1})

    def test_the_same_box_twice_from_one_process(self, tmp_path):
        with pytest.raises(ValueError, match="is given twice"):
            Writer(tmp_path, 2).save([self.piece(0, 8), self.piece(0, 8)], {"step": 1})

    def test_gathered_pieces_need_not_be_there_all_at_once(self, tmp_path):
        def gathered():
            for index in range(4):
                yield Piece(f"weights/{index}", (3,), ((0, 3),), torch.full((3,), float(index)))

        writer = Writer(tmp_path, 2)
        writer.save(gathered(), {"step": 1})
        writer.finish()
        assert {name: value.tolist() for name, value in checkpoints.newest(tmp_path).tensors("weights").items()} == {
            str(index): [float(index)] * 3 for index in range(4)
        }


class TestKeeping:
    @pytest.mark.parametrize("keep, kept", [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
    def test_the_last_few_are_kept(self, tmp_path, keep, kept):
        writer = Writer(tmp_path, keep)
        for step in range(1, 6):
            writer.save(pieces(step, 0, 1), state(step))
        writer.finish()
        assert checkpoints.steps(tmp_path) == kept and len(left(tmp_path)) == len(kept)

    def test_the_same_step_again_replaces_it(self, tmp_path):
        checkpoint_writer.save(tmp_path, tensors(4), state(5), keep=2)
        checkpoint_writer.save(tmp_path, tensors(5), state(5), keep=2)
        assert same(checkpoints.newest(tmp_path), 5) and left(tmp_path) == ["step-00000005"]

    def test_a_damaged_one_ahead_never_costs_an_intact_one(self, tmp_path):
        """After going on from 10 past a damaged 20, checkpoint 15 counts from 15 back; the damaged one goes."""
        for step in (10, 20):
            saved(tmp_path, step)
        (checkpoints.folder(tmp_path, 20) / "manifest.json").write_text("{}")
        saved(tmp_path, 15, keep=1)
        assert checkpoints.steps(tmp_path) == [15]

    def test_whoever_looks_at_any_moment_sees_a_whole_one(self, tmp_path):
        """A reader beside the writer never meets a folder named step-… that is damaged, nor a run without checkpoints."""
        saved(tmp_path, 1)
        done, seen, bad = threading.Event(), set(), []

        def look() -> None:
            while not done.is_set():
                try:
                    seen.add(checkpoints.newest(tmp_path).state["step"])
                except (AttributeError, Damaged) as error:
                    bad.append(error)

        reader = threading.Thread(target=look)
        reader.start()
        writer = Writer(tmp_path, 2)
        for step in range(2, 30):
            writer.save(pieces(step, 0, 1, 2000), state(step))
        writer.finish()
        done.set()
        reader.join(timeout=60)
        assert not bad and len(seen) > 1


class TestDisk:
    @pytest.mark.parametrize("limit", [10, 1500, 4000])
    def test_one_that_refuses_leaves_earlier_ones_intact(self, tmp_path, limit):
        """A limit on the size of files: the writes themselves fail, in whichever file they first meet it."""
        saved(tmp_path, 10)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match=f"step-00000020: the checkpoint could not be written .*too large.*{INTACT}"):
                checkpoint_writer.save(tmp_path, tensors(20, 500), state(20), keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert left(tmp_path) == ["step-00000010"] and same(checkpoints.newest(tmp_path), 10)

    def test_a_full_one(self, disk):
        saved(disk, 10)
        with pytest.raises(UserError, match=rf"step-00000020: the checkpoint could not be written \(No space left on device\); {INTACT}"):
            checkpoint_writer.save(disk, tensors(20, 50000), state(20), keep=1)
        assert left(disk) == ["step-00000010"] and same(checkpoints.newest(disk), 10)
        assert same(checkpoints.open_checkpoint(saved(disk, 30, keep=1)), 30)

    def test_one_that_is_full_for_another_process_says_whose(self, disk):
        saved(disk, 10)
        every = [Writer(disk, 2, rank, 2, "job", limit=20.0) for rank in range(2)]
        every[0].save([Piece("weights/a", (1000000,), ((0, 10),), torch.ones(10))], {"step": 20})
        every[1].save([Piece("weights/a", (1000000,), ((10, 1000000),), torch.ones(999990))], {"step": 20})
        with pytest.raises(UserError, match=rf"could not be written \(process 1 of 2: No space left on device\); {INTACT}"):
            every[0].finish()
        with pytest.raises(UserError, match=rf"could not be written \(No space left on device\); {INTACT}"):
            every[1].finish()
        assert left(disk) == ["step-00000010"]

    def test_one_that_may_only_be_read(self, disk):
        saved(disk, 10)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match=rf"could not be written \(Read-only file system\); {INTACT}"):
            checkpoint_writer.save(disk, tensors(20), state(20), keep=1)
        assert left(disk) == ["step-00000010"] and same(checkpoints.newest(disk), 10)

    def test_a_file_in_the_place_of_the_folder(self, tmp_path):
        (tmp_path / "checkpoints").write_text("")
        with pytest.raises(UserError, match="could not be written"):
            checkpoint_writer.save(tmp_path, tensors(20), state(20), keep=1)

    def test_a_part_that_is_not_as_long_as_was_said_is_no_checkpoint(self, tmp_path, monkeypatch):
        write = tensor_file.write
        monkeypatch.setattr(tensor_file, "write", lambda path, *rest: (write(path, *rest), os.truncate(path, 9))[0])
        with pytest.raises(UserError, match="has 9 bytes and not the"):
            checkpoint_writer.save(tmp_path, tensors(5), state(5), keep=1)
        assert left(tmp_path) == []
