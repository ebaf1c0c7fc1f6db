"""A safetensors file: any library opens it, it is written in a stream, and of a file larger than memory a box is read."""

import gc
import hashlib
import json
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megaflow.parallel import boxes
from megaflow.train import tensor_file
from tests.parallel.test_boxes import SHAPES, any_box, partition

TENSORS = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "double": torch.linspace(0, 1, 7, dtype=torch.float64),
    "number": torch.tensor(1.5),
    "nothing": torch.zeros(0, 3),
    "flags": torch.tensor([True, False, True]),
    **{name: torch.ones(2, dtype=dtype) for name, dtype in tensor_file.DTYPES.items()},
}


def written(path, tensors):
    return tensor_file.write(path, *tensor_file.given(tensors), {"format": "pt"})


def read(path, name, at=None):
    entry = tensor_file.entries(path)[name]
    return tensor_file.read(path, entry, boxes.full(entry.shape) if at is None else at)


class TestFormat:
    def test_the_library_reads_what_is_written(self, tmp_path):
        written(tmp_path / "f", TENSORS)
        found = load_file(tmp_path / "f")
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in TENSORS.items())
        with safe_open(tmp_path / "f", "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_what_the_library_writes_is_read(self, tmp_path):
        save_file(TENSORS, tmp_path / "f", {"format": "pt"})
        assert tensor_file.entries(tmp_path / "f").keys() == TENSORS.keys()
        for name, value in TENSORS.items():
            found = read(tmp_path / "f", name)
            assert torch.equal(found, value) and (found.dtype, found.shape) == (value.dtype, value.shape)

    def test_the_hash_is_that_of_the_file(self, tmp_path):
        content = written(tmp_path / "f", TENSORS)
        whole = (tmp_path / "f").read_bytes()
        assert content == (hashlib.sha256(whole).hexdigest(), len(whole)) and tensor_file.sha256(tmp_path / "f") == content[0]

    def test_views_and_parameters_are_written_by_their_values(self, tmp_path):
        tensors = {"t": torch.arange(12.0).view(3, 4).T, "v": torch.arange(10.0)[::2], "p": torch.nn.Parameter(torch.ones(2))}
        written(tmp_path / "f", tensors)
        assert all(torch.equal(read(tmp_path / "f", name), value) for name, value in tensors.items())

    @pytest.mark.long
    def test_a_block_is_asked_for_when_those_before_are_gone(self, tmp_path):
        alive: list[weakref.ref] = []

        def blocks_of(name: str):
            for block in range(4):
                gc.collect()
                assert all(reference() is None for reference in alive[:-1])  # the last one is what the loop's variable still names
                made = torch.arange(250.0) + 250 * block + 1000 * int(name)
                alive.append(weakref.ref(made))
                yield made
                del made

        tensor_file.write(tmp_path / "f", {str(name): (torch.float32, (1000,)) for name in range(5)}, blocks_of, {})
        assert len(alive) == 20
        assert all(torch.equal(read(tmp_path / "f", str(name)), torch.arange(1000.0) + 1000 * name) for name in range(5))

    def test_another_tensor_than_was_announced_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"a: 2 elements instead of \(3,\)"):
            tensor_file.write(tmp_path / "f", {"a": (torch.float32, (3,))}, lambda _: [torch.ones(2)], {})
        with pytest.raises(ValueError, match=r"a: torch.float64 instead of torch.float32"):
            tensor_file.write(tmp_path / "f", {"a": (torch.float32, (2,))}, lambda _: [torch.ones(2).double()], {})

    @pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x08" + bytes(7) + b'{"a": 1}'])
    def test_what_is_no_such_file_is_refused(self, tmp_path, content):
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(ValueError, match="not a safetensors file"):
            tensor_file.entries(tmp_path / "f")

    @pytest.mark.parametrize("offsets", [[0, 7], [0, 9], [-8, 0], [64, 72]])
    def test_a_tensor_that_is_not_where_the_header_says_is_refused(self, tmp_path, offsets):
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
        (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        with pytest.raises(ValueError, match="the place of a is wrong"):
            tensor_file.entries(tmp_path / "f")


class TestBoxes:
    @given(st.data())
    def test_any_box(self, tmp_path_factory, data):
        shape = data.draw(SHAPES)
        at, whole = data.draw(any_box(shape)), torch.arange(float(math.prod(shape))).view(shape)
        path = tmp_path_factory.getbasetemp() / "any-box"
        written(path, {"before": torch.ones(3), "a": whole})
        assert torch.equal(read(path, "a", at), whole[boxes.slices(at)])

    def test_a_box_of_a_file_larger_than_memory(self, tmp_path):
        """A terabyte, nearly all of it a hole in the file; a private mapping of it is refused."""
        rows = 2**28
        header = json.dumps({"a": {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [0, rows * 4096]}}).encode()
        with (tmp_path / "f").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            start = file.tell()
            file.truncate(start + rows * 4096)
            file.seek(start + (rows - 2) * 4096)
            file.write(torch.arange(2048.0).numpy().tobytes())
        assert read(tmp_path / "f", "a", ((rows - 3, rows), (5, 7))).tolist() == [[0, 0], [5, 6], [1029, 1030]]

    def test_a_file_that_has_become_shorter_is_an_error(self, tmp_path):
        written(tmp_path / "f", TENSORS)
        known = tensor_file.entries(tmp_path / "f")
        with (tmp_path / "f").open("r+b") as file:
            file.truncate(known["matrix"].start + 4)
        with pytest.raises(ValueError, match="ends too early"):
            tensor_file.read(tmp_path / "f", known["matrix"], ((0, 3), (0, 4)))


class TestContent:
    @given(st.data())
    def test_it_is_the_same_however_a_tensor_is_cut(self, data):
        shape = data.draw(SHAPES)
        held, kind = data.draw(partition(shape)), data.draw(st.sampled_from(list(tensor_file.NAMES)))
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(9).to(kind)
        parts = [tensor_file.content(whole[boxes.slices(box)].contiguous(), shape, box) for box in held]
        assert sum(parts) % 2**64 == tensor_file.content(whole, shape, boxes.full(shape))

    def test_blocks_make_no_difference(self, monkeypatch):
        whole = torch.randn(70, 33, generator=torch.Generator().manual_seed(0))
        found = {tensor_file.content(whole, whole.shape, boxes.full(whole.shape))}
        for block in (1, 7, 100, 2000):
            monkeypatch.setattr(tensor_file, "BLOCK", block)
            found.add(tensor_file.content(whole, whole.shape, boxes.full(whole.shape)))
            cut = [((0, 70), (0, 20)), ((0, 70), (20, 33))]
            parts = [tensor_file.content(whole[boxes.slices(box)].contiguous(), whole.shape, box) for box in cut]
            found.add(sum(parts) % 2**64)
        assert len(found) == 1

    def test_other_values_and_other_places_are_others(self):
        base = torch.arange(6.0).view(2, 3)
        others = [base, base + 1e-6, base.flip(0), base.flip(1), -base, base.T.contiguous().view(2, 3), base.double()]
        assert len({tensor_file.content(each, (2, 3), boxes.full((2, 3))) for each in others}) == len(others)
        near = base.clone()
        near[1, 2] = torch.nextafter(near[1, 2], torch.tensor(9.0))
        assert tensor_file.content(near, (2, 3), boxes.full((2, 3))) != tensor_file.content(base, (2, 3), boxes.full((2, 3)))
