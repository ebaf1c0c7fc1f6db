"""Stage 2 and joint training: a flow map by one of the objectives of map_objective.py.

Exact counts of the global batch's rows are diagonal (s = t), inner (s < t) and boundary ((0, 1)). Diagonal rows are anchored to a frozen
teacher's posterior, or to the data by the flow's own objective, which is what stage 1 trains: with that in one run from the start training
is joint. Targets come from the live network without gradient.

In stage 2 codes, prior and clock are the teacher's, frozen; in joint training the clock follows what the diagonal scores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.config.schema import Config
from megaflow.flow import choice, flow_map, losses
from megaflow.flow import clock as clocks
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup
from megaflow.flow.context import told
from megaflow.flow.flow_map import Times
from megaflow.flow.interpolant import noisy_state, time_of
from megaflow.flow.likelihood import NoBound
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import random
from megaflow.train import map_objective as objectives
from megaflow.train.map_objective import OBJECTIVES, MapObjective, Models, Rows, Target
from megaflow.train.stage import Batch, Total, alone, cells, noise, validation_bound
from megaflow.train.stage_flow import FlowStage

DIAGONAL, INNER, BOUNDARY = 0, 1, 2
NOTED = 4
"""What is noted apart: losses of rows with s = t, of those of the objective, and of others with s < t, which have the semigroup's target;
and last what of the objective's targets a floor answers."""


