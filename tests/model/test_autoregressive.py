"""The baseline: each position is told by the tokens before it and no other, at once or one after another."""

import pytest
import torch

from megaflow.flow import head as heads
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.text_dit import Shape
from megaflow.model.trunk import Cache
from megaflow.train.stage import documents_of

VOCAB, LENGTH = 9, 7


@pytest.fixture(params=[0, 1, 2], ids=lambda n: f"{n} neighbours")
def network(request):
    torch.manual_seed(0)
    shape = Shape(VOCAB, layers=2, hidden=16, heads=2, mlp_ratio=2, belief_dim=8, neighbors=request.param)
    made = Autoregressive(shape, torch.log_softmax(torch.randn(VOCAB), 0), "sdpa")
    made.initialize()
    return made


@pytest.fixture
def ids():
    return torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("position", range(LENGTH))
def test_a_position_sees_the_tokens_before_it_and_no_other(network, ids, position):
    other = ids.clone()
    other[:, position] = (other[:, position] + 1) % VOCAB
    moved = (network(ids) - network(other)).abs().amax((0, 2))
    assert (moved[: position + 1] == 0.0).all() and (moved[position + 1 :] > 1e-5).all()


def test_step_by_step_is_the_full_pass(network, ids):
    cache, previous, found = Cache(), None, []
    for position in range(LENGTH):
        found.append(network.step(previous, len(ids), cache))
        previous = ids[:, position]
    torch.testing.assert_close(torch.stack(found, 1), network(ids), rtol=1e-4, atol=1e-5)


def test_step_by_step_is_the_full_pass_where_documents_do_not_see_each_other(network, ids):
    ids[0, [1, 2]], ids[1, 4], ids[2, 0] = 3, 3, 3
    cache, previous, found = Cache(), None, []
    for position in range(LENGTH):
        found.append(network.step(previous, len(ids), cache, end=3))
        previous = ids[:, position]
    whole = network(ids, documents=documents_of(ids, 3))
    torch.testing.assert_close(torch.stack(found, 1), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, network(ids), atol=1e-2)


def test_padding_does_not_reach_the_tokens_before_it(network, ids):
    other = ids.clone()
    other[:, 5:] = 0
    lengths = torch.full((3,), 5)
    assert torch.equal(network(ids, lengths)[:, :5], network(other, lengths)[:, :5])


def test_every_token_is_scored_and_the_first_without_context(network, ids):
    nll = heads.negative_log_likelihood(network.head(), network.read(network(ids)), ids.flatten()).view(ids.shape)
    z = network(ids) @ network.weight.T + network.bias
    torch.testing.assert_close(nll, -torch.log_softmax(z, -1).gather(2, ids[..., None])[..., 0].detach())
    assert torch.equal(network(ids)[0, 0], network(ids)[1, 0])  # one start for all


def test_with_a_zero_head_it_scores_unigrams(network, ids):
    with torch.no_grad():
        network.weight.zero_()
    nll = heads.negative_log_likelihood(network.head(), network.read(network(ids)), ids.flatten())
    torch.testing.assert_close(nll, -network.log_prior[ids.flatten()])
