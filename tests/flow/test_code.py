"""Codes: frames are tight and even, leverage is exact, lookups and means are products with the matrix."""

import pytest
import torch

from megaflow.flow import channel, head, interpolant
from megaflow.flow import code as codes
from megaflow.flow.code import Code, make


def frame(vocab: int, dim: int, seed: int = 0) -> Code:
    return codes.frame(vocab, dim, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("vocab", "dim"), [(3, 2), (27, 9), (500, 32), (513, 500)])
def test_a_frame_is_tight(vocab, dim):
    matrix = frame(vocab, dim).matrix.double()
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("vocab", "dim"), [(27, 9), (500, 32), (2000, 64)])
def test_rows_of_a_frame_have_almost_equal_norms(vocab, dim):
    norms = frame(vocab, dim).leverage.sqrt()
    assert norms.mean().item() == pytest.approx((dim / vocab) ** 0.5, rel=1e-4)
    assert (norms.std() / norms.mean()).item() < 1e-2
    plain = torch.linalg.qr(torch.randn(vocab, dim, generator=torch.Generator().manual_seed(0)))[0].norm(dim=1)
    assert (norms.std() / norms.mean()).item() < 0.2 * (plain.std() / plain.mean()).item()  # a random tight frame is not even


@pytest.mark.parametrize(("vocab", "dim"), [(27, 9), (500, 32)])
def test_leverage_is_the_squared_norm_of_each_row_and_sums_to_the_dimension(vocab, dim):
    code = frame(vocab, dim)
    torch.testing.assert_close(code.leverage, code.matrix.double().square().sum(1).float(), rtol=1e-7, atol=0)
    assert code.leverage.double().sum().item() == pytest.approx(dim, rel=1e-6)
    assert codes.identity(vocab).leverage.sum().item() == vocab


def test_a_frame_is_a_function_of_its_generator():
    assert torch.equal(frame(40, 7, seed=1).matrix, frame(40, 7, seed=1).matrix)
    assert not torch.allclose(frame(40, 7, seed=1).matrix, frame(40, 7, seed=2).matrix, atol=0.1)


@pytest.mark.parametrize("dim", [0, 5, 6])
def test_a_frame_has_fewer_dimensions_than_tokens(dim):
    with pytest.raises(ValueError, match=f"not dim {dim} and vocab 5"):
        frame(5, dim)


@pytest.mark.parametrize("code", [codes.identity(11), frame(11, 4)], ids=["identity", "frame"])
def test_lookup_and_mean_are_products_with_the_matrix(code):
    matrix = torch.eye(11) if code.matrix is None else code.matrix
    ids = torch.tensor([[0, 10, 3], [3, 3, 7]])
    assert torch.equal(codes.lookup(code, ids), matrix[ids])
    p = torch.softmax(torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)), -1)
    torch.testing.assert_close(codes.mean(code, p), p @ matrix)
    torch.testing.assert_close(codes.mean(code, torch.nn.functional.one_hot(ids, 11).float()), codes.lookup(code, ids))


def test_double_precision_and_moves_keep_the_values():
    for code in (codes.identity(6), frame(6, 3)):
        double = code.double()
        assert (double.vocab, double.dim, double.leverage.dtype) == (code.vocab, code.dim, torch.float64)
        assert codes.lookup(double, torch.tensor([2])).dtype == torch.float64
        assert torch.equal(codes.lookup(double, torch.arange(6)), codes.lookup(code, torch.arange(6)).double())
        torch.testing.assert_close(double.leverage, codes.lookup(double, torch.arange(6)).square().sum(1), rtol=1e-15, atol=0)
        assert torch.equal(code.to("cpu").leverage, code.leverage)


def test_the_identity_is_what_an_eye_matrix_would_be():
    """The identity leaves out a term that moves all logits alike; every law read from them is the same."""
    vocab, generator = 7, torch.Generator().manual_seed(0)
    identity, eye = codes.identity(vocab).double(), make(vocab, vocab, torch.eye(vocab).double(), torch.ones(vocab).double())
    y, t = torch.randn(9, vocab, generator=generator).double(), torch.linspace(0.0, 0.95, 9).double()
    level = interpolant.level(interpolant.LINEAR, t)
    prior = torch.log_softmax(torch.randn(vocab, generator=generator).double(), 0)
    with_identity, with_eye = (channel.evidence(code, torch.zeros(vocab).double())(y, level) for code in (identity, eye))
    shift = with_identity - with_eye
    torch.testing.assert_close(shift, (t**2 / (1.0 - t) ** 2 / 2.0)[:, None].expand_as(shift))
    torch.testing.assert_close(channel.belief(identity, prior, y, level), channel.belief(eye, prior, y, level))
    hidden, weight = torch.randn(9, 3, generator=generator).double(), torch.randn(vocab, 3, generator=generator).double()
    read, ids = head.Read(hidden, y, level), torch.arange(9) % vocab
    one, two = (head.Head(weight, prior, code, True) for code in (identity, eye))
    for ours, theirs in zip(head.posterior(one, read), head.posterior(two, read), strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(head.denoising_error(one, read, ids), head.denoising_error(two, read, ids), strict=True):
        torch.testing.assert_close(ours, theirs)
