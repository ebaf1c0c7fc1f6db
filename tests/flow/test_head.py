"""The head against its dense form: losses with gradients, posteriors, draws, the integrands of the bound."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from megaflow.flow import balance, channel, flow_map
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR, level

VOCAB, WIDTH = 11, 6
CODES = {
    "identity": codes.identity(VOCAB).double(),
    "frame": codes.frame(VOCAB, 4, torch.Generator().manual_seed(5)).double(),
    "no channel": codes.identity(VOCAB).double(),
    "no state": None,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """64 tokens a chunk, so that the tests below go over several."""
    monkeypatch.setattr(channel, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(channel, "CHUNK_TOKENS", 64)


@pytest.fixture(params=CODES)
def kind(request):
    return request.param


def make(kind: str, tokens: int, seed: int = 0) -> tuple[Head, Read]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    code = CODES[kind]
    head = Head(normal(VOCAB, WIDTH).requires_grad_(), normal(VOCAB).requires_grad_(), code, skip=kind in ("identity", "frame"))
    hidden = normal(tokens, WIDTH).requires_grad_()
    if code is None:
        return head, Read(hidden)
    y, s = 0.5 * normal(tokens, code.dim), torch.rand(tokens, generator=generator, dtype=torch.float64) * 0.8
    return head, Read(hidden, y, level(LINEAR, s))


def dense_logits(head: Head, read: Read) -> torch.Tensor:
    """Written out: h . E + bias, and the channel's log-likelihood without the part that all tokens share."""
    z = read.hidden @ head.weight.T + head.bias
    if head.code is None or not head.skip:
        return z
    rows, (strength, signal) = codes.lookup(head.code, torch.arange(VOCAB)), read.level.chunk(2, 1)
    return z + strength * (read.y @ rows.T) - signal / 2 * rows.square().sum(1)


def ids_and_weights(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, weights of which every fourth is zero, as for padding."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.rand(tokens, generator=generator, dtype=torch.float64)
    weight[::4] = 0.0
    return torch.randint(VOCAB, (tokens,), generator=generator), weight


def same_gradients(ours: torch.Tensor, dense: torch.Tensor, head: Head, read: Read) -> None:
    leaves = (read.hidden, head.weight, head.bias)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert other.abs().max() > 1e-3


def test_logits_are_a_product_of_experts(kind):
    head, read = make(kind, 50)
    difference = heads.logits(head, read) - dense_logits(head, read)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))  # up to what a softmax does not see


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_cross_entropy_is_the_plain_one(kind, tokens):
    head, read = make(kind, tokens)
    ids, weight = ids_and_weights(tokens)
    weight[0] = 0.3
    loss, terms = heads.cross_entropy(head, read, ids, weight)
    plain = F.cross_entropy(dense_logits(head, read), ids, reduction="none")
    torch.testing.assert_close(terms, plain.detach())
    torch.testing.assert_close(loss, (plain * weight).sum())
    same_gradients(3.0 * loss, 3.0 * (plain * weight).sum(), head, read)


def test_cross_entropy_passes_gradcheck(kind):
    head, read = make(kind, 70)
    ids, weight = ids_and_weights(70)

    def loss(hidden, table, bias):
        return heads.cross_entropy(Head(table, bias, head.code, head.skip), Read(hidden, read.y, read.level), ids, weight)[0]

    assert torch.autograd.gradcheck(loss, (read.hidden, head.weight, head.bias), fast_mode=True)


def test_tokens_of_no_weight_give_no_gradient(kind):
    head, read = make(kind, 130)
    ids, weight = ids_and_weights(130)
    target, _ = mixed_target(kind, 130)
    for loss, terms in (heads.cross_entropy(head, read, ids, weight), heads.divergence(head, read, target, weight)):
        (grad,) = torch.autograd.grad(loss, read.hidden)
        assert (grad[weight == 0.0] == 0.0).all() and (grad[weight > 0.0].abs().sum(1) > 0.0).all()
        assert (terms[weight == 0.0] > 0.0).all()  # what is logged is not weighted


