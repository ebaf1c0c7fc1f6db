"""megaflow inspect: what a folder holds, all of it checked, or one sentence that says what is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from megaflow.data import shards

FORMATS = ("mds", "webdataset")


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_folder_holds(cli, folders, format):
    told = cli("inspect", folders("document", format), "--json", "--rows", 2)
    found = json.loads(told.out)
    manifest = shards.open_prepared(folders("document", format))
    assert (told.code, found["format"], found["identity"]) == (0, format, shards.identity(manifest))
    assert found["sources"] == manifest["sources"] and found["verified_files"] == len(manifest["files"])
    train = found["splits"]["train"]
    assert {name: train[name] for name in manifest["splits"]["train"]} == manifest["splits"]["train"]
    assert train["shards"] == len([name for name in manifest["files"] if name.startswith("train/shard.")]) > 3
    assert (train["lengths"]["least"], train["lengths"]["median"], train["lengths"]["most"]) == (2, 4, 4)
    assert train["lengths"]["mean"] == pytest.approx(train["tokens"] / train["rows"])
    assert train["first_rows"] == [{"row": 0, "length": 2, "text": "0\n"}, {"row": 1, "length": 2, "text": "1\n"}]


def test_the_same_for_a_person(cli, folders):
    told = cli("inspect", folders("wrap", "webdataset"), "--rows", 1)
    assert told.code == 0
    for part in (
        "format     webdataset",
        "packing wrap",
        "wrap.txt (text, 1,599 bytes",
        "train: documents 3",
        "lengths    least 4",
        "'000\\n'",
    ):
        assert part in told.out


@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_named(cli, folders, tmp_path, format):
    data = Path(shutil.copytree(folders("wrap", format), tmp_path / "data"))
    first, second, third = sorted((data / "train").glob("shard.*"))[:3]
    content = bytearray(first.read_bytes())
    content[len(content) // 3] ^= 1
    first.write_bytes(content)
    told = cli("inspect", data)
    assert told.code == 2 and f"train/{first.name} is not what prepare wrote (sha256 differs)" in told.err and not told.out
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    told = cli("inspect", data)
    names = ", ".join(f"train/{path.name}" for path in (first, second, third))
    assert told.code == 2 and f"3 files are missing or not what prepare wrote ({names})" in told.err and not told.out
    (data / "unigram.npy").unlink()
    told = cli("inspect", data)
    assert told.code == 2 and "4 files are missing" in told.err and "unigram.npy" in told.err and names in told.err


def test_what_prepare_has_not_written_is_named(cli, folders, tmp_path):
    data = Path(shutil.copytree(folders("wrap", "mds"), tmp_path / "data"))
    assert json.loads(cli("inspect", data, "--json").out)["unnamed_files"] == [] and "besides" not in cli("inspect", data).out
    for number in range(4):
        (data / f"train/shard.9{number}.mds").write_bytes(b"more")
    told = cli("inspect", data)
    assert told.code == 0 and "besides    train/shard.90.mds, train/shard.91.mds, train/shard.92.mds, …: not prepare's" in told.out
    assert json.loads(cli("inspect", data, "--json").out)["unnamed_files"] == [f"train/shard.9{number}.mds" for number in range(4)]


def test_a_folder_that_is_not_there_or_something_else(cli, tmp_path):
    told = cli("inspect", tmp_path / "nowhere")
    assert told.code == 2 and f"there is no folder {tmp_path / 'nowhere'}" in told.err
    told = cli("inspect", tmp_path)
    assert told.code == 2 and f"{tmp_path} is not a prepared folder" in told.err


def test_one_format_into_the_other(cli, folders, tmp_path):
    told = cli("inspect", folders("wrap", "mds"), "--to", "webdataset", "--out", tmp_path / "tar", "--json")
    found = json.loads(told.out)
    assert (told.code, found["path"], found["format"]) == (0, str(tmp_path / "tar"), "webdataset")
    assert (
        shards.identity(shards.verify(tmp_path / "tar"))
        == found["identity"]
        == shards.identity(shards.open_prepared(folders("wrap", "mds")))
    )


@pytest.mark.parametrize("arguments", [("--to", "mds"), ("--out", "somewhere")])
def test_a_format_without_a_folder_and_a_folder_without_a_format(cli, folders, arguments):
    told = cli("inspect", folders("wrap", "webdataset"), *arguments)
    assert told.code == 2 and "--to and --out go together" in told.err
    told = cli("inspect", folders("wrap", "webdataset"), "--rows", "-1")
    assert told.code == 2 and "--rows: -1 is below 0" in told.err
