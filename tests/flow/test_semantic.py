"""Vectors of tokens by what they stand beside, against counting by hand and the whole matrix."""

import numpy as np
import torch
from torch.nn import functional as F

from megaflow.flow.semantic import WINDOW, Pairs, vectors

VOCAB = 12


def rows(count: int, seed: int) -> np.ndarray:
    """Texts in which an even token stands beside even ones, four at a time, and an odd one beside odd ones."""
    source = np.random.default_rng(seed)
    kind = source.integers(0, 2, (count, 4))
    return (2 * source.integers(0, VOCAB // 2, (count, 4, 4)) + kind[..., None]).reshape(count, 16)


def counted_by_hand(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    found = np.zeros((VOCAB, VOCAB))
    for row, length in zip(ids, lengths, strict=True):
        for i in range(length):
            for j in range(length):
                if 0 < abs(i - j) <= WINDOW:
                    found[row[i], row[j]] += 1
    return found


def test_pairs_are_counted_over_batches_within_counted_tokens():
    ids, lengths = rows(20, 0), np.random.default_rng(1).integers(1, 17, 20)
    pairs = Pairs(VOCAB)
    pairs.add(ids[:7], lengths[:7])
    pairs.add(ids[7:], lengths[7:])
    dense = np.zeros(VOCAB * VOCAB)
    dense[pairs.keys] = pairs.counts
    assert np.array_equal(dense.reshape(VOCAB, VOCAB), counted_by_hand(ids, lengths))
    assert np.all(np.diff(pairs.keys) > 0)


def test_vectors_factor_the_positive_pointwise_mutual_information():
    """With as many dimensions as tokens their products by signs of the eigenvalues are the matrix itself; fewer are its largest parts."""
    pairs, ids = Pairs(VOCAB), rows(400, 2)
    pairs.add(ids, np.full(400, 16))
    joint = counted_by_hand(ids, np.full(400, 16))
    joint /= joint.sum()
    law = joint.sum(1)
    with np.errstate(divide="ignore"):
        matrix = np.maximum(np.log(joint / law[:, None] / law), 0.0)
    left, size, _ = np.linalg.svd(matrix)
    for dim in (2, 5):
        ours = vectors(pairs, dim, seed=0).double().numpy()
        exact = left[:, :dim] * np.sqrt(size[:dim])
        np.testing.assert_allclose(ours @ ours.T, exact @ exact.T, atol=2e-3 * size[0])
    assert torch.equal(vectors(pairs, 3, seed=0), vectors(pairs, 3, seed=0))


def test_tokens_of_one_use_are_near():
    pairs = Pairs(VOCAB)
    pairs.add(rows(400, 3), np.full(400, 16))
    found = F.normalize(vectors(pairs, 2, seed=0), dim=1)
    near, same = found @ found.T, (torch.arange(VOCAB)[:, None] - torch.arange(VOCAB)) % 2 == 0
    assert near[same].min() > near[~same].max() + 0.3


def test_a_token_that_never_occurs_has_no_vector():
    pairs = Pairs(VOCAB + 1)
    pairs.add(rows(50, 4), np.full(50, 16))
    assert (vectors(pairs, 3, seed=0)[-1] == 0.0).all()
