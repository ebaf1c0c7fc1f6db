"""The bound of a network on rows: exact where the network is, unigram entropy where it knows nothing, blind to padding."""

import math

import numpy as np
import pytest
import torch

from megaflow.config.schema import FlowConfig
from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow.interpolant import LINEAR, noisy_state, time_of
from megaflow.flow.likelihood import Range, RangeTooShort, information_range
from megaflow.flow.vocabulary import Vocabulary
from megaflow.model import parts as made
from megaflow.model.bound import bound_of_rows, boundary_cost
from megaflow.model.parts import Parts
from megaflow.model.text_dit import Shape, TextDiT
from megaflow.parallel import random
from tests.flow import toy as toys
from tests.flow.measured import argmax

COUNTS = np.array([50, 30, 12, 7, 5, 3, 1])
FLOWS = {
    "identity": FlowConfig(code="identity", code_dim=7),
    "frame of 5": FlowConfig(code="frame", code_dim=5),
    "frame of 2": FlowConfig(code="frame", code_dim=2),
}
each = pytest.mark.parametrize("kind", FLOWS)


def setup(kind: str, recalls: bool = False) -> tuple[TextDiT, Parts, clocks.Clock, torch.Tensor]:
    """A network that has learned nothing, its flow, a clock and rows of unigrams."""
    parts = made.make(FLOWS[kind], COUNTS, 0)
    torch.manual_seed(0)
    shape = Shape(7, layers=1, hidden=16, heads=2, mlp_ratio=2, belief_dim=8, neighbors=1)
    network = TextDiT(shape, parts.code, parts.log_prior, parts.span, LINEAR, True, ("belief",), None, "sdpa", recalls=recalls)
    network.initialize()
    generator = torch.Generator().manual_seed(1)
    ids = torch.multinomial(parts.log_prior.exp(), 48, replacement=True, generator=generator).view(8, 6)
    return network, parts, clocks.uniform_log_snr(LINEAR, parts.span.low, parts.span.high), ids


@each
def test_an_untrained_network_has_the_unigram_entropy_for_every_code(kind):
    network, parts, clock, ids = setup(kind)
    with torch.no_grad():
        network.weight.zero_()
    found = bound_of_rows(network, parts, clock, ids, None, draws=3, seed=0)
    entropy = -parts.log_prior.double()[ids].mean().item()
    assert found.mean == pytest.approx(entropy, rel=1e-9) and found.unigram == pytest.approx(entropy, rel=1e-12)
    assert found.standard_error < 1e-9 and found.tokens == 48
    assert found.last_cross_entropy < 0.01


@each
def test_what_is_not_resolved_at_the_end_of_the_range_is_part_of_it(kind):
    """However early the range ends: the cross-entropy there stands for the rest of the integral."""
    network, parts, clock, ids = setup(kind)
    with torch.no_grad():
        network.weight.zero_()
    entropy, last = -parts.log_prior.double()[ids].mean().item(), []
    for high in torch.linspace(parts.span.high, parts.span.low, 60).tolist():
        try:
            found = bound_of_rows(network, Parts(parts.code, parts.log_prior, Range(parts.span.low, high)), clock, ids, None, 3, seed=0)
        except RangeTooShort:
            break
        assert found.mean == pytest.approx(entropy, rel=1e-9)
        last.append(found.last_cross_entropy)
    assert len(last) > 1 and last[-1] > 0.01


def test_of_a_network_that_recalls_it_is_that_of_two_passes():
    """The cross-entropy at the end of the range, of a network that is told by hand what it has said of the same state."""
    network, parts, clock, ids = setup("frame of 5", recalls=True)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    short, said = Parts(parts.code, parts.log_prior, Range(parts.span.low, 2.0)), []
    with pytest.raises(RangeTooShort):
        bound_of_rows(network, short, clock, ids, None, draws=2, seed=0, double=False, total=lambda value: said.append(value) or value)
    last = said[0][-1].sum().item() / ids.numel()
    assert last == pytest.approx(by_hand(network, short, ids, passes=2), rel=1e-4)
    assert last != pytest.approx(by_hand(network, short, ids, passes=1), rel=1e-2)


@torch.no_grad()
def by_hand(network: TextDiT, parts: Parts, ids: torch.Tensor, passes: int) -> float:
    """Mean cross-entropy at the end of the range, at the noise that the bound draws there when it has made two draws."""
    times = time_of(parts.path, torch.full((len(ids),), parts.span.high, dtype=torch.float64))
    noise = random.normal(list(range(len(ids))), (ids.shape[1], parts.code.dim), 0, "bound noise", 2)
    y, said = noisy_state(parts.path, codes.lookup(parts.code, ids), noise, times), None
    for _ in range(passes):
        z = heads.logits(network.head(), network.read(network(y, times, said=said), y, times)).view(*ids.shape, -1)
        said = torch.softmax(z, -1) @ codes.lookup(network.code, torch.arange(7))
    return torch.nn.functional.cross_entropy(z.flatten(0, 1), ids.flatten()).item()


