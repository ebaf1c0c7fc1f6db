"""The two formats of shards: MDS of mosaicml-streaming and the tar of WebDataset, the same rows in the same shards.

    mds          shard.00000.mds: how many rows, where each begins, a description of the columns, then row after row
    webdataset   shard.00000.tar: one member a row, its number with the suffix .npy: an int32 array of the tokens that count
    index.json   in both: the shards in order and the rows of each, as streaming.LocalDataset and wids.ShardListDataset read it

A shard of either format holds as many rows as MDSWriter would put into one, because the order of training goes by the rows of the shards.
The bytes are those that MDSWriter and Python's tarfile write, to the last one. They are made and read here a shard at a time: through the
libraries, which go row by row, reading takes fifty times as long (tools/bench_data.py).
"""

import hashlib
import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megaflow.errors import UserError

SUFFIXES = {"mds": ".mds", "webdataset": ".tar"}
INDEX_FILE = "index.json"
TAR_BLOCK = 512
TAR_MAGIC, TAR_MAGIC_PLACE = int.from_bytes(b"\0ustar\x000", "little"), 256
"""What the header of a member has there, the closing zero of the field before it included."""
NPY_HEADER = 128
"""Bytes before the data of every .npy of one dimension."""


def row_type(length: int) -> np.dtype:
    """A row of `length` ids and how many of them count, laid out as MDS keeps it."""
    return np.dtype([("length", "<i8"), ("tokens", "<i4", (length,))])


def mds_columns(length: int, limit: int) -> dict[str, Any]:
    """MDSWriter's description of rows of `length` ids in shards of at most `limit` bytes."""
    return {
        "column_encodings": ["int", f"ndarray:int32:{length}"],
        "column_names": ["length", "tokens"],
        "column_sizes": [8, 4 * length],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": limit,
        "version": 2,
    }


def mds_header(length: int, limit: int) -> bytes:
    return json.dumps(mds_columns(length, limit), sort_keys=True).encode()


def rows_per_shard(length: int, limit: int) -> int:
    """Rows of `length` ids that MDSWriter puts into a shard of at most `limit` bytes."""
    return max(1, (limit - 8 - len(mds_header(length, limit))) // (row_type(length).itemsize + 4))


class ShardWriter:
    """Writes the shards of one split into a new folder, one at each `write`; `finish` writes the index."""

    def __init__(self, folder: Path, format: str, length: int, limit: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.format, self.length, self.limit = folder, format, length, limit
        self.shards: list[tuple[str, int, int]] = []  # name, rows, bytes
        self.rows, self.digest = 0, hashlib.sha256()

    def write(self, records: np.ndarray) -> None:
        """A shard of these rows, (n,) of row_type."""
        name = f"shard.{len(self.shards):05d}{SUFFIXES[self.format]}"
        data = mds_shard(records, self.limit) if self.format == "mds" else tar_shard(records, self.rows)
        (self.folder / name).write_bytes(data)
        self.shards.append((name, len(records), len(data)))
        self.rows += len(records)
        self.digest.update(records.tobytes())

    def finish(self) -> str:
        """Write the index; returns the sha256 of all rows end to end, which no format and no division into shards changes."""
        index = mds_index(self.shards, self.length, self.limit) if self.format == "mds" else wids_index(self.shards, self.folder.name)
        (self.folder / INDEX_FILE).write_text(json.dumps(index, sort_keys=True), "utf-8")
        return self.digest.hexdigest()


def mds_shard(records: np.ndarray, limit: int) -> bytes:
    """The bytes of an MDS shard of rows (n,) of row_type."""
    header = mds_header(records["tokens"].shape[1], limit)
    count = np.array([len(records)], "<u4")
    begins = np.arange(len(records) + 1) * records.itemsize + 4 * (len(records) + 2) + len(header)
    return count.tobytes() + begins.astype("<u4").tobytes() + header + records.tobytes()


def tar_shard(records: np.ndarray, first: int) -> bytes:
    """The bytes of a tar of rows (n,) of row_type, the first of them the row `first` of its split."""
    parts, size = [], 0
    for number, (tokens, count) in enumerate(zip(records["tokens"], records["length"].tolist(), strict=True), first):
        member = tarfile.TarInfo(f"{number:012d}.npy")
        member.size, member.mode = NPY_HEADER + 4 * count, 0o444
        padding = -member.size % TAR_BLOCK
        parts += [member.tobuf(tarfile.USTAR_FORMAT), npy_header(count), tokens[:count].tobytes(), bytes(padding)]
        size += TAR_BLOCK + member.size + padding
    end = 2 * TAR_BLOCK
    return b"".join([*parts, bytes(end + -(size + end) % tarfile.RECORDSIZE)])


@cache
def npy_header(count: int) -> bytes:
    """What stands before the data of a .npy of int32 (count,)."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (count,)})
    return file.getvalue()


def mds_index(shards: list[tuple[str, int, int]], length: int, limit: int) -> dict[str, Any]:
    """MDSWriter's index.json of shards (name, rows, bytes)."""
    columns = mds_columns(length, limit)
    described = [
        {**columns, "samples": rows, "raw_data": {"basename": name, "bytes": size, "hashes": {}}, "zip_data": None}
        for name, rows, size in shards
    ]
    return {"version": 2, "shards": described}


def wids_index(shards: list[tuple[str, int, int]], split: str) -> dict[str, Any]:
    """What wids.ShardListDataset reads, of shards (name, rows, bytes)."""
    described = [{"url": name, "nsamples": rows, "filesize": size} for name, rows, size in shards]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": split, "shardlist": described}


def listed_shards(folder: Path, format: str) -> list[tuple[str, int]]:
    """(name, rows) of every shard of a split's folder, in order. Raises UserError where the index is not of this format."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text("utf-8"))
        if format == "mds":
            return [(shard["raw_data"]["basename"], shard["samples"]) for shard in index["shards"]]
        return [(shard["url"], shard["nsamples"]) for shard in index["shardlist"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / INDEX_FILE} is not an index of {format} shards: run megaflow prepare again.") from error


def layout(content: np.ndarray, format: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in a shard's bytes the tokens of each row begin, (n,) int64, and how many of them count, (n,) int64.

    From there on `length` ids are the row in mds, padding included; in a tar those that do not count are something else.
    """
    return _mds_layout(content, length) if format == "mds" else _tar_layout(content)


def _mds_layout(content: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    count, begin = content[:8].view("<u4").tolist()
    width = row_type(length).itemsize
    lengths = np.ndarray((count,), "<i8", content, begin, (width,)).astype(np.int64)
    return begin + 8 + width * np.arange(count), lengths


def _tar_layout(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Eight bytes of every block at a time. None of tokens looks like a header's: it would hold an id above a billion.
    heads = np.flatnonzero(content.view("<u8").reshape(-1, TAR_BLOCK // 8)[:, TAR_MAGIC_PLACE // 8] == TAR_MAGIC)
    digits = content.reshape(-1, TAR_BLOCK)[heads, 124:135].astype(np.int64) - ord("0")
    sizes = digits @ 8 ** np.arange(10, -1, -1)
    return heads * TAR_BLOCK + TAR_BLOCK + NPY_HEADER, (sizes - NPY_HEADER) // 4
