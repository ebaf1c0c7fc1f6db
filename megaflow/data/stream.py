"""The order in which a run reads its rows: a pure function of (seed, epoch), with no state besides one number.

A *place* counts samples over the whole run: place p is row order(p // N)[p % N] of the N rows. Whoever knows the
next place resumes exactly; processes that read disjoint places of one global order read each row once per epoch.
The order goes by the rows of each shard, which the format does not change (see formats.py).
"""

import threading
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from megaflow.data.formats import layout, listed_shards
from megaflow.data.memory import Stretch
from megaflow.data.shards import SPLITS, check_present, format_of, open_prepared, verify_file
from megaflow.data.shuffle import epoch_order
from megaflow.errors import UserError

MAPPED = 1 << 14
"""Shards that are mapped at a time; the system has a limit of some ten thousand a process."""


NOWHERE = np.iinfo(np.int64).max
"""Where a row begins whose shard is not mapped: no index into any memory."""
ID = np.dtype("<i4")


class TokenStream:
    """The rows of one split of a prepared folder, by place.

    `shuffle=False` is the order they were written in, every epoch. Raises UserError if the folder is not sound; a shard is compared
    with the manifest when its first row is read. Shards are files mapped to memory: nothing is copied, locked or shared, and a process
    that is killed leaves nothing behind.
    """

    def __init__(self, folder: str | Path, split: str, seed: int, shuffle: bool = True) -> None:
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r} in {folder}: it is one of {', '.join(SPLITS)}.")
        self.folder, self.split, self.manifest = Path(folder), split, open_prepared(folder)
        self.format, self.length = format_of(self.manifest), self.manifest["length"]
        listed = listed_shards(self.folder / split, self.format)
        self.names = [f"{split}/{name}" for name, _ in listed]
        self.sizes = np.array([rows for _, rows in listed], np.int64)
        self.ends = self.sizes.cumsum()
        self.count = int(self.sizes.sum())
        self.seed, self.shuffle = seed, shuffle
        self.orders: dict[int, np.ndarray] = {}
        width = 4 * self.length
        self.memory = Stretch([self.manifest["files"][name]["bytes"] for name in self.names], spare=width)
        # the `width` bytes from any byte on: a batch of rows is one index into this
        self.windows: np.ndarray = np.ndarray((len(self.memory.bytes) - width + 1,), f"V{width}", self.memory.bytes, 0, (1,))
        self.begins = np.full(len(self), NOWHERE)  # of each row's tokens in the memory, where its shard is mapped
        self.counts = None if self.manifest["packing"] == "wrap" else np.zeros(len(self), np.int64)  # ids of each row; None: all
        self.mapped: dict[int, None] = {}  # shards, the oldest first
        self.verified: set[int] = set()

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.count

    def rows(self, places: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, L) int64 and how many of each row count (B,) int64, at `places` (B,) >= 0; ids beyond are 0. Raises UserError."""
        given = places.numpy() if isinstance(places, torch.Tensor) else np.asarray(places, np.int64)
        numbers = self.row_numbers(given)
        try:
            rows = self.windows[self.begins[numbers]]
        except IndexError:  # a row lies NOWHERE
            self._map(set(self.ends.searchsorted(numbers, side="right").tolist()))
            rows = self.windows[self.begins[numbers]]
        ids = rows.view(ID).reshape(len(numbers), self.length).astype(np.int64)
        if self.counts is None:
            return torch.from_numpy(ids), torch.full((len(ids),), self.length)
        counts = self.counts[numbers]
        ids[np.arange(self.length) >= counts[:, None]] = 0
        return torch.from_numpy(ids), torch.from_numpy(counts)

    def lengths(self) -> np.ndarray:
        """How many ids of each row of the split count, in the order they were written: (N,) int64. Raises UserError."""
        for first in range(0, len(self.names), MAPPED):
            self._map(set(range(first, min(first + MAPPED, len(self.names)))))
        return np.full(len(self), self.length) if self.counts is None else self.counts

    def _map(self, shards: set[int]) -> None:
        """Have these shards in memory, each compared with the manifest when it is mapped for the first time. Raises UserError."""
        new = sorted(shards - self.mapped.keys())
        too_many = max(0, len(self.mapped) + len(new) - MAPPED)
        for number in [old for old in self.mapped if old not in shards][:too_many]:
            self.memory.unmap(number)
            self.begins[self._rows_of(number)] = NOWHERE
            del self.mapped[number]
        for number in new:
            name = self.names[number]
            (check_present if number in self.verified else verify_file)(self.folder, name, self.manifest)
            self.verified.add(number)
            begins, counts = layout(self.memory.map(number, self.folder / name), self.format, self.length)
            self.begins[self._rows_of(number)] = self.memory.begins[number] + begins
            if self.counts is not None:
                self.counts[self._rows_of(number)] = counts
            self.mapped[number] = None

    def _rows_of(self, shard: int) -> slice:
        return slice(self.ends[shard] - self.sizes[shard], self.ends[shard])

    def row_numbers(self, places: np.ndarray) -> np.ndarray:
        """The rows of the split, in the order they were written, that stand at `places` (B,): (B,)."""
        listed, rows = places.tolist(), len(self)
        first, last = min(listed, default=0), max(listed, default=0)
        if first < 0:
            raise ValueError(f"a place is not negative: {first}")
        if not self.shuffle:
            return places % rows
        if first // rows == last // rows:  # nearly always
            return self.order(first // rows)[places - first // rows * rows]
        epochs, within = np.divmod(places, rows)
        for epoch in sorted(set(epochs.tolist())):
            here = epochs == epoch
            within[here] = self.order(epoch)[within[here]]
        return within

    def order(self, epoch: int) -> np.ndarray:
        """The permutation (N,) of one epoch; the latest two are kept, since a batch may straddle two."""
        if epoch not in self.orders:
            self.orders[epoch] = epoch_order(self.sizes, self.seed, epoch)
            while len(self.orders) > 2:
                del self.orders[next(iter(self.orders))]
        return self.orders[epoch]


def read_ahead(
    stream: TokenStream, batches: Iterable[Sequence[int] | torch.Tensor], ahead: int = 8
) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
    """stream.rows(places) for the places of each of `batches` in turn, read by a thread while the caller works on those before.

    The thread is up to `ahead` batches in front, so that shards are hashed before their rows are needed. It alone reads the stream until
    the iterator is closed (contextlib.closing) or at its end, which waits for the batch in hand and leaves no thread. What a batch raises
    is raised where the batch is asked for, after all batches before it.
    """
    # A pool's futures would take four times as long to hand over a batch: their locks give the interpreter to the thread.
    ready: SimpleQueue[Any] = SimpleQueue()
    room, closed = threading.Semaphore(ahead), threading.Event()

    def read() -> None:
        try:
            for places in batches:
                room.acquire()
                if closed.is_set():
                    return
                ready.put(stream.rows(places))
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=read, name="rows", daemon=True)  # an exit of the process waits for no rows
    thread.start()
    try:
        while (found := ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            room.release()
            yield found
    finally:
        closed.set()
        room.release()
        thread.join()