class MapStage:
    """See stage.Stage. Diagonal rows are trained as `flow` trains its rows, a stage of the same network; where that is None towards
    `teacher`, which holds its averaged weights and never changes. clock: the teacher's; None in joint training, which has the flow's.

    The loss is that of all rows together; or with distill.surgery the two of diagonal and other rows, (2,).
    """

    def __init__(
        self,
        config: Config,
        network: TextDiT,
        parts: Parts,
        clock: Clock | None = None,
        teacher: TextDiT | None = None,
        flow: FlowStage | None = None,
    ) -> None:
        self.config, self.network, self.parts, self.frozen_clock = config, network, parts, clock
        self.teacher, self.flow = None if teacher is None else teacher.requires_grad_(False), flow
        self.objective: MapObjective = choice.call(OBJECTIVES, config.distill.objective)
        self.at_once = config.parallel.zero == 3  # where each pass gathers the network anew

    @property
    def clock(self) -> Clock:
        if self.frozen_clock is None:
            assert self.flow is not None
            return self.flow.clock
        return self.frozen_clock

    def cards(self, batch: Batch, peer: int = 0) -> Tensor:
        """(B,) places of rows, of this process or of the `peer`-th after it, in a permutation of the global batch that is new every step:
        by them kinds are dealt, so that no process always gets the same ones."""
        places = batch.places + peer * (batch.rows // batch.peers)
        return random.permutation(batch.rows, self.config.run.seed, "kinds", batch.step)[places % batch.rows]

    def kinds(self, batch: Batch, peer: int = 0) -> Tensor:
        """(B,) kind of each row, of this process or of the `peer`-th after it."""
        distill = self.config.distill
        diagonal, boundary = flow_map.counts(batch.rows, distill.diagonal_fraction, distill.boundary_fraction)
        card = self.cards(batch, peer)
        kinds = torch.full_like(card, INNER)
        kinds[card < diagonal] = DIAGONAL
        kinds[card >= batch.rows - boundary] = BOUNDARY
        return kinds

    def rows(self, batch: Batch, kinds: Tensor) -> tuple[Rows, Batch, Tensor]:
        """The batch's rows with their times and states, ordered by kind, so that each pays only for the passes it needs; the batch in that
        order, and the times s as they were drawn, on the CPU."""
        seed, device, path = self.config.run.seed, batch.ids.device, self.parts.path
        share = cells(seed, batch, "between") if self.config.distill.between == "uniform" else None
        first = cells(seed, batch, "gap")
        if self.flow is not None:  # diagonal rows are spread over the clock among themselves, as in stage 1: they are what it is fitted to
            diagonal, _ = flow_map.counts(batch.rows, self.config.distill.diagonal_fraction, 0.0)
            even = clocks.stratified(self.cards(batch), max(diagonal, 1), random.uniform(seed, "diagonal offset", batch.step))
            first = torch.where(kinds == DIAGONAL, even, first)
        times = flow_map.draw_times(self.clock, kinds, first, cells(seed, batch, "start"), share, self.config.distill.times)
        if self.objective.derivative:
            end = time_of(path, torch.tensor(self.parts.span.high, dtype=torch.float64))
            times = Times(*(torch.where(kinds == INNER, torch.minimum(x, end), x) for x in times))
        order = torch.argsort(kinds, stable=True)
        batch, drawn, times = batch.of(order), times.s[order], Times(*(x[order].to(device) for x in times))
        seen_times = Times(*(told(x, batch.given) for x in times))
        y = noisy_state(path, lookup(self.parts.code, batch.ids), noise(seed, batch, self.parts), seen_times.s)
        seen = self.network.see(y, seen_times.s, seen_times.t)
        weight = batch.weight.view(batch.ids.shape)
        return Rows(y, seen_times, times, seen, batch.lengths, batch.documents, weight, batch.places, batch.given), batch, drawn

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        kinds = self.kinds(batch)
        rows, batch, drawn = self.rows(batch, kinds)
        still, inner, total = int((kinds == DIAGONAL).sum()), int((kinds == INNER).sum()), len(kinds)
        objective, network = self.objective, self.network
        diagonal, moving, boundary = slice(0, still), slice(still, still + inner), slice(still + inner, total)
        if objective.one_step:
            apart, others = boundary, moving
        else:
            apart, others = (moving, boundary) if objective.apart else (slice(still, still), slice(still, total))
        if still == total and batch.peers > 1:
            self.keep_company(batch, rows)
        terms, held = list[Tensor](), list[Tensor]()
        noted, of_flow = torch.zeros(NOTED, 2, dtype=torch.float64), []

        def take(kind: int, some: Rows, loss: Tensor, values: Tensor) -> None:
            terms.append(F.one_hot(torch.tensor(min(kind, 1)), 2).to(loss) * loss)
            weight = some.weight.flatten().double()
            noted[kind] += torch.stack([(values.double() * weight).sum(), weight.sum()]).cpu()

        todo: list[tuple[int, slice, Target | None]] = []
        if still:
            todo.append((0, diagonal, self.diagonal_target(rows.part(diagonal))))
        if objective.target is not None and apart.start < apart.stop:
            todo.append((1, apart, objective.target(network, rows.part(apart), held)))
        if others.start < others.stop:
            kind = 2 if objective.apart or objective.one_step else 1
            semigroup = objectives.semigroup if self.at_once else objectives.semigroup_by_rows
            todo.append((kind, others, semigroup(network, rows.part(others))))
        hidden = self.passes(rows, [part for _, part, _ in todo])
        uncertainty, ease = self.learned_weights(rows)
        rows = rows._replace(ease=ease)
        terms.append(self.nothing(rows, uncertainty))
        if objective.loss is not None and apart.start < apart.stop:
            some, measure = rows.part(apart), partial(objective.loss, self.models(batch), reweight=self.reweight())
            # a law that is matched has no learned weight: its value is not what it descends, and its loss is the auxiliary denoiser's too
            take(1, some, *(measure(rows=some) if objective.one_step else eased(some, measure)))
        while todo:
            kind, part, target = todo.pop(0)  # with its chunk, which is not kept beside the next one's
            some, last = rows.part(part), hidden.pop(0)
            if target is None:
                assert self.flow is not None
                of_rows = batch.of(torch.arange(part.start, part.stop))
                known = None if uncertainty is None else uncertainty[part]
                loss, values = self.flow.scored(network.read(last, some.y, some.told.s), drawn[part], of_rows, known)
                of_flow.append(self.flow.observe(drawn[part], values, of_rows))
                take(kind, some, loss, values[:, 0])
            else:
                take(kind, some, *eased(some, partial(self.towards, last, target, kind)))
        if held:
            weight = rows.part(apart).weight.flatten().double()
            noted[-1] = torch.stack([(torch.cat(held).double() * weight).sum(), weight.sum()]).cpu()
        if self.flow is not None and not of_flow:
            of_flow.append(torch.zeros(4, len(self.flow.profile.weight), dtype=torch.float64))
        both = sum(terms[1:], terms[0])
        return both if self.config.distill.surgery else both.sum(), torch.cat([x.flatten() for x in (noted, *of_flow)])

    def learned_weights(self, rows: Rows) -> tuple[Tensor | None, Tensor | None]:
        """w of the diagonal's weights and of the map's, of all rows (B,), None of those that are not learned. Under ZeRO 3 DeepSpeed takes
        the network's backward pass for over when the gradient of what entered it is there, so that theirs must come before: they are asked
        for after the network, and once."""
        network, (s, _, t) = self.network, rows.times
        uncertainty = None if network.uncertainty is None else network.uncertainty_at(s)
        return uncertainty, None if network.map_weights is None else network.ease(s, t)

    def nothing(self, rows: Rows, uncertainty: Tensor | None) -> Tensor:
        """Two zeros with a gradient of zero by all weights that only some kinds of rows have one by: every process must have a gradient by
        every weight, for they are summed as they come, and not every process has rows of each kind."""
        network, found = self.network, rows.y.new_zeros(2)
        for learned in (uncertainty, rows.ease):
            found = found if learned is None else found + 0.0 * learned.sum()
        for p in [] if network.auxiliary is None else network.auxiliary.parameters():
            found = found + 0.0 * p.sum()
        return found

    def passes(self, rows: Rows, parts: list[slice]) -> list[Tensor]:
        """Hidden states of every part's rows, with gradient, in one pass."""
        if not parts:
            return []
        whole = len(rows.y) == sum(part.stop - part.start for part in parts)
        some = rows if whole else rows.part(torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(rows.y.device))
        hidden = self.network(some.y, some.told.s, some.told.t, some.lengths, some.seen, some.documents)
        return list(hidden.split([part.stop - part.start for part in parts]))

    def towards(self, hidden: Tensor, target: Target, kind: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """The loss of rows with their weights, and what of it is to be noted, per token."""
        head, read, weight = self.network.head(), self.network.read(hidden, rows.y, rows.told.s), rows.weight.flatten()
        whole = 1 if kind == 0 or self.at_once else rows.y.shape[1]
        if self.objective.squared and kind > 0:
            return losses.endpoint_distance(head, read, objectives.means(self.parts.code, target), weight, self.reweight(), whole)
        return losses.divergence(head, read, target, weight, self.reweight(), whole)

    def diagonal_target(self, rows: Rows) -> Target | None:
        """None where diagonal rows are trained towards the data."""
        if self.flow is not None:
            return None
        assert self.teacher is not None
        return objectives.diagonal(self.teacher, rows)

    def models(self, batch: Batch) -> Models:
        def fresh(places: Tensor, draw: int) -> tuple[Tensor, Tensor]:
            some, purpose = batch._replace(places=places), f"again {draw}"
            times = clocks.inverse(self.clock, cells(self.config.run.seed, some, purpose))
            return times, noise(self.config.run.seed, some, self.parts, purpose)

        return Models(self.network, self.teacher, self.network.auxiliary, fresh)

    @torch.no_grad()
    def keep_company(self, batch: Batch, rows: Rows) -> None:
        """The two passes of a semigroup target, whose results nobody wants, where a peer has rows with s < t and makes them."""
        if any(bool((self.kinds(batch, peer) != DIAGONAL).any()) for peer in range(1, batch.peers)):
            for _ in range(2):
                self.network(rows.y[:1], rows.told.s[:1], rows.told.t[:1])

    def reweight(self) -> Any:
        distill = self.config.distill
        assert distill.weighting != "auto"  # of a config that is resolved
        if distill.weighting != "adaptive":
            return None
        return partial(flow_map.adaptive_weight, power=distill.adaptive_power, constant=distill.adaptive_constant)

    def learn(self, observed: Tensor, step: int) -> dict[str, float]:
        """The step's losses without weights, a token, of rows with s = t, of the objective's, and of others with s < t; and the share of
        psi_{s,t} that a target of derivatives answers by its floor: near 1 there is no target any more."""
        noted = observed[: 2 * NOTED].view(NOTED, 2)
        if self.flow is not None and self.frozen_clock is None:
            self.flow.learn(observed[2 * NOTED :].view(4, -1), step)
        diagonal = "diagonal_divergence" if self.flow is None else "cross_entropy"
        names = (diagonal, self.objective.measures, "semigroup_divergence", "target_at_floor")
        return {name: (total / weight).item() for name, (total, weight) in zip(names, noted, strict=True) if weight > 0.0}

    def validate(self, batch: Batch, total: Total = alone) -> dict[str, float]:
        """The objective itself on validation rows with draws that never change, the same without its weights, and the diagonal's bound."""
        with torch.no_grad():
            loss, observed = self.loss(batch)
        sums = total(torch.stack([loss.sum().double().cpu(), observed[: 2 * NOTED].view(NOTED, 2)[:-1, 0].sum()]))
        metrics = {"validation_loss": sums[0].item(), "validation_divergence": sums[1].item()}
        try:
            metrics["validation_bound"] = validation_bound(self.config, self.network, self.parts, self.clock, batch, total).mean
        except NoBound:
            pass
        return metrics

    def state(self) -> dict[str, Tensor]:
        if self.flow is not None and self.frozen_clock is None:
            return self.flow.state()
        return {"clock_times": self.clock.times, "clock_tau": self.clock.tau}

    def restore(self, state: dict[str, Tensor]) -> None:
        if self.flow is not None and self.frozen_clock is None:
            self.flow.restore(state)
        else:
            assert torch.equal(state["clock_times"], self.clock.times) and torch.equal(state["clock_tau"], self.clock.tau)

    def describe(self) -> dict[str, Any]:
        distill = self.config.distill
        where = {"teacher": distill.teacher} if distill.teacher else {"training": "of flow and map together"}
        return where | {
            "objective": distill.objective,
            "diagonal": "towards the teacher" if self.flow is None else f"towards the data, {self.config.flow.objective}",
            "reads": ", ".join([*self.network.reads, f"ahead: {distill.state_input}"]),
        }


def eased(rows: Rows, measure: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """measure(rows=…), a loss and its values per token; where weights are learned exp(-w) loss + w (FMM), with a gradient by w too."""
    if rows.ease is None:
        return measure(rows=rows)
    w = rows.ease[:, None]
    factor = torch.exp(-w)
    loss, values = measure(rows=rows._replace(weight=rows.weight * factor.detach()))
    plain = values.view(rows.weight.shape)
    return loss + (rows.weight * ((factor - factor.detach()) * plain + w)).sum(), values
