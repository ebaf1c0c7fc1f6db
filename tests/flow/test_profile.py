"""The profile: running averages per bin of log-SNR."""

import numpy as np
import torch

from megaflow.flow.profile import CROSS_ENTROPY, ERROR, FADED, SQUARE, Profile, bin_of


def test_bin_of():
    edges = torch.linspace(-4.0, 6.0, 11, dtype=torch.float64)
    levels = torch.tensor([-4.0, -3.999, 0.5, 5.999, -9.0, 9.0], dtype=torch.float64) + 1e-9
    assert bin_of(edges, levels).tolist() == [0, 0, 4, 9, 0, 9]
    assert bin_of(edges, torch.tensor([-torch.inf, torch.inf])).tolist() == [0, 9]
    random = 20.0 * torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 10.0
    assert np.array_equal(bin_of(edges, random).numpy(), np.clip(np.digitize(random.numpy(), edges.numpy()) - 1, 0, 9))


def rows(*values: float) -> torch.Tensor:
    """Totals (3, K) of which every row is this one, times 1, 2, 3."""
    return torch.tensor([[row * value for value in values] for row in (1.0, 2.0, 3.0)], dtype=torch.float64)


def test_a_profile_is_a_running_average_of_sums():
    profile = Profile(torch.linspace(0, 2, 3).double(), rows(4.0, 2.0), torch.ones(2).double())
    assert profile.centres.tolist() == [0.5, 1.5]
    total, weight = rows(0.9, 0.0), torch.tensor([0.3, 0.0]).double()  # only the first bin was seen, at 3 nats
    profile.observe(total, weight, memory=0.9)
    torch.testing.assert_close(profile.total, rows(0.9 * 4.0 + 0.1 * 2 * 0.9, 0.9 * 2.0))
    torch.testing.assert_close(profile.weight, torch.tensor([0.9 + 0.1 * 2 * 0.3, 0.9]).double())
    assert abs(profile.mean(CROSS_ENTROPY)[1].item() - 2.0) < 1e-12  # a bin that was not seen keeps its value
    for _ in range(300):
        profile.observe(rows(1.5, 0.5), torch.tensor([0.5, 0.5]).double(), memory=0.9)
    for row in (CROSS_ENTROPY, ERROR, SQUARE):
        torch.testing.assert_close(profile.mean(row), (row + 1.0) * torch.tensor([3.0, 1.0]).double())
    torch.testing.assert_close(profile.weight, torch.ones(2).double())


def test_a_profile_without_memory_keeps_what_it_does_not_see():
    profile = Profile(torch.linspace(0, 1, 4).double(), rows(3.0, 2.0, 1.0), torch.ones(3).double())
    profile.observe(rows(0.0, 0.5, 0.0), torch.tensor([0.0, 0.5, 0.0]).double(), memory=0.0)
    assert profile.mean(CROSS_ENTROPY).tolist() == [3.0, 1.0, 1.0]
    assert profile.weight.min() >= FADED
