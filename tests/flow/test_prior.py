"""Priors: the law of what is drawn, its moments in closed form, and that flows from the simplex stay on it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaflow.flow import code as codes
from megaflow.flow import interpolant, prior
from megaflow.flow.vocabulary import Vocabulary

VOCAB, DIM, COUNT = 7, 3, 40_000
CODES = {"identity": codes.identity(VOCAB), "frame": codes.frame(VOCAB, DIM, torch.Generator().manual_seed(1))}
LOG_PRIOR = torch.log_softmax(torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)), 0)
NAMES = [
    "gaussian",
    "gaussian:temperature=4",
    "vertices",
    "vertices:temperature=1",
    "dirichlet",
    "dirichlet:temperature=8",
    "dirichlet:temperature=0.1",
]
SIMPLEX = [name for name in NAMES if not name.startswith("gaussian")]


def drawn(name: str, code: codes.Code, rows: int = 1, length: int = COUNT) -> Tensor:
    law = prior.make(name)
    tokens = prior.token_law(law, LOG_PRIOR) if law.law == "vertices" else None
    return prior.draw(law, code, tokens, length, [torch.Generator().manual_seed(row) for row in range(rows)])


def test_every_prior_is_tried_here():
    assert {prior.make(name).law for name in NAMES} == set(prior.PRIORS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", CODES)
def test_moments_are_those_of_what_is_drawn(name, kind):
    code = CODES[kind]
    noise, found = drawn(name, code)[0].double(), prior.moments(prior.make(name), code, LOG_PRIOR)
    data = codes.mean(code, LOG_PRIOR.exp()).double()
    for draws, exact in ((noise.square().sum(1), found.square), (noise @ data, found.overlap)):
        assert abs(draws.mean().item() - exact) <= 4.0 * draws.std().item() / COUNT**0.5 + 1e-6


def test_vertices_are_tokens_by_their_law():
    for name, law in (
        ("vertices", torch.full((VOCAB,), 1.0 / VOCAB)),
        ("vertices:temperature=1", LOG_PRIOR.exp()),
        ("vertices:temperature=0.5", torch.softmax(2.0 * LOG_PRIOR, 0)),
    ):
        counts = drawn(name, CODES["identity"])[0].sum(0)
        assert ((counts - COUNT * law) ** 2 / (COUNT * law)).sum() < 22.5  # chi-square of 6 degrees, once in a thousand
    noise = drawn("vertices", CODES["frame"], length=50)[0]
    assert all(any(torch.equal(row, C) for C in CODES["frame"].matrix) for row in noise)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.8])
def test_noise_that_is_a_token_hides_none(t):
    """States (1 - t) C_j + t C_k of different tokens k are never the same but at t = 1/2, where j and k change places: a state says which
    token it has, and there is nothing to be learned from the tokens around it."""
    for kind in CODES.values():
        C = torch.eye(VOCAB) if kind.matrix is None else kind.matrix
        found = drawn("vertices", kind, length=400)[0].unique(dim=0)
        assert len(found) == VOCAB
        noise = found[torch.cdist(C, found).argmin(1)]  # in the order of tokens

        def least(t: float, C: Tensor = C, noise: Tensor = noise) -> float:
            states = (1.0 - t) * noise[:, None] + t * C[None, :]
            apart = torch.cdist(states.flatten(0, 1), states.flatten(0, 1))
            tokens = torch.arange(VOCAB).repeat(VOCAB)
            return apart[tokens[:, None] != tokens[None, :]].min().item()

        assert least(t) > 1e-3 and least(0.5) < 1e-6


def test_noise_spread_over_the_simplex_hides_a_token_for_a_moment_only():
    """Of Dirichlet noise of temperature one a token can be another than k where that one's own share of the noise is t / (1 - t) at least:
    with probability (1 - t / (1 - t))^(V - 1), in the one-hot state. Of 27 tokens one in seventy stays at t = 1/5."""
    vocab, count, t = 27, 20_000, 0.2
    source = torch.Generator().manual_seed(0)
    noise = prior.draw(prior.make("dirichlet"), codes.identity(vocab), None, count, [source])[0]
    state = (1.0 - t) * noise
    state[:, 0] += t
    others = (state[:, 1:] >= t).sum(1).double()
    expected = (vocab - 1) * (1.0 - t / (1.0 - t)) ** (vocab - 1)
    assert abs(others.mean().item() - expected) < 5.0 * others.std().item() / count**0.5 and expected < 1.0 / 60.0


@pytest.mark.parametrize("temperature", [0.1, 1.0, 8.0, 1e3, 1e6])
def test_dirichlet_has_the_variance_of_its_concentration(temperature):
    """Var p_k = (1/V)(1 - 1/V) / (a V + 1), a = 1 / temperature; at temperature 1 every p_k is Beta(1, V - 1)."""
    p = drawn(f"dirichlet:temperature={temperature}", CODES["identity"])[0].double()
    if temperature >= 1e6:  # a vertex each
        assert (p.max(1).values > 0.999).double().mean() > 0.999
    assert p.min() >= 0.0 and (p.sum(1) - 1.0).abs().max() < 1e-6
    expected = (1.0 / VOCAB) * (1.0 - 1.0 / VOCAB) / (VOCAB / temperature + 1.0)
    torch.testing.assert_close(p.var(0), torch.full((VOCAB,), expected).double(), rtol=0.06, atol=0)
    if temperature == 1.0:
        share = (p[:, 0] > 0.2).double().mean().item()
        assert abs(share - 0.8 ** (VOCAB - 1)) < 4.0 * (share / COUNT) ** 0.5


def test_what_a_large_vocabulary_draws_comes_in_pieces(monkeypatch):
    """Of the same stream, a row from each generator."""
    whole = drawn("dirichlet", CODES["frame"], rows=2, length=10)
    monkeypatch.setattr(prior, "CHUNK", 3 * VOCAB)
    torch.testing.assert_close(drawn("dirichlet", CODES["frame"], rows=2, length=10), whole)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", CODES)
def test_parts_of_the_vocabulary_draw_the_same(name, kind):
    """A dense state's columns; of a coded one each part's share, which add up to it."""
    code, shares = CODES[kind], []
    whole = drawn(name, code, rows=2, length=5)
    for place, (start, stop) in enumerate(((0, 4), (4, VOCAB))):
        part = Vocabulary(VOCAB, start, stop, place, 4, total=lambda x: x, stack=lambda x: x[None])
        shares.append(drawn(name, codes.cut(code, part), rows=2, length=5))
    if kind == "identity":
        assert torch.equal(torch.cat(shares, -1), whole)
    elif name.startswith("gaussian"):
        assert all(torch.equal(share, whole) for share in shares)
    else:
        torch.testing.assert_close(shares[0] + shares[1], whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["linear", "power:exponent=3"])
@pytest.mark.parametrize("name", SIMPLEX)
def test_flows_from_the_simplex_stay_on_it(name, path):
    """States and steps towards any posterior, to rounding; from Gaussian noise they are not on it, whatever is often said."""
    path, code, generator = interpolant.make(path), CODES["identity"], torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (6, 50), generator=generator)

    def off(noise: Tensor) -> float:
        worst = 0.0
        for t in (0.0, 0.3, 0.9, 1.0):
            y = interpolant.noisy_state(path, codes.lookup(code, ids), noise, torch.full((6,), t, dtype=torch.float64))
            worst = max(worst, (y.sum(-1) - 1.0).abs().max().item(), -y.min().item())
        grid = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)
        for s, t in zip(grid[:-1], grid[1:], strict=True):
            psi = torch.softmax(3.0 * torch.randn(6, 50, VOCAB, generator=generator), -1)
            noise = interpolant.transport(path, noise, s.expand(6), t.expand(6), psi)
            worst = max(worst, (noise.sum(-1) - 1.0).abs().max().item(), -noise.min().item())
        return worst

    assert off(drawn(name, code, rows=6, length=50)) < 5e-6
    assert off(drawn("gaussian", code, rows=6, length=50)) > 1.0


def test_the_temperature_of_a_gaussian_is_the_path_s():
    """Noise of twice the size at t is the linear path's at another time: at the same log-SNR the state is the same up to scale."""
    law = prior.make("gaussian:temperature=4")
    assert law.scale == 2.0 and prior.make("vertices:temperature=4").scale == 1.0
    hot, t = interpolant.make("linear", law.scale), torch.tensor([0.6], dtype=torch.float64)
    x, noise = torch.randn(2, 1, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = interpolant.time_of(interpolant.LINEAR, interpolant.log_snr(hot, t))
    ratio = interpolant.noisy_state(hot, x, noise, t) / interpolant.noisy_state(interpolant.LINEAR, x, noise, same)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert torch.equal(drawn("gaussian:temperature=4", CODES["frame"], length=5), drawn("gaussian", CODES["frame"], length=5))


def test_names_are_kept():
    assert prior.make("dirichlet:temperature=2") == replace(prior.dirichlet(temperature=2.0), name="dirichlet:temperature=2")
