"""Stage 1's loss: the objective's average over the rows, with its weights, against the dense formulas; what the clock learns from it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.config.check import resolve
from megaflow.config.load import assemble
from megaflow.config.schema import Config
from megaflow.flow import choice, interpolant
from megaflow.flow import head as heads
from megaflow.flow.code import lookup
from megaflow.flow.context import told
from megaflow.flow.interpolant import log_snr, noisy_state, time_of
from megaflow.flow.objective import OBJECTIVES as OBJECTIVE_TABLE
from megaflow.flow.objective import Objective
from megaflow.flow.profile import CROSS_ENTROPY, ERROR, SQUARE, bin_of
from megaflow.flow.weighting import WEIGHTINGS, Known
from megaflow.model import build
from megaflow.model import parts as made
from megaflow.train.stage import Batch, cells, noise
from megaflow.train.stage_flow import FlowStage

COUNTS = np.array([500, 300, 120, 60, 15, 4, 1, 1, 1, 30, 20])
ROWS, LENGTH = 8, 6


def stage(*overrides: tuple[str, object]) -> FlowStage:
    """A stage whose network is drawn and a little stirred, in fp64."""
    small = [("model.layers", 1), ("model.hidden", 16), ("model.heads", 2), ("model.belief_dim", 8), ("data.length", LENGTH)]
    config: Config = resolve(
        assemble([("test", dict([*small, ("flow.clock.bins", 20), ("train.global_batch", ROWS), *overrides]))]), 11
    ).config
    fixed = made.make(config.flow, COUNTS, 0)
    double = replace(fixed, code=fixed.code.double(), log_prior=fixed.log_prior.double())
    network = build.flow_network(config, double, torch.device("cpu"))
    build.draw(network, 0)
    with torch.no_grad():
        for index, p in enumerate(network.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
    return FlowStage(config, network.double(), double, made.initial_profile(fixed, config.flow.clock, 0))


def batch(padded: bool = False) -> Batch:
    ids = torch.randint(11, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([6, 3, 6, 1, 6, 6, 2, 6]) if padded else None
    counted = torch.ones_like(ids) if lengths is None else (torch.arange(LENGTH) < lengths[:, None])
    return Batch(ids, lengths, torch.arange(ROWS), 3, ROWS, (counted / counted.sum()).flatten().double())


def dense(stage: FlowStage, rows: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(times, -log psi[token], |C_x - psi C|^2, |psi - e_x|^2), with gradient, by the whole (B, L, V) tensor."""
    t = stage.objective.times(stage.setting, stage.draws(rows))
    s = told(t, rows.given)
    y = noisy_state(stage.parts.path, lookup(stage.parts.code, rows.ids), noise(0, rows, stage.parts), s)
    head = stage.network.head()
    log_p = torch.log_softmax(heads.logits(head, stage.network.read(stage.network(y, s, lengths=rows.lengths), y, s)), -1)
    clean = lookup(stage.parts.code, torch.arange(11))
    error = (log_p.exp() @ clean - clean[rows.ids.flatten()]).square().sum(-1)
    square = (log_p.exp() - F.one_hot(rows.ids.flatten(), 11)).square().sum(-1)
    nll = F.nll_loss(log_p, rows.ids.flatten(), reduction="none")
    return t, *(x.view(ROWS, LENGTH) for x in (nll, error, square))


def test_times_of_tokens_are_spread_evenly_over_every_row():
    """One in each of L cells, by an order of its own, shifted by the row's own draw; a row's is the same whatever rows are beside it."""
    ours, rows = stage(("flow.times", "tokens")), batch()
    draws = ours.draws(rows)
    assert draws.shape == (ROWS, LENGTH) and (0.0 <= draws).all() and (draws < 1.0).all()
    assert (draws * LENGTH).floor().sort(1).values.equal(torch.arange(LENGTH).double().expand(ROWS, -1))
    torch.testing.assert_close((draws * LENGTH).frac(), cells(0, rows, "time")[:, None].expand(-1, LENGTH))
    assert len({tuple(row) for row in (draws * LENGTH).floor().tolist()}) > 1
    some = ours.draws(rows._replace(ids=rows.ids[3:5], places=rows.places[3:5]))
    assert torch.equal(some, draws[3:5])


