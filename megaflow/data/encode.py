"""Encoding in several processes: documents cut into pieces, batches of pieces to workers, results in the order of the text."""

import multiprocessing
import os
import re
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megaflow.data.tokenizer import character_count, load_tokenizer
from megaflow.errors import UserError

# kinds whose decoding gives the text back, so that characters can be counted before encoding
EXACT_KINDS = ("characters", "bytes", "bpe", "gpt2")
# a place where no pre-tokenizer of the named kinds joins what is left of it with what is right of it
SAFE_CUT = re.compile(r"(?<=\w)(?=[ \n])")
PIECE = 1 << 16
BATCH = 1 << 18
KILLED = "a process that tokenizes was killed, perhaps for lack of memory: lower data.workers."


class Piece(NamedTuple):
    """A part of a document that can be encoded on its own, with what is needed to put the document together again."""

    text: str
    split: str
    first: bool
    last: bool
    parted: bool = False
    """Whether it ends a part of a document that has another."""


def pieces(text: str, split: str, kind: str, size: int = PIECE) -> Iterator[Piece]:
    """`text` cut into pieces of about `size` characters whose encodings, end to end, are the encoding of `text`.

    A book of a gigabyte would otherwise need a hundred times that in one process while the others wait. Nothing
    is known of a foreign tokenizer (it may put a mark before every text), so its documents stay whole.
    """
    start = 0
    while kind != "file" and len(text) - start > size:
        if kind in ("characters", "bytes"):
            end = start + size
        else:
            place = SAFE_CUT.search(text, start + size)
            end = place.start() if place else len(text)
        if end == len(text):
            break
        yield Piece(text[start:end], split, start == 0, False)
        start = end
    yield Piece(text[start:], split, start == 0, True)


def pieces_of_parts(parts: tuple[str, ...], split: str, kind: str, size: int = PIECE) -> Iterator[Piece]:
    """`pieces` of every part of a document."""
    for number, text in enumerate(parts):
        more = number + 1 < len(parts)
        for piece in pieces(text, split, kind, size):
            yield piece._replace(last=piece.last and not more, parted=piece.last and more)


def usable_cores() -> int:
    """Cores this process may run on, at most 8: more only wait for the one process that reads."""
    return min(8, len(os.sched_getaffinity(0)))


def encode_pieces(folder: str | Path, kind: str, stream: Iterable[Piece], workers: int) -> Iterator[tuple[Piece, np.ndarray, int]]:
    """(piece, its ids (n,) int32, its characters) of every piece of `stream`, in order, for any number of `workers`.

    The tokenizer is read from `folder`, once by every process. Each worker holds one batch at a time, so memory
    does not grow with the text. Raises UserError if a worker dies.
    """
    batches = _batches(stream)
    if workers == 1:
        tokenizer = load_tokenizer(folder)
        for batch in batches:
            yield from _joined(batch, _encode_texts(tokenizer, kind, _texts(batch)))
        return
    # A pipe for each worker and none shared: a worker that dies is an end of file here, and our death is one there.
    # (A pool's processes share their queues, and wait for ever if one of them is killed while it writes.)
    pool = [_start_worker(folder, kind) for _ in range(workers)]
    idle = deque(pipe for _, pipe in pool)
    waiting: deque[tuple[list[Piece], Connection]] = deque()
    try:
        for batch in batches:
            done, pipe = ([], idle.popleft()) if idle else waiting.popleft()
            encoded = _receive(pipe) if done else []
            _send(pipe, _texts(batch))
            waiting.append((batch, pipe))
            yield from _joined(done, encoded)
        for done, pipe in waiting:
            yield from _joined(done, _receive(pipe))
    finally:
        for process, pipe in pool:
            pipe.close()
            process.terminate()
            process.join()


def _texts(batch: list[Piece]) -> list[tuple[str, bool]]:
    return [(piece.text, piece.first) for piece in batch]


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(batch: list[Piece], encoded: list[tuple[np.ndarray, int]]) -> Iterator[tuple[Piece, np.ndarray, int]]:
    for piece, (ids, characters) in zip(batch, encoded, strict=True):
        yield piece, ids, characters


def _encode_texts(tokenizer: Tokenizer, kind: str, texts: list[tuple[str, bool]]) -> list[tuple[np.ndarray, int]]:
    try:
        encodings = tokenizer.encode_batch_fast([text for text, _ in texts], add_special_tokens=False)
    except Exception as error:
        raise UserError(f"the tokenizer cannot encode the text: {error}.") from error
    encoded = []
    for (text, first), encoding in zip(texts, encodings, strict=True):
        count = len(text) if kind in EXACT_KINDS else character_count(tokenizer, encoding.ids, first)
        encoded.append((np.array(encoding.ids, np.int32), count))
    return encoded


def _start_worker(folder: str | Path, kind: str) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")  # a forked child of a process with threads (Arrow, Rust) can hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(str(folder), kind, theirs), daemon=True)
    process.start()
    theirs.close()  # or its death would not be an end of file for us
    return process, ours


def _work(folder: str, kind: str, pipe: Connection) -> None:
    """A worker's life: a list of texts in, their encodings or an exception out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent ends us in order
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    try:
        tokenizer = load_tokenizer(folder)
        while True:
            texts = pipe.recv()
            try:
                result: Any = _encode_texts(tokenizer, kind, texts)
            except Exception as error:
                result = error
            pipe.send(result)
    except (EOFError, OSError):
        pass


def _send(pipe: Connection, texts: list[tuple[str, bool]]) -> None:
    try:
        pipe.send(texts)
    except OSError as error:
        raise UserError(KILLED) from error


def _receive(pipe: Connection) -> list[tuple[np.ndarray, int]]:
    try:
        result = pipe.recv()
    except (EOFError, OSError) as error:  # OSError: it died in the middle of its answer
        raise UserError(KILLED) from error
    if isinstance(result, Exception):
        raise result
    return result