def test_without_gradient_the_loss_is_the_same(kind):
    head, read = make(kind, 130)
    ids, weight = ids_and_weights(130)
    with torch.no_grad():
        loss, _ = heads.cross_entropy(head, read, ids, weight)
    torch.testing.assert_close(loss, heads.cross_entropy(head, read, ids, weight)[0].detach())
    assert not loss.requires_grad


def mixed_target(kind: str, tokens: int) -> tuple[Callable[[slice], torch.Tensor], torch.Tensor]:
    """A target of two heads with shares a and 1 - a, ends included, and the same written out."""
    share = torch.linspace(0.0, 1.0, tokens, dtype=torch.float64)
    (one, first), (two, second) = make(kind, tokens, seed=1), make(kind, tokens, seed=2)
    p, q = heads.probabilities(one), heads.probabilities(two)
    dense = torch.lerp(torch.softmax(dense_logits(two, second), -1), torch.softmax(dense_logits(one, first), -1), share[:, None])
    return lambda part: q(second[part]).lerp_(p(first[part]), share[part, None]), dense.detach()


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_divergence_is_the_plain_one(kind, tokens):
    head, read = make(kind, tokens)
    _, weight = ids_and_weights(tokens)
    weight[0] = 0.3
    target, dense = mixed_target(kind, tokens)
    loss, terms = heads.divergence(head, read, target, weight)
    plain = F.kl_div(torch.log_softmax(dense_logits(head, read), -1), dense, reduction="none").sum(-1)
    torch.testing.assert_close(terms, plain.detach())
    torch.testing.assert_close(loss, (plain * weight).sum())
    same_gradients(loss, (plain * weight).sum(), head, read)


def test_divergence_passes_gradcheck(kind):
    head, read = make(kind, 70)
    _, weight = ids_and_weights(70)
    target, _ = mixed_target(kind, 70)

    def loss(hidden, table, bias):
        return heads.divergence(Head(table, bias, head.code, head.skip), Read(hidden, read.y, read.level), target, weight)[0]

    assert torch.autograd.gradcheck(loss, (read.hidden, head.weight, head.bias), fast_mode=True)


def test_probabilities_are_the_posterior_without_gradient(kind):
    """Each chunk is written over the one before it."""
    head, read = make(kind, 130)
    psi = heads.probabilities(head)
    whole = psi(read)
    torch.testing.assert_close(whole, torch.softmax(dense_logits(head, read), -1).detach())
    assert not whole.requires_grad
    assert psi(read[slice(0, 64)]).data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("whole", [1, 10, 50, 64, 100])
def test_a_target_is_asked_for_whole_rows_once(kind, whole):
    head, read = make(kind, 200)
    target, _ = mixed_target(kind, 200)
    asked = []
    loss, _ = heads.divergence(head, read, lambda part: asked.append(part) or target(part), torch.ones(200).double(), whole=whole)
    assert [i for part in asked for i in range(part.start, part.stop)] == list(range(200))
    assert all(part.start % whole == 0 for part in asked) and len(asked) == {1: 4, 10: 4, 50: 4, 64: 4, 100: 2}[whole]
    torch.testing.assert_close(loss, heads.divergence(head, read, target, torch.ones(200).double())[0])


@pytest.mark.parametrize("kind", ["identity", "frame", "no channel"])
def test_the_expectation_is_the_codes_under_psi(kind):
    head, read = make(kind, 200)
    expected = codes.mean(head.code, torch.softmax(dense_logits(head, read), -1)).detach()
    torch.testing.assert_close(heads.expectation(head, read), expected)
    torch.testing.assert_close(heads.posterior(head, read)[0], expected)


def test_a_head_is_at_no_distance_from_itself(kind):
    head, read = make(kind, 130)
    psi = heads.probabilities(head)
    loss, terms = heads.divergence(head, read, lambda part: psi(read[part]), torch.ones(130).double())
    assert terms.abs().max() < 1e-12
    assert max(grad.abs().max() for grad in torch.autograd.grad(loss, (read.hidden, head.weight, head.bias))) < 1e-12