TIMES = [("cross_entropy", "none"), ("endpoint_mse", "sigmoid"), ("velocity_mse", "none"), ("cross_entropy", "balanced")]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("objective, weighting", TIMES)
def test_the_loss_where_every_token_has_a_time(objective, weighting, given):
    """Each token's own weight by time; what is given weighs nothing, and is not observed."""
    ours = stage(("flow.objective", objective), ("flow.weighting", weighting), ("flow.times", "tokens"))
    rows = batch(padded=True)
    if given:
        chosen = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
        rows = rows._replace(given=chosen, weight=rows.weight * ~chosen.flatten())
    t, nll, error, _ = dense(ours, rows)
    worth = ours.objective.weights(ours.setting, t)
    level = log_snr(ours.parts.path, t)
    scores = ours.profile.mean(ERROR if objective != "cross_entropy" else CROSS_ENTROPY)
    known = Known(level, scores[bin_of(ours.profile.edges, level)], scores.mean().item())
    factor = choice.call(WEIGHTINGS, weighting, known).time
    per_token = worth[..., 0] * nll + (worth[..., 1] * error if worth.shape[-1] == 2 else 0.0)
    per_token = per_token * (1.0 if factor is None else factor)
    expected = (rows.weight.view(ROWS, LENGTH) * per_token).sum()
    loss, observed = ours.loss(rows)
    torch.testing.assert_close(loss, expected)
    weights = [p for p in ours.network.parameters() if p.requires_grad]
    for grad, exact in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-9)
    by_bin = torch.zeros(20, dtype=torch.float64)
    by_bin.index_add_(0, bin_of(ours.profile.edges, level).flatten(), (rows.weight.view(ROWS, LENGTH) * nll.detach()).flatten())
    torch.testing.assert_close(observed[0], by_bin)


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_given_is_clean_and_weighs_nothing(padded):
    """Rows whose other tokens have the row's time."""
    ours, rows = stage(), batch(padded)
    chosen = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    rows = rows._replace(given=chosen, weight=rows.weight * ~chosen.flatten())
    t, nll, _, _ = dense(ours, rows)
    assert t.shape == (ROWS,)
    loss, observed = ours.loss(rows)
    torch.testing.assert_close(loss, (rows.weight.view(ROWS, LENGTH) * nll).sum())
    assert nll[chosen].max() < 1e-6 and observed[3].sum().item() == pytest.approx(rows.weight.sum().item())
    assert abs(loss.item() - ours.loss(rows._replace(given=None))[0].item()) > 1e-4  # context is seen


OBJECTIVES = ["cross_entropy", "endpoint_mse", "velocity_mse", "likelihood"]


@pytest.mark.parametrize("code", ["identity", "frame"])
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_objective_s_average_over_counted_tokens(objective, path, code):
    ours, rows = (
        stage(("flow.objective", objective), ("flow.interpolant", path), ("flow.code", code), ("flow.skip", "on")),
        batch(padded=True),
    )
    t, nll, error, _ = dense(ours, rows)
    worth = ours.objective.weights(ours.setting, t)
    per_token = worth[:, :1] * nll + (worth[:, 1:] * error if worth.shape[1] == 2 else 0.0)
    expected = (rows.weight.view(ROWS, LENGTH) * per_token).sum()
    loss, observed = ours.loss(rows)
    torch.testing.assert_close(loss, expected)
    weights = [p for p in ours.network.parameters() if p.requires_grad]
    for grad, exact in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(observed[0].sum(), (rows.weight.view(ROWS, LENGTH) * nll).sum().detach())
    assert observed[3].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("objective", ["cross_entropy", "endpoint_mse"])
@pytest.mark.parametrize("name", ["min_snr:gamma=2", "sigmoid:bias=-1", "truncated", "adaptive", "balanced"])
def test_weights_multiply_the_objective_s(name, objective):
    ours, rows = stage(("flow.weighting", name), ("flow.objective", objective)), batch()
    t, nll, error, square = dense(ours, rows)
    scores = ours.profile.mean(CROSS_ENTROPY if objective == "cross_entropy" else ERROR)
    level = log_snr(ours.parts.path, t)
    weighting = choice.call(WEIGHTINGS, name, Known(level, scores[bin_of(ours.profile.edges, level)], scores.mean().item()))
    factor = weighting.time[:, None] if weighting.time is not None else weighting.distance(square)
    expected = (rows.weight.view(ROWS, LENGTH) * factor * (nll if objective == "cross_entropy" else error)).sum()
    loss, _ = ours.loss(rows)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    plain, _ = stage(("flow.objective", objective)).loss(rows)
    assert abs(plain.item() - loss.item()) > 1e-4
    weights = [p for p in ours.network.parameters() if p.requires_grad]
    for grad, exact in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-8)


