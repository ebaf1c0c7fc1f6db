"""Stage 2 by each of its identities, on a flow whose exact map is known; what its rows are, and what combinations are refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from megaflow.config.check import resolve
from megaflow.config.load import ConfigError, assemble
from megaflow.config.schema import Config
from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow import tangent
from megaflow.flow.interpolant import LINEAR, transport, velocity_terms
from megaflow.flow.likelihood import Range, information_range
from megaflow.model import text_dit
from megaflow.model.parts import Parts, initial_profile
from megaflow.model.text_dit import Shape, TextDiT
from megaflow.train import map_objective
from megaflow.train.map_objective import OBJECTIVES
from megaflow.train.stage import Batch
from megaflow.train.stage_flow import FlowStage
from megaflow.train.stage_map import BOUNDARY, DIAGONAL, INNER, NOTED, MapStage
from tests.flow import toy as toys

CODE = codes.identity(4)
ROWS = 128


@cache
def solved() -> tuple[toys.Toy, Tensor, Tensor, Tensor]:
    """A toy, noise, and the exact psi_{0,1} and psi_{0,1/2} there."""
    toy = toys.make(CODE, length=2, seed=4)
    y = torch.randn(200, 2, 4, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return toy, y, toys.mean_denoiser(toy, y, 0.0, 1.0), toys.mean_denoiser(toy, y, 0.0, 0.5)


def stage_of(objective: str, **distill: object) -> MapStage:
    """A fresh map of the toy's exact denoiser."""
    toy, *_ = solved()
    parts = Parts(CODE, toy.marginal.mean(0).log().float(), Range(information_range(CODE, 0.0).low, 9.0))
    torch.manual_seed(0)
    shape = Shape(CODE.vocab, layers=2, hidden=48, heads=2, mlp_ratio=2, belief_dim=16, neighbors=1)
    weights = {"learned": 2, "learned_start": 1}.get(str(distill.get("weighting")), 0)
    fixed = CODE, parts.log_prior, parts.span, LINEAR, True, ("belief",)
    network = TextDiT(shape, *fixed, "linear", "sdpa", map_weights=weights)
    network.initialize()
    config = Config()
    config.distill.objective, config.distill.anchor, config.flow.clock.name = objective, "teacher", "ce_linear"
    config.distill.weighting = "adaptive"
    for name, value in distill.items():
        setattr(config.distill, name, value)
    if objective.startswith("dmd"):
        network.auxiliary = TextDiT(shape, *fixed, None, "sdpa")
        network.auxiliary.initialize()
    clock = clocks.uniform_log_snr(LINEAR, -4.0, 5.0)
    if config.distill.anchor == "teacher":
        return MapStage(config, network, parts, clock, toys.Exact(toy, CODE))
    return MapStage(
        config, network, parts, clock, None, FlowStage(config, network, parts, initial_profile(parts, config.flow.clock, seed=0))
    )


def batch(step: int) -> Batch:
    ids = toys.draw(solved()[0], ROWS, torch.Generator().manual_seed(step))
    return Batch(ids, None, torch.arange(ROWS), step, ROWS, torch.full((2 * ROWS,), 0.5 / ROWS))


@torch.no_grad()
def errors(network: TextDiT) -> tuple[float, float]:
    """Mean squared distance from the exact map to the end of one step, and of two, whose middle is at 1/2."""
    _, y, whole, half = solved()

    def psi(y: Tensor, s: float, t: float) -> Tensor:
        start, end = (torch.full((len(y),), x, dtype=torch.float64) for x in (s, t))
        z = heads.logits(network.head(), network.read(network(y.float(), start, end), y.float(), start))
        return torch.softmax(z, -1).view(len(y), 2, -1).double()

    zero, middle = torch.zeros(len(y), dtype=torch.float64), torch.full((len(y),), 0.5, dtype=torch.float64)
    one = (psi(y, 0.0, 1.0) - whole).square().sum(-1).mean().item()
    first = psi(y, 0.0, 0.5)
    two = (psi(transport(LINEAR, y, zero, middle, first), 0.5, 1.0) - whole).square().sum(-1).mean().item()
    return one, two


