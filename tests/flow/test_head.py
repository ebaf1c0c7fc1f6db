"""The head against its dense form: posteriors, draws, the integrands of the bound."""

import pytest
import torch
from torch.nn import functional as F

from megaflow.flow import balance, channel, losses
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR, level
from tests.flow.small_heads import VOCAB, dense_logits, ids_and_weights, make

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_logits_are_a_product_of_experts(kind):
    head, read = make(kind, 50)
    difference = heads.logits(head, read) - dense_logits(head, read)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))  # up to what a softmax does not see


def test_probabilities_are_the_posterior_without_gradient(kind):
    """Each chunk is written over the one before it."""
    head, read = make(kind, 130)
    psi = heads.probabilities(head)
    whole = psi(read)
    torch.testing.assert_close(whole, torch.softmax(dense_logits(head, read), -1).detach())
    assert not whole.requires_grad
    assert psi(read[slice(0, 64)]).data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("kind", ["identity", "frame", "no channel"])
def test_the_expectation_is_the_codes_under_psi(kind):
    head, read = make(kind, 200)
    expected = codes.mean(head.code, torch.softmax(dense_logits(head, read), -1)).detach()
    torch.testing.assert_close(heads.expectation(head, read), expected)
    torch.testing.assert_close(heads.posterior(head, read)[0], expected)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["identity", "frame", "no channel"], indirect=True)
def test_posterior(kind, temperature):
    head, read = make(kind, 130)
    p = torch.softmax(dense_logits(head, read) / temperature, -1)
    mean, token, confidence = heads.posterior(head, read, temperature)
    torch.testing.assert_close(mean, (p @ codes.lookup(head.code, torch.arange(VOCAB))).detach())
    assert torch.equal(token, p.argmax(-1)) and not mean.requires_grad
    torch.testing.assert_close(confidence, p.max(-1).values.detach())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["identity", "frame", "no channel"], indirect=True)
def test_an_offset_chooses_the_token_and_leaves_the_posterior(kind, temperature):
    """Among the candidates at temperature 1; its probability is that of the posterior at the temperature asked for."""
    head, read = make(kind, 150)
    z, offset = dense_logits(head, read).detach(), torch.linspace(-3.0, 3.0, VOCAB, dtype=torch.float64)
    mean, token, confidence = heads.posterior(head, read, temperature, offset)
    plain = heads.posterior(head, read, temperature)
    assert token.equal((z + offset).argmax(-1)) and not token.equal(plain[1]) and mean.equal(plain[0])
    torch.testing.assert_close(confidence, torch.softmax(z / temperature, -1).gather(1, token[:, None])[:, 0])


def test_candidates_are_the_largest_logits(kind, monkeypatch):
    monkeypatch.setattr(balance, "CANDIDATES", 3)
    head, read = make(kind, 150)
    logits, ids = heads.likeliest(head, read)
    expected = dense_logits(head, read).detach().sort(-1, descending=True)
    torch.testing.assert_close(logits - logits[:, :1], expected.values[:, :3] - expected.values[:, :1])
    assert ids.equal(expected.indices[:, :3])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_have_the_law_of_the_posterior(kind, temperature):
    """One token seen n times with evenly spaced uniforms: counts are n times the probabilities, to one."""
    head, read = make(kind, 1)
    n = 5000
    many = Read(*(None if x is None else x.expand(n, *x.shape[1:]) for x in (read.hidden, read.y, read.level)))
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token, probability = heads.draw(head, many, uniform, temperature)
    p = torch.softmax(dense_logits(head, read) / temperature, -1)[0].detach()
    assert (torch.bincount(token, minlength=VOCAB) - n * p).abs().max() <= 1.0
    torch.testing.assert_close(probability.double(), p[token], rtol=1e-5, atol=1e-7)


def test_draws_invert_the_distribution_function_at_its_edges():
    """u in [F(k-1), F(k)) gives k; a token of no probability is never drawn, not even at u = 0 or just below 1."""
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    head = Head(torch.zeros(6, 1).double(), p.log(), None, skip=False)
    uniform = torch.tensor([0.0, 0.25 - 1e-12, 0.25, 0.5, 0.75 - 1e-12, 0.75, 1.0 - 2.0**-53], dtype=torch.float64)
    token, probability = heads.draw(head, Read(torch.zeros(7, 1).double()), uniform)
    assert token.tolist() == [1, 1, 3, 3, 3, 4, 4]
    assert probability.tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize("kind", ["identity", "frame", "no channel"], indirect=True)
def test_denoising_error_is_cross_entropy_and_squared_error(kind):
    head, read = make(kind, 130)
    ids, _ = ids_and_weights(130)
    z, rows = dense_logits(head, read).detach(), codes.lookup(head.code, torch.arange(VOCAB))
    cross_entropy, error = heads.denoising_error(head, read, ids)
    torch.testing.assert_close(cross_entropy, F.cross_entropy(z, ids, reduction="none"))
    torch.testing.assert_close(error, (rows[ids] - torch.softmax(z, -1) @ rows).square().sum(-1))


@pytest.mark.parametrize("dim", [4, VOCAB])
def test_a_code_in_double_has_its_errors_in_double_without_a_skip_too(dim):
    """As the bound asks for them, of a network in single precision."""
    head, read = make("frame", 130)
    code = codes.identity(VOCAB) if dim == VOCAB else codes.frame(VOCAB, dim, torch.Generator().manual_seed(5))
    single = Head(head.weight.detach().float(), head.bias.detach().float(), code.double(), skip=False)
    ids, _ = ids_and_weights(130)
    nll, error = heads.denoising_error(single, Read(read.hidden.detach().float()), ids)
    psi, rows = (
        dense_logits(single, Read(read.hidden.detach().float())).softmax(-1).double(),
        codes.lookup(code.double(), torch.arange(VOCAB)),
    )
    torch.testing.assert_close(error, (rows[ids] - psi @ rows).square().sum(-1), rtol=1e-4, atol=1e-6)
    assert nll.dtype == error.dtype == torch.float64


def test_negative_log_likelihood(kind):
    head, read = make(kind, 130)
    ids, _ = ids_and_weights(130)
    ours = heads.negative_log_likelihood(head, read, ids)
    torch.testing.assert_close(ours, F.cross_entropy(dense_logits(head, read), ids, reduction="none").detach())


def test_half_precision_keeps_the_channel_in_single():
    """A bf16 trunk: the channel's logits, in the thousands, are those of fp32, and the loss's gradients come back in bf16."""
    head, read = make("frame", 130)
    code = codes.frame(VOCAB, 4, torch.Generator().manual_seed(5))
    y, sharp = read.y.float(), level(LINEAR, torch.full((130,), 0.99)).float()
    hidden, weight, bias = (x.detach().bfloat16().requires_grad_() for x in (read.hidden, head.weight, head.bias))
    half = Head(weight, bias, code, skip=True)
    z = heads.logits(half, Read(hidden, y, sharp))
    without = heads.logits(Head(weight, bias, code, skip=False), Read(hidden, y, sharp))
    channel_alone = channel.evidence(code, torch.zeros(VOCAB))(y, sharp)
    assert z.dtype == torch.float32 and channel_alone.abs().max() > 1000.0
    torch.testing.assert_close(z - without, channel_alone, rtol=1e-6, atol=1e-2)
    loss, _ = losses.cross_entropy(half, Read(hidden, y, sharp), torch.zeros(130, dtype=torch.int64), torch.ones(130))
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in torch.autograd.grad(loss, (hidden, weight, bias))} == {torch.bfloat16}
