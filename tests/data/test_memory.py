"""Files behind one another in one stretch of memory."""

import mmap
import os

import numpy as np
import pytest

from megaflow.data.memory import Stretch

SIZES = (10, 5000, mmap.PAGESIZE, 1)


@pytest.fixture
def files(tmp_path):
    draws = np.random.default_rng(0)
    paths = []
    for number, size in enumerate(SIZES):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(draws.integers(1, 256, size, dtype=np.uint8).tobytes())
    return paths


def test_files_stand_at_their_places_with_zeros_between(files):
    stretch = Stretch(SIZES, spare=7)
    assert not stretch.bytes.any()
    for number in (2, 0, 3, 1):  # in any sequence
        assert stretch.map(number, files[number]).tobytes() == files[number].read_bytes()
    assert [stretch.place(number).tobytes() for number in range(4)] == [path.read_bytes() for path in files]
    assert np.count_nonzero(stretch.bytes) == sum(SIZES)
    assert len(stretch.bytes) == stretch.begins[3] + mmap.PAGESIZE + 7


def test_an_unmapped_file_is_zeros_and_can_come_back(files):
    stretch = Stretch(SIZES, spare=0)
    stretch.map(0, files[0]), stretch.map(1, files[1])
    stretch.unmap(1)
    assert not stretch.place(1).any() and stretch.place(0).all()
    assert stretch.map(1, files[1]).tobytes() == files[1].read_bytes()


def test_no_file_stays_open_and_nothing_stays_mapped(files, tmp_path):
    stretch, before = Stretch(SIZES, spare=0), len(os.listdir("/proc/self/fd"))
    for number, path in enumerate(files):
        stretch.map(number, path)
    assert len(os.listdir("/proc/self/fd")) == before
    maps = open("/proc/self/maps").read()
    assert all(f"{path}\n" in maps for path in files)
    del stretch
    assert str(tmp_path) not in open("/proc/self/maps").read()


def test_it_cannot_be_written_to(files):
    with pytest.raises(ValueError, match="read-only"):
        Stretch(SIZES, spare=0).map(0, files[0])[0] = 1


def test_a_file_that_is_not_there(files):
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        Stretch(SIZES, spare=0).map(0, files[0])