def trained(stage: MapStage, steps: int, rate: float = 5e-3) -> TextDiT:
    optimizer = torch.optim.Adam(stage.network.parameters(), lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1.0 - step / steps)
        optimizer.zero_grad()
        stage.loss(batch(step))[0].backward()
        torch.nn.utils.clip_grad_norm_(stage.network.parameters(), 1.0)
        optimizer.step()
    return stage.network


def stirred(objective: str, **distill: object) -> MapStage:
    """With weights that say something of every time."""
    stage = stage_of(objective, diagonal_fraction=0.0, boundary_fraction=0.0, **distill)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in stage.network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return stage


def log_psi(network: TextDiT, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return torch.log_softmax(heads.logits(network.head(), network.read(network(y, s, t), y, s)).double(), -1)


@torch.no_grad()
def test_lagrangian_targets_are_those_of_finite_differences():
    stage = stirred("lsd")
    network, rows = stage.network, stage.rows(batch(0), stage.kinds(batch(0)))[0]
    (s, _, t), step = rows.told, 1e-3
    dz = (log_psi(network, rows.y, s, t + step) - log_psi(network, rows.y, s, t - step)) / (2.0 * step)
    p = log_psi(network, rows.y, s, t).exp()
    end = log_psi(network, transport(LINEAR, rows.y, s, t, p.view(rows.y.shape).float()), t, t).exp()
    gain = rows.tokens(tangent.lagrangian_gain(LINEAR, s, t))
    expected, _ = tangent.lagrangian_target(network.code.part, end, p, dz, gain)
    held: list[Tensor] = []
    found = map_objective.lagrangian(network, rows, held)
    parts = [found(slice(i, i + 64)) for i in range(0, 2 * ROWS, 64)]
    torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=0, atol=5e-3)
    assert [len(x) for x in held] == [64] * len(parts) and 0.0 <= torch.cat(held).min() <= torch.cat(held).max() <= 1.0
    assert (expected - p).abs().mean() > 0.1


@torch.no_grad()
def test_eulerian_targets_are_those_of_finite_differences():
    """Along the network's own flow, of rows that begin after the step and do not end at once."""
    stage = stirred("esd")
    network, rows = stage.network, stage.rows(batch(0), stage.kinds(batch(0)))[0]
    (s, _, t), step = rows.told, 2e-4
    start = log_psi(network, rows.y, s, s).exp()
    fall, lam = (x[:, None, None].float() for x in velocity_terms(LINEAR, s))
    way = step * (fall * rows.y + lam * start.view(rows.y.shape).float())
    dz = (log_psi(network, rows.y + way, s + step, t) - log_psi(network, rows.y - way, (s - step).clamp(min=0.0), t)) / (2.0 * step)
    gain, p = rows.tokens(tangent.eulerian_gain(LINEAR, s, t)), log_psi(network, rows.y, s, t).exp()
    expected, _ = tangent.eulerian_target(network.code.part, start, p, dz, gain)
    found = map_objective.eulerian(network, rows, [])(slice(0, 2 * ROWS)).double()
    here = rows.tokens((s > step) & (t > s + 0.05))
    assert (found - expected)[here].abs().mean() < 1e-3 < 0.1 < (expected - p)[here].abs().mean() and here.sum() > ROWS


