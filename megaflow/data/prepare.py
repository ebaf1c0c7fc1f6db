"""From raw text to a folder of token shards: what `megaflow prepare` does, from top to bottom.

The sources are read once to be hashed, once to be surveyed (how many documents, which characters, which lines are
broken), once by a BPE in training, and once to be tokenized and packed. Everything is written into a folder beside
the target, which gets its name in one step at the end: whatever happens before that, nothing looks finished.
"""

import hashlib
import json
import os
import resource
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megaflow.config.schema import DataConfig
from megaflow.data import encode, shards, sources
from megaflow.data import tokenizer as tokenizers
from megaflow.errors import UserError

HASHES = 1 << 64


def prepare(config: DataConfig, began: float | None = None) -> dict[str, Any]:
    """Make the prepared folder `config.path` (layout: see shards.py) and return its manifest.

    Its seconds count from `began`, a time.monotonic(), now if None. Returns at once if it is there already and was made with the same
    settings from the same text. Raises UserError if it was made otherwise, for sources that cannot be read, and for a split without a row.
    """
    began = time.monotonic() if began is None else began
    files = sources.find_sources(config.source, config.source_format)
    given = tokenizers.given_tokenizer(config)
    if config.target_field:
        check_pairs(config, files, given)
    remove_stale(Path(config.path))
    files = sources.hash_sources(files)
    settings = _settings(config, files)
    if (finished := _finished(config, settings, files, given)) is not None:
        print(f"{config.path} is already prepared with these settings", file=sys.stderr)
        return finished
    survey = _survey(files, config)
    with folder_in_one_step(Path(config.path)) as folder:
        tokenizer = given if given is not None else _tokenizer_of_text(files, config, survey)
        tokenizers.save_tokenizer(tokenizer, folder)
        splits, rows_sha256, longer = _write_splits(folder, files, config, survey, tokenizer)
        sources.check_unchanged(files)
        shards.require_rows(splits, config.length)
        end = tokenizers.end_id(tokenizer)
        described = {
            "kind": tokenizers.tokenizer_kind(config),
            "hash": tokenizers.tokenizer_hash(tokenizer),
            "vocab_size": tokenizers.vocabulary_size(tokenizer),
            "end_token": None if end is None else tokenizer.id_to_token(end),
            "end_id": end,
        }
        manifest = {
            "sources": _described_sources(files),
            "settings": settings,
            "tokenizer": described,
            "format": config.format,
            "length": config.length,
            "packing": config.packing,
            "normalize": config.normalize,
            "split_by": "document" if survey.documents > 1 else "position",
            "splits": splits,
            "rows_sha256": rows_sha256,
            "bad_lines": survey.bad_lines.total(),
            "blank_documents": survey.blank,
        }
        manifest = shards.write_manifest(folder, manifest)
        cost = {"seconds": time.monotonic() - began, "peak_memory_bytes": _peak_memory(), "command": sys.argv[1:]}
        (folder / shards.SECONDS_FILE).write_text(json.dumps(cost), "utf-8")
    for split, counts in splits.items():
        line = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())
        print(f"{config.path}/{split}  {line}", file=sys.stderr)
    if config.target_field and longer:
        cut = f"{longer:,} of {survey.documents:,} pairs are longer than data.length={config.length} and cut into rows"
        print(f"{config.path}  {cut}, the later ones without their source or with its end alone; raise data.length", file=sys.stderr)
    if broken := survey.bad_lines.total():  # beyond the first hundred of a file they were not named
        print(f"{config.path}  broken lines skipped {broken:,}", file=sys.stderr)
    return manifest


def check_pairs(config: DataConfig, files: list[sources.Source], given: Tokenizer | None) -> None:
    """Refuse what pairs of data.text_field and data.target_field cannot be made of. Raises UserError."""
    what = f"data.target_field={config.target_field} makes pairs"
    if texts := [file.name for file in files if file.format == "text"]:
        raise UserError(f"{what}, and {texts[0]} is plain text without fields: give JSONL or Parquet.")
    if config.packing != "document":
        raise UserError(f"{what}, which are rows of their own: set data.packing=document.")
    if config.target_field == config.text_field:
        raise UserError(f"{what} with data.text_field={config.text_field}, the same field: name two.")
    if given is not None and tokenizers.end_id(given) is None:
        raise UserError(f"{what}, whose halves an end token parts, and the tokenizer has none: use data.normalize=none.")


