"""A prepared folder: rows of tokens in shards, and the manifest that says what they are.

    prepared.json                    the manifest: sources, settings, tokenizer, counts, sha256 of every other file
    tokenizer.json                   the tokenizer
    train/, validation/              shards of rows, each LENGTH ids and how many of them count, in one of two formats (see formats.py)
    unigram.npy                      int64 (V,): how often each token counts in the training rows
    seconds.json                     how long prepare took, its peak memory, and its command
    length_counts.npy                packing=document only, int64 (LENGTH + 1,): training rows of each length

Row r of a split is sample r of its shards in order, whatever the format; ids beyond a row's length are 0.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from megaflow.data import formats
from megaflow.data.tokenizer import TOKENIZER_FILE, character_count
from megaflow.errors import UserError, reason
from megaflow.progress import Progress

MANIFEST_FILE = "prepared.json"
UNIGRAM_FILE = "unigram.npy"
LENGTH_COUNTS_FILE = "length_counts.npy"
SECONDS_FILE = "seconds.json"
DESCRIPTION = (MANIFEST_FILE, TOKENIZER_FILE, UNIGRAM_FILE, LENGTH_COUNTS_FILE)
"""What a prepared folder says of its rows: small, and enough to write text of their kind."""
SPLITS = ("train", "validation")
VERSION = 1
NEEDED = {"sources", "settings", "tokenizer", "length", "packing", "splits", "files"}
# of a shard of MDS; one of tar has as many rows. Small enough that the shuffle, which moves samples within blocks of 2^18, mixes several
SHARD_BYTES = 1 << 24


class SplitWriter:
    """Packs the tokens of one split into rows and writes them as shards below `folder`/`split`.

    Give it every document's pieces in order with `add`, each document closed by `end_document`; `finish` returns
    the counts. A row is LENGTH ids and how many of them count; the others are 0 and no loss counts them.
    """

    def __init__(self, folder: str | Path, split: str, length: int, packing: str, vocab_size: int, format: str = "mds") -> None:
        self.writer = formats.ShardWriter(Path(folder) / split, format, length, SHARD_BYTES)
        self.shard = np.zeros(formats.rows_per_shard(length, SHARD_BYTES), formats.row_type(length))
        self.filled = 0
        self.length, self.packing = length, packing
        self.unigram = np.zeros(vocab_size, np.int64)
        self.length_counts = np.zeros(length + 1, np.int64)
        self.documents, self.characters = 0, 0
        self.longer = 0  # documents that are cut into rows, with packing=document
        self.rest: list[np.ndarray] = []
        self.rest_tokens = 0
        # where the last full row ends: the piece, what `add` was told of it, how many of its tokens, characters before it
        self.last_cut: tuple[np.ndarray, int, bool, int, int] | None = None
        self.rows_sha256 = ""

    def add(self, ids: np.ndarray, characters: int, first: bool) -> None:
        """Tokens (n,) int32 that stand for `characters` characters; `first`: they begin a document."""
        self.rest.append(ids)
        self.rest_tokens += len(ids)
        if self.packing == "wrap" and self.rest_tokens >= self.length:
            kept = self._write_full_rows()
            self.rest_tokens -= kept
            self.last_cut = ids, characters, first, len(ids) - self.rest_tokens, self.characters
        self.characters += characters

    def end_part(self, closing: int) -> None:
        """Close a part of a document that has another with the token `closing`."""
        self.add(np.array([closing], np.int32), 1, False)

    def end_document(self, closing: int | None) -> None:
        """Close a document with the token `closing` (one character in decoded text), or with none."""
        if closing is not None:
            self.add(np.array([closing], np.int32), 1, False)
        if self.packing == "document" and self.rest_tokens:
            kept = self._write_full_rows()
            (tail,) = self.rest
            self.longer += kept + len(tail) > self.length
            if len(tail):
                self._write(np.pad(tail, (0, self.length - len(tail)))[None], len(tail))
            self.rest, self.rest_tokens = [], 0
        self.documents += 1

    def finish(self, tokenizer: Any) -> dict[str, int]:
        """Write the index; documents, rows, tokens that count, characters they decode to, tokens dropped. Sets `rows_sha256`."""
        if self.filled:
            self._close_shard()
        self.rows_sha256 = self.writer.finish()
        return {
            "documents": self.documents,
            "rows": int(self.length_counts.sum()),
            "tokens": int(self.unigram.sum()),
            "characters": self._counted_characters(tokenizer),
            "dropped_tokens": self.rest_tokens,
        }

    def _counted_characters(self, tokenizer: Any) -> int:
        """Characters of all tokens in rows: what was added, less what the dropped tokens stand for."""
        if self.packing == "document":
            return self.characters
        if self.last_cut is None:
            return 0
        ids, characters, first, kept, before = self.last_cut
        return before + (characters if kept == len(ids) else character_count(tokenizer, ids[:kept], first))

    def _write_full_rows(self) -> int:
        """Write every full row of what is waiting; returns the tokens written and leaves the others waiting."""
        stream = np.concatenate(self.rest)
        kept = len(stream) // self.length * self.length
        self._write(stream[:kept].reshape(-1, self.length), self.length)
        self.rest = [stream[kept:]]
        return kept

    def _write(self, rows: np.ndarray, length: int) -> None:
        """Rows (n, LENGTH), of each of which `length` ids count."""
        np.add.at(self.unigram, rows[:, :length], 1)
        self.length_counts[length] += len(rows)
        while len(rows):
            if self.filled == len(self.shard):
                self._close_shard()
            part = self.shard[self.filled : self.filled + len(rows)]
            part["tokens"], part["length"] = rows[: len(part)], length
            self.filled += len(part)
            rows = rows[len(part) :]

    def _close_shard(self) -> None:
        self.writer.write(self.shard[: self.filled])
        self.filled = 0


def describe_file(path: str | Path) -> dict[str, Any]:
    """Size and sha256 of a file, which is on disk for good when this returns."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest}


