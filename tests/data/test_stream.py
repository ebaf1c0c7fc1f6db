"""The order of a run: every row once an epoch, a pure function of (seed, epoch), resumed by one number, the same in both formats."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import LocalDataset

from megaflow.data import stream as streams
from megaflow.data.stream import TokenStream, read_ahead
from megaflow.errors import UserError

FORMATS = ("mds", "webdataset")


@pytest.fixture(params=FORMATS)
def folder(folders, request) -> Path:
    """Some hundred rows of four different bytes each, in several shards of either format."""
    return folders("wrap", request.param)


def identities(stream: TokenStream, places) -> list[bytes]:
    ids, _ = stream.rows(places)
    return [row.numpy().tobytes() for row in ids]


def test_rows_have_shape_and_type(folder):
    ids, lengths = TokenStream(folder, "train", seed=0).rows(torch.tensor([5, 0, 7]))
    assert ids.shape == (3, 4) and ids.dtype == torch.int64
    assert lengths.tolist() == [4, 4, 4] and lengths.dtype == torch.int64
    ids += 1  # writable


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(folder):
    stream = TokenStream(folder, "train", seed=3)
    epochs = [identities(stream, range(epoch * len(stream), (epoch + 1) * len(stream))) for epoch in range(3)]
    assert len(set(epochs[0])) == len(stream)
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_of_all_shards_are_mixed(folder):
    stream = TokenStream(folder, "train", seed=0)
    sizes = stream.sizes
    assert len(sizes) > 3
    shard = np.repeat(np.arange(len(sizes)), sizes)[stream.order(0)]
    assert len(set(shard[: len(stream) // 4])) > len(sizes) // 2
    assert np.abs(np.diff(stream.order(0))).mean() > len(stream) / 10


def test_the_order_is_a_function_of_seed_and_epoch(folder):
    one, same = TokenStream(folder, "train", seed=1), TokenStream(folder, "train", seed=1)
    last = same.order(4)  # asked for in another sequence
    assert all((one.order(epoch) == same.order(epoch)).all() for epoch in range(4)) and (one.order(4) == last).all()
    orders = {TokenStream(folder, "train", seed=seed).order(epoch).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_resuming_at_a_place_is_exact(folder):
    whole = identities(TokenStream(folder, "train", seed=0), range(900))
    for place in (1, 137, 399, 500, 899):
        assert identities(TokenStream(folder, "train", seed=0), range(place, 900)) == whole[place:]


def test_any_number_of_processes_reads_the_same_global_batches(folder):
    batch, steps = 12, 60
    whole = identities(TokenStream(folder, "train", seed=0), range(batch * steps))
    for processes in (1, 2, 3, 4):
        streams = [TokenStream(folder, "train", seed=0) for _ in range(processes)]
        share = batch // processes
        read = []
        for step in range(steps):
            for rank, stream in enumerate(streams):
                begin = step * batch + rank * share
                read += identities(stream, range(begin, begin + share))
        assert read == whole


def test_a_batch_may_straddle_epochs_in_any_sequence(folder):
    stream = TokenStream(folder, "train", seed=0)
    rows = len(stream)
    places = [rows - 1, rows, 2 * rows, 3 * rows - 1, 0, 5 * rows]
    assert identities(stream, places) == [identities(TokenStream(folder, "train", seed=0), [place])[0] for place in places]


def test_without_shuffle_the_order_is_the_written_one(folder, folders):
    stream = TokenStream(folder, "validation", seed=0, shuffle=False)
    written = [sample["tokens"].astype(np.int64).tobytes() for sample in LocalDataset(str(folders("wrap", "mds")), "validation")]
    assert identities(stream, range(2 * len(stream))) == written * 2


@pytest.mark.parametrize("packing", ["wrap", "document"])
def test_both_formats_hold_the_same_rows_in_the_same_order(folders, packing):
    one, other = (TokenStream(folders(packing, format), "train", seed=5) for format in FORMATS)
    assert len(one) == len(other) and len(one.names) == len(other.names) > 3
    for first in range(0, 2 * len(one), 100):
        places = range(first, first + 100)
        for left, right in zip(one.rows(places), other.rows(places), strict=True):
            assert left.equal(right)


def test_orders_of_runs_that_were_begun_long_ago_are_what_they_were():
    order = streams.epoch_order(np.array([5, 5, 2]), seed=3, epoch=1)
    assert order.tolist() == [2, 6, 7, 8, 11, 0, 3, 9, 5, 10, 4, 1]


@pytest.mark.parametrize("format", FORMATS)
def test_padding_is_zero_and_not_counted(folders, format):
    stream = TokenStream(folders("document", format), "train", seed=0)
    ids, lengths = stream.rows(range(len(stream)))
    assert set(lengths.tolist()) == {2, 3, 4}
    for row, length in zip(ids, lengths, strict=True):
        assert (row[:length] > 0).all() and (row[length:] == 0).all()
    assert sorted(stream.lengths().tolist()) == sorted(lengths.tolist())


def test_few_shards_are_mapped_at_a_time(folder, monkeypatch):
    """A row is the same however often its shard has come and gone, and however many shards a batch needs."""
    whole = identities(TokenStream(folder, "train", seed=0), range(500))
    monkeypatch.setattr(streams, "MAPPED", 2)
    stream = TokenStream(folder, "train", seed=0)
    assert [identities(stream, [place])[0] for place in range(500)] == whole
    assert len(stream.mapped) == 2 < len(stream.names)
    assert identities(stream, range(500)) == whole


class TestDamage:
    """A shard is compared when its first row is read, not before: a run does not read all shards at its start."""

    @pytest.fixture
    def opened(self, folder, tmp_path):
        """A stream in written order, its third shard, and the place of that shard's first row."""
        copy = Path(shutil.copytree(folder, tmp_path / "data"))
        stream = TokenStream(copy, "train", seed=0, shuffle=False)
        return stream, copy / stream.names[2], int(stream.ends[1])

    def refused(self, opened, told: str) -> None:
        stream, _, first = opened
        stream.rows(range(first))
        for _ in range(2):  # nor the second time
            with pytest.raises(UserError, match=told):
                stream.rows([0, first])
        with pytest.raises(UserError, match=told):
            list(read_ahead(stream, [[0], [first], [1]]))

    def test_a_changed_bit(self, opened):
        content = bytearray(opened[1].read_bytes())
        content[len(content) // 2] ^= 1
        opened[1].write_bytes(content)
        self.refused(opened, rf"train/{opened[1].name} is not what prepare wrote \(sha256 differs\)")

    def test_cut_short(self, opened):
        content = opened[1].read_bytes()
        opened[1].write_bytes(content[:-512])
        self.refused(opened, f"train/{opened[1].name} has {len(content) - 512} bytes instead of {len(content)}")

    def test_missing(self, opened):
        opened[1].unlink()
        self.refused(opened, f"train/{opened[1].name} is missing")

    def test_missing_from_the_start(self, opened):
        opened[1].unlink()
        with pytest.raises(UserError, match=f"train/{opened[1].name} is missing"):
            TokenStream(opened[0].folder, "train", seed=0)


class TestReadAhead:
    def test_the_batches_are_those_of_the_stream(self, folder):
        batches = [torch.arange(step * 7, step * 7 + 7) for step in range(80)]
        expected = [identities(TokenStream(folder, "train", seed=0), places) for places in batches]
        for ahead in (1, 3, 100):
            found = read_ahead(TokenStream(folder, "train", seed=0), iter(batches), ahead)
            assert [[row.numpy().tobytes() for row in ids] for ids, _ in found] == expected

    def test_it_reads_no_further_than_it_was_told(self, folder):
        """Three batches wait, and the places of a fourth are known."""
        asked = []
        batches = (asked.append(step) or [step] for step in range(100))
        with contextlib.closing(read_ahead(TokenStream(folder, "train", seed=0), batches, ahead=3)) as rows:
            for step in range(5):
                next(rows)
                deadline = time.monotonic() + 60
                while len(asked) < step + 5 and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(0.02)
                assert asked == list(range(step + 5))

    def test_closing_it_leaves_no_thread(self, folder):
        before = threading.active_count()
        with contextlib.closing(read_ahead(TokenStream(folder, "train", seed=0), ([step] for step in range(100)))) as rows:
            next(rows)
            assert threading.active_count() == before + 1
        assert threading.active_count() == before

    def test_what_a_batch_raises_comes_after_the_batches_before_it(self, folder):
        rows = read_ahead(TokenStream(folder, "train", seed=0), [[0], [1], [-1], [2]])
        next(rows), next(rows)
        with pytest.raises(ValueError, match="not negative"):
            next(rows)


READER = """
import sys
from megaflow.data.stream import TokenStream, read_ahead

steps, *folders = sys.argv[1:]
batches = [read_ahead(TokenStream(folder, "train", seed=0), ([step] for step in range(int(steps)))) for folder in folders]
for (mds, _), (tar, _) in zip(*batches, strict=True):
    print(mds.tolist(), tar.tolist(), flush=True)
"""


def test_a_killed_reader_leaves_nothing_and_the_next_one_starts(folders, tmp_path, environment):
    """No shared memory, no locks, no temporary files, nothing written to the shards."""
    read_folders = [folders("wrap", format) for format in FORMATS]

    def state() -> list[tuple[str, int, int]]:
        files = [path for folder in read_folders for path in folder.rglob("*")]
        return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)

    def shared_memory() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if re.match(r"\d{6}_", name)}  # as mosaicml-streaming names its own

    (tmp_path / "temporary").mkdir()
    own = environment | {"TMPDIR": str(tmp_path / "temporary")}

    def command(steps: int) -> list[str]:
        return [sys.executable, "-c", READER, str(steps), *map(str, read_folders)]

    before, shared = state(), shared_memory()
    with subprocess.Popen(command(10**9), stdout=subprocess.PIPE, env=own, text=True) as process:
        read = [process.stdout.readline() for _ in range(20)]
        assert "/dev/shm" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.kill()
    assert process.returncode == -9
    assert state() == before and shared_memory() == shared and not list((tmp_path / "temporary").iterdir())
    again = subprocess.run(command(20), stdout=subprocess.PIPE, env=own, text=True, check=True, timeout=100)
    assert again.stdout.splitlines(keepends=True) == read


def test_errors(folder, tmp_path):
    with pytest.raises(UserError, match="no split 'test'"):
        TokenStream(folder, "test", seed=0)
    with pytest.raises(UserError, match="run megaflow prepare"):
        TokenStream(tmp_path / "nowhere", "train", seed=0)
    with pytest.raises(ValueError, match="not negative"):
        TokenStream(folder, "train", seed=0).rows([-1])
