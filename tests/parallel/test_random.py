"""Randomness as a function of what it is for."""

import pytest
import torch

from megaflow.parallel import random


class TestGenerator:
    def test_the_same_arguments_give_the_same_stream(self):
        first, second = (torch.randn(5, generator=random.generator(3, "noise", 7, 1)) for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize(
        "other", [(4, "noise", 7, 1), (3, "nois", 7, 1), (3, "noise", 8, 1), (3, "noise", 7, 2), (3, "noise", 7), (3, "noise", 71)]
    )
    def test_any_other_argument_gives_another(self, other):
        first, second = (torch.randn(5, generator=random.generator(*arguments)) for arguments in ((3, "noise", 7, 1), other))
        assert not torch.isclose(first, second).any()

    def test_it_is_the_same_stream_on_every_machine(self):
        """A recorded draw: a change of it would change every run that is continued."""
        assert random.generator(0, "noise", 1, 2).initial_seed() == 5938781660159604271

    def test_the_global_stream_is_left_alone(self):
        torch.manual_seed(0)
        expected = torch.rand(1)
        torch.manual_seed(0)
        random.uniform(0, "x"), random.permutation(9, 0, "x"), random.normal([1], (2,), 0, "x")
        assert torch.equal(torch.rand(1), expected)


class TestNormal:
    def test_a_row_is_a_function_of_its_place(self):
        """Not of the rows beside it, their order or their number: what one process draws, two draw too."""
        whole = random.normal(list(range(8)), (4, 3), 0, "noise", 5)
        assert torch.equal(random.normal([6, 2], (4, 3), 0, "noise", 5), whole[[6, 2]])
        halves = [random.normal(places, (4, 3), 0, "noise", 5) for places in ([4, 5, 6, 7], [0, 1, 2, 3])]
        assert torch.equal(torch.cat(halves[::-1]), whole)

    def test_rows_and_steps_differ(self):
        draws = torch.stack([random.normal([0, 1], (64,), 0, "noise", step) for step in (0, 1)]).flatten(0, 1)
        assert (torch.corrcoef(draws) - torch.eye(4)).abs().max() < 0.5

    def test_it_is_standard_normal(self):
        draws = random.normal(list(range(50)), (2000,), 1, "law").double()
        assert abs(draws.mean()) < 0.013 and abs(draws.var() - 1.0) < 0.018  # four standard errors


class TestUniformAndPermutation:
    def test_uniform_covers_the_unit_interval(self):
        draws = torch.tensor([random.uniform(0, "offset", step) for step in range(1000)])
        assert 0.0 <= draws.min() and draws.max() < 1.0
        assert torch.histc(draws, 10, 0.0, 1.0).min() > 60

    def test_permutation(self):
        order = random.permutation(100, 0, "cells", 3)
        assert torch.equal(order.sort().values, torch.arange(100))
        assert torch.equal(order, random.permutation(100, 0, "cells", 3))
        assert not torch.equal(order, random.permutation(100, 0, "cells", 4))