def write_manifest(folder: str | Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write `folder`/prepared.json, `manifest` with size and sha256 of every other file of the folder, and return it."""
    folder = Path(folder)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest = {"version": VERSION, **manifest, "files": {name: describe_file(folder / name) for name in names}}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    describe_file(folder / MANIFEST_FILE)
    return manifest


def format_of(manifest: dict[str, Any]) -> str:
    """The format of a folder's shards; there was one only when folders did not say."""
    return manifest.get("format", "mds")


def identity(manifest: dict[str, Any]) -> str:
    """A hash of the rows and their tokenizer: equal where folders hold the same, in whatever format.

    A folder of before rows were hashed is known by its files, and what has been converted from it by what it was known by.
    """
    if "identity" in manifest:
        return manifest["identity"]
    if "rows_sha256" in manifest:
        known: Any = {"rows": manifest["rows_sha256"], "tokenizer": manifest["tokenizer"]["hash"]}
    else:
        known = manifest["files"]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder; raises UserError if there is no such folder, or it is not one, or is damaged."""
    manifest = _manifest(Path(folder))
    needed = [TOKENIZER_FILE, UNIGRAM_FILE, *(f"{split}/index.json" for split in SPLITS)]
    if missing := [name for name in needed if not (Path(folder) / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which prepare wrote: {ADVICE}.")
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    """What prepared.json says, whatever else of the folder is there."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: run megaflow prepare, or set data.path to a prepared folder.")
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a prepared folder, it lacks {MANIFEST_FILE}: run megaflow prepare.")
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version = manifest["version"]
        if version == VERSION and (missing := NEEDED - manifest.keys()):
            raise KeyError(*missing)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: delete {folder} and run megaflow prepare again.") from error
    if version != VERSION:
        raise UserError(f"{path} has version {version}, this MegaFlow reads {VERSION}: prepare the text again into another data.path.")
    if (format := format_of(manifest)) not in formats.SUFFIXES:
        raise UserError(f"{path} names shards of format {format}, this MegaFlow reads {' and '.join(formats.SUFFIXES)}: convert them.")
    return manifest


def copy_description(folder: str | Path, out: Path) -> None:
    """Copy what a prepared folder says of its rows into a new folder `out`, which is there whole or not at all."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in DESCRIPTION:
        if (Path(folder) / name).exists():
            shutil.copyfile(Path(folder) / name, partial / name)
    partial.replace(out)


def read_description(folder: Path) -> dict[str, Any]:
    """The manifest in a folder that copy_description has made, its files compared with it. Raises UserError."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
        if missing := NEEDED - manifest.keys():
            raise KeyError(*missing)
        for name in DESCRIPTION:
            if name in manifest["files"] and sha256(folder / name) != manifest["files"][name]["sha256"]:
                raise ValueError(f"{name} is not what prepare wrote")
        if type(length := manifest["length"]) is not int or length < 1:
            raise ValueError(f"rows of {length!r} tokens")
        if (counts := length_counts(folder)) is not None and len(counts) != length + 1:
            raise ValueError(f"rows of {length} tokens, and {LENGTH_COUNTS_FILE} has lengths up to {len(counts) - 1}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}: cannot tell what the run was trained on ({reason(error)}); restore this folder of the run") from None
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ADVICE = "restore it, or delete the folder and run megaflow prepare again"


