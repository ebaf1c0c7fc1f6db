"""Opening a prepared folder: everything is there and whole, or one sentence says what is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megaflow.data import shards, tokenizer
from megaflow.errors import UserError

LENGTH = 8


@pytest.fixture
def folder(tmp_path) -> Path:
    """A prepared folder of one document, abc…, in each split."""
    letters = tokenizer.characters_tokenizer("abcdefghij")
    tokenizer.save_tokenizer(letters, tmp_path)
    counts = {}
    for split in shards.SPLITS:
        writer = shards.SplitWriter(tmp_path, split, LENGTH, "wrap", 11)
        writer.add(np.arange(10, dtype=np.int32), 10, True)
        writer.end_document(10)
        counts[split] = writer.finish(letters)
        np.save(tmp_path / shards.UNIGRAM_FILE, writer.unigram)
    described = {"sources": [], "settings": {}, "tokenizer": {"hash": tokenizer.tokenizer_hash(letters)}, "packing": "wrap"}
    shards.write_manifest(tmp_path, {"length": LENGTH, "splits": counts, **described})
    return tmp_path


def test_the_manifest_comes_back(folder):
    manifest = shards.open_prepared(folder)
    assert manifest["splits"]["train"] == {"documents": 1, "rows": 1, "tokens": 8, "characters": 8, "dropped_tokens": 3}
    assert sorted(manifest["files"]) == [
        "tokenizer.json",
        "train/index.json",
        "train/shard.00000.mds",
        "unigram.npy",
        "validation/index.json",
        "validation/shard.00000.mds",
    ]
    assert shards.verify(folder) == manifest


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*nowhere: run megaflow prepare"):
        shards.open_prepared(tmp_path / "nowhere")


def test_not_prepared_says_what_is_missing(folder):
    (folder / "prepared.json").unlink()
    with pytest.raises(UserError, match=r"is not a prepared folder, it lacks prepared.json: run megaflow prepare"):
        shards.open_prepared(folder)


def test_a_missing_shard(folder):
    (folder / "train" / "shard.00000.mds").unlink()
    with pytest.raises(UserError, match="train/shard.00000.mds is missing"):
        shards.open_prepared(folder)


def test_small_files_that_are_missing(folder):
    (folder / "unigram.npy").unlink()
    (folder / "train" / "index.json").unlink()
    with pytest.raises(UserError, match="lacks unigram.npy, train/index.json, which prepare wrote: restore it"):
        shards.open_prepared(folder)


def test_a_shard_cut_short(folder):
    path = folder / "validation" / "shard.00000.mds"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"validation/shard.00000.mds has {size - 7} bytes instead of {size}"):
        shards.open_prepared(folder)


def test_a_changed_byte_is_found_by_verify(folder):
    path = folder / "train" / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shards.open_prepared(folder)
    with pytest.raises(UserError, match=r"train/shard.00000.mds is not what prepare wrote"):
        shards.verify(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "train/index.json", "unigram.npy"])
def test_a_changed_byte_of_a_small_file_is_found_at_once(folder, name):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is not what prepare wrote"):
        shards.open_prepared(folder)


def test_a_format_from_the_future(folder):
    manifest = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps(manifest | {"format": "parquet"}))
    with pytest.raises(UserError, match="names shards of format parquet, this MegaFlow reads mds and webdataset"):
        shards.open_prepared(folder)


def test_a_version_from_the_future(folder):
    manifest = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="has version 99, this MegaFlow reads 1"):
        shards.open_prepared(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "\x00", '{"version": 1, "files": {}}'])
def test_a_damaged_manifest(folder, content):
    (folder / "prepared.json").write_text(content)
    with pytest.raises(UserError, match="prepared.json is damaged"):
        shards.open_prepared(folder)


def test_the_law_of_lengths_is_that_of_the_training_rows(tmp_path):
    """Each length half a row more, none empty; rows that are all full have no law."""
    assert shards.log_length_law(tmp_path) is None
    np.save(tmp_path / shards.LENGTH_COUNTS_FILE, np.array([0, 3, 0, 5]))
    np.testing.assert_allclose(np.exp(shards.log_length_law(tmp_path)), np.array([0.0, 3.5, 0.5, 5.5]) / 9.5)


def test_the_description_of_a_folder_is_all_but_its_rows(folder, tmp_path):
    """Kept elsewhere it says the same of itself, and damage is seen; a copy that was cut short is made anew."""
    kept = tmp_path / "kept"
    (tmp_path / "kept.partial").mkdir()
    (tmp_path / "kept.partial" / "tokenizer.json").write_text("half of")
    shards.copy_description(folder, kept)
    assert {path.name for path in kept.iterdir()} == {"prepared.json", "tokenizer.json", "unigram.npy"}
    assert shards.read_description(kept) == shards.open_prepared(folder)
    for name in ("tokenizer.json", "prepared.json"):
        (kept / name).write_text("{}")
        with pytest.raises(UserError, match=f"{kept}: cannot tell what the run was trained on"):
            shards.read_description(kept)
        shutil.copy(folder / name, kept / name)
    (kept / "unigram.npy").unlink()
    with pytest.raises(UserError, match="unigram.npy"):
        shards.read_description(kept)
