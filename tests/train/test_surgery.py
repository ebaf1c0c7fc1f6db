"""What surgery leaves of two gradients, against numpy; over processes tests/end_to_end/test_layouts.py."""

import numpy as np
import pytest
import torch

from megaflow.parallel.mesh import ALONE, Mesh
from megaflow.train.surgery import Gradients


def gradients_of(first, second):
    """Gradients of a network of two weights that are these, (5,) each: of losses that are linear in them."""
    network = torch.nn.ParameterList([torch.zeros(3), torch.zeros(2)])
    found = Gradients(network, Mesh(ALONE, ALONE, ALONE, torch.device("cpu")))
    flat = torch.cat([p for p in network])
    found.take(torch.stack([flat @ torch.tensor(first).float(), flat @ torch.tensor(second).float()]))
    return found


@pytest.mark.parametrize("second", [[1.0, -2.0, 0.5, 0.0, 1.0], [-1.0, -2.0, 0.5, 0.0, -3.0]])
def test_what_works_against_the_first_is_taken_out(second):
    first = np.array([1.0, 0.5, 0.0, -1.0, 2.0])
    second = np.array(second)
    merged, cosine = gradients_of(first, second).merged()
    product = first @ second
    expected = first + second - min(product, 0.0) / (first @ first) * first
    np.testing.assert_allclose(torch.cat(merged), expected, rtol=1e-5)
    assert cosine == pytest.approx(product / np.linalg.norm(first) / np.linalg.norm(second))
    assert (product < 0.0) == (abs((expected - first) @ first) < 1e-5)  # orthogonal where they disagree


def test_passes_add_up_and_a_missing_gradient_is_zero():
    found = gradients_of([1.0] * 5, [2.0] * 5)
    weights = found.weights
    found.take(torch.stack([weights[0].sum(), weights[0].sum() * 0.0]))
    merged, _ = found.merged()
    assert torch.cat(merged).tolist() == [4.0, 4.0, 4.0, 3.0, 3.0]


@pytest.mark.parametrize("size", [0.0, 1e-8])
def test_a_first_gradient_of_rounding_errors_takes_nothing_away(size):
    """A map that is its teacher still has no gradient on the diagonal, and what is computed of it differs with the layout."""
    merged, cosine = gradients_of([-size] * 5, [1.0] * 5).merged()
    assert torch.cat(merged).tolist() == [1.0] * 5 and cosine == 0.0


def test_the_loss_whose_gradient_an_engine_takes():
    found = gradients_of([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5)
    found.loss(found.merged()[0]).backward()
    assert torch.cat([p.grad for p in found.weights]).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
