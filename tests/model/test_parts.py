"""The fixed parts of a flow and the profile behind its clock."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from megaflow.config.schema import ClockConfig, FlowConfig
from megaflow.errors import UserError
from megaflow.flow import clock as clocks
from megaflow.flow import laws
from megaflow.flow.interpolant import LINEAR, log_snr, time_of
from megaflow.flow.laws import Measured
from megaflow.flow.likelihood import information_range
from megaflow.flow.profile import CROSS_ENTROPY, ERROR, SQUARE, Profile
from megaflow.model import parts as made
from megaflow.model.parts import Parts
from tests.flow.measured import argmax

COUNTS = np.array([500, 300, 120, 60, 15, 4, 1, 0, 0])
FLOWS = {"identity": FlowConfig(code="identity", code_dim=9), "frame": FlowConfig(code="frame", code_dim=4)}
each = pytest.mark.parametrize("kind", FLOWS)


def parts(kind: str, seed: int = 0) -> Parts:
    return made.make(FLOWS[kind], COUNTS, seed)


def test_no_token_is_impossible():
    law = made.unigram(COUNTS).double().exp()
    np.testing.assert_allclose(law.numpy(), (COUNTS + 0.5) / (COUNTS + 0.5).sum(), rtol=1e-6)
    assert law.sum().item() == pytest.approx(1.0, abs=1e-6) and law.min() > 0.0


@each
def test_parts_are_a_function_of_counts_and_seed(kind):
    assert made.same(parts(kind), parts(kind))
    assert made.same(parts("frame", seed=0), parts("frame", seed=1)) is False


@each
def test_at_the_ends_of_the_range_nothing_and_everything_is_known(kind):
    flow = parts(kind)
    entropy = -(flow.log_prior.exp() * flow.log_prior).sum().item()
    ends = made.channel_measures(flow.code, flow.log_prior, torch.tensor([flow.span.low, flow.span.high]), 20_000, seed=5)[0]
    assert ends[0].item() == pytest.approx(entropy, abs=0.05)
    assert ends[1].item() < 2.0 * made.RESOLVED
    earlier = made.channel_measures(flow.code, flow.log_prior, torch.tensor([flow.span.high - 3.0]), 20_000, seed=5)[0]
    assert earlier.item() > made.RESOLVED  # and the range is not longer than it must be


@pytest.mark.parametrize("counts", [COUNTS, np.geomspace(1e5, 1, 300).astype(int)])
@each
def test_the_range_ends_half_a_nat_above_the_first_level_that_leaves_nothing_to_guess(kind, counts):
    flow = made.make(replace(FLOWS[kind], code_dim=32 if len(counts) > 9 and kind == "frame" else FLOWS[kind].code_dim), counts, 0)
    levels = torch.arange(information_range(flow.code, 0.0).low + 1.0, 40.0, 0.5)
    left = made.channel_measures(flow.code, flow.log_prior, levels, 2048, seed=0)[0]
    assert flow.span.high == levels[left < made.RESOLVED][0].item() + 0.5


def test_long_work_on_a_code_says_how_long_still(monkeypatch, capsys):
    monkeypatch.setattr(made, "PATIENCE", 0.0)
    made.initial_profile(parts("frame"), ClockConfig(bins=30), 0)
    assert "range of log-SNR" in (told := capsys.readouterr().err) and "profile of the code  30/30 levels  100%" in told
    monkeypatch.setattr(made, "PATIENCE", 60.0)
    made.initial_profile(parts("frame"), ClockConfig(bins=30), 0)
    assert capsys.readouterr().err == ""


def test_a_code_that_cannot_tell_its_tokens_apart_is_refused():
    with pytest.raises(UserError, match="flow.code_dim=2 is too few dimensions for 4096 tokens"):
        made.make(FlowConfig(code="frame", code_dim=2), np.full(4096, 5), 0)


@each
def test_what_the_channel_alone_scores(kind):
    """In the middle of the range, against the posterior written out, with other draws."""
    flow, level, n = parts(kind), 1.5 if kind == "identity" else 3.0, 20_000
    code, t = flow.code.double(), time_of(LINEAR, torch.tensor(level, dtype=torch.float64)).item()
    generator = torch.Generator().manual_seed(3)
    ids = torch.multinomial(flow.log_prior.exp(), n, replacement=True, generator=generator)
    matrix = torch.eye(9).double() if code.matrix is None else code.matrix
    y = t * matrix[ids] + (1 - t) * torch.randn(n, code.dim, generator=generator, dtype=torch.float64)
    log_likelihood = -(y[:, None] - t * matrix).square().sum(-1) / (2 * (1 - t) ** 2)
    log_p = torch.log_softmax(flow.log_prior + log_likelihood, -1)
    nll, error = -log_p.gather(1, ids[:, None])[:, 0], (log_p.exp() @ matrix - matrix[ids]).square().sum(-1)
    named = (log_likelihood.argmax(-1) == ids).double()
    ours = made.channel_measures(flow.code, flow.log_prior, torch.tensor([level]), n, seed=0)[:, 0]
    for value, exact in zip(ours, (nll, error, named), strict=True):
        assert abs(value - exact.mean()) < 4.0 * math.sqrt(2.0 / n) * exact.std()
    assert 0.1 < ours[0] < 1.1 and 0.3 < ours[2] < 0.95


@each
def test_what_is_saved_comes_back_bit_equal(kind, tmp_path):
    flow = parts(kind)
    made.save(flow, tmp_path / made.FILE)
    again = made.read(tmp_path / made.FILE)
    assert made.same(flow, again) and again.span == flow.span
    assert (again.code.vocab, again.code.dim, again.code.matrix is None) == (9, flow.code.dim, kind == "identity")
    assert again.log_prior.dtype == torch.float32


@pytest.mark.parametrize("content", [None, b"", b"not a tensor file", save({"log_prior": torch.zeros(3)}), save({}, {"dim": "x"})])
def test_a_missing_or_damaged_file_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / made.FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"flow.safetensors: cannot read the flow's code and prior \(.*restore the file, or train or"):
        made.read(tmp_path / made.FILE)


@each
def test_same_sees_a_difference_of_one_bit(kind):
    flow = parts(kind)
    up = torch.nextafter(flow.log_prior, torch.tensor(1.0))
    assert not made.same(flow, Parts(flow.code, up, flow.span))
    longer = type(flow.span)(flow.span.low, math.nextafter(flow.span.high, 99.0))
    assert not made.same(flow, Parts(flow.code, flow.log_prior, longer))
    if kind == "frame":
        code = replace(flow.code, matrix=torch.nextafter(flow.code.matrix, torch.tensor(1.0)))
        assert not made.same(flow, Parts(code, flow.log_prior, flow.span))
    assert not made.same(parts("identity"), parts("frame"))


@each
def test_the_first_profile_is_the_channels(kind):
    flow, config = parts(kind), ClockConfig(bins=40)
    profile = made.initial_profile(flow, config, seed=0)
    assert len(profile.edges) == 41 and profile.edges[0].item() == pytest.approx(flow.span.low)
    assert profile.edges[-1].item() == pytest.approx(flow.span.high)
    nll, error, named = made.channel_measures(flow.code, flow.log_prior, profile.centres, 20_000, seed=9)
    torch.testing.assert_close(profile.mean(CROSS_ENTROPY), nll, rtol=0, atol=0.15)
    torch.testing.assert_close(profile.mean(ERROR), error, rtol=0, atol=0.15 * error.max().item())
    torch.testing.assert_close(profile.mean(SQUARE), profile.mean(ERROR) ** 2)
    torch.testing.assert_close(profile.named, named, rtol=0, atol=0.1)


@pytest.mark.parametrize("prior", ["gaussian:temperature=4", "vertices:temperature=1", "dirichlet"])
@pytest.mark.parametrize("path", ["linear", "power:exponent=3"])
def test_path_and_prior_are_kept_by_name(prior, path, tmp_path):
    flow = made.make(replace(FLOWS["frame"], prior=prior, interpolant=path), COUNTS, 0)
    made.save(flow, tmp_path / made.FILE)
    again = made.read(tmp_path / made.FILE)
    assert made.same(flow, again) and again.moments == flow.moments and again.path.scale == (2.0 if "gaussian" in prior else 1.0)
    assert torch.equal(made.draw_noise(again, [3, 1], 5, 0, "noise"), made.draw_noise(flow, [3, 1], 5, 0, "noise"))
    assert torch.equal(made.draw_noise(flow, [1], 5, 0, "noise")[0], made.draw_noise(flow, [3, 1], 5, 0, "noise")[1])
    assert not made.same(flow, made.make(replace(FLOWS["frame"], prior=prior), COUNTS, 0)) or path == "linear"


@pytest.mark.parametrize("kind", ["learned", "embedding"])
def test_tokens_that_are_one_in_a_trained_code_do_not_keep_the_range_open(kind):
    """It ends where the others are told apart: near where it does with both, whatever the two leave to guess."""
    flow = made.make(FlowConfig(code=kind, code_dim=4), COUNTS, 0)
    weight = flow.code.matrix.clone()
    weight[1] = weight[0]
    trained = made.with_trained_code(flow, kind, weight, 0)
    never = made.ambiguity(trained.code, flow.log_prior, made.SHARPEST, 0)
    assert never > 10.0 * made.RESOLVED and abs(trained.bounded.high - flow.bounded.high) < 4.0
    assert made.ambiguity(trained.code, flow.log_prior, trained.bounded.high, 0) - never < made.RESOLVED


@pytest.mark.parametrize("kind", ["learned", "embedding"])
def test_a_trained_code_moves_the_range_of_the_bound_and_no_other(kind, tmp_path):
    """Two tokens whose weights have come near to each other are told apart later; what the network is told of the time stays."""
    flow = made.make(FlowConfig(code=kind, code_dim=4), COUNTS, 0)
    weight = flow.code.matrix.clone()
    weight[1] = weight[0] + 0.05 * weight[1]
    trained = made.with_trained_code(flow, kind, weight, 0)
    assert trained.span == flow.span and trained.bounded.high > flow.bounded.high + 2.0 and flow.bounded == flow.span
    left = made.channel_measures(trained.code, flow.log_prior, torch.tensor([trained.bounded.high]), 20_000, seed=5)[0, 0]
    assert left < 2.0 * made.RESOLVED and not trained.code.trained
    made.save(trained, tmp_path / made.FILE)
    again = made.read(tmp_path / made.FILE)
    assert made.same(trained, again) and again.bounded == trained.bounded
    assert (again.code.mixing is None) == (kind == "embedding") and (
        kind == "embedding" or torch.equal(again.code.mixing, trained.code.mixing)
    )


@pytest.mark.parametrize("name", ["uniform", "argmax", "ce_linear", "mixture:argmax=0.5,uniform=0.5"])
def test_the_clock_that_a_config_names(name):
    flow, config = parts("frame"), ClockConfig(name=name, uniform_share=0.2, bins=50)
    profile = made.initial_profile(flow, config, seed=0)
    clock, t = made.fit_clock(config, flow, profile), torch.linspace(0.0, 1.0, 200, dtype=torch.float64)
    flat = clocks.uniform_log_snr(LINEAR, flow.span.low, flow.span.high)
    expected = {
        "uniform": t,
        "mixture:argmax=0.5,uniform=0.5": 0.5 * clocks.forward(argmax(9), t) + 0.5 * t,
        "argmax": 0.8 * clocks.forward(argmax(9), t) + 0.2 * clocks.forward(flat, t),
        "ce_linear": 0.8 * clocks.forward(laws.ce_linear(Measured(LINEAR, 9, profile)), t) + 0.2 * clocks.forward(flat, t),
    }[name]
    torch.testing.assert_close(clocks.forward(clock, t), expected, rtol=0, atol=2e-3)


def test_how_much_of_a_clock_lies_where_tokens_are_told_apart():
    flow = parts("frame")
    ends = time_of(LINEAR, torch.tensor([flow.span.low, flow.span.high], dtype=torch.float64))
    for name, share, expected in (
        ("uniform", 0.0, (ends[1] - ends[0]).item()),
        ("logit_normal:mean=40", 0.0, 0.0),
        ("logit_normal:mean=40", 0.25, 0.25),
        ("ce_linear", 0.0, None),
    ):
        found = made.share_inside(ClockConfig(name=name, uniform_share=share, bins=50), flow)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_the_clock_follows_the_profile():
    """A model that learns earlier is trained at earlier times."""
    flow, config = parts("frame"), ClockConfig("ce_linear", bins=50)
    profile = made.initial_profile(flow, config, seed=0)
    half = torch.tensor([0.5], dtype=torch.float64)
    before = log_snr(LINEAR, clocks.inverse(made.fit_clock(config, flow, profile), half)).item()
    scores = 1.5 * torch.sigmoid(flow.span.low + 3.0 - profile.centres)
    earlier = Profile(profile.edges, scores.expand(3, -1), profile.weight)
    after = log_snr(LINEAR, clocks.inverse(made.fit_clock(config, flow, earlier), half)).item()
    assert after < before - 1.0
