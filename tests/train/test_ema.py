"""Averaged weights: the decay of short and long runs, the update, and a network that carries them for a while."""

import pytest
import torch
from torch import nn

from megaflow.errors import UserError
from megaflow.train import ema


class TestDecay:
    @pytest.mark.parametrize("step, expected", [(0, 1 / 10), (1, 2 / 11), (8, 9 / 18), (990, 991 / 1000)])
    def test_at_most_the_share_of_the_steps_so_far(self, step, expected):
        assert ema.decay(0.9999, step) == expected

    def test_in_the_long_run_the_configured_one(self):
        assert ema.decay(0.99, 889) < 0.99 and ema.decay(0.99, 10**5) == 0.99 and ema.decay(0.0, 5) == 0.0

    def test_a_short_run_forgets_its_beginning(self):
        """With the correction the first weights have a share below 1e-6 after 50 steps; with 0.9999 alone it would be 0.995."""
        share = 1.0
        for step in range(50):
            share *= ema.decay(0.9999, step)
        assert share < 1e-6


class TestUpdate:
    def test_a_weighted_mean_in_place(self):
        average = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0]])}
        kept = average["a"]
        ema.update(average, {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([[4.0]])}, 0.75)
        assert average["a"] is kept and torch.equal(kept, torch.tensor([1.25, 1.5])) and average["b"].item() == 1.0

    def test_closed_form_of_a_ramp(self):
        """Weights 1, 2, 3, … at a constant rate r: the average is the sum of (1 - r) r^(n - k) k."""
        average, rate = {"w": torch.zeros(1, dtype=torch.float64)}, 0.8
        for step in range(1, 31):
            ema.update(average, {"w": torch.full((1,), float(step), dtype=torch.float64)}, rate)
        assert average["w"].item() == pytest.approx(sum((1 - rate) * rate ** (30 - k) * k for k in range(1, 31)), rel=1e-12)

    def test_rate_zero_copies(self):
        average = {"w": torch.zeros(3)}
        ema.update(average, {"w": torch.arange(3.0)}, 0.0)
        assert torch.equal(average["w"], torch.arange(3.0))


class TestInPlace:
    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))

    def test_the_block_sees_the_average_and_after_it_all_is_as_before(self, network):
        own = {name: p.clone() for name, p in network.named_parameters()}
        average = {name: torch.full_like(p, 0.5) for name, p in own.items()}
        with ema.in_place(network, average):
            assert all((p == 0.5).all() for p in network.parameters())
        assert all(torch.equal(p, own[name]) for name, p in network.named_parameters())

    def test_also_if_the_block_fails(self, network):
        own = {name: p.clone() for name, p in network.named_parameters()}
        with pytest.raises(RuntimeError), ema.in_place(network, {name: 0 * p for name, p in own.items()}):
            raise RuntimeError
        assert all(torch.equal(p, own[name]) for name, p in network.named_parameters())

    def test_a_missing_name_is_an_error(self, network):
        with pytest.raises(UserError, match="no weights for 0.bias"):
            ema.load(network, {"0.weight": torch.zeros(2, 3)})