@pytest.mark.parametrize("code", [codes.identity(4), codes.frame(5, 3, torch.Generator().manual_seed(1))], ids=["identity", "frame"])
@pytest.mark.parametrize("clock", [clocks.uniform_log_snr(LINEAR, -6.0, 10.0), argmax(5)], ids=["log-SNR", "argmax"])
def test_of_the_exact_denoiser_it_is_the_likelihood(code, clock):
    toy = toys.make(code, length=2, seed=2, spread=1.5)
    ids = toys.draw(toy, 1500, torch.Generator().manual_seed(0))
    parts = Parts(code, toy.marginal.mean(0).log(), Range(information_range(code, 0.0).low, 9.0))
    found = bound_of_rows(toys.Exact(toy, code).double(), parts, clock, ids, None, draws=10, seed=0, batch=1500)
    exact = -toy.law[(ids * torch.tensor([code.vocab, 1])).sum(1)].log().mean().item() / 2.0
    assert abs(found.mean - exact) < 4.0 * found.standard_error < 0.1
    assert found.unigram - exact > 6.0 * found.standard_error


@pytest.mark.parametrize("code", [codes.identity(4), codes.frame(5, 3, torch.Generator().manual_seed(1))], ids=["identity", "frame"])
def test_parts_and_rows_add_up_to_it(code):
    """Rows exactly; parts up to the control variate, whose own parts add up to the entropy; and the exact denoiser is ahead of the
    posterior of independent tokens at every level but for noise."""
    toy = toys.make(code, length=2, seed=2, spread=1.5)
    ids = toys.draw(toy, 600, torch.Generator().manual_seed(0))
    parts = Parts(code, toy.marginal.mean(0).log(), Range(information_range(code, 0.0).low, 9.0))
    clock = clocks.uniform_log_snr(LINEAR, -6.0, 10.0)
    found = bound_of_rows(toys.Exact(toy, code).double(), parts, clock, ids, None, draws=20, seed=0, batch=600, stretches=12)
    assert found.rows.shape == found.row_tokens.shape == (600,) and found.row_tokens.sum() == 1200
    assert found.rows.sum().item() / 1200 == pytest.approx(found.mean, rel=1e-12)
    told = found.parts
    whole = sum(told.nats) + told.before + told.after
    assert whole == pytest.approx(found.mean, abs=6.0 * sum(error**2 for error in told.errors) ** 0.5)
    assert sum(told.unigram) + told.before == pytest.approx(found.unigram, abs=0.06) and told.rest == 0.0
    gain = np.array(told.unigram) - np.array(told.nats)
    assert (gain >= -4.0 * np.array(told.errors) - 1e-12).all() and gain.sum() > 0.05
    assert told.edges[0] == parts.bounded.low and told.edges[-1] == parts.bounded.high == 9.0
    assert bound_of_rows(toys.Exact(toy, code).double(), parts, clock, ids[:8], None, draws=2, seed=0).parts is None


def test_rows_that_are_questions_of_their_own():
    """Each is the likelihood on average over keys, within the errors that are said; and what it is alone, whatever is beside it. Few draws
    have no bias, which a control variate that is fitted to them has."""
    code = codes.frame(5, 3, torch.Generator().manual_seed(1))
    toy = toys.make(code, length=2, seed=2, spread=1.5)
    parts = Parts(code, toy.marginal.mean(0).log(), Range(information_range(code, 0.0).low, 9.0))
    network, clock = toys.Exact(toy, code).double(), clocks.uniform_log_snr(LINEAR, -6.0, 10.0)
    text = toys.draw(toy, 1, torch.Generator().manual_seed(0)).expand(2000, 2)
    every = {"draws": 8, "seed": 0, "batch": 2000, "keys": list(range(2**40, 2**40 + 2000))}
    found = bound_of_rows(network, parts, clock, text, None, **every)
    exact = -toy.law[(text[0] * torch.tensor([code.vocab, 1])).sum()].log()
    assert abs(found.rows.mean() - exact) < 4.0 * (found.rows.std() / 2000**0.5).item() < 0.15
    assert found.rows.std() < found.errors.square().mean().sqrt() * 1.1
    some = bound_of_rows(network, parts, clock, text[:3], None, 8, 0, keys=[2**40 + 700, 2**40, 2**40 + 700])
    torch.testing.assert_close(some.rows, found.rows[[700, 0, 700]])
    torch.testing.assert_close(some.errors, found.errors[[700, 0, 700]])


