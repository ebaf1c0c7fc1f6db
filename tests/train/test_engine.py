"""The schedule in closed form, and the steps of DeepSpeed's engine under every ZeRO stage."""

import gc
import math
import weakref
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from megaflow.config.schema import OptimConfig
from megaflow.parallel import mesh as meshes
from megaflow.parallel import random, reduction
from megaflow.train import engine
from megaflow.train.stage import Batch
from tests.plan.steps import Run
from tests.train.session import COVERED, Session, group, small


def test_a_closed_engine_holds_nothing():
    """DeepSpeed's hooks keep an engine for good, in cycles that Python does not see; each would leave the threads of its groups running."""
    with meshes.join() as joined:
        session = Session(small("adamw", 1, "fp32"), joined, seed=1)
        held = weakref.ref(session.engine)
        engine.close(Session.open.pop())
        del session, joined
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_cuts_weights_before_deepspeed_takes_them_all_to_the_device(monkeypatch, precision):
    """A network may be larger than a device: it waits on the CPU, from where one weight comes after another, and a slice of each stays."""
    deepspeed, seen = engine.quiet_deepspeed(), []
    true = deepspeed.initialize

    def initialize(**named):
        seen.extend(p.ds_status.name for p in named["model"].parameters())
        return true(**named)

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    with meshes.join() as joined:
        Session(small("adamw", 3, precision), joined, seed=1)
    assert seen and set(seen) == {"NOT_AVAILABLE"}


class TestLearningRate:
    def rates(self, steps: int, **settings: object) -> list[float]:
        optim = OptimConfig(learning_rate=2.0, **settings)
        return [engine.learning_rate(optim, step, steps) for step in range(steps)]

    def test_warm_up_is_linear_and_ends_at_the_peak(self):
        assert self.rates(8, schedule="constant", warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]

    @pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
    def test_without_warm_up_the_first_step_is_at_the_peak(self, schedule):
        assert self.rates(8, schedule=schedule, warmup_steps=0)[0] == 2.0

    @pytest.mark.parametrize("schedule", ["linear", "cosine"])
    def test_decay_starts_where_warm_up_ends_and_the_last_step_has_the_final_fraction(self, schedule):
        rates = self.rates(24, schedule=schedule, warmup_steps=4, final_fraction=0.25)
        assert rates[3] == rates[4] == 2.0 and rates[-1] == pytest.approx(0.5, rel=1e-12)
        assert all(a > b for a, b in zip(rates[4:-1], rates[5:], strict=True))

    def test_linear(self):
        rates = self.rates(14, schedule="linear", warmup_steps=4, final_fraction=0.1)
        assert rates[4:] == pytest.approx([2.0 - 1.8 * k / 9 for k in range(10)], rel=1e-12)

    def test_cosine(self):
        rates = self.rates(14, schedule="cosine", warmup_steps=4, final_fraction=0.1)
        assert rates[4:] == pytest.approx([2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * k / 9)) / 2) for k in range(10)], rel=1e-12)

    def test_edges(self):
        assert self.rates(1, schedule="cosine", warmup_steps=0) == [2.0]
        assert self.rates(3, schedule="linear", warmup_steps=10) == pytest.approx([0.2, 0.4, 0.6])  # the run ends in its warm-up
        assert engine.learning_rate(OptimConfig(learning_rate=2.0, warmup_steps=0, final_fraction=0.0), 50, 20) == 0.0


@pytest.mark.parametrize("name, zero, precision", COVERED)
class TestAGradientThatIsDropped:
    @pytest.mark.parametrize("accumulation, why", [(1, "not finite"), (2, "not taken")])
    def test_it_leaves_nothing_behind(self, mesh, monkeypatch, name, zero, precision, accumulation, why):
        """Everything is as before the step, and the next step is what it would have been without it, to the last bit."""
        session, undisturbed = (Session(small(name, zero, precision), mesh, 1, accumulation) for _ in range(2))
        for each in (session, undisturbed):
            each.step(0)
        before, true = {key: value.clone() for key, value in session.state().items()}, session.stage.loss
        with monkeypatch.context() as patched:
            if why == "not finite":
                patched.setattr(session.stage, "loss", lambda batch: (true(batch)[0] * math.nan, None))
            else:
                patched.setattr(engine, "step", partial(engine.step, take=False))
            assert math.isfinite(session.step(1)[1]) == (why == "not taken")
        assert all(torch.equal(value, before[key]) for key, value in session.state().items())
        assert session.step(2) == undisturbed.step(2)
        expected = undisturbed.state()
        assert all(torch.equal(value, expected[key]) for key, value in session.state().items())


