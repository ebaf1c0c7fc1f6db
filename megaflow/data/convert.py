"""One format of shards into the other: `megaflow inspect PATH --to FORMAT --out DIR`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from megaflow import process
from megaflow.data import formats, shards
from megaflow.data.prepare import folder_in_one_step, remove_stale
from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import TOKENIZER_FILE
from megaflow.errors import UserError
from megaflow.progress import Progress

COPIED = (TOKENIZER_FILE, shards.UNIGRAM_FILE, shards.LENGTH_COUNTS_FILE)


def convert(folder: str | Path, format: str, out: str | Path) -> dict[str, Any]:
    """Write the rows of a prepared folder to the new folder `out` in the other format, and return its manifest.

    The rows of a shard stay together, so that every order of training stays what it was, and the two folders have one identity: a run
    goes on from either. `out` gets its name in one step, when it is whole. Raises UserError for a folder that is damaged, or has this
    format already, and for an `out` that is there.
    """
    folder, out = Path(folder), Path(out)
    manifest = shards.open_prepared(folder)
    if shards.format_of(manifest) == format:
        raise UserError(f"{folder} holds shards of format {format} already: name the other format, or copy the folder.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists: choose another --out or delete it.")
    if out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} lies within {folder}, which is not written to: choose another --out.")
    remove_stale(out)
    with process.making(out), folder_in_one_step(out) as partial:
        for name in COPIED:
            if (folder / name).exists():
                shutil.copyfile(folder / name, partial / name)
        hashes = {split: _convert_split(folder, split, format, partial) for split in shards.SPLITS}
        for split, expected in manifest.get("rows_sha256", {}).items():
            if hashes[split] != expected:
                raise UserError(f"{folder}: the rows of {split} are not those that prepared.json names: {shards.ADVICE}.")
        made = {**manifest, "format": format, "rows_sha256": hashes}
        if "rows_sha256" not in manifest:
            made["identity"] = shards.identity(manifest)
        made = shards.write_manifest(partial, made)
        if (folder / shards.SECONDS_FILE).exists():  # not in the manifest, in either folder
            shutil.copyfile(folder / shards.SECONDS_FILE, partial / shards.SECONDS_FILE)
    return made


def _convert_split(folder: Path, split: str, format: str, out: Path) -> str:
    """Returns the sha256 of the rows."""
    stream = TokenStream(folder, split, seed=0, shuffle=False)
    writer = formats.ShardWriter(out / split, format, stream.length, shards.SHARD_BYTES)
    progress, first = Progress(f"convert {split}", len(stream), "rows"), 0
    for end in stream.ends.tolist():
        ids, lengths = stream.rows(range(first, end))
        records = np.zeros(end - first, formats.row_type(stream.length))
        records["tokens"], records["length"] = ids.numpy(), lengths.numpy()
        writer.write(records)
        first = end
        progress.update(end)
    return writer.finish()