@pytest.mark.parametrize("weighting", ["none", "adaptive"])
@pytest.mark.parametrize("objective", ["lsd_cfm", "ecld"])
def test_losses_with_a_gradient_through_the_derivative(objective, weighting):
    """By the whole (n, V) tensors and nested automatic differentiation."""
    stage = stirred(objective, weighting=weighting)
    network, rows = stage.network, stage.rows(batch(0), stage.kinds(batch(0)))[0]
    (s, _, t), weight = rows.told, rows.weight.flatten()

    def psi_of(t: Tensor) -> Tensor:
        with text_dit.differentiable(network):
            z = heads.logits(network.head(), network.read(network(rows.y, s, t), rows.y, s))
        return torch.softmax(z, -1)

    psi, moving = torch.func.jvp(psi_of, (t,), (torch.ones_like(t),))
    x = transport(LINEAR, rows.y, s, t, psi.detach().view(rows.y.shape))
    with torch.no_grad():
        end = torch.softmax(heads.logits(network.head(), network.read(network(x, t), x, t)), -1)
    s_, t_ = (rows.tokens(each)[:, None].float() for each in (s, t))
    if objective == "lsd_cfm":  # as published: (1 - t) dX - psi_{t,t}(X) + X, X and psi_{t,t} without gradient
        velocity = (psi - rows.y.flatten(0, 1)) / (1.0 - s_) + (t_ - s_) / (1.0 - s_) * moving
        terms = square = ((1.0 - t_) * velocity - end + x.flatten(0, 1)).square().sum(-1)
    else:
        gain = ((t_ - s_) * (1.0 - t_) / (1.0 - s_))[:, 0]
        terms = 4.0 * torch.nn.functional.kl_div(psi.log(), end, reduction="none").sum(-1) + 2.0 * gain**2 * moving.square().sum(-1)
        square = (psi - end).square().sum(-1)
    factor = weight if weighting == "none" else weight * (square.detach() + 0.01) ** -0.5
    expected = (factor * terms).sum()
    loss, observed = stage.loss(batch(0))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        observed.view(NOTED, 2)[1], torch.stack([(weight * terms).sum().detach(), weight.sum()]).double(), rtol=1e-4, atol=0
    )
    assert observed.view(NOTED, 2)[0].sum() == 0.0
    weights = [p for p in network.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(value, weights, allow_unused=True) for value in (loss, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.zeros(1) if one is None else one, torch.zeros(1) if other is None else other, rtol=1e-3, atol=2e-5)


@cache
def converged() -> dict[str, Tensor]:
    """Weights of a map that knows its diagonal, from where two-stage training begins."""
    return trained(stage_of("psd", diagonal_fraction=1.0, boundary_fraction=0.0), 300).state_dict()


REDUCED = [
    ("psd", "adaptive", "middle", 150, 5e-3),
    pytest.param("psd", "adaptive", "uniform", 150, 5e-3, marks=pytest.mark.long),
    ("fmlm_mse", "none", "middle", 150, 5e-3),
    pytest.param("lsd", "none", "middle", 1000, 1e-3, marks=pytest.mark.long),
    pytest.param("esd", "adaptive", "middle", 300, 5e-3, marks=pytest.mark.long),
    pytest.param("lsd_cfm", "none", "middle", 150, 5e-3, marks=pytest.mark.long),
    pytest.param("ecld", "none", "middle", 150, 2e-3, marks=pytest.mark.long),
]


def test_every_objective_but_that_of_laws_is_there():
    tried = {case.values[0] if isinstance(case, type(pytest.param())) else case[0] for case in REDUCED}
    assert tried == {name for name, make in OBJECTIVES.items() if not make().one_step}


@pytest.mark.parametrize("objective, weighting, between, steps, rate", REDUCED)
def test_every_objective_brings_one_and_two_steps_nearer_to_the_exact_map(objective, weighting, between, steps, rate):
    """From a converged diagonal, by itself: without boundary rows, whose semigroup targets would do it for any."""
    stage = stage_of(objective, weighting=weighting, between=between, boundary_fraction=0.0)
    stage.network.load_state_dict(converged())
    before = errors(stage.network)
    after = errors(trained(stage, steps, rate))
    assert after[0] < 0.75 * before[0] and after[1] < 0.8 * before[1], (before, after)


def test_diagonal_rows_alone_bring_them_no_nearer():
    stage = stage_of("psd", diagonal_fraction=1.0, boundary_fraction=0.0)
    stage.network.load_state_dict(converged())
    before = errors(stage.network)
    after = errors(trained(stage, 100))
    assert after[0] > 0.95 * before[0] and after[1] > 0.95 * before[1], (before, after)


@pytest.mark.long
def test_lagrangian_targets_at_a_high_rate_lead_away():
    """They hold the network's own derivative: what it gets wrong quickly in t comes back larger, unless it learns slowly."""
    stage = stage_of("lsd", weighting="none", boundary_fraction=0.0)
    stage.network.load_state_dict(converged())
    before = errors(stage.network)
    assert errors(trained(stage, 300, 5e-3))[0] > before[0]


def test_every_objective_has_a_name_for_what_it_measures():
    measured = {name: make().measures for name, make in OBJECTIVES.items()}
    assert len(set(measured.values())) == len(OBJECTIVES)
    for objective in OBJECTIVES:
        stage = stage_of(objective)
        _, observed = stage.loss(batch(0))
        without = {"semigroup_divergence"} if objective == "fmlm_mse" else set()
        floor = {"target_at_floor"} if stage.objective.derivative == "target" else set()
        noted = stage.learn(observed, 0)
        assert set(noted) == {"diagonal_divergence", "semigroup_divergence", measured[objective]} - without | floor
        torch.testing.assert_close(observed.view(NOTED, 2)[:3, 1].sum(), torch.tensor(1.0, dtype=torch.float64))


@torch.no_grad()
def law_of(network: TextDiT, steps: int) -> Tensor:
    """(N,) law of the texts that a map writes in one step, or in two with all noise drawn anew at 1/2."""
    toy, count = solved()[0], 4000
    source = torch.Generator().manual_seed(5)
    times = [torch.full((count,), x, dtype=torch.float64) for x in (0.0, 0.5, 1.0)]
    y = torch.randn(count, 2, 4, generator=source)
    for s in times[:steps]:
        psi = log_psi(network, y, s, times[2]).exp().view(count, 2, 4).float()
        y = 0.5 * psi + 0.5 * torch.randn(psi.shape, generator=source)
    written = psi.argmax(-1)
    found = (toy.texts[:, None] == written).all(-1).double().sum(1)
    return found / found.sum()


def far_from(toy: toys.Toy, network: TextDiT) -> list[float]:
    """Total variation between the law of the texts of one and of two steps and that of the data."""
    return [(law_of(network, steps) - toy.law).abs().sum().item() / 2.0 for steps in (1, 2)]


def on_boundary_rows(stage: MapStage, steps: int, every: int, rate: float, first: int = 50) -> TextDiT:
    """Train with an auxiliary denoiser, where there is one, that learns faster: the map every few steps alone, once it has begun."""
    network, parts = stage.network, dict[bool, list[Tensor]]()
    for name, p in network.named_parameters():
        parts.setdefault(name.startswith("auxiliary"), []).append(p)
    optimizers = {kind: torch.optim.Adam(some, lr=5e-3 if kind else rate, betas=(0.0, 0.99)) for kind, some in parts.items()}
    for step in range(steps):
        network.zero_grad()
        stage.loss(batch(step))[0].backward()
        for kind, optimizer in optimizers.items():
            torch.nn.utils.clip_grad_norm_(parts[kind], 1.0)
            if kind or step >= first and step % every == 0:
                optimizer.step()
    return network


@pytest.mark.long
def test_matching_laws_alone_brings_the_texts_of_a_map_nearer_to_the_data():
    """Of a map that the semigroup identity has begun to teach, by rows from 0 to 1 without inner ones: which noise writes which text stays
    as it was, the law of the texts comes nearer, and much nearer than by the identity on the same rows."""
    toy = solved()[0]
    begun = stage_of("psd", boundary_fraction=0.125)
    begun.network.load_state_dict(converged())
    begun = trained(begun, 60).state_dict()
    found = {}
    for objective in ("dmd:draws=2", "psd"):
        stage = stage_of(objective, diagonal_fraction=0.25, boundary_fraction=1.0, weighting="none")
        stage.network.load_state_dict(begun, strict=False)
        if stage.network.auxiliary is not None:
            stage.network.auxiliary.load_state_dict(converged(), strict=False)
        before, off = far_from(toy, stage.network), errors(stage.network)
        network = on_boundary_rows(stage, 400, 4, 5e-4)
        found[objective] = [before, far_from(toy, network), off, errors(network)]
    before, after, off, still = found["dmd:draws=2"]
    assert after[0] < 0.5 * before[0] and after[1] < 0.8 * before[1], found
    assert still[0] < 1.2 * off[0] and still[1] < 1.1 * off[1], found
    assert after[0] < 0.5 * found["psd"][1][0] and after[1] < 0.9 * found["psd"][1][1], found


@pytest.mark.long
def test_matching_laws_beside_the_identity_brings_one_and_two_steps_nearer_to_the_exact_map():
    """As it is distilled, with inner rows by the semigroup identity: the error, and how far the law of whole texts is."""
    toy, stage = solved()[0], stage_of("dmd:draws=2", boundary_fraction=0.125)
    stage.network.load_state_dict(converged(), strict=False)
    stage.network.auxiliary.load_state_dict(converged(), strict=False)
    off, before = errors(stage.network), far_from(toy, stage.network)
    network = trained(stage, 400, 2e-3)
    near, after = errors(network), far_from(toy, network)
    assert near[0] < 0.5 * off[0] and near[1] < 0.8 * off[1], (off, near)
    assert after[0] < 0.25 * before[0] and after[1] < 0.8 * before[1], (before, after)


@pytest.mark.long
def test_matching_laws_alone_finds_the_law_of_whole_texts():
    """One step, nothing but boundary rows: from a map that writes one text, and tells noises apart by chance at first."""
    toy, stage = solved()[0], stage_of("dmd:draws=2", diagonal_fraction=0.0, boundary_fraction=1.0, weighting="none")
    network = stage.network
    network.load_state_dict(converged(), strict=False)
    network.auxiliary.load_state_dict(converged(), strict=False)
    before = far_from(toy, network)[0]
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.add_(0.3 * torch.randn_like(p) if name.startswith("map_") else 0.0)
    after = far_from(toy, on_boundary_rows(stage, 2000, 5, 2e-3, first=100))[0]
    assert after < 0.6 * before, (before, after)


def test_a_map_that_is_right_is_left_alone_by_matched_laws():
    """Where teacher and auxiliary denoiser say the same boundary rows have no gradient, whatever the map writes."""
    stage, toy = stirred("dmd"), solved()[0]
    stage.config.distill.boundary_fraction = 1.0
    stage.network.auxiliary = toys.Exact(toy, CODE)
    loss, observed = stage.loss(batch(0))
    weights = [p for name, p in stage.network.named_parameters() if not name.startswith("auxiliary")]
    found = torch.autograd.grad(loss, [p for p in weights if p.requires_grad], allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-7 for g in found) and observed.view(NOTED, 2)[1, 0].item() < 1e-10


def test_matched_laws_are_of_what_is_written_and_see_what_is_given():
    """Both denoisers read the given tokens clean, at time 1, and noise on all others; the auxiliary one learns the others alone."""
    stage = stirred("dmd")
    stage.config.distill.boundary_fraction = 1.0
    given = torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(3)) < 0.5
    rows = batch(0)._replace(given=given, weight=batch(0).weight * ~given.flatten())
    read: list[tuple[Tensor, Tensor]] = []
    for denoiser in (stage.teacher, stage.network.auxiliary):
        inner = denoiser.settled
        denoiser.settled = lambda y, t, *more, inner=inner: read.append((y, t)) or inner(y, t, *more)
    loss, _ = stage.loss(rows)
    assert len(read) == 2 and torch.isfinite(loss).all()
    ordered, _, _ = stage.rows(rows, stage.kinds(rows))
    clean = codes.lookup(CODE, rows.ids)[ordered.places]
    for y, t in read:
        assert (t[ordered.given] == 1.0).all() and (t[~ordered.given] < 1.0).all()
        torch.testing.assert_close(y[ordered.given], clean[ordered.given])


