"""Shards are what the libraries write, and each library opens its own format with neither the other one nor MegaFlow at hand."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from megaflow.data import formats
from megaflow.data.stream import TokenStream


def made_up(rows: int, length: int) -> np.ndarray:
    draws = np.random.default_rng(0)
    records = np.zeros(rows, formats.row_type(length))
    records["length"] = draws.integers(1, length + 1, rows)
    records["tokens"] = draws.integers(1, 50_000, (rows, length)) * (np.arange(length) < records["length"][:, None])
    return records


def written(folder: Path, format: str, records: np.ndarray, limit: int) -> dict[str, bytes]:
    length = records["tokens"].shape[1]
    writer, share = formats.ShardWriter(folder, format, length, limit), formats.rows_per_shard(length, limit)
    for first in range(0, len(records), share):
        writer.write(records[first : first + share])
    writer.finish()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("rows, length, limit", [(200, 4, 2000), (99, 5, 2000), (7, 33, 5000), (3, 16, 2000), (70, 1024, 1 << 16)])
def test_mds_is_what_its_library_writes_to_the_byte(tmp_path, rows, length, limit):
    records = made_up(rows, length)
    columns = {"tokens": f"ndarray:int32:{length}", "length": "int"}
    with MDSWriter(columns=columns, out=str(tmp_path / "theirs"), size_limit=limit) as writer:
        for record in records:
            writer.write({"tokens": record["tokens"], "length": int(record["length"])})
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert written(tmp_path / "ours", "mds", records, limit) == theirs


def test_a_tar_has_one_npy_a_row_of_the_tokens_that_count(tmp_path):
    """To the byte what Python's tarfile and NumPy make of them."""
    records, share = made_up(150, 9), formats.rows_per_shard(9, 2000)
    files = written(tmp_path / "train", "webdataset", records, 2000)
    assert len(files) == -(-150 // share) + 1 > 4
    for number, first in enumerate(range(0, 150, share)):
        expected = io.BytesIO()
        with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, record in enumerate(records[first : first + share], first):
                content = io.BytesIO()
                np.save(content, record["tokens"][: record["length"]])
                member = tarfile.TarInfo(f"{row:012d}.npy")
                member.size, member.mode = len(content.getvalue()), 0o444
                tar.addfile(member, io.BytesIO(content.getvalue()))
        assert files[f"shard.{number:05d}.tar"] == expected.getvalue()
    index = json.loads(files["index.json"])
    assert index["name"] == "train" and sum(shard["nsamples"] for shard in index["shardlist"]) == 150


@pytest.mark.parametrize("format", ["mds", "webdataset"])
@pytest.mark.parametrize("length", [1, 2, 95, 96, 97, 1000])
def test_the_layout_finds_every_row(length, format):
    records = made_up(40, length)
    shard = formats.mds_shard(records, 10**6) if format == "mds" else formats.tar_shard(records, 123)
    content = np.frombuffer(shard, np.uint8)
    begins, lengths = formats.layout(content, format, length)
    assert lengths.tolist() == records["length"].tolist()
    for begin, record in zip(begins, records, strict=True):
        tokens = record["tokens"][: record["length"]]
        assert content[begin : begin + 4 * len(tokens)].tobytes() == tokens.tobytes()


def test_the_hash_of_the_rows_knows_neither_format_nor_division(tmp_path):
    records = made_up(50, 6)
    found = set()
    for format in formats.SUFFIXES:
        for limit in (1500, 10**6):
            writer, share = formats.ShardWriter(tmp_path / f"{format}{limit}", format, 6, limit), formats.rows_per_shard(6, limit)
            for first in range(0, 50, share):
                writer.write(records[first : first + share])
            found.add(writer.finish())
    assert len(found) == 1
    records["tokens"][17, 0] += 1
    writer = formats.ShardWriter(tmp_path / "other", "mds", 6, 10**6)
    writer.write(records)
    assert writer.finish() not in found


STREAMING_ALONE = """
import sys
for name in ("megaflow", "webdataset", "wids"):
    sys.modules[name] = None
import io
import json
from streaming import LocalDataset
rows = LocalDataset(sys.argv[1], "train")
print(json.dumps([rows[number]["tokens"][: rows[number]["length"]].tolist() for number in range(len(rows))]))
"""
WIDS_ALONE = """
import sys
for name in ("megaflow", "streaming"):
    sys.modules[name] = None
import io
import json
from wids import ShardListDataset
rows = ShardListDataset(sys.argv[1] + "/train/index.json", cache_dir=sys.argv[2])
print(json.dumps([rows[number][".npy"].tolist() for number in range(len(rows))]))
"""
WEBDATASET_ALONE = """
import sys
for name in ("megaflow", "streaming"):
    sys.modules[name] = None
import glob, json
from webdataset import WebDataset
rows = WebDataset(sorted(glob.glob(sys.argv[1] + "/train/*.tar")), shardshuffle=False).decode()
print(json.dumps([row["npy"].tolist() for row in rows]))
"""


@pytest.mark.parametrize(
    "format, program",
    [("mds", STREAMING_ALONE), ("webdataset", WIDS_ALONE), ("webdataset", WEBDATASET_ALONE)],
    ids=["mds", "wids", "webdataset"],
)
def test_a_library_alone_reads_every_row(folders, process, tmp_path, format, program):
    stream = TokenStream(folders("document", format), "train", seed=0, shuffle=False)
    ids, lengths = stream.rows(range(len(stream)))
    (tmp_path / "cache").mkdir()
    told = process("-c", program, stream.folder, tmp_path / "cache")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
