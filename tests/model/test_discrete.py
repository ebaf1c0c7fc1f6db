"""Networks of discrete diffusion and their bounds: what is hidden is not seen, and exact laws have exact bounds."""

import numpy as np
import pytest
import torch

from megaflow.config.check import resolve
from megaflow.config.load import assemble
from megaflow.flow import discrete
from megaflow.flow import head as heads
from megaflow.model import build, parts
from megaflow.model.discrete import Discrete
from megaflow.model.discrete_bound import bound_of_rows, noised

COUNTS = np.array([50, 30, 12, 7, 5, 3, 1])
ROWS, LENGTH = 8, 6


def make(family: str, **values: object) -> Discrete:
    """A drawn network, stirred where it begins at zero, in fp64."""
    small = {"model.layers": 2, "model.hidden": 16, "model.heads": 2, "model.belief_dim": 8, "data.length": LENGTH, "model.family": family}
    config = resolve(assemble([("test", small | values)]), 7).config
    network = build.baseline_network(config, parts.unigram(COUNTS), torch.device("cpu"))
    build.draw(network, 0)
    with torch.no_grad():
        for index, p in enumerate(network.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
    return network.double()


def ids() -> torch.Tensor:
    law = parts.unigram(COUNTS).exp()
    return torch.multinomial(law, ROWS * LENGTH, replacement=True, generator=torch.Generator().manual_seed(1)).view(ROWS, LENGTH)


TIMES = torch.linspace(0.1, 0.9, ROWS, dtype=torch.float64)


@pytest.mark.parametrize("values", [{}, {"model.time": "none"}, {"model.head": "tied", "model.belief_dim": "auto"}], ids=str)
def test_what_is_hidden_is_not_seen(values):
    network, mask = make("masked", **values), torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    other = torch.where(mask, (ids() + 3) % 7, ids())
    assert torch.equal(network(ids(), TIMES, mask), network(other, TIMES, mask))
    assert (network(ids(), TIMES, mask) - network(ids(), TIMES, ~mask)).abs().max() > 1e-3
    told = (network(ids(), TIMES, mask) - network(ids(), TIMES + 0.05, mask)).abs().max()
    assert (told == 0.0) == (values.get("model.time") == "none")


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_padding_does_not_reach_counted_tokens(family):
    network, lengths = make(family), torch.tensor([1, 2, 3, 4, 5, 6, 6, 3])
    there = torch.arange(LENGTH) < lengths[:, None]
    mask, other = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5, torch.where(there, ids(), (ids() + 1) % 7)
    one, two = (network(x, TIMES, mask, lengths) for x in (ids(), other))
    torch.testing.assert_close(one[there], two[there])


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_noise_is_a_function_of_the_place_and_as_frequent_as_the_time_says(family):
    network, rows = make(family), torch.zeros(4000, LENGTH, dtype=torch.int64)
    u, places = torch.full((4000,), 1.0 - 0.7**0.5, dtype=torch.float64), list(range(4000))
    noisy = noised(network, rows, u, places, 0, "noise", 3)
    torch.testing.assert_close(noisy.times, torch.full_like(u, 0.3))
    clean = (~noisy.hidden if noisy.hidden is not None else noisy.seen == 0).double().mean().item()
    assert clean == pytest.approx(0.3 if family == "masked" else 0.3 + 0.7 / 7, abs=0.02)
    some = noised(network, rows[5:7], u[5:7], places[5:7], 0, "noise", 3)
    for one, other in zip(some, noisy, strict=True):
        assert one is other is None or torch.equal(one, other[5:7])


def test_an_untrained_masked_network_has_the_unigram_entropy():
    """Draw by draw, for the control variate is the same."""
    network, rows = make("masked"), ids()
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(network.log_prior)
    for given in (None, torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.4):
        found = bound_of_rows(network, rows, None, draws=3, seed=0, given=given)
        counted = torch.ones_like(rows, dtype=torch.bool) if given is None else ~given
        entropy = -network.log_prior.double()[rows][counted].mean().item()
        assert found.mean == pytest.approx(entropy, rel=1e-7) and found.standard_error < 1e-7
        assert found.unigram == pytest.approx(entropy, rel=1e-7) and found.tokens == counted.sum()


def test_given_tokens_are_seen_by_a_masked_network():
    """Of a row whose other tokens are all given the bound is the cross-entropy of the one that is hidden, at any time."""
    network, rows = make("masked", **{"model.time": "none"}), ids()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    here = torch.arange(ROWS)[:, None] % LENGTH == torch.arange(LENGTH)
    z = heads.logits(network.head(), network.read(network(rows, TIMES, here)))
    exact = torch.nn.functional.cross_entropy(z[here.flatten()], rows[here]).item()
    found = bound_of_rows(network, rows, None, draws=1600, seed=0, given=~here)
    assert abs(found.mean - exact) < 4.0 * found.standard_error < 0.15
    blind = heads.logits(network.head(), network.read(network(rows, TIMES, torch.ones_like(here))))
    assert abs(torch.nn.functional.cross_entropy(blind[here.flatten()], rows[here]).item() - exact) > 0.3


def test_of_a_uniform_network_that_knows_no_context_it_is_the_unigram_entropy():
    """On average over draws: the law of a token given the others is the unigram law, whatever is seen."""
    network, rows = make("uniform"), ids().repeat(8, 1)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.copy_(network.log_prior)
    found = bound_of_rows(network, rows, None, draws=100, seed=0)
    assert abs(found.mean - found.unigram) < 4.0 * found.standard_error < 0.15


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_processes_that_share_rows_have_the_bound_of_all(family):
    network, rows = make(family), ids()
    whole, said = bound_of_rows(network, rows, None, draws=3, seed=0), []
    for part in (slice(0, 3), slice(3, 8)):
        own = {"places": torch.arange(8)[part], "all_rows": 8, "total": lambda value: said.append(value) or value}
        bound_of_rows(network, rows[part], None, draws=3, seed=0, **own)
    found = bound_of_rows(
        network, rows[:3], None, draws=3, seed=0, places=torch.arange(3), all_rows=8, total=lambda value: said[0] + said[1]
    )
    assert found.mean == pytest.approx(whole.mean, rel=1e-9) and found.tokens == whole.tokens == ROWS * LENGTH


@pytest.mark.parametrize("family", ["masked", "uniform"])
def test_rows_that_are_questions_of_their_own(family):
    """Each has the value that it has alone; on average over keys that of all draws."""
    network, rows = make(family), ids()
    found = bound_of_rows(network, rows, None, draws=4, seed=0, keys=list(range(ROWS)))
    some = bound_of_rows(network, rows[[5, 2]], None, draws=4, seed=0, keys=[5, 2])
    torch.testing.assert_close(some.rows, found.rows[[5, 2]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some.errors, found.errors[[5, 2]], rtol=1e-3, atol=1e-5)
    text = rows[:1].expand(400, LENGTH)
    mine = bound_of_rows(network, text, None, draws=6, seed=0, keys=list(range(400))).rows
    many = bound_of_rows(network, text, None, draws=40, seed=1)
    assert abs(mine.mean() - many.rows.mean()) < 4.0 * (mine.std() / 20.0 + many.standard_error * LENGTH)


def test_the_head_has_no_entry_for_what_is_hidden():
    network = make("masked")
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    psi = torch.softmax(heads.logits(network.head(), network.read(network(ids(), TIMES, mask))), -1)
    assert psi.shape == (ROWS * LENGTH, 7)
    torch.testing.assert_close(psi.sum(-1), torch.ones(ROWS * LENGTH, dtype=torch.float64))
    assert discrete.masked_weight(torch.tensor(0.75)) == 4.0