@pytest.mark.parametrize("objective", ["lsd_cfm", "esd", "ecld"])
def test_what_an_objective_measures_is_of_its_own_rows(objective):
    """Whatever the share of rows from 0 to 1, which have the semigroup's target: the mean over inner rows is that of their losses alone."""
    stage = stirred(objective)
    stage.config.distill.diagonal_fraction, stage.config.distill.boundary_fraction = 0.25, 0.5
    kinds = stage.kinds(batch(0))
    weight = batch(0).weight.view(len(kinds), -1).sum(1).double()
    _, observed = stage.loss(batch(0))
    shares = torch.stack([weight[kinds == kind].sum() for kind in (DIAGONAL, INNER, BOUNDARY)])
    torch.testing.assert_close(observed.view(NOTED, 2)[:3, 1], shares)
    some, _, _ = stage.rows(batch(0), kinds)
    inner = some.part(slice(int((kinds == DIAGONAL).sum()), int((kinds != BOUNDARY).sum())))
    if stage.objective.loss is not None:
        _, values = stage.objective.loss(stage.models(batch(0)), inner, None)
    else:
        target = stage.objective.target(stage.network, inner, [])
        hidden = stage.network(inner.y, inner.told.s, inner.told.t, inner.lengths, inner.seen, inner.documents)
        _, values = stage.towards(hidden, target, 1, inner)
    expected = (values.double() * inner.weight.flatten().double()).sum() / inner.weight.sum()
    assert stage.learn(observed, 0)[stage.objective.measures] == pytest.approx(expected.item(), rel=1e-5)