def test_the_adaptive_weight_scales_the_loss_and_is_not_differentiated(kind):
    head, read = make(kind, 130)
    _, weight = ids_and_weights(130)
    target, dense = mixed_target(kind, 130)
    loss, terms = heads.divergence(head, read, target, weight, partial(flow_map.adaptive_weight, power=0.5, constant=0.01))
    log_q = torch.log_softmax(dense_logits(head, read), -1)
    plain = F.kl_div(log_q, dense, reduction="none").sum(-1)
    adaptive = ((log_q.exp() - dense).square().sum(-1) + 0.01).rsqrt()
    detached, through = ((plain * weight * x).sum() for x in (adaptive.detach(), adaptive))
    torch.testing.assert_close(terms, plain.detach())
    torch.testing.assert_close(loss, detached)
    differs = torch.autograd.grad(through, head.bias, retain_graph=True)[0] - torch.autograd.grad(detached, head.bias, retain_graph=True)[0]
    assert differs.abs().max() > 1e-2
    same_gradients(loss, detached, head, read)


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


def dense_denoising_loss(head, read, ids, a, b, reweight=None) -> torch.Tensor:
    """Written out, for autograd."""
    log_p, rows = torch.log_softmax(dense_logits(head, read), -1), codes.lookup(head.code, torch.arange(VOCAB))
    error = (log_p.exp() @ rows - rows[ids]).square().sum(-1)
    w = 1.0 if reweight is None else reweight((log_p.exp() - F.one_hot(ids, VOCAB)).square().sum(-1)).detach()
    return (w * (a * F.nll_loss(log_p, ids, reduction="none") + b * error)).sum()


@pytest.mark.parametrize("reweight", [None, lambda square: (square + 0.01) ** -0.5], ids=["plain", "reweighted"])
@pytest.mark.parametrize("tokens", [1, 130])
@pytest.mark.parametrize("kind", ["identity", "frame", "no channel"], indirect=True)
def test_denoising_loss_in_value_and_gradient(kind, tokens, reweight, monkeypatch):
    """Of any share of cross-entropy and squared error, over several chunks."""
    monkeypatch.setattr(channel, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(channel, "CHUNK_TOKENS", 64)
    head, read = make(kind, tokens)
    ids, a = ids_and_weights(tokens)
    leaves = (read.hidden, head.weight, head.bias)
    for by_entropy, by_error in ((a, 2.0 * a.flip(0)), (torch.zeros_like(a), a), (a, torch.zeros_like(a))):
        ours, terms = heads.denoising_loss(head, read, ids, by_entropy, by_error, reweight)
        dense = dense_denoising_loss(head, read, ids, by_entropy, by_error, reweight)
        torch.testing.assert_close(ours, dense)
        for grad, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(dense, leaves), strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(terms, torch.stack(heads.denoising_error(head, read, ids), 1))


@pytest.mark.parametrize("kind", CODES, indirect=True)
def test_a_reweighted_cross_entropy(kind):
    """Factors of |psi - token|^2, which have no gradient."""
    head, read = make(kind, 70)
    ids, weight = ids_and_weights(70)
    reweight = lambda square: (square + 0.01) ** -0.5  # noqa: E731
    log_p = torch.log_softmax(dense_logits(head, read), -1)
    w = weight * reweight((log_p.exp() - F.one_hot(ids, VOCAB)).square().sum(-1)).detach()
    dense, (ours, nll) = (w * F.nll_loss(log_p, ids, reduction="none")).sum(), heads.cross_entropy(head, read, ids, weight, reweight)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(nll, F.nll_loss(log_p, ids, reduction="none").detach())
    leaves = (read.hidden, head.weight, head.bias)
    for grad, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)


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
    loss, _ = heads.cross_entropy(half, Read(hidden, y, sharp), torch.zeros(130, dtype=torch.int64), torch.ones(130))
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in torch.autograd.grad(loss, (hidden, weight, bias))} == {torch.bfloat16}