def check_present(folder: str | Path, name: str, manifest: dict[str, Any]) -> None:
    """Raises UserError where a file of the manifest is missing or has another size."""
    path, expected = Path(folder) / name, manifest["files"][name]["bytes"]
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise UserError(f"{path} is missing: {ADVICE}.")
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: {ADVICE}.")


def verify_file(folder: str | Path, name: str, manifest: dict[str, Any]) -> None:
    """Compare one file with the manifest; raises UserError where it is missing, cut short or another."""
    check_present(folder, name, manifest)
    path = Path(folder) / name
    if sha256(path) != manifest["files"][name]["sha256"]:
        raise UserError(f"{path} is not what prepare wrote (sha256 differs): {ADVICE}.")


def open_prepared(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder after checking that every file is there and has its size, and the content of all but the
    shards, which TokenStream checks as it comes to them; UserError otherwise."""
    manifest = read_manifest(folder)
    for name in manifest["files"]:
        check_present(folder, name, manifest)
        if Path(name).suffix not in formats.SUFFIXES.values():
            verify_file(folder, name, manifest)
    return manifest


def verify(folder: str | Path) -> dict[str, Any]:
    """The manifest after reading every file and checking its sha256; raises UserError that names all that are missing or differ."""
    manifest, damaged = _manifest(Path(folder)), []
    files: dict[str, Any] = manifest["files"]
    progress, done = Progress("verify shards", sum(file["bytes"] for file in files.values()) / 1e6, "MB"), 0
    for name, expected in files.items():
        try:
            verify_file(folder, name, manifest)
        except UserError as error:
            damaged.append((name, error))
        done += expected["bytes"]
        progress.update(done / 1e6)
    if len(damaged) == 1:
        raise damaged[0][1]
    if damaged:
        names = ", ".join(name for name, _ in damaged)
        raise UserError(
            f"{folder}: {len(damaged)} files are missing or not what prepare wrote ({names}): {ADVICE.replace('it,', 'them,')}."
        )
    return manifest


def require_rows(counts: dict[str, dict[str, int]], length: int) -> None:
    """Raises UserError for a split without a row, given the counts of each split."""
    for split in SPLITS:
        if counts[split]["rows"] == 0:
            tokens = counts[split]["dropped_tokens"]
            change = "raise" if split == "validation" else "lower"
            advice = f"{change} data.validation_fraction, lower data.length, or add text"
            raise UserError(f"the {split} split has {tokens} tokens, less than one row of data.length={length}: {advice}.")


def length_counts(folder: str | Path) -> np.ndarray | None:
    """How many training rows have each length, (LENGTH + 1,) int64; None with packing=wrap, whose rows all have the same."""
    path = Path(folder) / LENGTH_COUNTS_FILE
    return _read_counts(path) if path.exists() else None


def drawn_lengths(folder: str | Path, chances: list[float], least: list[int] | None = None) -> list[int] | None:
    """Lengths of rows of single documents by the law of the training rows that are longer than `least`, of each, or the whole width where
    there is none; None where every row is full. chances: a draw of [0, 1) for each."""
    counts = length_counts(folder)
    if counts is None:
        return None

    def drawn(chance: float, beyond: int) -> int:
        longer = np.where(np.arange(len(counts)) > beyond, counts, 0)
        longer[-1] += not longer.any()
        return min(int(np.searchsorted(np.cumsum(longer / longer.sum()), chance, side="right")), len(counts) - 1)

    return [drawn(*each) for each in zip(chances, least or [0] * len(chances), strict=True)]


def log_length_law(folder: str | Path) -> np.ndarray | None:
    """log p of a row's length, (LENGTH + 1,) fp64, from length_counts, each given half a row more so that none is impossible."""
    rows = length_counts(folder)
    if rows is None:
        return None
    counts = rows + 0.5
    counts[0] = 0.0  # no row is empty
    with np.errstate(divide="ignore"):
        return np.log(counts / counts.sum())


def unigram_counts(folder: str | Path) -> np.ndarray:
    """How often each token counts in the training rows: (V,) int64."""
    return _read_counts(Path(folder) / UNIGRAM_FILE)


def _read_counts(path: Path) -> np.ndarray:
    """A row of counts. The format may hold Python objects, whose reading would run code: refused. Raises UserError."""
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype != np.int64:
            raise ValueError("not a row of counts")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); restore this file") from None
    return found
