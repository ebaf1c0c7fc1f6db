"""Stage 2: a flow map by one of its identities, from a frozen teacher.

Exact counts of the global batch's rows are diagonal (s = t, towards the teacher's posterior), inner (s < t) and boundary ((0, 1)). What
inner rows are trained towards is distill.objective:

    psd        the semigroup identity, KL (FMLM, DFM)                                     no derivative
    fmlm_mse   the same by least squares in the state's dimensions (FMLM's first form)    no derivative
    lsd        the Lagrangian identity in logits, KL (DFM)                                one in t, inside the target
    esd        the Eulerian identity in logits, KL (DFM)                                  one along the flow, inside the target
    lsd_cfm    the Lagrangian residual, squared (CFM)                                     one in t, with gradient through it
    ecld       a bound on that residual (CFM)                                             the same

Boundary rows always have the semigroup's target: at t = 1 the Eulerian identity says nothing. Targets come from the live network without
gradient. The codes, the prior and the clock are the teacher's, frozen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaflow.config.schema import Config
from megaflow.flow import flow_map, losses, tangent
from megaflow.flow import head as heads
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup
from megaflow.flow.context import told
from megaflow.flow.flow_map import Times
from megaflow.flow.interpolant import noisy_state, time_of
from megaflow.flow.likelihood import NoBound
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import random
from megaflow.train import targets
from megaflow.train.stage import Batch, Total, alone, cells, noise, validation_bound
from megaflow.train.targets import Rows, Target

DIAGONAL, INNER, BOUNDARY = 0, 1, 2
WITH_DERIVATIVES = ("lsd", "esd", "lsd_cfm", "ecld")
"""Objectives whose inner rows go apart from the boundary rows, and end within the range of log-SNR."""
NAMES = {
    "psd": "semigroup_divergence",
    "fmlm_mse": "semigroup_distance",
    "lsd": "lagrangian_divergence",
    "esd": "eulerian_divergence",
    "lsd_cfm": "lagrangian_residual",
    "ecld": "endpoint_divergence",
}
"""What metrics.jsonl calls the loss of rows with s < t without weights; distance and residual are squared, in the state's dimensions."""