def test_an_objective_of_the_cross_entropy_alone_is_weighed_by_what_it_measures(monkeypatch):
    """Beside a clock that is fitted to squared errors, too: half the cross-entropy is half its loss, and balanced by its profile."""
    for name, worth in (("half", 0.5), ("whole", 1.0)):
        made_of = Objective(lambda setting, u: u, lambda setting, t, worth=worth: torch.full_like(t, worth)[..., None])
        monkeypatch.setitem(OBJECTIVE_TABLE, name, lambda made_of=made_of: made_of)
    for clock in ("ce_linear", "variance"):
        rest = ("flow.clock.name", clock), ("flow.weighting", "balanced")
        half, whole = stage(("flow.objective", "half"), *rest), stage(("flow.objective", "whole"), *rest)
        t = half.draws(batch())
        level = log_snr(half.parts.path, t)
        assert torch.equal(half.known(t).expected, 0.5 * half.profile.mean(CROSS_ENTROPY)[bin_of(half.profile.edges, level)])
        torch.testing.assert_close(2.0 * half.loss(batch())[0], whole.loss(batch())[0])


@pytest.mark.parametrize("objective", ["cross_entropy", "endpoint_mse", "velocity_mse"])
def test_balanced_weights_give_every_time_the_same_share_of_the_objective(objective):
    """Weight times the objective as the profile has it, in the middle of every bin; velocity MSE's own weight is in that."""
    ours = stage(("flow.weighting", "balanced"), ("flow.objective", objective))
    t = time_of(ours.parts.path, ours.profile.centres)
    means = torch.stack([ours.profile.mean(CROSS_ENTROPY), ours.profile.mean(ERROR)], -1)
    worth = ours.objective.weights(ours.setting, t)
    expected = (worth * means[:, : worth.shape[1]]).sum(-1)
    weight = choice.call(WEIGHTINGS, "balanced", ours.known(t)).time
    there = expected > 1e-3 * expected.mean()  # below a thousandth of the mean nothing is made more of
    assert there.double().mean() > 0.25
    torch.testing.assert_close((weight * expected)[there], torch.full_like(expected[there], expected.mean().item()))


@pytest.mark.parametrize("objective", ["cross_entropy", "endpoint_mse"])
def test_learned_weights(objective):
    """sum of exp(-w) loss + w, and its gradients: the network's through the loss, the uncertainty's through both, neither the other's."""
    ours, rows = stage(("flow.weighting", "learned"), ("flow.objective", objective)), batch()
    t, nll, error, _ = dense(ours, rows)
    w = ours.network.uncertainty_at(t)[:, None]
    assert w.abs().max() > 0.01
    plain = nll if objective == "cross_entropy" else error
    expected = (rows.weight.view(ROWS, LENGTH) * (torch.exp(-w) * plain + w)).sum()
    loss, _ = ours.loss(rows)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    weights = [p for p in ours.network.parameters() if p.requires_grad]
    for grad, exact in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-7)


def test_learned_weights_come_to_one_over_the_mean_loss():
    """With the network held still, w at each time goes to the logarithm of what is lost there."""
    ours = stage(("flow.weighting", "learned"), ("flow.clock.name", "logit_normal:mean=-1"), ("flow.clock.uniform_share", 0.0))
    module = ours.network.uncertainty
    search = torch.optim.LBFGS(module.parameters(), lr=1.0, max_iter=200, line_search_fn="strong_wolfe")

    def again() -> Tensor:
        search.zero_grad()
        loss, _ = ours.loss(batch())
        loss.backward()
        return loss

    search.step(again)
    t, nll, _, _ = dense(ours, batch())
    torch.testing.assert_close(ours.network.uncertainty_at(t), nll.mean(1).log(), rtol=0, atol=0.05)


@pytest.mark.parametrize("overrides", [(), (("flow.clock.name", "variance"),), (("flow.objective", "likelihood"),)])
def test_what_is_observed_of_every_bin(overrides):
    """Sums over the rows in a bin, of squared errors too where something asks for them; and the square of each row's own."""
    ours, rows, measured = stage(*overrides), batch(padded=True), bool(overrides)
    t, nll, error, _ = dense(ours, rows)
    _, observed = ours.loss(rows)
    here, weight = bin_of(ours.profile.edges, log_snr(ours.parts.path, t)), rows.weight.view(ROWS, LENGTH)
    expected = torch.zeros(4, 20, dtype=torch.float64)
    for row in range(ROWS):
        tokens = weight[row].sum()
        by_row = (weight[row] * error[row]).sum() / tokens
        terms = [(weight[row] * nll[row]).sum(), tokens * by_row * measured, tokens * by_row**2 * measured, tokens]
        expected[:, here[row]] += torch.stack(terms).detach()
    torch.testing.assert_close(observed, expected)
    before = ours.profile.mean(SQUARE)
    metrics = ours.learn(observed, step=24)
    assert bool((ours.profile.mean(SQUARE) != before).any()) == measured
    if overrides:
        assert ours.profile.mean(ERROR).min() > 0.0
    assert set(metrics) == ({"cross_entropy"} if ("flow.objective", "likelihood") in overrides else set())


