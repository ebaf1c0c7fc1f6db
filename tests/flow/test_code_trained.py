"""Trained codes: C as a function of weights, and every gradient by it against autograd through the dense formulas."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.flow import channel, interpolant, losses
from megaflow.flow import code as codes
from megaflow.flow.code import Code
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR
from megaflow.flow.vocabulary import whole

VOCAB, DIM, WIDTH, TOKENS = 9, 4, 5, 130


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(kind: str, weight: Tensor) -> Code:
    code = codes.TRAINED[kind](weight, VOCAB, whole(VOCAB))
    if kind == "learned":  # fp32 but in tests
        return codes.Code(
            VOCAB, DIM, code.matrix.double(), code.matrix.double().square().sum(1), code.mean_leverage, code.part, code.mixing
        )
    return code


def test_a_learned_code_is_a_tight_frame_that_spans_what_its_weights_do():
    weight = normal(VOCAB, DIM, seed=0)
    code = codes.learned(weight, VOCAB, whole(VOCAB))
    torch.testing.assert_close(code.matrix.T @ code.matrix, torch.eye(DIM).double())
    torch.testing.assert_close(code.leverage, (weight @ torch.linalg.inv(weight.T @ weight) @ weight.T).diagonal())
    assert code.leverage.mean().item() == pytest.approx(code.mean_leverage) == pytest.approx(DIM / VOCAB)
    # in its weights' own coordinates a row is the row of W, over the root of the mean square
    torch.testing.assert_close(code.matrix @ code.mixing, weight * (DIM / weight.square().sum()).sqrt())
    half = codes.learned(weight.bfloat16(), VOCAB, whole(VOCAB))
    assert half.matrix.dtype == torch.float32 and (half.matrix.T @ half.matrix - torch.eye(DIM)).abs().max() < 1e-6


def test_an_embedding_s_rows_have_the_norm_of_its_dimensions():
    weight = normal(VOCAB, DIM, seed=0)
    code = codes.embedding(weight, VOCAB, whole(VOCAB))
    torch.testing.assert_close(code.matrix, math.sqrt(DIM) * F.normalize(weight, dim=1))
    assert (code.leverage == DIM).all() and code.mean_leverage == DIM and code.mixing is None
    start = codes.spread(codes.frame(VOCAB, DIM, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(start.matrix.norm(dim=1), torch.full((VOCAB,), math.sqrt(DIM)))


def test_a_semantic_frame_is_tight_and_near_to_its_start():
    start = normal(3, DIM, seed=1).repeat(20, 1) + 0.1 * normal(60, DIM, seed=2)
    code = codes.frame(60, DIM, torch.Generator().manual_seed(0), start=start)
    torch.testing.assert_close(code.matrix.T @ code.matrix, torch.eye(DIM), rtol=0, atol=1e-5)
    near = F.normalize(code.matrix, dim=1) @ F.normalize(code.matrix, dim=1).T
    alike = (torch.arange(60)[:, None] - torch.arange(60)) % 3 == 0
    assert near[alike].mean() > near[~alike].mean() + 0.5


@pytest.mark.parametrize("kind", codes.TRAINED)
@pytest.mark.parametrize("kept", ["skip", "no skip"])
@pytest.mark.parametrize("loss", ["cross_entropy", "denoising"])
def test_losses_have_the_gradients_of_the_dense_formulas(kind, kept, loss, monkeypatch):
    """By the weights of the code through the state, the channel and what the error is measured in; by the state; over several chunks."""
    monkeypatch.setattr(channel, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(channel, "CHUNK_TOKENS", 64)
    skip = kept == "skip"
    weight, table = normal(VOCAB, DIM, seed=0).requires_grad_(), normal(VOCAB, WIDTH, seed=1).requires_grad_()
    bias, hidden = normal(VOCAB, seed=2).requires_grad_(), normal(TOKENS, WIDTH, seed=3).requires_grad_()
    ids, t = torch.arange(TOKENS) % VOCAB, torch.linspace(0.0, 0.8, TOKENS, dtype=torch.float64)
    level, noise = interpolant.level(LINEAR, t), normal(TOKENS, DIM, seed=4)
    counted = (torch.arange(TOKENS) % 4 > 0).double() / TOKENS
    code = made(kind, weight)
    y = t[:, None] * codes.lookup(code, ids) + (1.0 - t[:, None]) * noise
    head, read = Head(table, bias, code, skip), Read(hidden, y, level)
    if loss == "cross_entropy":
        ours, _ = losses.cross_entropy(head, read, ids, counted)
    else:
        ours, _ = losses.denoising_loss(head, read, ids, counted, 3.0 * counted)
    z = hidden @ table.T + bias
    if skip:
        z = z + level[:, :1] * (y @ code.matrix.T) - 0.5 * level[:, 1:] * code.leverage
    log_p = torch.log_softmax(z, -1)
    dense = (counted * F.nll_loss(log_p, ids, reduction="none")).sum()
    if loss == "denoising":
        dense = dense + (3.0 * counted * (log_p.exp() @ code.matrix - code.matrix[ids]).square().sum(-1)).sum()
    torch.testing.assert_close(ours, dense)
    leaves = (hidden, table, bias, weight)
    expected = torch.autograd.grad(dense, leaves, retain_graph=True, allow_unused=True)
    for grad, exact in zip(torch.autograd.grad(ours, leaves, allow_unused=True), expected, strict=True):
        if exact is None:
            assert grad is None or grad.abs().max() == 0.0
        else:
            torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", codes.TRAINED)
def test_beliefs_have_the_gradients_of_the_dense_formula(kind, monkeypatch):
    monkeypatch.setattr(channel, "CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(channel, "CHUNK_TOKENS", 64)
    weight, table = normal(VOCAB, DIM, seed=0).requires_grad_(), normal(VOCAB, WIDTH, seed=1).requires_grad_()
    log_prior = torch.log_softmax(normal(VOCAB, seed=2), 0)
    t = torch.linspace(0.0, 0.8, TOKENS, dtype=torch.float64)
    code, level = made(kind, weight), interpolant.level(LINEAR, t)
    y = t[:, None] * codes.lookup(code, torch.arange(TOKENS) % VOCAB) + (1.0 - t[:, None]) * normal(TOKENS, DIM, seed=4)
    toward = normal(TOKENS, WIDTH, seed=5)
    ours = channel.belief_embedding(code, log_prior, y, level, table)
    z = log_prior + level[:, :1] * (y @ code.matrix.T) - 0.5 * level[:, 1:] * code.leverage
    dense = torch.softmax(z, -1) @ table
    torch.testing.assert_close(ours, dense)
    expected = torch.autograd.grad(dense, (table, weight), toward, retain_graph=True)
    for grad, exact in zip(torch.autograd.grad(ours, (table, weight), toward), expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-10)


def test_a_frozen_code_gives_no_gradient_and_costs_none():
    code = codes.frame(VOCAB, DIM, torch.Generator().manual_seed(0)).double()
    assert not code.trained and code.detached() is code and codes.noise_through(code, normal(3, DIM, seed=0)).grad_fn is None
    trained = made("learned", normal(VOCAB, DIM, seed=0).requires_grad_())
    assert trained.trained and not trained.detached().trained


class Dense:
    """A loss of a state x_t W that is no function of W besides; its gradient by W as dense noise x_0 gives it, and as seen noise does."""

    def __init__(self) -> None:
        self.weight, self.inner = normal(VOCAB, DIM, seed=0), normal(DIM, 16, seed=1)
        self.outer, self.ids, self.t = normal(16, VOCAB, seed=2), torch.arange(64) % VOCAB, 0.4

    def loss(self, state: Tensor) -> Tensor:
        return F.cross_entropy(torch.tanh(state @ self.inner) @ self.outer, self.ids)

    def dense(self, seed: int) -> Tensor:
        weight = self.weight.clone().requires_grad_()
        x = self.t * F.one_hot(self.ids, VOCAB).double() + (1.0 - self.t) * normal(64, VOCAB, seed=seed)
        return torch.autograd.grad(self.loss(x @ weight), weight)[0]

    def seen(self, seed: int) -> Tensor:
        weight = self.weight.clone().requires_grad_()
        code = codes.learned(weight, VOCAB, whole(VOCAB))
        noise = codes.noise_through(code, normal(64, DIM, seed=seed))
        y = self.t * codes.lookup(code, self.ids) + (1.0 - self.t) * noise
        size = (weight.square().sum() / DIM).sqrt()
        return torch.autograd.grad(self.loss((y @ code.mixing) * size), weight)[0]


def test_seen_noise_gives_the_gradient_of_dense_noise_with_less_variance():
    """The same mean to the standard error of both, and a variance several times smaller in every respect that is measured."""
    toy, count = Dense(), 3000
    dense, seen = (torch.stack([f(seed) for seed in range(100, 100 + count)]) for f in (toy.dense, toy.seen))
    error = ((dense.var(0) + seen.var(0)) / count).sqrt()
    assert ((dense.mean(0) - seen.mean(0)).abs() < 4.5 * error).all()
    assert dense.mean(0).norm() > 20.0 * error.norm() / VOCAB  # there is a gradient to agree on
    ratio = dense.var(0).sum() / seen.var(0).sum()
    assert ratio > 1.5 and (dense.var(0) > 0.9 * seen.var(0)).double().mean() > 0.9


def test_a_part_of_the_gradient_is_another_gradient():
    """Without what flows through G, or through the noise, the mean is seen to be off: all of it or none."""
    toy, count = Dense(), 3000

    def without_noise(seed: int) -> Tensor:
        weight = toy.weight.clone().requires_grad_()
        code = codes.learned(weight, VOCAB, whole(VOCAB))
        y = toy.t * codes.lookup(code, toy.ids) + (1.0 - toy.t) * normal(64, DIM, seed=seed)
        size = (weight.square().sum() / DIM).sqrt()
        return torch.autograd.grad(toy.loss((y @ code.mixing.detach()) * size.detach()), weight)[0]

    partial, seen = (torch.stack([f(seed) for seed in range(100, 100 + count)]) for f in (without_noise, toy.seen))
    error = ((partial.var(0) + seen.var(0)) / count).sqrt()
    assert ((partial.mean(0) - seen.mean(0)).abs() / error).max() > 8.0