def test_an_auxiliary_denoiser_that_is_the_teacher_still_measures_no_distance():
    stage = stirred("dmd")
    stage.config.distill.boundary_fraction = 0.25
    stage.network.auxiliary = toys.Exact(solved()[0], CODE)
    assert stage.learn(stage.loss(batch(0))[1], 0)["distance_of_laws"] < 1e-10


@pytest.mark.long
def test_joint_training_from_the_start():
    """Towards the data alone, without a teacher: the map comes nearer than one with diagonal rows alone, and the diagonal learns."""
    found = {}
    for share in (0.5, 1.0):
        stage = stage_of("psd", anchor="data", diagonal_fraction=share, weighting="none")
        stage.frozen_clock = None
        trained(stage, 400)
        found[share] = errors(stage.network)
    assert found[0.5][0] < 0.4 * found[1.0][0] and found[0.5][1] < 0.6 * found[1.0][1], found


def test_the_diagonal_of_joint_training_is_what_stage_1_trains():
    """The same loss, gradient and profile at the same rows and times."""
    stage = stage_of("psd", anchor="data", diagonal_fraction=1.0, weighting="none")
    stage.frozen_clock = None
    network, flow = stage.network, stage.flow
    rows, ordered, t = stage.rows(batch(0), stage.kinds(batch(0)))
    loss, observed = stage.loss(batch(0))
    hidden = network(rows.y, rows.told.s)
    expected, terms = flow.scored(network.read(hidden, rows.y, rows.told.s), t, ordered)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(observed[2 * NOTED :].view(4, -1), flow.observe(t, terms, ordered))
    assert observed.view(-1)[0].item() == pytest.approx(expected.item(), rel=1e-5) and stage.clock is flow.clock
    before = flow.profile.total.clone()
    assert stage.learn(observed, 24) == {"cross_entropy": pytest.approx(expected.item(), rel=1e-5)} and not torch.equal(
        flow.profile.total, before
    )
    assert set(stage.state()) == set(flow.state())


