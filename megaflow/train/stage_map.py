"""Stage 2: a flow map by the semigroup identity in KL form, from a frozen teacher (FMLM, DFM).

Exact counts of the global batch's rows are diagonal (s = t, towards the teacher's posterior), inner (s < u < t, u midway on the clock)
and boundary ((0, 1)). Inner and boundary targets come from the live network without gradient:

    psi_{s,t}(y)  <-  a psi_{s,u}(y) + (1 - a) psi_{u,t}( X_{s,u}(y) )

The codes, the prior and the clock are the teacher's, frozen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaflow.config.schema import Config
from megaflow.flow import flow_map, losses
from megaflow.flow import head as heads
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup, mean
from megaflow.flow.context import told
from megaflow.flow.interpolant import noisy_state, transport
from megaflow.flow.likelihood import NoBound
from megaflow.model.parts import Parts
from megaflow.model.text_dit import Seen, TextDiT
from megaflow.parallel import random
from megaflow.train.stage import Batch, Total, alone, cells, noise, validation_bound

DIAGONAL, INNER, BOUNDARY = 0, 1, 2


class MapStage:
    """See stage.Stage. `teacher` holds its averaged weights and never changes."""

    def __init__(self, config: Config, network: TextDiT, teacher: TextDiT, parts: Parts, clock: Clock) -> None:
        self.config, self.network, self.parts, self.clock = config, network, parts, clock
        self.teacher = teacher.requires_grad_(False)
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

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        seed, device = self.config.run.seed, batch.ids.device
        kinds = self.kinds(batch)
        times = flow_map.draw_times(self.clock, kinds, cells(seed, batch, "gap"), cells(seed, batch, "start"))
        times = flow_map.Times(*(told(x.to(device), batch.given) for x in times))
        y = noisy_state(self.parts.path, lookup(self.parts.code, batch.ids), noise(seed, batch, self.parts), times.s)
        # rows of one kind go together, so that each kind pays only for the passes it needs
        order = torch.argsort(kinds, stable=True).to(device)
        split = int((kinds == DIAGONAL).sum())
        y, times = y[order], flow_map.Times(*(x[order] for x in times))
        lengths = None if batch.lengths is None else batch.lengths[order]
        documents = None if batch.documents is None else batch.documents[order]
        seen = self.network.see(y, times.s, times.t)  # with nothing trained in it: the teacher and every target see the same
        targets = []
        for index, part in enumerate((slice(0, split), slice(split, len(order)))):
            if part.start < part.stop:
                some, of = (None if x is None else x[part] for x in (lengths, documents))
                make = self.diagonal_target if index == 0 else self.semigroup_target if self.at_once else self.semigroup_target_by_rows
                targets.append((index, part, make(y[part], flow_map.Times(*(x[part] for x in times)), some, seen[part], of)))
        if split == len(order) and batch.peers > 1:
            self.keep_company(batch, y, times)
        hidden = self.network(y, times.s, times.t, lengths, seen, documents)
        parts, observed = [], torch.zeros(2, 2, dtype=torch.float64)
        while targets:
            index, part, target = targets.pop(0)  # with its chunk, which is not kept beside the next one's
            read = self.network.read(hidden[part], y[part], times.s[part])
            weight = batch.weight.view(batch.ids.shape)[order[part]].flatten()
            whole = 1 if index == 0 or self.at_once else y.shape[1]
            loss, divergences = losses.divergence(self.network.head(), read, target, weight, self.reweight(), whole)
            parts.append(loss)
            observed[index, 0] = (divergences.double() * weight.double()).sum().item()
            observed[index, 1] = weight.double().sum().item()
        return torch.stack(parts).sum(), observed

    @torch.no_grad()
    def keep_company(self, batch: Batch, y: Tensor, times: flow_map.Times) -> None:
        """The two passes of a semigroup target, whose results nobody wants, where a peer has rows with s < t and makes them."""
        if any(bool((self.kinds(batch, peer) != DIAGONAL).any()) for peer in range(1, batch.peers)):
            for _ in range(2):
                self.network(y[:1], times.s[:1], times.t[:1])

    def reweight(self) -> Any:
        distill = self.config.distill
        if distill.weighting == "none":
            return None
        return partial(flow_map.adaptive_weight, power=distill.adaptive_power, constant=distill.adaptive_constant)

    @torch.no_grad()
    def diagonal_target(
        self, y: Tensor, times: flow_map.Times, lengths: Tensor | None, seen: Seen, documents: Tensor | None
    ) -> Callable[[slice], Tensor]:
        """The frozen teacher's posterior at (y, s), by chunks of tokens."""
        hidden, psi = self.teacher.settled(y, times.s, lengths, documents, seen), heads.probabilities(self.teacher.head())
        read = self.teacher.read(hidden, y, times.s)
        return lambda tokens: psi(read[tokens])

    @torch.no_grad()
    def semigroup_target(
        self, y: Tensor, times: flow_map.Times, lengths: Tensor | None, seen: Seen, documents: Tensor | None
    ) -> Callable[[slice], Tensor]:
        """The identity's right side from the live network, by chunks of tokens. `seen` is what y says at s.

        Two passes of the network, whatever the number of rows. Hidden states at s and at u are kept, posteriors are too large for that:
        those at s are taken twice, for the state at u that they lead to, and for the mixture.
        """
        (s, u, t), path, network, head = times, self.parts.path, self.network, self.network.head().frozen()
        at_s = network.read(network(y, s, u, lengths, seen, documents), y, s)
        midway = transport(path, y, s, u, heads.expectation(head, at_s).view(y.shape))
        at_u = network.read(network(midway, u, t, lengths, documents=documents), midway, u)
        from_s, from_u = heads.probabilities(head), heads.probabilities(head)
        share = self.share(times, y)
        return lambda tokens: from_u(at_u[tokens]).lerp_(from_s(at_s[tokens]), share[tokens])

    def semigroup_target_by_rows(
        self, y: Tensor, times: flow_map.Times, lengths: Tensor | None, seen: Seen, documents: Tensor | None
    ) -> Callable[[slice], Tensor]:
        """The same by chunks of whole rows, and two passes for each: psi_{s,u} is followed to the next state and mixed with psi_{u,t} there
        while it is at hand, and nothing is computed twice."""
        length, path, network = y.shape[1], self.parts.path, self.network
        first, second = heads.probabilities(network.head()), heads.probabilities(network.head())

        @torch.no_grad()
        def target(tokens: slice) -> Tensor:
            rows = slice(tokens.start // length, tokens.stop // length)
            (s, u, t), (some, of) = (x[rows] for x in times), (None if x is None else x[rows] for x in (lengths, documents))
            from_s = first(network.read(network(y[rows], s, u, some, seen[rows], of), y[rows], s))
            midway = transport(path, y[rows], s, u, mean(self.parts.code, from_s).view(y[rows].shape))
            from_u = second(network.read(network(midway, u, t, some, documents=of), midway, u))
            return from_u.lerp_(from_s, self.share(flow_map.Times(s, u, t), y[rows]))

        return target

    def share(self, times: flow_map.Times, y: Tensor) -> Tensor:
        """a of the identity, (B L, 1) of tokens."""
        share = flow_map.semigroup_share(self.parts.path, *times).to(y.dtype)
        return (share if share.ndim == 2 else share[:, None].expand(y.shape[:2])).reshape(-1, 1)

    def learn(self, observed: Tensor, step: int) -> dict[str, float]:
        """The step's divergences from its targets without weights, nats a token, of rows with s = t and of those with s < t."""
        names = ("diagonal_divergence", "semigroup_divergence")
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
