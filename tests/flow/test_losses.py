"""Losses against their dense forms, in value and gradient, over several chunks."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from megaflow.flow import channel, flow_map, losses
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow.head import Head, Read
from tests.flow.small_heads import VOCAB, dense_logits, ids_and_weights, make, same_gradients

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_cross_entropy_is_the_plain_one(kind, tokens):
    head, read = make(kind, tokens)
    ids, weight = ids_and_weights(tokens)
    weight[0] = 0.3
    loss, terms = losses.cross_entropy(head, read, ids, weight)
    plain = F.cross_entropy(dense_logits(head, read), ids, reduction="none")
    torch.testing.assert_close(terms, plain.detach())
    torch.testing.assert_close(loss, (plain * weight).sum())
    same_gradients(3.0 * loss, 3.0 * (plain * weight).sum(), head, read)


def test_cross_entropy_passes_gradcheck(kind):
    head, read = make(kind, 70)
    ids, weight = ids_and_weights(70)

    def loss(hidden, table, bias):
        return losses.cross_entropy(Head(table, bias, head.code, head.skip), Read(hidden, read.y, read.level), ids, weight)[0]

    assert torch.autograd.gradcheck(loss, (read.hidden, head.weight, head.bias), fast_mode=True)


def test_tokens_of_no_weight_give_no_gradient(kind):
    head, read = make(kind, 130)
    ids, weight = ids_and_weights(130)
    target, _ = mixed_target(kind, 130)
    for loss, terms in (losses.cross_entropy(head, read, ids, weight), losses.divergence(head, read, target, weight)):
        (grad,) = torch.autograd.grad(loss, read.hidden)
        assert (grad[weight == 0.0] == 0.0).all() and (grad[weight > 0.0].abs().sum(1) > 0.0).all()
        assert (terms[weight == 0.0] > 0.0).all()  # what is logged is not weighted


def test_without_gradient_the_loss_is_the_same(kind):
    head, read = make(kind, 130)
    ids, weight = ids_and_weights(130)
    with torch.no_grad():
        loss, _ = losses.cross_entropy(head, read, ids, weight)
    torch.testing.assert_close(loss, losses.cross_entropy(head, read, ids, weight)[0].detach())
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
    loss, terms = losses.divergence(head, read, target, weight)
    plain = F.kl_div(torch.log_softmax(dense_logits(head, read), -1), dense, reduction="none").sum(-1)
    torch.testing.assert_close(terms, plain.detach())
    torch.testing.assert_close(loss, (plain * weight).sum())
    same_gradients(loss, (plain * weight).sum(), head, read)


def test_divergence_passes_gradcheck(kind):
    head, read = make(kind, 70)
    _, weight = ids_and_weights(70)
    target, _ = mixed_target(kind, 70)

    def loss(hidden, table, bias):
        return losses.divergence(Head(table, bias, head.code, head.skip), Read(hidden, read.y, read.level), target, weight)[0]

    assert torch.autograd.gradcheck(loss, (read.hidden, head.weight, head.bias), fast_mode=True)


@pytest.mark.parametrize("whole", [1, 10, 50, 64, 100])
def test_a_target_is_asked_for_whole_rows_once(kind, whole):
    head, read = make(kind, 200)
    target, _ = mixed_target(kind, 200)
    asked = []
    loss, _ = losses.divergence(head, read, lambda part: asked.append(part) or target(part), torch.ones(200).double(), whole=whole)
    assert [i for part in asked for i in range(part.start, part.stop)] == list(range(200))
    assert all(part.start % whole == 0 for part in asked) and len(asked) == {1: 4, 10: 4, 50: 4, 64: 4, 100: 2}[whole]
    torch.testing.assert_close(loss, losses.divergence(head, read, target, torch.ones(200).double())[0])


def test_a_head_is_at_no_distance_from_itself(kind):
    head, read = make(kind, 130)
    psi = heads.probabilities(head)
    loss, terms = losses.divergence(head, read, lambda part: psi(read[part]), torch.ones(130).double())
    assert terms.abs().max() < 1e-12
    assert max(grad.abs().max() for grad in torch.autograd.grad(loss, (read.hidden, head.weight, head.bias))) < 1e-12


def test_the_adaptive_weight_scales_the_loss_and_is_not_differentiated(kind):
    head, read = make(kind, 130)
    _, weight = ids_and_weights(130)
    target, dense = mixed_target(kind, 130)
    loss, terms = losses.divergence(head, read, target, weight, partial(flow_map.adaptive_weight, power=0.5, constant=0.01))
    log_q = torch.log_softmax(dense_logits(head, read), -1)
    plain = F.kl_div(log_q, dense, reduction="none").sum(-1)
    adaptive = ((log_q.exp() - dense).square().sum(-1) + 0.01).rsqrt()
    detached, through = ((plain * weight * x).sum() for x in (adaptive.detach(), adaptive))
    torch.testing.assert_close(terms, plain.detach())
    torch.testing.assert_close(loss, detached)
    differs = torch.autograd.grad(through, head.bias, retain_graph=True)[0] - torch.autograd.grad(detached, head.bias, retain_graph=True)[0]
    assert differs.abs().max() > 1e-2
    same_gradients(loss, detached, head, read)


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
        ours, terms = losses.denoising_loss(head, read, ids, by_entropy, by_error, reweight)
        dense = dense_denoising_loss(head, read, ids, by_entropy, by_error, reweight)
        torch.testing.assert_close(ours, dense)
        for grad, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(dense, leaves), strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(terms, torch.stack(heads.denoising_error(head, read, ids), 1))


def test_a_reweighted_cross_entropy(kind):
    """Factors of |psi - token|^2, which have no gradient."""
    head, read = make(kind, 70)
    ids, weight = ids_and_weights(70)
    reweight = lambda square: (square + 0.01) ** -0.5  # noqa: E731
    log_p = torch.log_softmax(dense_logits(head, read), -1)
    w = weight * reweight((log_p.exp() - F.one_hot(ids, VOCAB)).square().sum(-1)).detach()
    dense, (ours, nll) = (w * F.nll_loss(log_p, ids, reduction="none")).sum(), losses.cross_entropy(head, read, ids, weight, reweight)
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(nll, F.nll_loss(log_p, ids, reduction="none").detach())
    leaves = (read.hidden, head.weight, head.bias)
    for grad, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reweighted", [False, True])
def test_a_squared_distance_of_means(kind, reweighted):
    """From target means in the state's dimensions, plain and with detached weights of its own."""
    head, read = make(kind, 150)
    if head.code is None:
        return
    ids, weight = ids_and_weights(150)
    wanted = codes.lookup(head.code, ids) + 0.1
    reweight = partial(flow_map.adaptive_weight, power=0.5, constant=0.01) if reweighted else None
    loss, terms = losses.endpoint_distance(head, read, lambda part: wanted[part], weight, reweight)
    off = torch.softmax(dense_logits(head, read), -1) @ codes.lookup(head.code, torch.arange(VOCAB)) - wanted
    square = off.square().sum(-1)
    factor = weight if reweight is None else weight * reweight(square)
    torch.testing.assert_close(terms, square.detach())
    torch.testing.assert_close(loss, (factor * square).sum())
    same_gradients(loss, (factor * square).sum(), head, read)