def test_a_network_that_knows_less_has_a_larger_bound():
    """Random weights in the head: still a bound of these rows' unigram law, and so above its entropy."""
    network, parts, clock, ids = setup("frame of 5")
    with torch.no_grad():
        network.weight.normal_(std=0.3)
    found = bound_of_rows(network, parts, clock, ids.repeat(20, 1), None, draws=4, seed=0)
    assert found.mean > found.unigram + 4.0 * found.standard_error


def test_the_lengths_of_rows_have_their_price():
    """A network that knows nothing has the entropy of length and tokens together, each row's length once."""
    network, parts, clock, ids = setup("frame of 5")
    with torch.no_grad():
        network.weight.zero_()
    lengths = torch.tensor([1, 2, 3, 4, 5, 6, 6, 3])
    law = np.log(np.array([1e-9, 0.05, 0.1, 0.35, 0.05, 0.15, 0.3]))
    known, unknown = (bound_of_rows(network, parts, clock, ids, lengths, draws=3, seed=0, log_length=x) for x in (None, law))
    counted = torch.arange(6) < lengths[:, None]
    tokens = -parts.log_prior.double()[ids][counted].sum().item()
    assert known.mean * 30 == pytest.approx(tokens, rel=1e-9)
    assert unknown.mean * 30 == pytest.approx(tokens - law[lengths.numpy()].sum(), rel=1e-9)
    assert unknown.unigram == known.unigram and unknown.standard_error < 1e-9


@each
def test_padding_counts_for_nothing(kind):
    network, parts, clock, ids = setup(kind)
    lengths, other = torch.tensor([1, 2, 3, 4, 5, 6, 6, 3]), ids.clone()
    for row, length in enumerate(lengths):
        other[row, length:] = 6
    one, two = (bound_of_rows(network, parts, clock, x, lengths, draws=2, seed=0) for x in (ids, other))
    assert one.tokens == two.tokens == 30
    assert two.mean == pytest.approx(one.mean, abs=1e-6) and two.unigram == one.unigram
    full = bound_of_rows(network, parts, clock, ids, torch.full((8,), 6), draws=2, seed=0)
    assert full.mean == pytest.approx(bound_of_rows(network, parts, clock, ids, None, draws=2, seed=0).mean, abs=1e-6)


def test_given_tokens_change_nothing_of_what_the_length_costs():
    network, parts, clock, ids = setup("frame of 5")
    with torch.no_grad():
        network.weight.zero_()
    lengths, given = torch.tensor([1, 2, 3, 4, 5, 6, 6, 3]), torch.arange(6).expand(8, -1) < 2
    law = np.log(np.array([1e-9, 0.05, 0.1, 0.35, 0.05, 0.15, 0.3]))
    found = bound_of_rows(network, parts, clock, ids, lengths, draws=3, seed=0, log_length=law, given=given)
    counted = (torch.arange(6) < lengths[:, None]) & ~given
    tokens = -parts.log_prior.double()[ids][counted].sum().item()
    assert found.mean * counted.sum().item() == pytest.approx(tokens - law[lengths.numpy()].sum(), rel=1e-9)


@each
def test_given_tokens_count_for_nothing_and_are_seen(kind):
    """Of a network that knows no context the entropy of the others; what is given changes what one that knows some says of them."""
    network, parts, clock, ids = setup(kind)
    given = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    other = torch.where(given, (ids + 1) % 7, ids)
    one, two = (bound_of_rows(network, parts, clock, x, None, draws=2, seed=0, given=given) for x in (ids, other))
    assert one.tokens == (~given).sum() and one.unigram == two.unigram and abs(one.mean - two.mean) > 1e-6
    with torch.no_grad():
        network.weight.zero_()
    found = bound_of_rows(network, parts, clock, ids, None, draws=3, seed=0, given=given)
    entropy = -parts.log_prior.double()[ids][~given].mean().item()
    assert found.mean == pytest.approx(entropy, rel=1e-9) and found.standard_error < 1e-9


