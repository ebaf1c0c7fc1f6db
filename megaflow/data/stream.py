"""The order in which a run reads its rows: a pure function of (seed, epoch), with no state besides one number.

A *place* counts samples over the whole run: place p is row order(p // N)[p % N] of the N rows. Whoever knows the
next place resumes exactly; processes that read disjoint places of one global order read each row once per epoch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from streaming import LocalDataset
from streaming.base.shuffle import get_shuffle

from megaflow.data.shards import SPLITS, open_prepared, verify_file
from megaflow.errors import UserError


class TokenStream:
    """The rows of one split of a prepared folder, by place.

    `shuffle=False` is the order they were written in, every epoch. Raises UserError if the folder is not sound; a shard is compared
    with the manifest when its first row is read.
    """

    def __init__(self, folder: str | Path, split: str, seed: int, shuffle: bool = True) -> None:
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r} in {folder}: it is one of {', '.join(SPLITS)}.")
        self.folder, self.split, self.manifest = Path(folder), split, open_prepared(folder)
        # LocalDataset is random access to files: no shared memory, no locks, nothing left behind by a killed run
        self.dataset = LocalDataset(str(folder), split)
        self.seed, self.shuffle = seed, shuffle
        self.orders: dict[int, np.ndarray] = {}
        self.verified: set[int] = set()

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self.dataset)

    def rows(self, places: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, L) int64 and how many of each row count (B,) int64, at `places` (B,) >= 0; ids beyond are 0. Raises UserError."""
        samples = [self.sample(self.row_number(int(place))) for place in places]
        ids = np.zeros((len(samples), self.manifest["length"]), np.int64)
        for row, sample in zip(ids, samples, strict=True):
            row[:] = sample["tokens"]
        lengths = np.array([sample["length"] for sample in samples], np.int64)
        return torch.from_numpy(ids), torch.from_numpy(lengths)

    def sample(self, number: int) -> dict:
        """A row of the split by its number."""
        shard, _ = self.dataset.spanner[number]
        if shard not in self.verified:
            raw, _ = self.dataset.shards[shard].file_pairs[0]
            verify_file(self.folder, f"{self.split}/{raw.basename}", self.manifest)
            self.verified.add(shard)
        return self.dataset[number]

    def row_number(self, place: int) -> int:
        """The row of the split, in the order it was written, that stands at `place`."""
        if place < 0:
            raise ValueError(f"a place is not negative: {place}")
        epoch, within = divmod(place, len(self))
        return int(self.order(epoch)[within]) if self.shuffle else within

    def order(self, epoch: int) -> np.ndarray:
        """The permutation (N,) of one epoch; the latest two are kept, since a batch may straddle two."""
        if epoch not in self.orders:
            self.orders[epoch] = epoch_order(self.shard_sizes(), self.seed, epoch)
            while len(self.orders) > 2:
                del self.orders[next(iter(self.orders))]
        return self.orders[epoch]

    def shard_sizes(self) -> np.ndarray:
        """Rows of each shard."""
        return np.array([shard.samples for shard in self.dataset.shards], np.int64)


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """mosaicml-streaming's py1e shuffle of one epoch, the same on any machine.

    It adds the epoch to its seed: the spread seed keeps epoch 1 of seed 0 from being epoch 0 of seed 1. A block
    smaller than a shard would leave that shard unmixed with the others.
    """
    block = max(1 << 18, 2 * int(shard_sizes.max()))
    return get_shuffle("py1e", shard_sizes, num_canonical_nodes=1, seed=seed << 32, epoch=epoch, block_size=block)