def _peak_memory() -> int:
    """Largest resident set so far of this process or of one that it has waited for, in bytes."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _described_sources(files: list[sources.Source]) -> list[dict[str, Any]]:
    return [{"name": file.name, "format": file.format, "bytes": file.bytes, "sha256": file.sha256} for file in files]


def _settings(config: DataConfig, files: list[sources.Source]) -> dict[str, Any]:
    """The keys that shape the shards; not where they lie, nor how many processes make them, nor keys nothing reads."""
    names = ["normalize", "length", "packing", "validation_fraction"]
    formats = {file.format for file in files}
    if "text" in formats:
        names.append("document_separator")
    if formats - {"text"}:
        names += ["text_field", "on_bad_line"] + (["target_field"] if config.target_field else [])
    if config.tokenizer == "bpe":
        names.append("vocab_size")
    # not the path of a tokenizer.json: its content is compared by the tokenizer's hash
    return {"tokenizer": tokenizers.tokenizer_kind(config)} | {name: getattr(config, name) for name in names}


def _finished(config: DataConfig, settings: dict[str, Any], files: list[sources.Source], given: Tokenizer | None) -> dict[str, Any] | None:
    """The manifest of a folder that is done already, None if there is nothing yet; UserError if it is something else."""
    path = Path(config.path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    advice = "choose another data.path or delete the folder"
    if not (path / shards.MANIFEST_FILE).is_file():
        raise UserError(f"{path} exists and was not made by megaflow prepare: {advice}.")
    manifest = shards.open_prepared(path)
    old = [(source["format"], source["sha256"]) for source in manifest["sources"]]
    new = [(file.format, file.sha256) for file in files]
    if old != new:
        changed = next((file.name for file, pair in zip(files, new, strict=True) if pair not in old), "their number or order")
        raise UserError(f"{path} was prepared from other sources (differs: {changed}): {advice}.")
    for name in sorted(settings.keys() | manifest["settings"].keys()):
        before, now = manifest["settings"].get(name), settings.get(name)
        if before != now:
            raise UserError(f"{path} was prepared with data.{name}={before}, not {now}: {advice}.")
    if (made := shards.format_of(manifest)) != config.format:
        way = f"megaflow inspect {path} --to {config.format} --out DIR converts it"
        raise UserError(f"{path} was prepared with data.format={made}, not {config.format}: {way}, or {advice}.")
    if given is not None and tokenizers.tokenizer_hash(given) != manifest["tokenizer"]["hash"]:
        raise UserError(f"{path} was prepared with another vocabulary of data.tokenizer={config.tokenizer}: {advice}.")
    return manifest


def partial_prefix(path: Path) -> str:
    return f"{path.name}.partial-{socket.gethostname()}-"


def remove_stale(path: Path) -> None:
    """Delete what prepares of this path that were killed on this machine have left."""
    prefix = partial_prefix(path)
    for folder in path.parent.glob("*"):
        number = folder.name.removeprefix(prefix)
        if not folder.name.startswith(prefix) or not number.isdigit():
            continue
        # our own number is a dead process's too: this process has not begun to write
        if int(number) == os.getpid() or not _alive(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def folder_in_one_step(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its name if the block ends well and is deleted if it does not."""
    folder = path.parent / f"{partial_prefix(path)}{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        yield folder
        # replaces nothing but an empty folder: a rival that finished first makes this fail, not mix
        os.rename(folder, path)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and path.is_dir() and any(path.iterdir()):
            raise UserError(f"{path} has been prepared by another process meanwhile; the same command sees what it has made.") from error
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
        raise


@dataclass
class _Survey:
    """What the first reading finds; `threshold`: documents whose hash is below it are held out."""

    documents: int = 0
    blank: int = 0
    characters: int = 0
    lowest: int = HASHES
    highest: int = -1
    threshold: int = 0
    alphabet: set[str] = field(default_factory=set)
    bad_lines: Counter[str] = field(default_factory=Counter)


