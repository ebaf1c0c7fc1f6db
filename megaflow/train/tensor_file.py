"""One safetensors file: written tensor by tensor and hashed on the way, read box by box.

The format is eight bytes of length, a JSON header and the tensors' bytes (huggingface.co/docs/safetensors); any library of that name opens
what is written here. It is written and read here because the library needs all tensors at once and a second pass for the hash, and
reads by a private mapping, which the system refuses for a file larger than memory and which kills the process where a disk fails.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaflow.errors import reason
from megaflow.parallel import boxes
from megaflow.parallel.boxes import Box

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**24
"""Bytes that are hashed and written at a time."""
LARGEST_HEADER = 100 * 2**20
"""Bytes; the format's own limit, which keeps a damaged length from asking for all memory."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type, its shape and the byte at which it starts."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


Kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Types and shapes of tensors, by name."""


def given(tensors: dict[str, Tensor]) -> tuple[Kinds, Callable[[str], Iterable[Tensor]]]:
    """What `write` asks for, of tensors that are all at hand."""
    return kinds_of(tensors), lambda name: [tensors[name]]


def kinds_of(tensors: dict[str, Tensor]) -> Kinds:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, kinds: Kinds, blocks_of: Callable[[str], Iterable[Tensor]], metadata: dict[str, str]) -> tuple[str, int]:
    """Write the tensors of these types and shapes, asking for each when its turn comes; have them on disk. Returns SHA-256 and bytes.

    blocks_of(name): the tensor in any number of blocks whose elements, laid end to end, are its own in row-major order. Raises OSError
    where the disk refuses.
    """
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))  # the widest first: every tensor is aligned
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in order:
        dtype, shape = kinds[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(content: bytes | memoryview) -> None:
            for first in range(0, len(content), CHUNK):
                part = content[first : first + CHUNK]
                digest.update(part)
                file.write(part)

        put(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            (dtype, shape), count = kinds[name], 0
            for block in blocks_of(name):
                if block.dtype != dtype:
                    raise ValueError(f"{name}: {block.dtype} instead of {dtype}")
                count += block.numel()
                if block.numel():
                    put(raw(block.detach().cpu().contiguous()))
            if count != math.prod(shape):
                raise ValueError(f"{name}: {count} elements instead of {shape}")
        file.flush()
        os.fsync(file.fileno())
        return digest.hexdigest(), file.tell()


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file. Raises OSError, ValueError where it is none."""
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{path}: not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {
                name: Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in header.items()
            }
            ends = [8 + length + entry["data_offsets"][1] for entry in header.values()]
            for (name, entry), end in zip(found.items(), ends, strict=True):
                whole = all(type(x) is int and x >= 0 for x in (*entry.shape, entry.start, end))
                if not whole or math.prod(max(size, 1) for size in entry.shape) >= 2**63:
                    raise ValueError(f"the shape or the place of {name} is none")
                if not 8 + length <= entry.start <= end <= size or end - entry.start != entry.dtype.itemsize * math.prod(entry.shape):
                    raise ValueError(f"the place of {name} is wrong")
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: not a safetensors file ({reason(error)})") from None
    return found


def read(path: Path, entry: Entry, at: Box) -> Tensor:
    """A box of a file's tensor; nothing but its bytes is read. Raises OSError, ValueError where the file ends before."""
    found = torch.empty(boxes.shape_of(at), dtype=entry.dtype)
    if not found.numel():
        return found
    firsts, length = boxes.runs(entry.shape, at)
    target, width = raw(found), entry.dtype.itemsize
    with path.open("rb", buffering=0) as file:
        for index, first in enumerate(firsts.tolist()):
            _fill(file.fileno(), target[index * length * width : (index + 1) * length * width], entry.start + first * width, path)
    return found


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, its own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of SplitMix64 (Steele, Lea, Flood 2014), whose output function scatters 64 bits."""
BLOCK = 2**16
"""Elements that are scattered at a time, small enough to stay in a core's cache."""


def content(tensor: Tensor, shape: tuple[int, ...], at: Box) -> int:
    """A sum over the elements of box `at` of a tensor of this shape, modulo 2^64, of each one's bits scattered together with its place.

    Being a sum, it is the same for a whole tensor however that is cut into boxes. It tells apart contents that came to differ, not
    ones that were made to collide. By NumPy, which takes one core: it runs beside training.
    """
    if not tensor.numel():
        return 0
    firsts, length = boxes.runs(shape, at)
    bits = np.frombuffer(raw(tensor), f"u{tensor.dtype.itemsize}").reshape(len(firsts), length)
    rows, columns, total = max(BLOCK // length, 1), min(length, BLOCK), 0
    weyl, one, two = map(np.uint64, SPLITMIX)
    for row in range(0, len(firsts), rows):
        for column in range(0, length, columns):
            part = bits[row : row + rows, column : column + columns]
            z = (firsts[row : row + rows, None] + np.arange(column + 1, column + 1 + part.shape[1])).astype(np.uint64)
            z *= weyl
            z += part
            z ^= z >> np.uint64(30)
            z *= one
            z ^= z >> np.uint64(27)
            z *= two
            z ^= z >> np.uint64(31)
            total += int(z.sum(dtype=np.uint64))
    return total % 2**64


def _fill(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    while len(target):
        count = os.preadv(descriptor, [target[: 2**30]], offset)
        if not count:
            raise ValueError(f"{path}: the file ends too early")
        target, offset = target[count:], offset + count
