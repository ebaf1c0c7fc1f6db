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


class TestLoad:
    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))

    def test_weights_by_name_in_the_precision_of_the_network(self, network):
        weights = {name: torch.full(p.shape, 0.1) for name, p in network.named_parameters()}
        ema.load(network.bfloat16(), weights)
        assert all(p.dtype == torch.bfloat16 and (p == torch.tensor(0.1).bfloat16()).all() for p in network.parameters())

    def test_a_missing_name_is_an_error(self, network):
        with pytest.raises(UserError, match="no weights for 0.bias"):
            ema.load(network, {"0.weight": torch.zeros(2, 3)})

    def test_unless_a_part_is_enough(self, network):
        own = {name: p.detach().clone() for name, p in network.named_parameters()}
        ema.load(network, {"0.weight": torch.zeros(2, 3), "other": torch.zeros(1)}, partial=True)
        after = dict(network.named_parameters())
        assert (after["0.weight"] == 0).all() and all(torch.equal(after[name], own[name]) for name in own if name != "0.weight")