def _survey(files: list[sources.Source], config: DataConfig) -> _Survey:
    survey = _Survey()
    report = partial(sources.report_bad_line, survey.bad_lines, config.on_bad_line == "stop")
    for parts in sources.corpus(files, config, "survey documents", report):
        if not all(text.strip() for text in parts):
            survey.blank += 1
            continue
        text = "".join(parts)
        place = _document_hash(parts[0])  # all targets of a source on one side
        survey.documents += 1
        survey.characters += len(text)
        survey.lowest, survey.highest = min(survey.lowest, place), max(survey.highest, place)
        if config.tokenizer == "characters":
            survey.alphabet.update(text)
    if survey.documents == 0:
        broken = survey.bad_lines.total()
        fields = "data.source, data.text_field and data.target_field" if config.target_field else "data.source and data.text_field"
        raise UserError(f"the sources hold no document with text ({broken} broken lines): check {fields}.")
    if survey.documents == 1 and config.target_field:
        raise UserError("the sources hold one pair, so that none can be held out: add others.")
    if survey.documents == 1:
        print(f"one document only: its last {config.validation_fraction:.2%} of characters are the validation split", file=sys.stderr)
    elif survey.lowest == survey.highest:
        raise UserError(f"all {survey.documents} documents are the same text, so that none can be held out: add other text.")
    # by content, so that copies of a document fall on the same side; at least one document on either side
    survey.threshold = min(max(round(config.validation_fraction * HASHES), survey.lowest + 1), survey.highest)
    return survey


def _document_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def _split_documents(
    files: list[sources.Source], config: DataConfig, survey: _Survey, label: str
) -> Iterator[tuple[str, sources.Document]]:
    """(split, parts) of every document in order; a single document is cut in two."""
    documents = characters = 0
    for parts in sources.corpus(files, config, label):
        if not all(text.strip() for text in parts):
            continue
        text = "".join(parts)
        documents += 1
        characters += len(text)
        if survey.documents == 1:
            cut = _cut_near(text, round(len(text) * (1 - config.validation_fraction)))
            yield "train", (text[:cut],)
            yield "validation", (text[cut:],)
        else:
            yield ("validation" if _document_hash(parts[0]) < survey.threshold else "train"), parts
    if (documents, characters) != (survey.documents, survey.characters):
        raise UserError(f"the sources changed between two readings ({survey.documents} documents, then {documents}): run prepare again.")


def _cut_near(text: str, target: int) -> int:
    """The place of whitespace nearest to `target`, or `target` if there is none; the text after it starts with it."""
    for distance in range(len(text)):
        for place in (target + distance, target - distance):
            if 0 < place < len(text) and text[place].isspace():
                return place
    return target


def _tokenizer_of_text(files: list[sources.Source], config: DataConfig, survey: _Survey) -> Tokenizer:
    """The tokenizers that depend on the text: the alphabet of all of it, or a BPE of the training documents."""
    if config.tokenizer == "characters":
        return tokenizers.characters_tokenizer(sorted(survey.alphabet))
    documents = _split_documents(files, config, survey, "train tokenizer")
    texts = (piece.text for split, parts in documents if split == "train" for text in parts for piece in encode.pieces(text, split, "bpe"))
    tokenizer = tokenizers.train_bpe(texts, config.vocab_size)
    if (size := tokenizers.vocabulary_size(tokenizer)) < config.vocab_size:
        print(f"the text gives a BPE of {size} tokens only, not data.vocab_size={config.vocab_size}", file=sys.stderr)
    return tokenizer


def _write_splits(
    folder: Path, files: list[sources.Source], config: DataConfig, survey: _Survey, tokenizer: Tokenizer
) -> tuple[dict[str, dict[str, int]], dict[str, str], int]:
    """Tokenize and pack every document; writes shards and token counts, returns the counts of each split, the hash of its rows, and how
    many documents are longer than a row of their own."""
    kind, end = tokenizers.tokenizer_kind(config), tokenizers.end_id(tokenizer)
    size = tokenizers.vocabulary_size(tokenizer)
    # the 27 letters have no end token: a space stands between documents that share a row
    closing = tokenizer.token_to_id(" ") if end is None and config.packing == "wrap" else end
    writers = {split: shards.SplitWriter(folder, split, config.length, config.packing, size, config.format) for split in shards.SPLITS}
    documents = _split_documents(files, config, survey, "tokenize")
    stream = (piece for split, parts in documents for piece in encode.pieces_of_parts(parts, split, kind))
    workers = encode.usable_cores() if config.workers == "auto" else config.workers
    for piece, ids, characters in encode.encode_pieces(folder, kind, stream, workers):
        writers[piece.split].add(ids, characters, piece.first)
        if piece.last:
            writers[piece.split].end_document(closing)
        elif piece.parted:
            assert closing is not None  # check_pairs
            writers[piece.split].end_part(closing)
    np.save(folder / shards.UNIGRAM_FILE, writers["train"].unigram)
    if config.packing == "document":
        np.save(folder / shards.LENGTH_COUNTS_FILE, writers["train"].length_counts)
    splits = {split: writer.finish(tokenizer) for split, writer in writers.items()}
    return splits, {split: writer.rows_sha256 for split, writer in writers.items()}, sum(writer.longer for writer in writers.values())