@pytest.mark.parametrize("code", [codes.identity(4), codes.frame(5, 3, torch.Generator().manual_seed(1))], ids=["identity", "frame"])
@pytest.mark.parametrize("first", [0, 1])
def test_of_the_exact_denoiser_it_is_the_likelihood_of_the_rest_given_some(code, first):
    """One of two tokens given: the law of the other, given it, by Bayes."""
    toy = toys.make(code, length=2, seed=2, spread=1.5)
    ids = toys.draw(toy, 1500, torch.Generator().manual_seed(0))
    parts = Parts(code, toy.marginal.mean(0).log(), Range(information_range(code, 0.0).low, 9.0))
    given = (torch.arange(2) == first).expand(ids.shape)
    clock = clocks.uniform_log_snr(LINEAR, -6.0, 10.0)
    found = bound_of_rows(toys.Exact(toy, code).double(), parts, clock, ids, None, draws=20, seed=0, batch=1500, given=given)
    both = toy.law[(ids * torch.tensor([code.vocab, 1])).sum(1)].log()
    exact = -(both - toy.marginal[first][ids[:, first]].log()).mean().item()
    assert abs(found.mean - exact) < 4.0 * found.standard_error < 0.1
    assert found.tokens == 1500 and found.unigram - exact > 6.0 * found.standard_error


def test_draws_are_a_function_of_the_seed_and_not_of_the_batch():
    network, parts, clock, ids = setup("frame of 5")
    once = bound_of_rows(network, parts, clock, ids, None, draws=3, seed=0, batch=64)
    assert bound_of_rows(network, parts, clock, ids, None, draws=3, seed=0, batch=64) == once
    assert bound_of_rows(network, parts, clock, ids, None, draws=3, seed=0, batch=3).mean == pytest.approx(once.mean, abs=1e-5)
    assert bound_of_rows(network, parts, clock, ids, None, draws=3, seed=1).mean != once.mean


def test_in_single_precision_it_is_nearly_the_same():
    network, parts, clock, ids = setup("frame of 5")
    double, single = (bound_of_rows(network, parts, clock, ids, None, draws=3, seed=0, double=x) for x in (True, False))
    assert single.mean == pytest.approx(double.mean, abs=2e-3)


def test_a_range_that_ends_too_early_is_refused():
    network, parts, clock, ids = setup("frame of 5")
    short = Parts(parts.code, parts.log_prior, Range(parts.span.low, 2.0))
    with pytest.raises(RangeTooShort, match="there is no bound"):
        bound_of_rows(network, short, clock, ids, None, draws=1, seed=0)


@each
def test_processes_that_share_rows_all_have_the_bound_of_all(kind):
    """Each sees its own part; what they sum is put together here by hand."""
    network, parts, clock, ids = setup(kind)
    lengths = torch.tensor([6, 6, 3, 6, 1, 6, 2, 6])
    whole = bound_of_rows(network, parts, clock, ids, lengths, draws=3, seed=0)
    said: list[torch.Tensor] = []

    def part(rows: slice, total) -> object:
        return bound_of_rows(
            network, parts, clock, ids[rows], lengths[rows], draws=3, seed=0, places=torch.arange(8)[rows], all_rows=8, total=total
        )

    class Told(Exception):
        pass

    def tell(value: torch.Tensor) -> torch.Tensor:
        said.append(value)
        raise Told

    for rows in (slice(0, 3), slice(3, 8)):
        with pytest.raises(Told):
            part(rows, tell)
    for rows in (slice(0, 3), slice(3, 8)):
        found = part(rows, lambda value: sum(said))
        assert found.mean == pytest.approx(whole.mean, rel=1e-6) and found.standard_error == pytest.approx(whole.standard_error, rel=1e-4)
        assert found.tokens == whole.tokens and found.unigram == pytest.approx(whole.unigram, rel=1e-12)


def rows_apart(ids, end, whole, counted):
    return [((ids[i : i + 1], end), (whole[i : i + 1], counted[i : i + 1])) for i in range(len(ids))]


def test_where_documents_end_costs_a_coin_at_each_token_that_is_to_be_written_and_has_one_behind_it():
    """A given token tells its own; the one behind a token that is not given tells whether that ends a document."""
    log_prior, end = torch.tensor([0.01, 0.49, 0.5]).log(), 0
    ids, whole = torch.tensor([[1, end, 2, 1], [2, end, 1, end], [1, 1, 2, 0], [1, 2, 1, 2]]), torch.tensor([4, 4, 3, 4])
    for known in ([0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 1]):
        counted = (torch.arange(4) < whole[:, None]).long() * ~torch.tensor(known).bool()
        wanted = []
        for row, count in enumerate(whole):
            free = [i for i in range(int(count) - 1) if not known[i]]
            wanted.append(sum(-math.log(0.01 if ids[row, i] == end else 0.99) for i in free))
        found = boundary_cost(ids, end, Vocabulary(3, 0, 3, 0, 3), log_prior, whole, counted)
        assert found.tolist() == pytest.approx(wanted, rel=1e-6)
        alone = [boundary_cost(*x, Vocabulary(3, 0, 3, 0, 3), log_prior, *y) for x, y in rows_apart(ids, end, whole, counted)]
        assert torch.cat(alone).tolist() == found.tolist()  # whatever the rows beside it hold
