"""The bound of the flow's equation for a network: exact where the network is, its divergence that of the field, blind to padding."""

import numpy as np
import pytest
import torch

from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import interpolant
from megaflow.flow.interpolant import LINEAR
from megaflow.flow.likelihood import NoBound, Range, information_range
from megaflow.model import ode_bound
from megaflow.model import parts as made
from megaflow.model.ode_bound import denoiser, field_of, ode_bound_of_rows
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT
from tests.flow import toy as toys
from tests.model.test_bound import FLOWS, setup

each = pytest.mark.parametrize("kind", FLOWS)


def taught(kind: str, recalls: bool = False) -> tuple[TextDiT, Parts, clocks.Clock, torch.Tensor]:
    """A network in fp64 whose every weight has moved, and four rows."""
    network, parts, clock, ids = setup(kind, recalls)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return network.double(), parts, clock, ids[:4, :3]


@pytest.mark.parametrize("kind", ["identity", pytest.param("frame of 2", marks=pytest.mark.long)])
def test_an_untrained_network_has_the_unigram_entropy_for_every_code(kind):
    """Of every row, by the exact divergence; what is left is the steps', and halving them says how much it is."""
    network, parts, clock, ids = setup(kind)
    with torch.no_grad():
        network.weight.zero_()
    log_prior, ids = parts.log_prior.double(), ids[:2, :1]
    many = ode_bound_of_rows(network, parts, clock, ids, None, 60, None, seed=0)
    assert many.unigram == pytest.approx(-log_prior[ids].mean().item(), rel=1e-12) and many.tokens == 2
    error = many.mean - many.unigram
    assert abs(error) < 0.05 and abs((many.rows / many.row_tokens + log_prior[ids].mean(1)).max()) < 0.1
    assert abs(error) < abs(many.integration)  # of second order: a third of it
    assert many.standard_error < 0.02 and many.last_cross_entropy < 0.01


@pytest.mark.parametrize(
    "code",
    [codes.frame(5, 3, torch.Generator().manual_seed(1)), pytest.param(codes.identity(3), marks=pytest.mark.long)],
    ids=["frame", "identity"],
)
def test_of_the_exact_denoiser_it_is_the_likelihood(code):
    """Texts of two dependent tokens, row by row: where the tokens are resolved nothing is left to tell of each other."""
    toy = toys.make(code, length=2, seed=2, spread=1.5)
    ids = toys.draw(toy, 16, torch.Generator().manual_seed(0))
    parts = Parts(code, toy.marginal.mean(0).log(), Range(information_range(code, 0.0).low, 9.0))
    clock, network = clocks.uniform_log_snr(LINEAR, -6.0, 10.0), toys.Exact(toy, code).double()
    found = ode_bound_of_rows(network, parts, clock, ids, None, 160, None, seed=0)
    exact = -toy.law[(ids * torch.tensor([code.vocab, 1])).sum(1)].log()
    torch.testing.assert_close(found.rows, exact, atol=3e-2, rtol=0)
    assert found.mean == pytest.approx(exact.mean().item() / 2.0, abs=1e-2) and found.unigram - found.mean > 0.05
    # probes have the right mean
    probed = ode_bound_of_rows(network, parts, clock, ids, None, 60, 1, seed=0)
    assert abs(probed.mean - exact.mean().item() / 2.0) < 4.0 * probed.standard_error + abs(probed.integration) < 0.4
    given = (torch.arange(2) == 0).expand(ids.shape)
    rest = ode_bound_of_rows(network, parts, clock, ids, None, 160, None, seed=0, given=given)
    assert rest.tokens == 16
    torch.testing.assert_close(rest.rows, exact + toy.marginal[0][ids[:, 0]].log(), atol=3e-2, rtol=0)


@pytest.mark.parametrize("recalls", [False, True])
@pytest.mark.parametrize("kind", ["identity", "frame of 5"])
def test_the_divergence_is_that_of_the_field(kind, recalls, monkeypatch):
    """Of a trained network, by central differences in every dimension; of one that recalls through both of its passes."""
    network, parts, _, ids = taught(kind, recalls)
    monkeypatch.setattr(network, "log_prior", network.log_prior.double())
    monkeypatch.setattr(network, "code", network.code.double())
    clean = codes.lookup(parts.code.double(), ids)
    psi = denoiser(network, parts, clean, None, None, None)
    many = {n: denoiser(network, parts, ode_bound.repeated(clean, n), None, None, None) for n in (clean[0].numel(), 16)}
    y = 0.6 * clean + 0.4 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free, t = torch.ones_like(ids, dtype=torch.bool), 0.6
    free[1, 2] = False
    mean, exact = field_of(many[clean[0].numel()], free, [0, 1, 2, 3], None, 0, 0)(y, t, 3)
    time, step, expected = torch.tensor(t, dtype=torch.float64), 1e-5, torch.zeros(4, dtype=torch.float64)
    for position in range(3):
        for dim in range(parts.code.dim):
            moved = torch.zeros_like(y)
            moved[:, position, dim] = step
            above, below = (psi(y + sign * moved, time, None)[0][0][:, position, dim] for sign in (1.0, -1.0))
            expected += (above - below) / (2.0 * step) * free[:, position]
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, psi(y, time, None)[0][0] * free[..., None])
    draws = torch.stack([field_of(many[16], free, [0, 1, 2, 3], 16, seed, 0)(y, t, 3)[1] for seed in range(12)])
    assert ((draws.mean(0) - exact).abs() < 4.5 * draws.std(0) / 12**0.5).all() and draws.std() > 0.0


@each
def test_padding_counts_for_nothing(kind):
    network, parts, clock, ids = setup(kind)
    ids, lengths = ids[:3], torch.tensor([2, 6, 3])
    other = torch.where(torch.arange(6) < lengths[:, None], ids, 6)
    one, two = (ode_bound_of_rows(network, parts, clock, x, lengths, 8, 1, seed=0) for x in (ids, other))
    assert one.tokens == two.tokens == 11 and two.mean == pytest.approx(one.mean, abs=1e-6) and two.unigram == one.unigram
    law = np.log(np.array([1e-9, 0.05, 0.1, 0.35, 0.05, 0.15, 0.3]))
    priced = ode_bound_of_rows(network, parts, clock, ids, lengths, 8, 1, seed=0, log_length=law)
    assert priced.mean == pytest.approx(one.mean - law[lengths.numpy()].sum() / 11)


def test_draws_are_a_function_of_the_seed_and_not_of_the_batch():
    network, parts, clock, ids = setup("frame of 5")
    once, parted, other = (
        ode_bound_of_rows(network, parts, clock, ids, None, 4, 2, seed, batch=n) for seed, n in ((0, 64), (0, 3), (1, 64))
    )
    assert parted.mean == pytest.approx(once.mean, abs=1e-5) and other.mean != once.mean


def test_what_is_no_bound_is_refused(monkeypatch):
    network, parts, clock, ids = setup("frame of 5")
    for steps, probes in ((3, 1), (5, 1), (2, 1), (4, 0)):
        with pytest.raises(ValueError):
            ode_bound_of_rows(network, parts, clock, ids, None, steps, probes, 0)
    monkeypatch.setattr(ode_bound, "EXACT", 29)
    with pytest.raises(ValueError, match="of 30 dimensions"):
        ode_bound_of_rows(network, parts, clock, ids, None, 4, None, 0)
    with pytest.raises(NoBound, match="Gaussian"):
        ode_bound_of_rows(network, made.with_noise(parts, interpolant.LINEAR.name, "vertices"), clock, ids, None, 4, 1, 0)
