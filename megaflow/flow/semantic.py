"""Vectors of tokens by what they stand beside: positive pointwise mutual information, factored (Levy and Goldberg 2014).

    M_ij = max(0, log( P(i, j) / (P(i) P(j)) )),     M ~ U S U^T,     vectors U S^1/2

A code near to them gives tokens of one use codes that are near to one another: noise hides first which of them it is, then of what kind.
"""

import numpy as np
import torch
from torch import Tensor

WINDOW = 2
"""Positions to each side that count as beside."""


class Pairs:
    """How often tokens stand beside each other: counts of keys i V + j, sorted."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.keys: np.ndarray = np.zeros(0, np.int64)
        self.counts: np.ndarray = np.zeros(0)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Take in rows (B, L) of which so many tokens (B,) count."""
        counted = np.arange(ids.shape[1]) < lengths[:, None]
        found: list[np.ndarray] = [self.keys]
        weights: list[np.ndarray] = [self.counts]
        for gap in range(1, WINDOW + 1):
            both = counted[:, gap:]
            one, other = ids[:, :-gap][both].astype(np.int64), ids[:, gap:][both].astype(np.int64)
            for a, b in ((one, other), (other, one)):
                keys, counts = np.unique(a * self.vocab + b, return_counts=True)
                found.append(keys)
                weights.append(counts.astype(np.float64))
        self.keys, place = np.unique(np.concatenate(found), return_inverse=True)
        self.counts = np.bincount(place, np.concatenate(weights), len(self.keys))


def vectors(pairs: Pairs, dim: int, seed: int) -> Tensor:
    """(V, dim) fp32; zero for tokens that stand beside none."""
    vocab = pairs.vocab
    rows, columns = pairs.keys // vocab, pairs.keys % vocab
    share = np.bincount(rows, pairs.counts, vocab) / max(pairs.counts.sum(), 1.0)
    information = np.log(pairs.counts / pairs.counts.sum()) - np.log(share[rows]) - np.log(share[columns])
    kept = information > 0.0
    places = torch.from_numpy(np.stack([rows[kept], columns[kept]]))
    matrix = torch.sparse_coo_tensor(places, torch.from_numpy(information[kept]), (vocab, vocab), check_invariants=False).coalesce()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, size, _ = torch.svd_lowrank(matrix, min(dim + 8, vocab), niter=4)
    return (left[:, :dim] * size[:dim].sqrt()).float()
