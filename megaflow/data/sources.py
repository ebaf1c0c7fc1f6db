"""Raw text: finding the source files, hashing them, and reading them one document at a time.

A document is a whole plain text file (or what lies between two `document_separator`s), one line of JSONL, or
one row of Parquet; with data.target_field its two fields are its parts. Nothing here holds more than one document in memory.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megaflow.config.schema import DataConfig
from megaflow.errors import UserError
from megaflow.progress import Progress

COMPRESSIONS = {".gz": "gz", ".xz": "xz", ".zst": "zst"}
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
CHUNK = 1 << 20
BAD_LINES_SHOWN = 100

Document = tuple[str, ...]
"""The parts of a document: its text, or what is given and what is to be written of a pair."""

# what a reader does with a broken line: (line or row number, what is wrong with it)
BadLine = Callable[[int, str], None]


@dataclass(frozen=True)
class Source:
    """One file of raw text. `modified` is its time stamp in ns, which tells whether it changes under our hands."""

    name: str
    format: str
    compression: str
    bytes: int
    modified: int
    sha256: str = ""


def find_sources(patterns: list[str], source_format: str = "auto") -> list[Source]:
    """The files that `patterns` (paths or globs) name, in their order, matches of a glob sorted, each once.

    Raises UserError for an empty list, a pattern without a file, a directory, and a file that cannot be read.
    """
    if not patterns:
        raise UserError("data.source is empty: name the files of raw text, for example data.source=[corpus/*.jsonl].")
    names: dict[str, None] = {}
    for pattern in patterns:
        # a file whose own name holds [ or * is that file, not a pattern
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if os.path.isdir(pattern):
            raise UserError(f"data.source names the directory {pattern}: name its files, for example {os.path.join(pattern, '*.jsonl')}.")
        files = [name for name in matches if not os.path.isdir(name)]
        if not files:
            raise UserError(f"data.source: no file matches {pattern}: check the path, which is relative to {os.getcwd()}.")
        names |= dict.fromkeys(files)
    return [_describe(name, source_format) for name in names]


def _describe(name: str, source_format: str) -> Source:
    stem, suffix = os.path.splitext(name)
    compression = COMPRESSIONS.get(suffix.lower(), "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = FORMATS.get(suffix.lower(), "text") if source_format == "auto" else source_format
    if kind == "parquet" and compression:
        raise UserError(f"{name}: a Parquet file is compressed inside, not with {compression}: decompress it first.")
    try:
        with open(name, "rb"):
            status = os.stat(name)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error
    return Source(name, kind, compression, status.st_size, status.st_mtime_ns)


def hash_sources(sources: list[Source]) -> list[Source]:
    """The same sources with the sha256 of their bytes."""
    progress = Progress("hash sources", sum(source.bytes for source in sources) / 1e6, "MB")
    hashed, before = [], 0
    for source in sources:
        digest = hashlib.sha256()
        with open(source.name, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                _below(progress, (before + file.tell()) / 1e6)
        before += source.bytes
        hashed.append(replace(source, sha256=digest.hexdigest()))
    progress.update(progress.total)
    return hashed


def _below(progress: Progress, done: float) -> None:
    # the total is announced once, at the end: a small file is read to its end long before its last document is used
    if done < progress.total:
        progress.update(done)


def check_unchanged(sources: list[Source]) -> None:
    """Raises UserError if a source is no longer the file that was hashed."""
    for source in sources:
        status = os.stat(source.name) if os.path.exists(source.name) else None
        if status is None or (status.st_size, status.st_mtime_ns) != (source.bytes, source.modified):
            raise UserError(f"{source.name} changed while it was being prepared: run megaflow prepare again when it is complete.")


def corpus(
    sources: list[Source], config: DataConfig, label: str, bad_line: Callable[[str, int, str], None] | None = None
) -> Iterator[Document]:
    """Every document of every source in order, normalized, blank ones too, with progress by bytes of source read.

    `bad_line(name, number, problem)` is told of every broken line of JSONL or row of Parquet; without it they are
    passed over in silence (they were reported by an earlier pass).
    """
    progress = Progress(label, sum(source.bytes for source in sources) / 1e6, "MB")
    before = 0
    for source in sources:
        name = source.name

        def report(number: int, problem: str, name: str = name) -> None:
            if bad_line is not None:
                bad_line(name, number, problem)

        for parts, position in documents(source, config, report):
            yield tuple(letters(text) for text in parts) if config.normalize == "letters" else parts
            _below(progress, (before + position) / 1e6)
        before += source.bytes
    progress.update(progress.total)


def letters(text: str) -> str:
    """Lower-case a-z, everything else one space: the 27 symbols of text8."""
    return re.sub("[^a-z]+", " ", text.lower()).strip()


def report_bad_line(counts: Counter[str], stop: bool, name: str, number: int, problem: str) -> None:
    """Say on stderr which line is broken and count it in `counts[name]`; raises UserError if `stop`."""
    if stop:
        raise UserError(f"{name}, line {number}: {problem}: mend the line or set data.on_bad_line=skip.")
    counts[name] += 1
    if counts[name] <= BAD_LINES_SHOWN:
        print(f"{name}, line {number}: {problem}; skipped", file=sys.stderr)
    elif counts[name] == BAD_LINES_SHOWN + 1:
        print(f"{name}: more than {BAD_LINES_SHOWN} broken lines; further ones are skipped and counted in silence", file=sys.stderr)


def fields(config: DataConfig) -> list[str]:
    """Fields of JSONL or columns of Parquet that hold the parts of a document."""
    return [config.text_field, config.target_field] if config.target_field else [config.text_field]


def documents(source: Source, config: DataConfig, bad_line: BadLine) -> Iterator[tuple[Document, int]]:
    """(parts, bytes of the file read so far) of every document of one source.

    Raises UserError for a file that is not what its name says: truncated or corrupt compression, not UTF-8, not
    Parquet, no such column.
    """
    if source.format == "parquet":
        yield from _parquet_documents(source, fields(config), bad_line)
        return
    try:
        with open(source.name, "rb") as raw:
            stream = _decompressed(source, raw)
            if source.format == "jsonl":
                found = _jsonl_documents(stream, fields(config), bad_line)
            else:
                found = ((text,) for text in _text_documents(source.name, stream, config.document_separator))
            for parts in found:
                yield parts, raw.tell()
    except EOFError as error:
        raise UserError(f"{source.name} is cut short (its {source.compression} stream ends too early): fetch it again.") from error
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile, _CorruptError) as error:
        raise UserError(f"{source.name} is not a sound {source.compression} file ({error}): fetch it again.") from error
    except OSError as error:
        raise UserError(f"{source.name} cannot be read: {error.strerror or error}.") from error


def _text_documents(name: str, stream: io.BufferedIOBase, separator: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    buffer, consumed, chunk = "", 0, b"."
    while chunk:
        chunk = stream.read(CHUNK)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(f"{name} is not UTF-8 text (byte {consumed - pending + error.start}): convert it, or leave it out.") from error
        consumed += len(chunk)
        # a separator may straddle two chunks
        start = max(0, len(buffer) - len(separator) + 1)
        buffer += text
        if separator and buffer.find(separator, start) >= 0:
            *complete, buffer = buffer.split(separator)
            yield from complete
    if buffer:
        yield buffer


def _jsonl_documents(stream: io.BufferedIOBase, names: list[str], bad_line: BadLine) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            parts = _json_texts(line, names)
        except ValueError as error:
            bad_line(number, str(error))
        else:
            yield parts


def _json_texts(line: bytes, names: list[str]) -> Document:
    """The texts of one line of JSONL by their fields; raises ValueError saying what is wrong with it."""
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(item, dict):
        raise ValueError("not a JSON object")
    for name in names:
        if name not in item:
            raise ValueError(f"no field {name!r}")
    return tuple(_checked_text(item[name], f"field {name!r}") for name in names)


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where} is not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half a surrogate pair, which is no character") from None
    return text


def _parquet_documents(source: Source, names: list[str], bad_line: BadLine) -> Iterator[tuple[Document, int]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{source.name}: Parquet needs the package pyarrow: pip install pyarrow.") from error
    try:
        with pyarrow.parquet.ParquetFile(source.name) as file:
            for key, name in zip(("data.text_field", "data.target_field"), names, strict=False):
                if name not in file.schema_arrow.names:
                    columns = ", ".join(file.schema_arrow.names)
                    raise UserError(f"{source.name} has no column {name!r}: set {key} to one of {columns}.")
            row, rows = 0, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=1024, columns=names):
                for values in zip(*(batch.column(name) for name in names), strict=True):
                    row += 1
                    try:
                        parts = tuple(_checked_text(v.as_py(), f"column {name!r}") for name, v in zip(names, values, strict=True))
                    except UnicodeDecodeError:
                        bad_line(row, "not UTF-8")
                    except ValueError as error:
                        bad_line(row, str(error))
                    else:
                        yield parts, source.bytes * row // rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source.name} is not a sound Parquet file ({str(error).splitlines()[0]}): fetch or write it again.") from error


class _CorruptError(Exception):
    """A zstd stream that cannot be decoded (zstandard is imported only where it is used)."""


def _decompressed(source: Source, raw: io.BufferedReader) -> io.BufferedIOBase:
    if source.compression == "gz":
        return gzip.GzipFile(fileobj=raw)
    if source.compression == "xz":
        return lzma.LZMAFile(raw)
    if source.compression == "zst":
        return io.BufferedReader(_ZstdFrames(raw, source.name), CHUNK)
    return raw


class _ZstdFrames(io.RawIOBase):
    """Reads zstd frames one after the other; a cut one raises EOFError, which zstandard's own reader does not."""

    def __init__(self, raw: io.BufferedIOBase, name: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{name}: zstd needs the package zstandard: pip install zstandard.") from error
        self.raw, self.zstandard = raw, zstandard
        self.frame: Any = None
        self.compressed, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            self.compressed = self.compressed or self.raw.read(1 << 16)
            if not self.compressed:
                if self.frame is not None:
                    raise EOFError
                return 0
            if self.frame is None:
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self.ready = memoryview(self.frame.decompress(self.compressed))
            except self.zstandard.ZstdError as error:
                raise _CorruptError(error) from error
            self.compressed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count