class MapStage:
    """See stage.Stage. `teacher` holds its averaged weights and never changes."""

    def __init__(self, config: Config, network: TextDiT, teacher: TextDiT, parts: Parts, clock: Clock) -> None:
        self.config, self.network, self.parts, self.clock = config, network, parts, clock
        self.teacher, self.objective = teacher.requires_grad_(False), config.distill.objective
        self.at_once = config.parallel.zero == 3  # where each pass gathers the network anew

    def kinds(self, batch: Batch, peer: int = 0) -> Tensor:
        """(B,) kind of each row, of this process or of the `peer`-th after it. The kinds of a global batch are dealt by a permutation of
        its places, new every step, so that no process always gets the same ones."""
        distill = self.config.distill
        diagonal, boundary = flow_map.counts(batch.rows, distill.diagonal_fraction, distill.boundary_fraction)
        places = batch.places + peer * (batch.rows // batch.peers)
        card = random.permutation(batch.rows, self.config.run.seed, "kinds", batch.step)[places % batch.rows]
        kinds = torch.full_like(card, INNER)
        kinds[card < diagonal] = DIAGONAL
        kinds[card >= batch.rows - boundary] = BOUNDARY
        return kinds

    def rows(self, batch: Batch, kinds: Tensor) -> Rows:
        """The batch's rows with their times and states, ordered by kind, so that each pays only for the passes it needs."""
        seed, device, path = self.config.run.seed, batch.ids.device, self.parts.path
        share = cells(seed, batch, "between") if self.config.distill.between == "uniform" else None
        times = flow_map.draw_times(self.clock, kinds, cells(seed, batch, "gap"), cells(seed, batch, "start"), share)
        if self.objective in WITH_DERIVATIVES:
            end = time_of(path, torch.tensor(self.parts.span.high, dtype=torch.float64))
            inner = kinds == INNER
            times = Times(*(torch.where(inner, torch.minimum(x, end), x) for x in times))
        times = Times(*(x.to(device) for x in times))
        seen_times = Times(*(told(x, batch.given) for x in times))
        y = noisy_state(path, lookup(self.parts.code, batch.ids), noise(seed, batch, self.parts), seen_times.s)
        order = torch.argsort(kinds, stable=True).to(device)
        lengths, documents = (None if x is None else x[order] for x in (batch.lengths, batch.documents))
        y, (seen_times, times) = y[order], (Times(*(x[order] for x in each)) for each in (seen_times, times))
        seen = self.network.see(y, seen_times.s, seen_times.t)  # with nothing trained in it: the teacher and every target see the same
        return Rows(y, seen_times, times, seen, lengths, documents, batch.weight.view(batch.ids.shape)[order])

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        kinds = self.kinds(batch)
        rows = self.rows(batch, kinds)
        counts = [int((kinds == kind).sum()) for kind in (DIAGONAL, INNER, BOUNDARY)]
        still, total = counts[0], len(kinds)
        apart = slice(still, still + counts[1]) if self.objective in WITH_DERIVATIVES else slice(still, still)
        parts = [slice(0, still), apart, slice(apart.stop, total)]
        make = [partial(targets.diagonal, self.teacher), self.inner_target(), self.semigroup_target()]
        found: list[tuple[int, slice, Target]] = []
        for index, (part, of) in enumerate(zip(parts, make, strict=True)):
            if part.start < part.stop and of is not None:
                found.append((min(index, 1), part, of(rows.part(part))))
        if still == total and batch.peers > 1:
            self.keep_company(batch, rows)
        terms, observed = [], torch.zeros(2, 2, dtype=torch.float64)
        if self.inner_target() is None and apart.start < apart.stop:
            loss, divergences = self.through_tangent(rows.part(apart))
            terms.append(loss)
            note(observed, 1, divergences, rows.part(apart))
        plain = [part for _, part, _ in found]
        hidden = self.passes(rows, plain)
        while found:
            index, part, target = found.pop(0)  # with its chunk, which is not kept beside the next one's
            loss, divergences = self.towards(hidden[part.start], rows.part(part), target, index == 0)
            terms.append(loss)
            note(observed, index, divergences, rows.part(part))
        return torch.stack(terms).sum(), observed

    def passes(self, rows: Rows, parts: list[slice]) -> dict[int, Tensor]:
        """Hidden states of every part's rows by where it begins, with gradient, in one pass."""
        if not parts:
            return {}
        whole = len(rows.y) == sum(part.stop - part.start for part in parts)
        some = rows if whole else rows.part(torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(rows.y.device))
        hidden = self.network(some.y, some.told.s, some.told.t, some.lengths, some.seen, some.documents)
        split = hidden.split([part.stop - part.start for part in parts])
        return {part.start: each for part, each in zip(parts, split, strict=True)}

    def towards(self, hidden: Tensor, rows: Rows, target: Target, diagonal: bool) -> tuple[Tensor, Tensor]:
        """The loss of rows with their weights, and what of it is to be noted, per token."""
        head, read, weight = self.network.head(), self.network.read(hidden, rows.y, rows.told.s), rows.weight.flatten()
        whole = 1 if diagonal or self.at_once else rows.y.shape[1]
        if self.objective == "fmlm_mse" and not diagonal:
            return losses.endpoint_distance(head, read, targets.means(self.parts.code, target), weight, self.reweight(), whole)
        return losses.divergence(head, read, target, weight, self.reweight(), whole)

    def inner_target(self) -> Callable[[Rows], Target] | None:
        """Of inner rows that go apart from boundary rows; None where their loss has a gradient through a tangent."""
        of = {"lsd": targets.lagrangian, "esd": targets.eulerian}.get(self.objective)
        return None if of is None else partial(of, self.network)

    def semigroup_target(self) -> Callable[[Rows], Target]:
        return partial(targets.semigroup if self.at_once else targets.semigroup_by_rows, self.network)

    def through_tangent(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The losses of Categorical Flow Maps, and (n,) the squared residual or the divergence, without weights."""
        network, path, weight = self.network, self.parts.path, rows.weight.flatten()
        hidden, moved = targets.by_end(network, rows)
        read, head, moved = network.read(hidden, rows.y, rows.told.s), network.head(), moved.flatten(0, 1)
        without = heads.Read(read.hidden.detach(), read.y, read.level)
        end = targets.at_the_end(network, rows, without)
        if self.objective == "ecld":
            gain = rows.tokens(tangent.lagrangian_gain(path, rows.times.s, rows.times.t))
            psi = heads.probabilities(head)
            loss, terms = tangent.endpoint_bound(head, read, moved, lambda tokens: psi(end[tokens]), gain, weight, self.reweight())
            return loss, terms[:, 0]
        frozen, y = head.frozen(), rows.y.flatten(0, 1)
        mean, at_end = heads.expectation(frozen, without), heads.expectation(frozen, end)
        s, t = rows.tokens(rows.times.s), rows.tokens(rows.times.t)
        terms_of = tangent.residual_terms(path, y, s, t, mean, at_end)
        return tangent.lagrangian_residual(head, read, moved, *terms_of, weight, self.reweight())

    @torch.no_grad()
    def keep_company(self, batch: Batch, rows: Rows) -> None:
        """The two passes of a semigroup target, whose results nobody wants, where a peer has rows with s < t and makes them."""
        if any(bool((self.kinds(batch, peer) != DIAGONAL).any()) for peer in range(1, batch.peers)):
            for _ in range(2):
                self.network(rows.y[:1], rows.told.s[:1], rows.told.t[:1])

    def reweight(self) -> Any:
        distill = self.config.distill
        if distill.weighting == "none":
            return None
        return partial(flow_map.adaptive_weight, power=distill.adaptive_power, constant=distill.adaptive_constant)

    def learn(self, observed: Tensor, step: int) -> dict[str, float]:
        """The step's divergences from its targets without weights, a token, of rows with s = t and of those with s < t."""
        names = ("diagonal_divergence", NAMES[self.objective])
        return {name: (total / weight).item() for name, (total, weight) in zip(names, observed, strict=True) if weight > 0.0}

    def validate(self, batch: Batch, total: Total = alone) -> dict[str, float]:
        """The objective itself on validation rows with draws that never change, the same without its weights, and the diagonal's bound."""
        with torch.no_grad():
            loss, observed = self.loss(batch)
        sums = total(torch.stack([loss.double().cpu(), observed[:, 0].sum()]))
        metrics = {"validation_loss": sums[0].item(), "validation_divergence": sums[1].item()}
        try:
            metrics["validation_bound"] = validation_bound(self.config, self.network, self.parts, self.clock, batch, total).mean
        except NoBound:
            pass
        return metrics

    def state(self) -> dict[str, Tensor]:
        return {"clock_times": self.clock.times, "clock_tau": self.clock.tau}

    def restore(self, state: dict[str, Tensor]) -> None:
        assert torch.equal(state["clock_times"], self.clock.times) and torch.equal(state["clock_tau"], self.clock.tau)

    def describe(self) -> dict[str, Any]:
        distill = self.config.distill
        return {
            "teacher": distill.teacher,
            "objective": distill.objective,
            "reads": ", ".join([*self.network.reads, f"ahead: {distill.state_input}"]),
        }


def note(observed: Tensor, index: int, values: Tensor, rows: Rows) -> None:
    """Add what was found of rows, (n,) without weights, and their weight to a line of what is observed."""
    weight = rows.weight.flatten().double()
    observed[index, 0] += (values.double() * weight).sum().item()
    observed[index, 1] += weight.sum().item()
