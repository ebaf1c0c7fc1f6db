"""The channel: beliefs are exact posteriors, and their mean embedding is the dense product, in value and gradient."""

import pytest
import torch

from megaflow.flow import channel, interpolant
from megaflow.flow import code as codes
from megaflow.flow.interpolant import LINEAR

VOCAB, DIM = 13, 5
CPU = torch.device("cpu")


@pytest.fixture(params=["identity", "frame"])
def code(request):
    made = codes.identity(VOCAB) if request.param == "identity" else codes.frame(VOCAB, DIM, torch.Generator().manual_seed(1))
    return made.double()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def log_prior(generator):
    return torch.log_softmax(2.0 * torch.randn(VOCAB, generator=generator, dtype=torch.float64), 0)


def seen(code, tokens, generator):
    """(y, level, t): states of random tokens at times from 0 to where nothing is left to guess."""
    t = torch.linspace(0.0, 0.995, tokens, dtype=torch.float64)
    ids = torch.randint(VOCAB, (tokens,), generator=generator)
    noise = torch.randn(tokens, code.dim, generator=generator, dtype=torch.float64)
    return t[:, None] * codes.lookup(code, ids) + (1.0 - t[:, None]) * noise, interpolant.level(LINEAR, t), t


def test_belief_is_the_posterior_under_the_gaussian_likelihood(code, log_prior, generator):
    y, level, t = seen(code, 200, generator)
    rows = codes.lookup(code, torch.arange(VOCAB))
    log_likelihood = torch.distributions.Normal(t[:, None, None] * rows, (1.0 - t)[:, None, None]).log_prob(y[:, None]).sum(-1)
    exact = torch.softmax(log_prior + log_likelihood, -1)
    torch.testing.assert_close(channel.belief(code, log_prior, y, level), exact, rtol=0, atol=1e-10)
    assert exact[0].max() < 0.9 and exact[-1].max() > 0.999


def test_belief_at_time_zero_is_the_prior_and_at_the_end_the_token(code, log_prior):
    y = codes.lookup(code, torch.arange(VOCAB))
    start, end = (interpolant.level(LINEAR, torch.full((VOCAB,), t)) for t in (0.0, 1.0))
    torch.testing.assert_close(channel.belief(code, log_prior, 3.0 * y, start), log_prior.exp().expand(VOCAB, -1))
    torch.testing.assert_close(channel.belief(code, log_prior, y, end), torch.eye(VOCAB, dtype=torch.float64))


def test_belief_in_single_precision_holds_to_the_end_of_the_bound(code, log_prior, generator):
    """Its errors are those of fp32 logits of size c = 1e4, not more."""
    y, level, _ = seen(code, 200, generator)
    single = codes.make(VOCAB, code.dim, None if code.matrix is None else code.matrix.float(), code.leverage.float())
    ours = channel.belief(single, log_prior.float(), y.float(), level.float())
    torch.testing.assert_close(ours.double(), channel.belief(code, log_prior, y, level), rtol=0, atol=0.02)
    torch.testing.assert_close(ours[:150].double(), channel.belief(code, log_prior, y, level)[:150], rtol=0, atol=1e-4)


def test_a_hot_channel_is_read_as_if_it_were_sharper(code, log_prior, generator):
    """A gain g stands for c in both terms of the evidence: (g, g beta) is a level like any other."""
    y, _, t = seen(code, 20, generator)
    rows, gain = codes.lookup(code, torch.arange(VOCAB)), torch.linspace(0.0, 30.0, 20, dtype=torch.float64)
    by_hand = log_prior + gain[:, None] * (y @ rows.T) - 0.5 * (gain * t)[:, None] * rows.square().sum(1)
    torch.testing.assert_close(channel.belief(code, log_prior, y, torch.stack([gain, gain * t], 1)), torch.softmax(by_hand, -1))


