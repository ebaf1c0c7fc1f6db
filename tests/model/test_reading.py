"""What enters the trunk: the time as features."""

import torch

from megaflow.flow.interpolant import LINEAR, time_of
from megaflow.flow.likelihood import Range
from megaflow.model.reading import TimeEmbedding


def test_time_embeddings_are_finite_at_the_ends_and_clipped_to_the_range():
    torch.manual_seed(0)
    embedding = TimeEmbedding(LINEAR, Range(-5.0, 9.0))
    embedding.initialize(zero=False)
    low, high = time_of(LINEAR, torch.tensor([-5.0, 9.0], dtype=torch.float64))
    ends = embedding(torch.tensor([0.0, low / 2, low, high, (1 + high) / 2, 1.0], dtype=torch.float64))
    assert ends.isfinite().all() and ends.abs().max() < 20.0
    torch.testing.assert_close(ends[:2], ends[2:3].expand(2, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[4:], ends[3:4].expand(2, -1), rtol=0, atol=1e-5)
    inside = embedding(time_of(LINEAR, torch.linspace(-5.0, 9.0, 60, dtype=torch.float64)))
    assert torch.pdist(inside).min() > 1e-2  # times within the range are told apart
    embedding.initialize(zero=True)
    assert (embedding(torch.tensor([0.0, 0.3, 1.0])) == 0.0).all()
