"""Logical weights, averages and moments out of DeepSpeed and into it again, under every ZeRO stage."""

import math
from dataclasses import replace

import pytest
import torch

from megaflow.model.build import baseline_network
from megaflow.parallel import mesh as meshes
from megaflow.parallel import random
from megaflow.train import ema, engine_state
from tests.train.session import COVERED, Session, group, small


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_what_is_allocated_around_the_weights_may_be_anything(zero):
    """Under ZeRO 3 each weight's slice is a multiple long, and its end is memory as it was found."""
    with meshes.join() as joined:
        session = Session(small("adamw", zero, "fp32"), joined, seed=1)
        held = session.engine.held[0]
        assert engine_state.finite(session.engine)
        around = torch.cat([held.flat.detach().flatten(), torch.tensor([math.nan])])
        session.engine.held[0] = replace(held, flat=around)
        assert engine_state.finite(session.engine)
        held.of(held.flat.detach())[-1] = math.inf
        session.engine.held[0] = held
        assert not engine_state.finite(session.engine)


@pytest.mark.parametrize("name, zero, precision", COVERED)
class TestRoundTrip:
    def test_a_restored_engine_goes_on_exactly_as_the_first_would(self, mesh, name, zero, precision):
        """Weights, averages, moments and losses are equal to the last bit; the restored engine started from other weights."""
        first = Session(small(name, zero, precision), mesh, seed=1)
        for number in range(3):
            first.step(number)
            engine_state.update_average(first.engine, 0.5)
        kept = first.state()
        expected = [first.step(number) for number in (3, 4)]
        second = Session(small(name, zero, precision), mesh, seed=2)
        second.restore(kept, steps=3)
        assert all(torch.equal(value, kept[key]) for key, value in second.state().items())
        assert [second.step(number) for number in (3, 4)] == expected
        one, other = first.state(), second.state()
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    def test_what_is_kept_is_full_and_fp32(self, mesh, name, zero, precision):
        session = Session(small(name, zero, precision), mesh, seed=1)
        shapes = {key: value.shape for key, value in session.drawn.items()}
        session.step(0)
        state = session.state()
        weights, moments = group(state, "weights/"), group(state, "moments/")
        assert {key: value.shape for key, value in weights.items()} == shapes == {k: v.shape for k, v in group(state, "averaged/").items()}
        assert all(value.dtype == torch.float32 and value.shape == shapes[key.partition(".")[2]] for key, value in moments.items())
        kinds = {key.partition(".")[0] for key in moments}
        assert kinds == ({"exp_avg", "exp_avg_sq", "momentum_buffer"} if name == "muon" else {"exp_avg", "exp_avg_sq"})
        if precision == "bf16":  # the masters hold what bf16 cannot
            assert any((value != value.bfloat16().float()).any() for value in weights.values())
            assert all(p.dtype == torch.bfloat16 for p in session.engine.module.parameters())


def lerp(average: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], rate: float) -> dict[str, torch.Tensor]:
    return {name: rate * average[name] + (1.0 - rate) * value for name, value in weights.items()}


@pytest.mark.parametrize("name, zero, precision", COVERED)
class TestAverage:
    def test_it_is_that_of_the_whole_weights(self, mesh, name, zero, precision):
        """And goes on from a restored one of another layout; frozen parameters keep their value."""
        session, other = (Session(small(name, z, precision), mesh, seed=1, frozen="table") for z in (zero, (zero + 1) % 4))
        expected = group(session.state(), "weights/")
        for number, rate in enumerate((0.1, 0.5, 0.9)):
            session.step(number)
            engine_state.update_average(session.engine, rate)
            expected = lerp(expected, group(session.state(), "weights/"), rate)
        self.equal(group(session.state(), "averaged/"), expected)
        other.restore(session.state(), steps=3)
        other.step(3)
        engine_state.update_average(other.engine, 0.75)
        expected = lerp(expected, group(other.state(), "weights/"), 0.75)
        self.equal(group(other.state(), "averaged/"), expected)
        for found in (session.state(), other.state()):
            for kind in ("weights/table", "averaged/table"):  # in bf16 too, whose masters hold only what is trained
                assert torch.equal(found[kind], session.drawn["table"])

    def equal(self, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-8)

    def test_a_block_sees_it_and_after_it_all_is_as_before(self, mesh, name, zero, precision):
        """Also if the block fails. The network is asked through the engine's module, as ZeRO 3 needs it."""
        session = Session(small(name, zero, precision), mesh, seed=1)
        for number in range(3):
            session.step(number)
        before, network = session.state(), session.stage.network
        ids = torch.randint(11, (2, 8), generator=random.generator(0, "look", 0))

        def look() -> torch.Tensor:
            with torch.no_grad():
                return session.engine.module(network, ids).float()

        own = look()
        plain = baseline_network(session.stage.config, torch.full((11,), 1 / 11).log(), mesh.device)
        ema.load(plain.to(torch.bfloat16 if precision == "bf16" else torch.float32), group(before, "averaged/"))
        with engine_state.averaged(session.engine):
            seen = look()
        with pytest.raises(RuntimeError), engine_state.averaged(session.engine):
            raise RuntimeError
        assert torch.equal(seen, plain(ids).detach().float()) and not torch.equal(seen, own) and torch.equal(look(), own)
        after = session.state()
        assert all(torch.equal(after[key], before[key]) for key in before)
