"""Flows and flow maps for plain transformers."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from .modeling_megaflow import (
    CONDITION,
    MegaFlowConfig,
    MegaFlowModel,
    Path,
    Reading,
    TimeEmbedding,
    Trunk,
    draw,
    real,
    source,
    uniform,
    windows,
)

CHUNK = 2**21  # logits that are held at once
CANDIDATES = 32


class FlowModel(MegaFlowModel):
    """A denoiser psi_{s,s} of noisy states, or a flow map's psi_{s,t}.

    With c = beta / alpha^2 the noisy state y of a token says log p(k) = log prior_k + c C_k . y - (c beta / 2) |C_k|^2: its belief, which
    is embedded, and which the logits have as a summand of their own where the network was trained with a skip.
    """

    def __init__(self, config: MegaFlowConfig) -> None:
        super().__init__(config)
        d, window, dim = config.hidden_size, 2 * config.neighbors + 1, config.code_dim
        self.path = Path(**config.path)
        reads, timed = config.reads, config.timed
        belief = "belief" in reads
        self.table = nn.Parameter(torch.empty(config.vocab_size, config.belief_dim)) if belief and config.own_table else None
        self.widen = Reading(window * config.belief_dim, d) if belief else None
        self.state = Reading(dim, d) if "linear" in reads else None
        self.recall = Reading(dim, d) if config.recalls else None
        self.map_state = Reading(window * dim, d) if config.map_reads == "linear" else None
        self.map_widen = Reading(window * config.belief_dim, d) if config.map_reads == "hot_belief" else None
        self.time = TimeEmbedding(self.path, config.span) if timed or config.time_tokens else None
        self.time_tokens = nn.Linear(CONDITION, config.time_tokens * d) if config.time_tokens else None
        self.registers = nn.Parameter(torch.empty(config.registers, d)) if config.registers else None
        self.map_time = TimeEmbedding(self.path, config.span) if config.map_reads else None
        self.trunk = Trunk(config, timed)
        self.whole = False
        self.post_init()

    @property
    def is_map(self) -> bool:
        return self.config.kind == "flow_map"

    def forward(
        self,
        state: Tensor,
        start: Tensor,
        end: Tensor | None = None,
        lengths: Tensor | None = None,
        said: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> CausalLMOutput:
        """Logits (B, L, V) of psi at states (B, L, code_dim) with times start, 0 to 1, (B,) or (B, L), fp64, and of a flow map ends,
        None for the diagonal. lengths: (B,) positions that there are; said: (B, L, code_dim) what an earlier pass said, of networks that
        recall; documents: (B, L) which one each token is of, of a network that was trained on documents apart."""
        start, end = start.double(), None if end is None else end.double()
        hidden = self.hidden(state, start, end, lengths, said, documents).flatten(0, 1)
        logits = self.logits(hidden, state.flatten(0, 1), self.of_tokens(self.path.level(start), state))
        return CausalLMOutput(logits=logits.unflatten(0, state.shape[:2]))

    def hidden(
        self, y: Tensor, s: Tensor, t: Tensor | None, lengths: Tensor | None, said: Tensor | None, documents: Tensor | None = None
    ) -> Tensor:
        n, entering, config = self.config.neighbors, [], self.config
        level = self.path.level(s)
        if self.widen is not None:
            entering.append(self.widen(windows(self.believed(y, level), n, n, lengths, documents)))
        if self.state is not None:
            entering.append(self.state(self.sized(y, s)))
        if self.recall is not None and said is not None:
            entering.append(self.recall(said * math.sqrt(config.code_dim / config.mean_leverage)))
        told = None if self.time is None else self.time(s)
        if told is not None and self.map_time is not None:
            told = told + self.map_time(s if t is None else t)
        if t is not None and (self.map_state is not None or self.map_widen is not None):
            if self.map_state is not None:
                ahead = self.map_state(windows(self.sized(y, s), n, n, lengths, documents))
            else:
                gain = 3.0 / math.sqrt(config.mean_leverage)
                blunt = (t > s) & (level[..., 0] < gain)
                sharper = torch.stack([torch.full_like(s, gain), gain * self.path.beta(s)], -1)
                ahead = self.map_widen(windows(self.believed(y, torch.where(blunt[..., None], sharper, level)), n, n, lengths, documents))
            share = self.path.move(s, t)[1].to(ahead.dtype)
            entering.append(share.reshape(share.shape + (1,) * (3 - share.ndim)) * ahead)
        told = None if told is None else F.silu(told)
        extra = [] if self.time_tokens is None else [self.time_tokens(told).unflatten(1, (-1, config.hidden_size))]
        extra += [] if self.registers is None else [self.registers.expand(len(y), -1, -1)]
        x = sum(entering[1:], entering[0])
        beside = torch.cat(extra, 1).to(x.dtype) if extra else None
        return self.trunk(x, told if config.timed else None, lengths=lengths, extra=beside, documents=documents)

    def of_tokens(self, level: Tensor, y: Tensor) -> Tensor:
        """(B L, 2) what the channel is read by, in fp32, from levels of rows or tokens."""
        return (level if level.ndim == 3 else level[:, None].expand(*y.shape[:2], 2)).flatten(0, 1).to(self.fixed.log_prior.dtype)

    def evidence(self, y: Tensor, level: Tensor, bias: Tensor) -> Tensor:
        """(n, V) in fp32: what noisy states (n, code_dim) say of their tokens, and a bias."""
        strength, signal = level.chunk(2, 1)
        y, bias = y.to(level.dtype), bias.to(level.dtype)
        if "code" not in self.config.fixed:  # one-hot: every code has the norm 1
            return bias + y * strength
        return bias + (strength * y) @ self.fixed.code.T - 0.5 * signal * self.fixed.leverage

    def believed(self, y: Tensor, level: Tensor) -> Tensor:
        """(B, L, belief_dim): the table's mean under the belief at levels of rows or tokens, a part of the tokens after the other."""
        table = self.embedding()
        parts = [
            torch.softmax(self.evidence(some, at, self.fixed.log_prior), -1).to(table.dtype) @ table
            for some, at in zip(*self.parts(y.flatten(0, 1), self.of_tokens(level, y)), strict=True)
        ]
        return torch.cat(parts).unflatten(0, y.shape[:2]) * self.table_scale

    def sized(self, y: Tensor, s: Tensor) -> Tensor:
        """A state at size one, and that of a learned code in its weights' coordinates."""
        config, alpha, beta = self.config, self.path.alpha(s), self.path.beta(s)
        square = beta**2 * config.mean_leverage + alpha**2 * config.noise_square + 2.0 * alpha * beta * config.noise_overlap
        scale = (square / config.code_dim).rsqrt().to(self.fixed.log_prior.dtype)
        y = y * scale.reshape(scale.shape + (1,) * (3 - scale.ndim))
        return y @ self.fixed.mixing if "mixing" in config.fixed else y

    def logits(self, hidden: Tensor, y: Tensor, level: Tensor) -> Tensor:
        """(n, V) in fp32."""
        if not self.config.skip:
            return F.linear(hidden, self.weight).float() + self.bias.float()
        return self.evidence(y, level, self.bias) + F.linear(hidden, self.weight).float()

    def parts(self, *of_tokens: Tensor) -> list[tuple[Tensor, ...]]:
        """Tensors of (n, …) tokens cut into as many tokens as a part of all logits has, or whole."""
        if self.whole:
            return [(x,) for x in of_tokens]
        return [x.split(max(1, CHUNK // self.config.vocab_size)) for x in of_tokens]

    def mean(self, p: Tensor) -> Tensor:
        """p C of probabilities (n, V), in the state's dimensions."""
        return p @ self.fixed.code if "code" in self.config.fixed else p

    def codes(self, ids: Tensor) -> Tensor:
        if "code" not in self.config.fixed:
            return F.one_hot(ids, self.config.vocab_size).to(self.fixed.log_prior.dtype)
        return self.fixed.code[ids]

    # -- generation

    def settings(
        self,
        num_steps: int | None,
        given: bool,
        method: str | None = None,
        gamma: float | None = None,
        last: float | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        if others:
            raise ValueError(f"generate takes num_steps, method, gamma and last, and no {', '.join(others)}")
        steps = num_steps or (1 if self.is_map else 64)
        method = method or ("stochastic" if gamma is not None else "flow_map" if self.is_map else "ode")
        if method not in ("ode", "flow_map", "stochastic", "ancestral"):
            raise ValueError(f"method must be ode, flow_map, stochastic or ancestral, not {method!r}")
        if method == "flow_map" and not self.is_map:
            raise ValueError("this is a flow and no flow map: use method ode, stochastic or ancestral")
        if method in ("stochastic", "ancestral") and self.config.prior["law"] != "gaussian":
            raise ValueError(f"method {method} adds Gaussian noise, and this flow starts from another: use ode or flow_map")
        gamma, last = (None if x is None else real(x, name) for x, name in ((gamma, "gamma"), (last, "last")))
        if gamma is not None and (method != "stochastic" or not 0.0 <= gamma <= 1.0):
            raise ValueError("gamma is a number from 0 to 1 of method stochastic")
        if last is not None and not 0.0 < last < 1.0:
            raise ValueError(f"last is a share of the clock between 0 and 1, not {last}")
        if last is not None and steps == 1:
            raise ValueError("with one step there is no other for the last one to differ from: use num_steps=2 or more")
        if method == "stochastic" and gamma is None:
            gamma = 0.75
        if method == "flow_map" and steps > 1 and last is None:
            last = 0.5  # more steps refine the way to the middle of the clock
        balanced = self.is_map and steps == 1 and method in ("flow_map", "stochastic") and not given
        if balanced and "balance" not in self.config.fixed:
            raise ValueError("this map has no balance for one-step text, it was larger than memory when it was converted: use num_steps=2")
        return {"steps": steps, "method": method, "gamma": gamma, "last": last, "balanced": balanced}

    def grid(self, steps: int, last: float | None) -> Tensor:
        """(steps + 1,) times from 0 to 1, even on the clock that training was fitted to but for the last step."""
        times, shown = (torch.tensor(x, dtype=torch.float64) for x in self.config.clock)
        tau = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
        if last is not None and steps > 1:
            tau[:-1] *= (1.0 - last) / tau[-2].item()
        right = torch.searchsorted(shown, tau, right=True).clamp(1, len(shown) - 1)
        t0, t1, f0, f1 = times[right - 1], times[right], shown[right - 1], shown[right]
        share = torch.where(f1 > f0, (tau - f0) / (f1 - f0), 1.0)
        found = t0 + (t1 - t0) * share.clamp(0.0, 1.0)
        found[0], found[-1] = 0.0, 1.0
        return found

    def noise(self, places: list[int], seed: int, purpose: str) -> Tensor:
        """(B, L, code_dim) where the path begins, each row a function of its place."""
        length, dim, prior = self.config.max_position_embeddings, self.config.code_dim, self.config.prior
        sources = [source(seed, purpose, place) for place in places]
        if prior["law"] == "gaussian":
            return self.path.scale * torch.stack([torch.randn(length, dim, generator=each) for each in sources]).to(self.device)
        if prior["law"] == "vertices":
            law = torch.softmax(self.fixed.log_prior.cpu().double() / (prior["temperature"] or math.inf), 0)
            return self.codes(torch.stack([torch.multinomial(law, length, replacement=True, generator=x) for x in sources]).to(self.device))
        return torch.stack([self.simplex(length, 1.0 / prior["temperature"], each) for each in sources])

    def simplex(self, length: int, concentration: float, draws: torch.Generator) -> Tensor:
        """(L, code_dim) of Dirichlet draws over the vocabulary, in logarithms."""
        vocab = self.config.vocab_size
        other, rows = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=draws))), []
        for some in torch.empty(length).split(max(CHUNK // vocab, 1)):
            full = torch.full((len(some), vocab), concentration + 1.0, dtype=torch.float64)
            above = torch._standard_gamma(full, generator=draws)
            waiting = torch.empty_like(full).exponential_(generator=other)
            p = torch.softmax(above.log() - (waiting - waiting.amin(1, keepdim=True)) / concentration, 1).to(self.fixed.log_prior)
            rows.append(self.mean(p))
        return torch.cat(rows)

    def write(
        self,
        places: list[int],
        lengths: Tensor | None,
        template: tuple[Tensor, Tensor] | None,
        temperature: float,
        seed: int,
        steps: int,
        method: str,
        gamma: float | None,
        last: float | None,
        balanced: bool,
    ) -> tuple[Tensor, Tensor | None]:
        known, given = template or (None, None)
        offsets = self.fixed.balance if balanced else None
        times, path, said = self.grid(steps, last), self.path, None
        clean = None if known is None else self.codes(known)
        y = self.noise(places, seed, "initial noise")
        walk, snr = 0.0 * y, 0.0

        def fresh(step: int) -> Tensor:
            return torch.stack([torch.randn(y.shape[1:], generator=source(seed, "sampler noise", step, place)) for place in places]).to(y)

        for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
            beyond = t
            if method == "stochastic" and gamma == 1.0:
                beyond = torch.ones_like(t)
            elif method == "stochastic" and gamma:
                beyond = path.time(path.log_snr(t) - math.log1p(-(gamma**2)))
            ahead = beyond if self.is_map and method in ("flow_map", "stochastic") else s
            chance = None
            if method == "ancestral":
                chance = torch.stack([uniform(y.shape[1], seed, "token draws", step, place) for place in places]).flatten().to(y.device)
            if clean is not None:
                y = torch.where(given[..., None], clean, y)
            start, end = (self.told(x, y, given) for x in (s, ahead))
            mean, tokens = self.posterior(y, start, end if self.is_map else None, lengths, said, temperature, chance, offsets)
            said = mean if self.recall is not None else None
            if clean is not None:
                mean, tokens = torch.where(given[..., None], clean, mean), torch.where(given, known, tokens)
            if method == "ancestral" and t < 1.0:
                alpha, beta = path.alpha(t).item(), path.beta(t).item()
                gain = (beta / alpha) ** 2 - snr
                walk = walk + gain * self.codes(tokens) + math.sqrt(gain) * fresh(step)
                snr += gain
                y = walk * (alpha**2 / beta)
            elif method != "ancestral" and t < 1.0:
                kept, gained = (x.item() for x in path.move(s, beyond))
                y = kept * y + gained * mean
                if method == "stochastic":
                    y = (path.beta(t) / path.beta(beyond)).item() * y + gamma * path.alpha(t).item() * fresh(step)
        return tokens, lengths

    def told(self, time: Tensor, y: Tensor, given: Tensor | None) -> Tensor:
        """The time as the network is told it: 1 of tokens that are given."""
        times = time.expand(len(y)).to(y.device)
        return times if given is None else torch.where(given, 1.0, times[:, None])

    def posterior(
        self,
        y: Tensor,
        start: Tensor,
        end: Tensor | None,
        lengths: Tensor | None,
        said: Tensor | None,
        temperature: float,
        chance: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean of psi in the state's dimensions (B, L, code_dim) and tokens (B, L), the likeliest or drawn, a part of the tokens after the
        other."""
        means, tokens, done = [], [], 0
        for logits in self.all_logits(y, start, end, lengths, said):
            means.append(self.mean(torch.softmax(logits / temperature, -1)))
            if chance is not None:
                tokens.append(draw(logits, chance[done : done + len(logits)], temperature))
                done += len(logits)
            elif offsets is not None:
                tokens.append(choose(*logits.topk(min(CANDIDATES, logits.shape[-1])), offsets))
            else:
                tokens.append(logits.argmax(-1))
        return torch.cat(means).view(y.shape), torch.cat(tokens).view(y.shape[:2])

    def all_logits(
        self, y: Tensor, start: Tensor, end: Tensor | None, lengths: Tensor | None, said: Tensor | None = None
    ) -> Iterator[Tensor]:
        """(n, V), of a part of the tokens after the other."""
        hidden, level = self.hidden(y, start, end, lengths, said).flatten(0, 1), self.of_tokens(self.path.level(start), y)
        for some in zip(*self.parts(hidden, y.flatten(0, 1), level), strict=True):
            yield self.logits(*some)


def choose(logits: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The tokens (n,) that positions take among their candidates (n, K)."""
    return ids.gather(1, (logits + offsets[ids]).argmax(-1, keepdim=True))[:, 0]