@pytest.mark.parametrize("code", ["learned", "embedding"])
def test_a_code_that_makes_two_tokens_one_has_the_bound_of_rows_without_them_and_trains_on(code):
    """Of rare tokens, that is; of frequent ones too much is left to guess, and the cross-entropy is shown in its place."""
    found, rows = stage(("flow.code", code), ("flow.code_dim", 4)), batch()
    weight = found.network.code_weight
    rare = rows._replace(ids=torch.where(rows.ids == 7, 0, torch.where(rows.ids == 6, 1, rows.ids)))
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[7] = weight[6]
    assert "validation_standard_error" in found.validate(rare)
    with torch.no_grad():
        weight.copy_(kept)
        weight[1] = weight[0]
    (one,) = found.validate(rare).values()
    assert math.isfinite(one)


def test_the_clock_of_the_likelihood_is_the_one_of_least_variance():
    assert stage(("flow.objective", "likelihood")).config.flow.clock.name == "variance"
    assert stage().config.flow.clock.name == "ce_linear"


def test_one_draw_of_the_bound_is_the_objective(monkeypatch):
    """Averaged over many batches of noise and times the objective is the bound that evaluation takes, less its constant first term."""
    from megaflow.model.bound import bound_of_rows

    ours = stage(("flow.objective", "likelihood"), ("flow.code", "identity"))
    rows = batch()
    with torch.no_grad():
        found = torch.stack([ours.loss(rows._replace(step=step))[0] for step in range(1500)])
    bound = bound_of_rows(ours.network, ours.parts, ours.clock, rows.ids, None, draws=200, seed=1)
    first = 0.5 * math.exp(ours.parts.span.low)
    assert abs(found.mean().item() + first - bound.mean) < 4.0 * (found.std().item() / math.sqrt(1500) + bound.standard_error)
    assert found.std().item() / math.sqrt(1500) < 0.02 * bound.mean


def test_a_profile_of_an_earlier_version_is_taken_on():
    """Which had kept the cross-entropy alone."""
    ours = stage()
    state = ours.state()
    again = stage()
    again.restore({**{name: value for name, value in state.items() if name != "profile_named"}, "profile_total": state["profile_total"][0]})
    assert torch.equal(again.profile.mean(CROSS_ENTROPY), ours.profile.mean(CROSS_ENTROPY)) and again.profile.total.shape == (3, 20)


def test_paths_by_name_reach_the_parts():
    assert stage(("flow.interpolant", "power:exponent=3")).parts.path == interpolant.make("power:exponent=3")


@pytest.mark.parametrize(("share", "told"), [(1.0, 8), (0.25, 2), (0.1, 1)])
def test_a_share_of_the_rows_is_told_what_a_first_pass_says(share, told):
    """Exactly so many, whose second pass has no gradient by the first; the others as ever."""
    ours, rows = stage(("flow.self_conditioning", share)), batch(padded=True)
    t = ours.objective.times(ours.setting, cells(0, rows, "time"))
    network, code = ours.network, ours.parts.code
    y = noisy_state(ours.parts.path, lookup(code, rows.ids), noise(0, rows, ours.parts), t)
    said = ours.said_before(y, t, rows)
    here = said.abs().amax((1, 2)) > 0.0
    assert here.sum() == told and said.grad_fn is None
    first = torch.softmax(heads.logits(network.head(), network.read(network(y, t, lengths=rows.lengths), y, t)), -1)
    expected = (first @ lookup(code, torch.arange(11))).view(y.shape).detach()
    torch.testing.assert_close(said[here], expected[here], rtol=1e-6, atol=1e-8)
    log_p = torch.log_softmax(heads.logits(network.head(), network.read(network(y, t, lengths=rows.lengths, said=said), y, t)), -1)
    dense = (rows.weight * F.nll_loss(log_p, rows.ids.flatten(), reduction="none")).sum()
    loss, _ = ours.loss(rows)
    torch.testing.assert_close(loss, dense)
    weights = [p for p in network.parameters() if p.requires_grad]
    for grad, exact in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(dense, weights), strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-9)
    parts = [
        ours.said_before(
            y[i : i + 2],
            t[i : i + 2],
            rows._replace(ids=rows.ids[i : i + 2], lengths=rows.lengths[i : i + 2], places=rows.places[i : i + 2]),
        )
        for i in range(0, ROWS, 2)
    ]
    torch.testing.assert_close(torch.cat(parts), said)  # in any micro-batch the same rows
