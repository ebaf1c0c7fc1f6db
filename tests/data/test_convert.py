"""Converting changes the bytes of the shards and nothing that a run sees."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from megaflow.data import formats, shards
from megaflow.data.convert import convert
from megaflow.data.prepare import partial_prefix
from megaflow.data.stream import TokenStream
from megaflow.errors import UserError
from tests.data.conftest import SHARD_BYTES

OTHER = {"mds": "webdataset", "webdataset": "mds"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != shards.SECONDS_FILE
    }


@pytest.mark.parametrize("packing", ["wrap", "document"])
@pytest.mark.parametrize("format", OTHER)
def test_what_is_converted_is_what_prepare_would_have_written(folders, tmp_path, packing, format):
    manifest = convert(folders(packing, format), OTHER[format], tmp_path / "other")
    assert files(tmp_path / "other") == files(folders(packing, OTHER[format]))
    assert shards.verify(tmp_path / "other") == manifest
    convert(tmp_path / "other", format, tmp_path / "back")
    assert files(tmp_path / "back") == files(folders(packing, format))
    assert (tmp_path / "back" / shards.SECONDS_FILE).read_text() == (folders(packing, format) / shards.SECONDS_FILE).read_text()


def test_both_have_one_identity_and_other_rows_another(folders):
    known = {
        packing: {shards.identity(shards.open_prepared(folders(packing, format))) for format in OTHER} for packing in ("wrap", "document")
    }
    assert [len(one) for one in known.values()] == [1, 1]
    assert known["wrap"] != known["document"]


def test_a_folder_of_before_rows_were_hashed_keeps_what_runs_know_it_by(folders, tmp_path):
    """Such a run says of its shards what their files hash to."""
    old = Path(shutil.copytree(folders("wrap", "mds"), tmp_path / "old"))
    manifest = json.loads((old / shards.MANIFEST_FILE).read_text())
    del manifest["rows_sha256"], manifest["format"]
    (old / shards.MANIFEST_FILE).write_text(json.dumps(manifest))
    known = shards.identity(shards.open_prepared(old))
    assert known != shards.identity(shards.open_prepared(folders("wrap", "mds")))
    convert(old, "webdataset", tmp_path / "tar")
    convert(tmp_path / "tar", "mds", tmp_path / "back")
    for folder in ("tar", "back"):
        assert shards.identity(shards.open_prepared(tmp_path / folder)) == known
        before, after = (TokenStream(path, "train", seed=1).rows(range(500)) for path in (old, tmp_path / folder))
        assert before[0].equal(after[0])


def test_a_damaged_folder_is_not_converted(folders, tmp_path):
    damaged = Path(shutil.copytree(folders("wrap", "mds"), tmp_path / "data"))
    content = bytearray((damaged / "train" / "shard.00001.mds").read_bytes())
    content[-1] ^= 1
    (damaged / "train" / "shard.00001.mds").write_bytes(content)
    with pytest.raises(UserError, match="train/shard.00001.mds is not what prepare wrote"):
        convert(damaged, "webdataset", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_error_leaves_nothing_and_what_a_killed_one_left_goes(folders, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    killed = tmp_path / f"{partial_prefix(tmp_path / 'out')}{2**22 + 1}"  # no process has this number
    killed.mkdir()
    (killed / "half").write_text("a shard")
    with monkeypatch.context() as patch:
        patch.setattr(formats.ShardWriter, "finish", fail)
        with pytest.raises(UserError, match="out cannot be written: No space left on device"):
            convert(folders("wrap", "mds"), "webdataset", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    convert(folders("wrap", "mds"), "webdataset", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_refused(folders, tmp_path):
    source = folders("wrap", "mds")
    with pytest.raises(UserError, match="holds shards of format mds already"):
        convert(source, "mds", tmp_path / "out")
    with pytest.raises(UserError, match="lies within"):
        convert(source, "webdataset", source / "train" / "tar")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="out exists: choose another --out"):
        convert(source, "webdataset", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_one_leaves_nothing(cli, folders, tmp_path, monkeypatch, number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; a worker that runs tests ignores it
    try:
        monkeypatch.setattr(formats.ShardWriter, "write", lambda *_: os.kill(os.getpid(), number))
        told = cli("inspect", folders("wrap", "mds"), "--to", "webdataset", "--out", tmp_path / "tar")
    finally:
        signal.signal(signal.SIGINT, before)
    assert told.code == 130 and told.err.endswith(
        f"megaflow: interrupted; {tmp_path / 'tar'} is not made, and nothing of it is left; the same command begins anew\n"
    )
    assert not list(tmp_path.iterdir())