class TestLayouts:
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    @pytest.mark.parametrize("source, target", [(0, 1), (1, 2), (2, 3), (3, 0)])
    def test_another_zero_stage_goes_on_the_same_way(self, mesh, name, source, target):
        first = Session(small(name, source, "fp32"), mesh, seed=1)
        for number in range(3):
            first.step(number)
        second = Session(small(name, target, "fp32"), mesh, seed=2)
        second.restore(first.state(), steps=3)
        for number in (3, 4, 5):
            assert second.step(number) == pytest.approx(first.step(number), rel=1e-6)

    @pytest.mark.parametrize(
        "one, other, tolerance",
        [
            ((0, "fp32"), (1, "fp32"), 1e-6),
            ((0, "fp32"), (2, "fp32"), 1e-6),
            ((0, "fp32"), (3, "fp32"), 1e-6),
            ((0, "bf16"), (1, "bf16"), 1e-6),
            ((0, "bf16"), (2, "bf16"), 1e-6),
            ((0, "bf16"), (3, "bf16"), 1e-6),
            ((0, "fp32"), (0, "bf16"), 2e-3),
        ],
    )
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_every_layout_takes_the_same_steps_from_the_first_on(self, mesh, name, one, other, tolerance):
        """ZeRO only shards and bf16 only rounds. DeepSpeed's bf16 optimizer counts a step before the first, which must be undone."""
        first, second = (Session(small(name, *layout), mesh, seed=1) for layout in (one, other))
        for number in range(4):
            assert second.step(number)[0] == pytest.approx(first.step(number)[0], rel=tolerance)

    def test_torchs_linear_stays_as_it_is(self, mesh):
        """DeepSpeed's ZeRO 3 would replace it in the whole process, for whatever runs there later, by one without tangents."""
        theirs = torch.nn.functional.linear
        Session(small("adamw", 3, "fp32"), mesh, seed=1)
        assert torch.nn.functional.linear is theirs

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    @pytest.mark.parametrize("zero", [1, 2, 3])
    def test_an_optimizer_on_the_cpu_takes_the_same_steps(self, mesh, name, zero):
        plain, away = small(name, 0, "fp32"), small(name, zero, "fp32")
        away.parallel.offload = "optimizer"
        one, other = Session(plain, mesh, seed=1), Session(away, mesh, seed=1)
        for number in range(4):
            assert other.step(number) == pytest.approx(one.step(number), rel=2e-6)

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    @pytest.mark.parametrize("zero", [0, 1, 2, 3])
    def test_accumulation_changes_nothing(self, mesh, name, zero):
        whole, parts = (Session(small(name, zero, "fp32"), mesh, seed=1, accumulation=a) for a in (1, 4))
        for number in range(3):
            assert parts.step(number) == pytest.approx(whole.step(number), rel=2e-6)

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("zero", [0, 1, 2, 3])
    def test_the_gradient_is_clipped_before_muon_and_its_step_is_not(self, mesh, zero, precision):
        """The momentum after a step is a twentieth of the clipped gradient; an orthogonalised step does not depend on its length."""
        moved, norms = [], []
        for clip in (0.0, 1e-3):
            config = small("muon", zero, precision)
            config.optim.clip_norm, config.optim.weight_decay = clip, 0.0
            session = Session(config, mesh, seed=1)
            before = group(session.state(), "weights/")
            assert session.step(0)[1] > 0.1
            after, moments = (group(session.state(), kind) for kind in ("weights/", "moments/"))
            held = {name.partition(".")[2]: value for name, value in moments.items() if name.startswith("momentum_buffer.")}
            norms.append(torch.cat([value.flatten() for value in held.values()]).norm().item())
            moved.append(torch.cat([(after[name] - before[name]).flatten() for name in held]))
        assert norms[0] > 1e-3 and 0.0 < norms[1] < 1.01 * 0.05 * 1e-3
        assert 0.0 < (moved[0] - moved[1]).norm() < 0.2 * moved[0].norm()  # Newton-Schulz rounds to bf16

    @pytest.mark.parametrize("zero", [0, 1, 2, 3])
    def test_the_norm_is_that_of_the_whole_gradient_before_clipping(self, mesh, zero):
        config = small("adamw", zero, "fp32")
        config.optim.clip_norm = 1e-3
        session = Session(config, mesh, seed=1)
        reference = Session(small("adamw", 0, "fp32"), mesh, seed=1)
        network = reference.engine.module.network
        ids = torch.randint(11, (4, 8), generator=random.generator(0, "ids", 0))
        loss, _ = reference.stage.loss(Batch(ids, None, torch.arange(4), 0, 4, torch.full((32,), 1 / 32)))
        gradients = torch.autograd.grad(loss, [p for p in network.parameters() if p.requires_grad], allow_unused=True)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients if g is not None))
        assert norm > 0.01 and session.step(0)[1] == pytest.approx(norm, rel=1e-5)


def steps_in_buckets(values: dict[str, Any], elements: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of four steps of a flow, gradients sent in buckets of so many elements."""
    with meshes.join() as mesh, mock.patch.multiple(reduction, BUCKET=elements, BUCKET_SHARE=0):
        run = Run("flow", 200, values, mesh)
        found = [run.step(index) for index in range(4)]
        engine.close(run.deep)
    return found


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_many_buckets_of_gradients_take_the_same_steps(ranks, zero):
    """Some parameters are larger than a bucket, as a vocabulary's may be; passes are accumulated."""
    values = {"model.layers": 2, "model.hidden": 32, "model.heads": 2, "model.belief_dim": 16, "data.length": 16, "flow.clock.bins": 20}
    values |= {"train.global_batch": 8, "train.micro_batch": 2, "optim.name": "adamw"}
    expected = steps_in_buckets(values | {"parallel.zero": 0}, 10**9)
    for found in ranks(2, steps_in_buckets, values | {"parallel.zero": zero}, 2_000):
        assert found == [pytest.approx(one, rel=1e-5) for one in expected]
