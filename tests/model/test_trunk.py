"""The trunk: rotary positions are relative, a cache changes nothing, masks and conditions do what they say."""

import pytest
import torch

from megaflow.model.trunk import Cache, Trunk, rotary, rotate


def trunk(condition: int | None = None, seed: int = 0) -> Trunk:
    torch.manual_seed(seed)
    made = Trunk(layers=3, hidden=24, heads=2, mlp_ratio=2, condition=condition, kernel="sdpa")
    made.initialize()
    return made.double()


def stirred(made: Trunk) -> Trunk:
    """With random values in place of the zeros and ones that conditions and gains start from."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_rotation_keeps_norms_and_position_zero():
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = rotate(x, *rotary(torch.arange(9), 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[:, :, 0], x[:, :, 0]) and (turned[:, :, 1] - x[:, :, 1]).abs().max() > 0.1


def test_scores_depend_on_distances_alone():
    """Angles of a row that starts at position 5 give the scores of one that starts at 0; the angle is position times frequency."""
    q, k = torch.randn(2, 1, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    scores = [
        rotate(q, *angles) @ rotate(k, *angles).transpose(-1, -2) for angles in (rotary(torch.arange(6), 8), rotary(torch.arange(5, 11), 8))
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    assert (scores[0] - q @ k.transpose(-1, -2)).abs().max() > 0.5
    same = torch.ones(1, 1, 6, 8)
    by_distance = (rotate(same, *rotary(torch.arange(6), 8)) @ rotate(same, *rotary(torch.arange(6), 8)).transpose(-1, -2))[0, 0]
    expected = 2.0 * sum(torch.cos(torch.tensor(3.0) * 10_000.0 ** (-i / 8)) for i in (0, 2, 4, 6))
    torch.testing.assert_close(by_distance.diagonal(3), expected.expand(3))


@pytest.mark.parametrize("pieces", [[1] * 10, [4, 1, 5], [10]])
def test_decoding_with_a_cache_is_the_full_pass(pieces):
    made = stirred(trunk())
    x = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cache, start, found = Cache(), 0, []
    for length in pieces:
        found.append(made(x[:, start : start + length], causal=True, cache=cache))
        start += length
        assert cache.length == start
    torch.testing.assert_close(torch.cat(found, 1), made(x, causal=True), rtol=0, atol=1e-6)


def test_causal_positions_do_not_see_what_follows():
    made = stirred(trunk())
    x = torch.randn(1, 10, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = x.clone()
    other[:, 6, 0] += 1.0  # one dimension: a norm takes a shift of all away
    moved = (made(x, causal=True) - made(other, causal=True)).abs().amax(-1)[0]
    assert (moved[:6] == 0.0).all() and (moved[6:] > 1e-6).all()
    assert ((made(x) - made(other)).abs().amax(-1)[0] > 1e-6).all()


def test_lengths_hide_what_follows_them():
    made = stirred(trunk())
    x = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths = torch.tensor([5, 8])
    full = made(x, lengths=lengths)
    torch.testing.assert_close(full[0, :5], made(x[:1, :5])[0])
    torch.testing.assert_close(full[1], made(x[1:])[0])
    assert (full[0, :5] - made(x)[0, :5]).abs().max() > 1e-3


def test_a_condition_says_nothing_at_first_and_something_once_trained():
    made, plain = trunk(condition=6), trunk()
    plain.load_state_dict({k: v for k, v in made.state_dict().items() if "modulation" not in k}, strict=False)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, two = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(made(x, one), made(x, two))
    torch.testing.assert_close(made(x, one), plain(x))  # shift 0, scale 1, gate 1: the blocks without a condition
    assert (stirred(made)(x, one) - made(x, two)).abs().max() > 1e-2


def test_each_row_has_its_own_condition():
    made = stirred(trunk(condition=6))
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    condition = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    both = made(x, condition)
    torch.testing.assert_close(both[1:], made(x[1:], condition[1:]))


def test_gradients_reach_every_weight():
    made = stirred(trunk(condition=6))
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made(x, torch.ones(2, 6, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0.0 for p in made.parameters())


def test_without_gains_queries_and_keys_stay_as_they_are():
    torch.manual_seed(0)
    made = stirred(Trunk(1, 24, 2, 2, None, "plain", qk_norm=False).double())
    assert made.blocks[0].query_gain is None and not any("gain" in name and "key" in name for name, _ in made.named_parameters())
    qkv = torch.randn(1, 5, 72, dtype=torch.float64)
    q, k, v = made.blocks[0].split(qkv, *rotary(torch.arange(5), 12))
    torch.testing.assert_close(q.norm(dim=-1), qkv.view(1, 5, 3, 2, 12)[:, :, 0].norm(dim=-1).transpose(1, 2), rtol=1e-6, atol=1e-6)


def test_extra_tokens_are_seen_by_all_have_no_place_and_come_out_no_more():
    """The same in any order, in front of rows of any length; padding stays unseen."""
    made = stirred(trunk())
    x, extra = (torch.randn(2, n, 24, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (10, 3))
    lengths = torch.tensor([10, 6])
    found = made(x, lengths=lengths, extra=extra)
    assert found.shape == x.shape and (found - made(x, lengths=lengths)).abs().amax((0, 2)).min() > 1e-3
    torch.testing.assert_close(made(x, lengths=lengths, extra=extra[:, [2, 0, 1]]), found, rtol=1e-6, atol=1e-6)
    other = x.clone()
    other[1, 6:] += 1.0
    assert torch.equal(made(other, lengths=lengths, extra=extra)[:, :6], found[:, :6])