@pytest.mark.parametrize("path", [*interpolant.PATHS, "power:exponent=0.5"])
def test_beliefs_know_a_path_by_its_log_snr_alone(code, log_prior, generator, path):
    """At the same log-SNR, from the same token and noise, every path's state says the same."""
    path = interpolant.make(path, 1.7)
    ids, noise = torch.arange(VOCAB), torch.randn(VOCAB, code.dim, generator=generator, dtype=torch.float64)
    log_snr = torch.linspace(-6.0, 12.0, VOCAB, dtype=torch.float64)
    found = []
    for one in (LINEAR, path):
        t = interpolant.time_of(one, log_snr)
        y = interpolant.noisy_state(one, codes.lookup(code, ids)[:, None], noise[:, None], t)[:, 0]
        found.append(channel.belief(code, log_prior, y, interpolant.level(one, t)))
    assert not torch.allclose(interpolant.time_of(LINEAR, log_snr), interpolant.time_of(path, log_snr), atol=1e-3)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_belief_embedding_is_belief_times_table(code, log_prior, generator, monkeypatch, tokens, hot):
    """Value and gradient of the dense form, over one chunk, exactly one, and several with a rest."""
    monkeypatch.setattr(channel, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(channel, "CHUNK_TOKENS", 64)
    assert len(channel.chunks(tokens, VOCAB, CPU)) == {1: 1, 64: 1, 150: 3}[tokens]
    y, level, t = seen(code, tokens, generator)
    level = torch.stack([torch.full_like(t, 2.0), 2.0 * t], 1) if hot else level
    table = torch.randn(VOCAB, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    toward = torch.randn(tokens, 4, generator=generator, dtype=torch.float64)
    ours = channel.belief_embedding(code, log_prior, y, level, table)
    dense = channel.belief(code, log_prior, y, level) @ table
    torch.testing.assert_close(ours, dense)
    (grad,), (dense_grad,) = torch.autograd.grad(ours, table, toward), torch.autograd.grad(dense, table, toward)
    torch.testing.assert_close(grad, dense_grad, rtol=0, atol=1e-12)
    assert dense_grad.abs().max() > 0.1


def test_belief_embedding_passes_gradcheck(code, log_prior, generator):
    y, level, _ = seen(code, 10, generator)
    table = torch.randn(VOCAB, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: channel.belief_embedding(code, log_prior, y, level, x), table)


def test_belief_embedding_gives_no_gradient_to_state_prior_or_level(code, log_prior, generator):
    y, level, _ = seen(code, 10, generator)
    leaves = [x.clone().requires_grad_() for x in (y, level, log_prior)]
    table = torch.randn(VOCAB, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    channel.belief_embedding(code, leaves[2], leaves[0], leaves[1], table).sum().backward()
    assert table.grad is not None and all(leaf.grad is None for leaf in leaves)


def test_belief_embedding_with_a_half_precision_table(log_prior, generator, monkeypatch):
    """Beliefs stay fp32, the gradient is summed over chunks in fp32 and rounded once."""
    monkeypatch.setattr(channel, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(channel, "CHUNK_TOKENS", 64)
    code = codes.frame(VOCAB, DIM, torch.Generator().manual_seed(1))
    y, level = (x.float() for x in seen(code.double(), 2000, generator)[:2])
    table = torch.randn(VOCAB, 4, generator=generator).bfloat16().requires_grad_()
    out = channel.belief_embedding(code, log_prior.float(), y, level, table)
    dense = channel.belief(code, log_prior.float(), y, level) @ table.detach().float()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense, rtol=0.02, atol=0.02)
    out.sum().backward()
    expected = channel.belief(code, log_prior.float(), y, level).sum(0)[:, None].expand(-1, 4)
    torch.testing.assert_close(table.grad.float(), expected, rtol=0.01, atol=0.2)


@pytest.mark.parametrize("vocab", [2, 27, 50_257, 10_000_000])
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 5000])
def test_chunks_cover_all_tokens_once(tokens, vocab):
    parts = channel.chunks(tokens, vocab, CPU)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(tokens))
    largest = max(part.stop - part.start for part in parts)
    assert largest * vocab <= max(channel.CHUNK_ELEMENTS["cpu"], channel.CHUNK_TOKENS * vocab)
    assert len(parts) == 1 or largest >= channel.CHUNK_TOKENS


def test_no_tokens_have_no_chunks():
    assert channel.chunks(0, 27, CPU) == []


@pytest.mark.parametrize("dtype, columns", [(torch.bfloat16, 320), (torch.float16, 320), (torch.float32, 257)])
def test_products_in_half_precision_are_of_round_sizes(generator, dtype, columns):
    """By columns and rows of zeros, which change nothing, also where a buffer is used again for fewer tokens."""
    buffer, table = channel.Buffer(), torch.randn(257, 64, generator=generator).to(dtype)
    for rows in (5, 3):
        x = torch.randn(rows, 257, generator=generator)
        cast = buffer.cast(x, table)
        assert cast.shape == (rows, columns) and channel.rounded(table).shape == (columns, 64)
        assert torch.equal(cast[:, :257], x.to(dtype)) and not cast[:, 257:].any()
        assert torch.allclose((cast @ channel.rounded(table)).float(), (x.to(dtype) @ table).float(), atol=0.1)
