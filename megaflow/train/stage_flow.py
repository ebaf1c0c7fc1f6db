"""Stage 1: a denoiser by one of the objectives of flow/objective.py, its times drawn by a clock that follows what it scores."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.config.schema import Config
from megaflow.flow import choice, losses
from megaflow.flow import clock as clocks
from megaflow.flow import head as heads
from megaflow.flow import profile as profiles
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup, noise_through
from megaflow.flow.context import told
from megaflow.flow.head import Read
from megaflow.flow.interpolant import log_snr, noisy_state, time_of
from megaflow.flow.likelihood import NoBound
from megaflow.flow.objective import OBJECTIVES, Objective, Setting, measures_error
from megaflow.flow.profile import CROSS_ENTROPY, ERROR, Profile, bin_of
from megaflow.flow.weighting import WEIGHTINGS, Known, Weighting
from megaflow.model.parts import Parts, fit_clock, resolving_range
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import random
from megaflow.train.stage import Batch, Total, alone, cells, noise, validation_bound


class FlowStage:
    """See stage.Stage. The clock is refitted every flow.clock.refit_every steps from the profile, which is part of the state.

    profile: `initial_profile` of the whole parts; None where `restore` brings another before anything is asked for.
    """

    profile: Profile
    clock: Clock

    def __init__(self, config: Config, network: TextDiT, parts: Parts, profile: Profile | None) -> None:
        self.config, self.network, self.parts = config, network, parts
        self.objective: Objective = choice.call(OBJECTIVES, config.flow.objective)
        self.measures_error = measures_error(config.flow.objective, config.flow.clock.name)
        if profile is not None:
            if not self.measures_error:
                profile.total[ERROR:] = 0.0  # the channel's own would stay, and be taken for the network's
            self.profile, self.clock = profile, fit_clock(config.flow.clock, parts, profile)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        seed, device, path = self.config.run.seed, batch.ids.device, self.parts.path
        code = self.network.refresh()
        t = self.objective.times(self.setting, self.draws(batch))
        s = told(t.to(device), batch.given)
        y = noisy_state(path, lookup(code, batch.ids), noise_through(code, noise(seed, batch, self.parts)), s)
        said = self.said_before(y, s, batch)
        hidden = self.network(y, s, lengths=batch.lengths, documents=batch.documents, said=said)
        loss, terms = self.scored(self.network.read(hidden, y, s), t, batch)
        return loss, self.observe(t, terms, batch)

    def draws(self, batch: Batch) -> Tensor:
        """Low-discrepancy draws in [0, 1) that times are made of: of rows (B,), or of tokens (B, L), of each row one in each of L parts."""
        seed, rows = self.config.run.seed, cells(self.config.run.seed, batch, "time")
        if self.config.flow.times == "rows":
            return rows
        length = batch.ids.shape[1]
        orders = [random.permutation(length, seed, "token times", batch.step, place) for place in batch.places.tolist()]
        return clocks.stratified(torch.stack(orders), length, 0.0) + rows[:, None] / length

    @torch.no_grad()
    def said_before(self, y: Tensor, t: Tensor, batch: Batch) -> Tensor | None:
        """What a first pass says (B, L, d_c) of a share of the rows, an exact count of the global batch, and zero of the others; None of a
        network that recalls nothing. Processes make the pass together, with one row at least."""
        share = self.config.flow.self_conditioning
        if not share:
            return None
        card = random.permutation(batch.rows, self.config.run.seed, "told", batch.step)[batch.places % batch.rows]
        told = card < round(share * batch.rows)
        some = torch.nonzero(told)[:, 0].to(y.device) if told.any() else torch.zeros(1, dtype=torch.int64, device=y.device)
        few, s = y[some], t[some]
        lengths, documents = (None if x is None else x[some] for x in (batch.lengths, batch.documents))
        first = self.network(few, s, lengths=lengths, documents=documents)
        mean = heads.expectation(self.network.head(), self.network.read(first, few, s)).view(few.shape)
        return torch.zeros_like(y).index_copy(0, some, mean * told.any())

    def scored(self, read: Read, t: Tensor, batch: Batch, uncertainty: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The objective's loss with its weights at times (B,) or (B, L), and of every token its cross-entropy and, where it is measured,
        its squared error: (n, 1) or (n, 2), without weights. uncertainty: what the network says at these times, if it is known already."""
        head, ids, shape = self.network.head(), batch.ids.flatten(), batch.ids.shape
        weighting: Weighting = choice.call(WEIGHTINGS, self.config.flow.weighting, self.known(t))
        worth = self.objective.weights(self.setting, t)
        if self.measures_error and not self.objective.squared:
            worth = F.pad(worth, (0, 1))
        if weighting.time is not None:
            worth = worth * weighting.time[..., None]
        worth = worth.to(batch.weight)
        if not weighting.learned:
            uncertainty = torch.zeros_like(worth[..., 0])
        else:
            uncertainty = (self.network.uncertainty_at(t.to(ids.device)) if uncertainty is None else uncertainty).float()
        if t.ndim == 1:  # of every token what its row has
            worth, uncertainty = worth[:, None], uncertainty[:, None]
        factor = batch.weight.view(*shape, 1) * (torch.exp(-uncertainty.detach())[..., None] * worth)
        factors = [x.flatten() for x in factor.unbind(2)]
        if len(factors) == 1:
            loss, nll = losses.cross_entropy(head, read, ids, factors[0], weighting.distance)
            terms = nll[:, None]
        else:
            loss, terms = losses.denoising_loss(head, read, ids, factors[0], factors[1], weighting.distance)
        if weighting.learned:  # exp(-w) loss + w, of which the gradient by the network is there, and that by w is not
            plain = (terms.view(*shape, -1) * worth).sum(2)
            eased = torch.exp(-uncertainty)
            loss = loss + (batch.weight.view(shape) * ((eased - eased.detach()) * plain + uncertainty)).sum()
        return loss, terms

    def known(self, t: Tensor) -> Known:
        """What weights may depend on, at these times: the objective's mean in each bin of the profile, with its weight in the middle."""
        level, edges = log_snr(self.parts.path, t), self.profile.edges
        made_of = [self.profile.mean(which) for which in (CROSS_ENTROPY, ERROR)[: 1 + self.objective.squared]]
        middle = time_of(self.parts.path, self.profile.centres)
        scores = (torch.stack(made_of, -1) * self.objective.weights(self.setting, middle)).sum(-1)
        return Known(level, scores[bin_of(edges, level)], scores.mean().item())

    @property
    def setting(self) -> Setting:
        return Setting(self.parts.path, self.clock, self.parts.span.low, self.parts.span.high)

    def observe(self, t: Tensor, terms: Tensor, batch: Batch) -> Tensor:
        """(4, K) fp64: what the profile takes in of each bin of log-SNR, and its share of tokens, as shares of the global batch; by rows,
        or by tokens where those have times."""
        row = bin_of(self.profile.edges, log_snr(self.parts.path, t)).flatten()
        weight = batch.weight.view(len(row), -1).double().cpu()
        sums, tokens = (terms.view(*weight.shape, -1).double().cpu() * weight[..., None]).sum(1), weight.sum(1)
        error = sums[:, 1] if sums.shape[1] == 2 else torch.zeros_like(tokens)
        values = torch.stack([sums[:, 0], error, error**2 / tokens.clamp(min=1e-300), tokens])
        return torch.zeros(4, len(self.profile.weight), dtype=torch.float64).index_add_(1, row, values)

    def learn(self, observed: Tensor, step: int) -> dict[str, float]:
        """Besides the clock: the step's cross-entropy, nats a token, where its loss is another."""
        flow = self.config.flow
        self.profile.observe(observed[:3], observed[3], flow.clock.memory)
        if (step + 1) % flow.clock.refit_every == 0:
            self.clock = fit_clock(flow.clock, self.parts, self.profile)
        plain = flow.objective == "cross_entropy" and flow.weighting == "none"
        return {} if plain else {"cross_entropy": observed[0].sum().item()}

    @torch.no_grad()
    def validate(self, batch: Batch, total: Total = alone) -> dict[str, float]:
        try:
            found = validation_bound(self.config, self.network, self.present(), self.clock, batch, total)
        except NoBound:
            return {"validation_loss": self.plain_cross_entropy(batch, total)}
        return {"validation_loss": found.mean, "validation_standard_error": found.standard_error}

    def present(self) -> Parts:
        """The fixed parts with the code that the network's weights are at present."""
        code = self.network.refresh()
        if self.network.trained_code is None:
            return self.parts
        return replace(self.parts, code=code, reach=resolving_range(code, self.parts.log_prior, self.config.run.seed, self.parts.law))

    @torch.no_grad()
    def plain_cross_entropy(self, batch: Batch, total: Total) -> float:
        """Cross-entropy at times uniform in log-SNR: what is shown for networks that have no bound."""
        ids, path, counted = batch.ids, self.parts.path, (batch.weight > 0.0).double()
        flat = clocks.uniform_log_snr(path, self.parts.span.low, self.parts.span.high)
        t = told(clocks.inverse(flat, clocks.stratified(batch.places, batch.rows, 0.5)).to(ids.device), batch.given)
        y = noisy_state(path, lookup(self.network.refresh(), ids), noise(self.config.run.seed, batch, self.parts), t)
        hidden = self.network.settled(y, t, batch.lengths, batch.documents)
        nll, _ = heads.denoising_error(self.network.head(), self.network.read(hidden, y, t), ids.flatten())
        sums = total(torch.stack([(nll.double() * counted).sum(), counted.sum()]))
        return (sums[0] / sums[1]).item()

    def state(self) -> dict[str, Tensor]:
        return profiles.state(self.profile) | {"clock_times": self.clock.times, "clock_tau": self.clock.tau}

    def restore(self, state: dict[str, Tensor]) -> None:
        found = profiles.kept(state)
        assert found is not None
        self.profile, self.clock = found, Clock(state["clock_times"], state["clock_tau"])

    def describe(self) -> dict[str, Any]:
        code, span = self.parts.code, self.parts.span
        return {
            "state": f"{self.config.flow.code} code, {code.dim} dimensions for {code.vocab} tokens",
            "range": f"log-SNR {span.low:.2f} to {span.high:.2f}",
            "clock": self.config.flow.clock.name,
        }
