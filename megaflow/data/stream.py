"""The order in which a run reads its rows: a pure function of (seed, epoch), with no state besides one number.

A *place* counts samples over the whole run: place p is row order(p // N)[p % N] of the N rows. Whoever knows the
next place resumes exactly; processes that read disjoint places of one global order read each row once per epoch.
The order goes by the rows of each shard, which the format does not change (see formats.py).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from streaming.base.shuffle import get_shuffle

from megaflow.data.formats import Shard, listed_shards
from megaflow.data.shards import SPLITS, format_of, map_shard, open_prepared
from megaflow.errors import UserError

MAPPED = 256
"""Shards that are mapped at a time: each holds a file descriptor, of which a process has a thousand."""


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
        self.shards = listed_shards(self.folder / split, format_of(self.manifest))
        self.ends = self.shard_sizes().cumsum()
        self.seed, self.shuffle = seed, shuffle
        self.orders: dict[int, np.ndarray] = {}
        self.mapped: dict[int, Shard] = {}
        self.verified: set[int] = set()

    def __len__(self) -> int:
        """Rows of an epoch."""
        return int(self.ends[-1])

    def rows(self, places: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, L) int64 and how many of each row count (B,) int64, at `places` (B,) >= 0; ids beyond are 0. Raises UserError."""
        numbers = self.row_numbers(np.asarray(places, np.int64))
        shards = self.ends.searchsorted(numbers, side="right")
        within = numbers - self.ends[shards]  # negative: counted from the shard's end
        tokens, lengths = np.zeros((len(numbers), 4 * self.manifest["length"]), np.uint8), []
        for row, number, place in zip(tokens, shards.tolist(), within.tolist(), strict=True):
            shard = self.mapped.get(number) or self.shard(number)
            begin, count = shard.begins[place], shard.lengths[place]
            row[: 4 * count] = shard.data[begin : begin + 4 * count]
            lengths.append(count)
        return torch.from_numpy(tokens.view("<i4").astype(np.int64)), torch.from_numpy(np.array(lengths, np.int64))

    def shard(self, number: int) -> Shard:
        """A shard of the split, compared with the manifest when it is first read. Raises UserError."""
        if number not in self.mapped:
            name, first = f"{self.split}/{self.shards[number][0]}", number not in self.verified
            while len(self.mapped) >= MAPPED:
                del self.mapped[next(iter(self.mapped))]
            self.mapped[number] = map_shard(self.folder, name, self.manifest, verify=first)
            self.verified.add(number)
        return self.mapped[number]

    def row_numbers(self, places: np.ndarray) -> np.ndarray:
        """The rows of the split, in the order they were written, that stand at `places` (B,): (B,)."""
        if (places < 0).any():
            raise ValueError(f"a place is not negative: {places.min()}")
        epochs, within = np.divmod(places, len(self))
        if self.shuffle:
            for epoch in sorted(set(epochs.tolist())):
                here = epochs == epoch
                within[here] = self.order(epoch)[within[here]]
        return within

    def order(self, epoch: int) -> np.ndarray:
        """The permutation (N,) of one epoch; the latest two are kept, since a batch may straddle two."""
        if epoch not in self.orders:
            self.orders[epoch] = epoch_order(self.shard_sizes(), self.seed, epoch)
            while len(self.orders) > 2:
                del self.orders[next(iter(self.orders))]
        return self.orders[epoch]

    def shard_sizes(self) -> np.ndarray:
        """Rows of each shard."""
        return np.array([rows for _, rows in self.shards], np.int64)


def read_ahead(stream: TokenStream, batches: Iterable[Sequence[int] | torch.Tensor], ahead: int = 8) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """stream.rows(places) for the places of each of `batches` in turn, read by a thread while the caller works on those before.

    The thread is up to `ahead` batches in front, so that shards are hashed before their rows are needed. It alone reads the stream until
    the iterator is closed (contextlib.closing) or at its end, which waits for the batch in hand and leaves no thread. What a batch raises
    is raised where the batch is asked for, after all batches before it.
    """
    waiting: deque[Future[tuple[torch.Tensor, torch.Tensor]]] = deque()
    pool = ThreadPoolExecutor(1, "rows")
    try:
        for places in batches:
            waiting.append(pool.submit(stream.rows, places))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """mosaicml-streaming's py1e shuffle of one epoch, the same on any machine.

    It adds the epoch to its seed: the spread seed keeps epoch 1 of seed 0 from being epoch 0 of seed 1. A block
    smaller than a shard would leave that shard unmixed with the others.
    """
    block = max(1 << 18, 2 * int(shard_sizes.max()))
    return get_shuffle("py1e", shard_sizes, num_canonical_nodes=1, seed=seed << 32, epoch=epoch, block_size=block)
