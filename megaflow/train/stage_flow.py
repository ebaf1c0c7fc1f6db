"""Stage 1: a denoiser by cross-entropy (VFM), its times drawn by a clock that follows its own cross-entropy."""

from typing import Any

import torch
from torch import Tensor

from megaflow.config.schema import Config
from megaflow.flow import clock as clocks
from megaflow.flow import head as heads
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup
from megaflow.flow.interpolant import noisy_state
from megaflow.flow.likelihood import RangeTooShort
from megaflow.model.parts import Parts, Profile, fit_clock
from megaflow.model.text_dit import TextDiT
from megaflow.train.stage import Batch, Total, alone, cells, noise, validation_bound


class FlowStage:
    """See stage.Stage. The clock is refitted every flow.clock.refit_every steps from the profile, which is part of the state.

    profile: `initial_profile` of the whole parts; None where `restore` brings another before anything is asked for.
    """

    profile: Profile
    clock: Clock

    def __init__(self, config: Config, network: TextDiT, parts: Parts, profile: Profile | None) -> None:
        self.config, self.network, self.parts = config, network, parts
        if profile is not None:
            self.profile, self.clock = profile, fit_clock(config.flow.clock, parts, profile)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        seed, device = self.config.run.seed, batch.ids.device
        t = clocks.inverse(self.clock, cells(seed, batch, "time")).to(device)
        y = noisy_state(self.parts.path, lookup(self.parts.code, batch.ids), noise(seed, batch, self.parts.code, device), t)
        hidden = self.network(y, t, lengths=batch.lengths, documents=batch.documents)
        loss, nll = heads.cross_entropy(self.network.head(), self.network.read(hidden, y, t), batch.ids.flatten(), batch.weight)
        return loss, self.observe(t, nll, batch)

    def observe(self, t: Tensor, nll: Tensor, batch: Batch) -> Tensor:
        """(2, K) fp64: cross-entropy and token share of each bin of log-SNR, as shares of the global batch."""
        bins = len(self.profile.total)
        row = clocks.bin_of(self.parts.path, self.profile.edges, t.cpu())
        weight = batch.weight.view(batch.ids.shape).double().cpu()
        observed = torch.zeros(2, bins, dtype=torch.float64)
        observed[0].index_add_(0, row, (nll.view(batch.ids.shape).double().cpu() * weight).sum(1))
        observed[1].index_add_(0, row, weight.sum(1))
        return observed

    def learn(self, observed: Tensor, step: int) -> dict[str, float]:
        clock = self.config.flow.clock
        self.profile.observe(observed[0], observed[1], clock.memory)
        if clock.name == "ce_linear" and (step + 1) % clock.refit_every == 0:
            self.clock = fit_clock(clock, self.parts, self.profile)
        return {}

    def validate(self, batch: Batch, total: Total = alone) -> dict[str, float]:
        try:
            found = validation_bound(self.config, self.network, self.parts, self.clock, batch, total)
        except RangeTooShort:
            return {"validation_loss": self.plain_cross_entropy(batch, total)}
        return {"validation_loss": found.mean, "validation_standard_error": found.standard_error}

    @torch.no_grad()
    def plain_cross_entropy(self, batch: Batch, total: Total) -> float:
        """Cross-entropy at times uniform in log-SNR: what is shown for networks that have no bound."""
        ids, path, counted = batch.ids, self.parts.path, (batch.weight > 0.0).double()
        flat = clocks.uniform_log_snr(path, self.parts.span.low, self.parts.span.high)
        t = clocks.inverse(flat, clocks.stratified(batch.places, batch.rows, 0.5)).to(ids.device)
        y = noisy_state(path, lookup(self.parts.code, ids), noise(self.config.run.seed, batch, self.parts.code, ids.device), t)
        hidden = self.network(y, t, lengths=batch.lengths, documents=batch.documents)
        nll, _ = heads.denoising_error(self.network.head(), self.network.read(hidden, y, t), ids.flatten())
        sums = total(torch.stack([(nll.double() * counted).sum(), counted.sum()]))
        return (sums[0] / sums[1]).item()

    def state(self) -> dict[str, Tensor]:
        return {
            "profile_total": self.profile.total,
            "profile_weight": self.profile.weight,
            "profile_edges": self.profile.edges,
            "clock_times": self.clock.times,
            "clock_tau": self.clock.tau,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.profile = Profile(state["profile_edges"], state["profile_total"], state["profile_weight"])
        self.clock = Clock(state["clock_times"], state["clock_tau"])

    def describe(self) -> dict[str, Any]:
        code, span = self.parts.code, self.parts.span
        return {
            "state": f"{self.config.flow.code} code, {code.dim} dimensions for {code.vocab} tokens",
            "range": f"log-SNR {span.low:.2f} to {span.high:.2f}",
            "clock": self.config.flow.clock.name,
        }