def test_diagonal_rows_of_joint_training_are_spread_over_the_clock_among_themselves():
    """One in each of as many equal parts of the clock: the profile that the clock is fitted to sees what stage 1 would show it."""
    stage = stage_of("psd", anchor="data", diagonal_fraction=0.25)
    kinds = stage.kinds(batch(7))
    s = stage.rows(batch(7), kinds)[0].times.s[: ROWS // 4]
    tau = clocks.forward(stage.clock, s)
    assert sorted((tau * ROWS / 4).long().tolist()) == list(range(ROWS // 4))


def test_a_table_is_trained_in_joint_training_alone():
    for joint in (False, True):
        toy, *_ = solved()
        shape = Shape(CODE.vocab, layers=1, hidden=16, heads=2, mlp_ratio=2, belief_dim=16)
        network = TextDiT(shape, CODE, torch.zeros(4), Range(-3.0, 9.0), LINEAR, True, ("belief",), "linear", "sdpa", joint=joint)
        assert network.table.requires_grad == joint


@pytest.mark.parametrize("objective", ["psd", "lsd_cfm"])
def test_learned_weights(objective):
    """exp(-w) loss + w: its value, its gradient by the map, which w only scales, and by w, which is 1 - exp(-w) loss a token."""
    torch.manual_seed(0)
    stage, plain = stage_of(objective, weighting="learned"), stage_of(objective, weighting="none")
    plain.network.load_state_dict(stage.network.state_dict(), strict=False)
    module = stage.network.map_weights
    with torch.no_grad():
        module.second.bias.fill_(0.7)  # one w for all
    loss, observed = stage.loss(batch(0))
    bare, same = plain.loss(batch(0))
    torch.testing.assert_close(observed, same)
    factor = torch.tensor(-0.7).exp()
    torch.testing.assert_close(loss, factor * bare + 0.7)
    (by_w,) = torch.autograd.grad(loss, [module.second.bias], retain_graph=True)
    torch.testing.assert_close(by_w[0], 1.0 - factor * bare.detach())
    (ours,), (theirs,) = (torch.autograd.grad(x, [s.network.bias]) for x, s in ((loss, stage), (bare, plain)))
    torch.testing.assert_close(ours, factor * theirs, rtol=1e-4, atol=1e-7)


def test_a_matched_law_has_no_learned_weight():
    """Its auxiliary denoiser learns what the map writes, however sure the map is to be."""
    stages = learned, plain = stage_of("dmd", weighting="learned"), stage_of("dmd", weighting="none")
    plain.network.load_state_dict(learned.network.state_dict(), strict=False)
    torch.nn.init.constant_(learned.network.map_weights.second.bias, 0.7)
    ours, theirs = (torch.autograd.grad(stage.loss(batch(0))[0], [stage.network.auxiliary.bias])[0] for stage in stages)
    assert theirs.abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs)


def test_learned_weights_see_both_times_or_the_start_alone():
    s, t, other = (torch.tensor([x], dtype=torch.float64) for x in (0.2, 0.6, 0.9))
    for weighting, both in (("learned", True), ("learned_start", False)):
        network = stage_of("psd", weighting=weighting).network
        torch.nn.init.normal_(network.map_weights.second.weight)
        assert bool(network.ease(s, t) != network.ease(s, other)) == both
        assert network.ease(s, t) != network.ease(t, t)


def test_two_losses_for_surgery():
    """Of diagonal rows and of the others, whose sum is the loss."""
    stage, whole = stage_of("psd", surgery=True), stage_of("psd")
    both, observed = stage.loss(batch(0))
    loss, same = whole.loss(batch(0))
    torch.testing.assert_close(both.sum(), loss)
    torch.testing.assert_close(observed, same)
    still = stage.kinds(batch(0)) == DIAGONAL
    only, _ = stage_of("psd").loss(batch(0)._replace(weight=(batch(0).weight.view(ROWS, 2) * still[:, None]).flatten()))
    torch.testing.assert_close(both[0], only)


def test_rows_are_in_order_of_time_and_of_kind():
    """s < t on inner rows by construction, s = t on diagonal ones: draws that come unsorted would ask for maps that run backwards."""
    for objective, own in (("psd", {}), ("psd", {"between": "uniform"}), ("psd", {"times": "end"}), ("esd", {}), ("dmd", {})):
        stage = stage_of(objective, **own)
        kinds = stage.kinds(batch(3))
        rows, ordered, drawn = stage.rows(batch(3), kinds)
        counts = [int((kinds == kind).sum()) for kind in (DIAGONAL, INNER, BOUNDARY)]
        still, inner = slice(0, counts[0]), slice(counts[0], counts[0] + counts[1])
        s, u, t = rows.times
        assert (s[still] == t[still]).all() and (s[inner] < t[inner]).all() and (s[counts[0] + counts[1] :] == 0.0).all()
        assert ((s <= u) & (u <= t)).all() and (t[counts[0] + counts[1] :] == 1.0).all()
        torch.testing.assert_close(ordered.ids, batch(3).ids[torch.argsort(kinds, stable=True)])
        assert torch.equal(drawn, s)


def test_the_derivative_of_a_sum_over_the_vocabulary_is_blind():
    """autograd.grad(X.sum(), t) is one number a row, in which a softmax cancels: the network has no gradient by it, whatever it says. The
    derivative that the objectives take is of every coordinate, and has one."""
    network = stirred("lsd_cfm").network
    y, s = torch.randn(8, 2, 4), torch.full((8,), 0.2, dtype=torch.float64)
    t = torch.full((8,), 0.7, dtype=torch.float64, requires_grad=True)

    def x_of(t: Tensor) -> Tensor:
        z = heads.logits(network.head(), network.read(network(y, s, t), y, s))
        return transport(LINEAR, y, s, t, torch.softmax(z, -1).view(y.shape))

    with text_dit.differentiable(network):
        (blind,) = torch.autograd.grad(x_of(t).sum(), t, create_graph=True)
        _, moving = torch.func.jvp(x_of, (t.detach(),), (torch.ones(8, dtype=torch.float64),))
    assert blind.shape == (8,) and moving.shape == y.shape
    torch.testing.assert_close(blind, moving.sum((1, 2)).double(), rtol=1e-3, atol=1e-4)
    weights = [p for p in network.parameters() if p.requires_grad]
    by_sum = torch.autograd.grad(blind.square().sum(), weights, allow_unused=True)
    by_each = torch.autograd.grad(moving.square().sum(), weights, allow_unused=True)
    size = [sum(float(g.square().sum()) for g in found if g is not None) ** 0.5 for found in (by_sum, by_each)]
    assert size[0] < 1e-4 * size[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_means_over_rows_and_finite_however_near_their_end_is(objective):
    """Velocities with a 1 / (1 - t) in them would have no finite mean up to t = 1; here some rows end a ten-thousandth before it."""
    stage = stage_of(objective, diagonal_fraction=0.0)
    stage.parts = replace(stage.parts, span=Range(stage.parts.span.low, 18.0))
    stage.frozen_clock = clocks.uniform_log_snr(LINEAR, -4.0, 40.0)
    loss, _ = stage.loss(batch(0))
    twice = Batch(*(x.repeat_interleave(2, 0) if isinstance(x, Tensor) and x.ndim == 2 else x for x in batch(0)))
    half = twice._replace(places=batch(0).places.repeat_interleave(2), weight=batch(0).weight.repeat_interleave(2) / 2.0)
    assert torch.isfinite(loss) and loss < 40.0
    if objective != "dmd":
        again, _ = stage.loss(half._replace(ids=half.ids, rows=ROWS))
        torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"distill.objective": "esd", "parallel.zero": 3}, "needs? whole weights.*use 0 to 2, or psd"),
        ({"distill.objective": "lsd", "parallel.compile": True}, "torch.compile has none"),
        ({"distill.objective": "lsd_cfm", "parallel.recompute": "full"}, "use parallel.recompute=off"),
        ({"distill.objective": "ecld", "distill.between": "uniform"}, "is of the semigroup identity"),
        ({"distill.objective": "dmd", "parallel.zero": 3}, "passes that not every process makes.*use 0 to 2"),
        ({"distill.objective": "dmd", "flow.prior": "vertices"}, "compares scores"),
        ({"distill.objective": "dmd", "distill.boundary_fraction": 0.0}, "is of rows from 0 to 1"),
        ({"distill.objective": "dmd:draws=1.5"}, "whole number"),
        ({"distill.surgery": True, "parallel.zero": 3}, "needs whole gradients"),
        ({"distill.diagonal_fraction": 0.0}, "no row of train.global_batch=32 with s = t, which alone are trained towards the teacher"),
        ({"distill.anchor": "data", "distill.diagonal_fraction": 0.01}, "which alone are trained towards the data"),
        ({"distill.anchor": "data", "flow.objective": "likelihood"}, "times of its own.*distill.anchor=teacher"),
        ({"train.joint": True}, "without distill.teacher; leave one out"),
    ],
)
def test_what_a_derivative_does_not_go_with_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        resolve(assemble([("test", {"distill.teacher": "runs/flow", **values})]), 300)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model.family": "masked"}, "is of a flow"),
        ({"distill.anchor": "teacher"}, "has none; use data"),
        ({"distill.objective": "dmd"}, "needs a trained flow"),
        ({"flow.code": "learned"}, "follow what the map says of itself"),
        ({"flow.self_conditioning": 0.5}, "no earlier pass"),
        ({"flow.times": "tokens"}, "takes whole rows"),
        ({"flow.objective": "likelihood"}, "times of its own"),
        ({"model.time": "none"}, "must be told where it goes"),
        ({"distill.diagonal_fraction": 0.01}, "which alone are trained towards the data"),
        ({"distill.objective": "lsd", "parallel.zero": 3}, "whole weights"),
    ],
)
def test_what_joint_training_does_not_go_with_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        resolve(assemble([("test", {"train.joint": True, **values})]), 300)
