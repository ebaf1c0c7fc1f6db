"""A network that MegaFlow has trained, for plain transformers: needs torch and transformers, and nothing of MegaFlow.

    flow, flow_map     FlowModel: a state and its time -> logits of every position's token; text in as many steps as asked for
    autoregressive     CausalModel: tokens -> logits of the next one
    masked, uniform    DiscreteModel: tokens, some hidden or replaced, and their time -> logits

`generate` writes the texts that `megaflow sample` writes from the same seed. Times go from 0, noise, to 1, text.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

CONDITION, FREQUENCIES = 128, 16
CHUNK = 2**21  # logits that are held at once
LAST_LOG_SNR = 2.0 * math.log(9999.0)
CANDIDATES, ROUNDS, BALANCE_TOKENS = 32, 100, 2**14
BATCH = 64


class MegaFlowConfig(PretrainedConfig):
    """kind: one of those above. Sizes have the names that transformers gives them; the rest is what `megaflow convert` has written."""

    model_type = "megaflow"

    def __init__(self, kind: str = "flow", **fields: Any) -> None:
        super().__init__(**{"tie_word_embeddings": False, **fields})
        self.kind = kind


@dataclass
class Texts(ModelOutput):
    """sequences: (B, L) tokens; lengths: (B,) how many of each row are text, the rest is filled up."""

    sequences: Tensor | None = None
    lengths: Tensor | None = None


# ---- draws: functions of a seed, what they are for and their place, never of a shared stream


def source(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    digest = hashlib.blake2b(repr((seed, purpose, *numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(shape: Any, seed: int, purpose: str, *numbers: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=source(seed, purpose, *numbers), dtype=dtype)


# ---- the path from noise to text: y_t = alpha noise + beta code(token)


class Path:
    """alpha, beta of times in fp64, and the time of log odds log(beta / alpha)."""

    def __init__(self, name: str = "linear", scale: float = 1.0, **options: float) -> None:
        self.name, self.scale, self.options = name, scale, options

    def alpha(self, t: Tensor) -> Tensor:
        return self.scale * self._alpha(t)

    def _alpha(self, t: Tensor) -> Tensor:
        if self.name == "trigonometric":
            return torch.sin(math.pi / 2.0 * (1.0 - t))
        if self.name == "variance_preserving":
            gone = self.lost(t).clamp(max=1.0)
            return (gone * (2.0 - gone)).sqrt()
        return 0.0 - torch.expm1(self.options["exponent"] * torch.log(t)) if self.name == "power" else 1.0 - t

    def beta(self, t: Tensor) -> Tensor:
        if self.name == "trigonometric":
            return torch.sin(math.pi / 2.0 * t)
        if self.name == "variance_preserving":
            return (1.0 - self.lost(t)).clamp(min=0.0)
        return t ** self.options["exponent"] if self.name == "power" else t

    @property
    def rates(self) -> tuple[float, float, float]:
        square, slope = (self.options["last"] - self.options["first"]) / 4.0, self.options["first"] / 2.0
        return square, slope, math.exp(-square - slope)

    def lost(self, t: Tensor) -> Tensor:
        square, slope, left = self.rates
        return -torch.expm1(-(square * (1.0 - t) + slope) * (1.0 - t)) / (1.0 - left)

    def time(self, log_snr: Tensor) -> Tensor:
        odds = log_snr / 2.0 + math.log(self.scale)
        if self.name == "trigonometric":
            return 2.0 / math.pi * torch.atan(odds.exp())
        if self.name == "variance_preserving":
            square, slope, left = self.rates
            exponent = -torch.log1p(torch.expm1(-0.5 * F.softplus(-2.0 * odds)) * (1.0 - left))
            return 1.0 - 2.0 * exponent / (slope + (slope**2 + 4.0 * square * exponent).sqrt())
        return torch.sigmoid(odds) ** (1.0 / self.options["exponent"]) if self.name == "power" else torch.sigmoid(odds)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2.0 * torch.log(self.beta(t) / self.alpha(t))

    def level(self, t: Tensor) -> Tensor:
        """(…, 2) strength beta / alpha^2 of the channel at times, and the signal-to-noise ratio."""
        t = t.clamp(max=self.time(torch.full((), LAST_LOG_SNR, dtype=torch.float64, device=t.device)))
        strength = self.beta(t) / self.alpha(t) ** 2
        return torch.stack([strength, strength * self.beta(t)], -1)

    def move(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(kept, gained) of the step y <- kept y + gained psi from s to t."""
        noise = self.alpha(s)
        kept = torch.where(noise > 0.0, self.alpha(t) / torch.where(noise > 0.0, noise, 1.0), 1.0)
        return kept, self.beta(t) - kept * self.beta(s)


# ---- the trunk: pre-norm blocks with rotary positions; a condition, of rows or positions, moves the norms


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, keys: Tensor | None, cap: float) -> Tensor:
    """keys: (B, K) which may be seen. Scores are capped at cap tanh(score / cap); 0 leaves them as they are."""
    seen = None if keys is None else keys[:, None, None, :]
    if causal and q.shape[2] > 1:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    if not cap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = cap * torch.tanh(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) / cap)
    return torch.softmax(scores if seen is None else scores.masked_fill(~seen, -math.inf), -1) @ v


class Block(nn.Module):
    def __init__(self, config: MegaFlowConfig, timed: bool) -> None:
        super().__init__()
        d, inner, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
        self.heads, self.cap = config.num_attention_heads, config.softcap
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, inner), nn.Linear(inner, d)
        self.query_gain = nn.Parameter(torch.ones(head)) if config.qk_norm else None
        self.key_gain = nn.Parameter(torch.ones(head)) if config.qk_norm else None
        self.modulation = nn.Linear(CONDITION, 6 * d) if timed else None
        self.gains = None if timed else nn.Parameter(torch.ones(2, d))

    def forward(self, x: Tensor, condition: Tensor | None, angles: Any, causal: bool, keys: Tensor | None, cache: list | None) -> Tensor:
        if self.modulation is None:
            x = x + self.attention(F.layer_norm(x, x.shape[-1:], self.gains[0]), angles, causal, keys, cache)
            return x + self.mlp(F.layer_norm(x, x.shape[-1:], self.gains[1]))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        x = x + gate1 * self.attention(shift1 + F.layer_norm(x, x.shape[-1:]) * (1 + scale1), angles, causal, keys, cache)
        return x + gate2 * self.mlp(shift2 + F.layer_norm(x, x.shape[-1:]) * (1 + scale2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def attention(self, x: Tensor, angles: Any, causal: bool, keys: Tensor | None, cache: list | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.query_gain is not None:
            q, k = F.rms_norm(q, q.shape[-1:], self.query_gain), F.rms_norm(k, k.shape[-1:], self.key_gain)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(cache, (k, v), strict=True)) if cache else (k, v)
            cache[:] = [k, v]
        return self.out(attend(q, k, v, causal, keys, self.cap).transpose(1, 2).flatten(2))


class Trunk(nn.Module):
    def __init__(self, config: MegaFlowConfig, timed: bool) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.blocks = nn.ModuleList(Block(config, timed) for _ in range(config.num_hidden_layers))
        self.last_modulation = nn.Linear(CONDITION, 2 * config.hidden_size) if timed else None
        self.last_gain = None if timed else nn.Parameter(torch.ones(config.hidden_size))

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        causal: bool = False,
        lengths: Tensor | None = None,
        extra: Tensor | None = None,
        caches: list[list] | None = None,
    ) -> Tensor:
        """x: (B, L, d) after what `caches` hold; condition: (B, c) or (B, L, c); lengths: (B,) positions that may be seen; extra: (B, R, d)
        tokens beside the text. Returns (B, L, d)."""
        past = caches[0][0].shape[2] if caches and caches[0] else 0
        places = torch.arange(past, past + x.shape[1], device=x.device)
        keys = None if lengths is None else places < lengths[:, None]
        condition = condition[:, None] if condition is not None and condition.ndim == 2 else condition
        count = 0 if extra is None else extra.shape[1]
        if extra is not None:
            x, places = torch.cat([extra, x], 1), F.pad(places, (count, 0))
            keys = None if keys is None else F.pad(keys, (count, 0), value=True)
            condition = F.pad(condition, (0, 0, count, 0)) if condition is not None and condition.shape[1] > 1 else condition
        frequency = 10_000.0 ** (-torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32) / self.head_dim)
        angle = places.float()[:, None] * frequency
        angles = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, condition, angles, causal, keys, None if caches is None else caches[index])
        if self.last_modulation is None:
            return F.layer_norm(x, x.shape[-1:], self.last_gain)[:, count:]
        shift, scale = self.last_modulation(condition).chunk(2, -1)
        return (shift + F.layer_norm(x, x.shape[-1:]) * (1 + scale))[:, count:]


class TimeEmbedding(nn.Module):
    """Times to (…, CONDITION): Fourier features of the log-SNR, scaled to the range that the network was trained on."""

    def __init__(self, path: Path, span: list[float]) -> None:
        super().__init__()
        self.path, self.span = path, span
        self.first, self.second = nn.Linear(2 * FREQUENCIES, CONDITION), nn.Linear(CONDITION, CONDITION)

    def forward(self, t: Tensor) -> Tensor:
        low, high = self.span
        scaled = ((self.path.log_snr(t.double()) - low) / (high - low)).clamp(0.0, 1.0)
        angle = math.pi * scaled[..., None] * 0.5 * torch.logspace(0, 5, FREQUENCIES, base=2.0, dtype=torch.float64, device=t.device)
        features = torch.cat([angle.cos(), angle.sin()], -1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(features)))


class Reading(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight)


def windows(x: Tensor, before: int, after: int, lengths: Tensor | None = None) -> Tensor:
    """(B, L, (before + 1 + after) d): every position beside its neighbours, zeros beyond the ends of a row."""
    if lengths is not None and before + after:
        x = x * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
    padded = F.pad(x, (0, 0, before, after))
    return torch.cat([padded[:, i : i + x.shape[1]] for i in range(before + 1 + after)], -1)


# ---- what all kinds share


def draw(logits: Tensor, chance: Tensor, temperature: float) -> Tensor:
    """Tokens (n,) by inverting the distribution function of logits (n, V) at uniform draws (n,)."""
    return invert(torch.softmax(logits.double() / temperature, -1), chance)


def invert(weights: Tensor, chance: Tensor) -> Tensor:
    cumulative = weights.cumsum(-1)
    return torch.searchsorted(cumulative, chance[:, None].double() * cumulative[:, -1:], right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


class MegaFlowModel(PreTrainedModel):
    config_class = MegaFlowConfig
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected = [r"^uncertainty\.", r"^map_weights\.", r"^code_weight$"]

    def __init__(self, config: MegaFlowConfig) -> None:
        super().__init__(config)
        vocab, hidden = config.vocab_size, config.hidden_size
        self.weight, self.bias = nn.Parameter(torch.empty(vocab, hidden)), nn.Parameter(torch.empty(vocab))
        self.fixed = nn.Module()
        for name, (shape, kind) in config.fixed.items():  # no weights, but transformers keeps parameters alone in fp32
            self.fixed.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=getattr(torch, kind)), requires_grad=False))
        if config.fixed:
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = ["fixed"]
        self.table_scale = math.sqrt(hidden) / 0.1 if config.tied else 1.0

    def _init_weights(self, module: nn.Module) -> None:
        """All weights come from the files."""

    def embedding(self) -> Tensor:
        return self.weight if self.table is None else self.table

    def drawn_lengths(self, places: list[int], seed: int, least: Any) -> Tensor | None:
        """(B,) lengths of rows, by the law of those of training that are longer than `least`; None where all rows are full."""
        if "length_counts" not in self.config.fixed:
            return None
        counts = self.fixed.length_counts.cpu().double().clone()
        counts[: int(least) + 1] = 0.0
        counts[-1] += not counts.any()
        cumulative = (counts / counts.sum()).cumsum(0)
        chance = torch.stack([uniform((), seed, "length", place, dtype=torch.float64) for place in places])
        return torch.searchsorted(cumulative, chance, right=True).clamp(max=len(counts) - 1).to(self.device)

    @torch.no_grad()
    def generate(
        self,
        num_steps: int | None = None,
        prompt: Tensor | None = None,
        mask: Tensor | None = None,
        num_texts: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        lengths: Tensor | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Tensor | Texts:
        """Texts (B, L) of tokens, or these with their lengths. Text i is a function of the seed, i and what is given.

        num_steps: passes of the network (a flow 64, a flow map 1, masked and uniform 64; an autoregressive one has a pass for each token);
        prompt: (n,) or (B, n) tokens; mask: which of them are given, all if None, the others are written; num_texts: B. Flows also take
        method 'ode', 'flow_map', 'stochastic' with gamma, or 'ancestral', and last, the share of the clock that the last step covers.
        lengths: (B,) of rows, if they are to be others than the law of training's rows says; what is beyond them is filled with the token
        of config.pad_token_id. Raises ValueError.
        """
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, not {temperature}")
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be 1 or more, not {num_steps}")
        known, given = self.template(prompt, mask, num_texts)
        count = num_texts if num_texts is not None else 1 if known is None else len(known)
        settings = self.settings(num_steps, given is not None, **options)
        rows, counts = [], []
        for start in range(0, count, BATCH):
            places = list(range(start, min(start + BATCH, count)))
            some = None if known is None else (known[places], given[places])
            least = 0 if some is None else (torch.arange(1, some[1].shape[1] + 1, device=self.device) * some[1]).max()
            length = self.drawn_lengths(places, seed, least) if lengths is None else torch.as_tensor(lengths, device=self.device)[places]
            ids, length = self.write(places, length, some, temperature=temperature, seed=seed, **settings)
            rows.append(ids)
            counts.append(torch.full((len(ids),), ids.shape[1], device=ids.device) if length is None else length)
        sequences, counted = torch.cat(rows), torch.cat(counts)
        beyond = torch.arange(sequences.shape[1], device=sequences.device) >= counted[:, None]
        sequences = sequences.masked_fill(beyond, self.config.pad_token_id or 0)
        return Texts(sequences, counted) if return_dict_in_generate else sequences

    def template(self, prompt: Tensor | None, mask: Tensor | None, count: int | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(B, L) tokens and which of them are given. Raises ValueError."""
        if prompt is None:
            if mask is not None:
                raise ValueError("mask says which tokens of the prompt are given; give a prompt too")
            return None, None
        if refused := self.config.no_given:
            raise ValueError(refused)
        length = self.config.max_position_embeddings
        ids = torch.as_tensor(prompt, device=self.device).long()
        ids = ids[None] if ids.ndim == 1 else ids
        given = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask, device=self.device).bool().expand_as(ids)
        if ids.shape[1] > length or ids.shape[1] == length and bool(given.all()):
            raise ValueError(f"the prompt has {ids.shape[1]} tokens, and a text {length}; give less of it")
        if bool(((ids < 0) | (ids >= self.config.vocab_size)).any()):
            raise ValueError(f"the prompt has tokens outside of 0 … {self.config.vocab_size - 1}")
        if count is not None and count != len(ids):
            if len(ids) > 1:
                raise ValueError(f"num_texts is {count}, and there are {len(ids)} prompts")
            ids, given = ids.expand(count, -1), given.expand(count, -1)
        rest = length - ids.shape[1]
        return F.pad(ids, (0, rest)), F.pad(given, (0, rest))


# ---- flows and flow maps


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
        self.offsets: Tensor | None = None
        self.whole = False
        self.post_init()

    @property
    def is_map(self) -> bool:
        return self.config.kind == "flow_map"

    def forward(
        self, state: Tensor, start: Tensor, end: Tensor | None = None, lengths: Tensor | None = None, said: Tensor | None = None
    ) -> CausalLMOutput:
        """Logits (B, L, V) of psi at states (B, L, code_dim) with times start, (B,) or (B, L), fp64, and of a flow map ends, None for the
        diagonal. lengths: (B,) positions that there are; said: (B, L, code_dim) what an earlier pass said, of networks that recall."""
        start, end = start.double(), None if end is None else end.double()
        hidden = self.hidden(state, start, end, lengths, said).flatten(0, 1)
        logits = self.logits(hidden, state.flatten(0, 1), self.of_tokens(self.path.level(start), state))
        return CausalLMOutput(logits=logits.unflatten(0, state.shape[:2]))

    def hidden(self, y: Tensor, s: Tensor, t: Tensor | None, lengths: Tensor | None, said: Tensor | None) -> Tensor:
        n, entering, config = self.config.neighbors, [], self.config
        level = self.path.level(s)
        if self.widen is not None:
            entering.append(self.widen(windows(self.believed(y, level), n, n, lengths)))
        if self.state is not None:
            entering.append(self.state(self.sized(y, s)))
        if self.recall is not None and said is not None:
            entering.append(self.recall(said * math.sqrt(config.code_dim / config.mean_leverage)))
        told = None if self.time is None else self.time(s)
        if told is not None and self.map_time is not None:
            told = told + self.map_time(s if t is None else t)
        if t is not None and (self.map_state is not None or self.map_widen is not None):
            if self.map_state is not None:
                ahead = self.map_state(windows(self.sized(y, s), n, n, lengths))
            else:
                gain = 3.0 / math.sqrt(config.mean_leverage)
                blunt = (t > s) & (level[..., 0] < gain)
                sharper = torch.stack([torch.full_like(s, gain), gain * self.path.beta(s)], -1)
                ahead = self.map_widen(windows(self.believed(y, torch.where(blunt[..., None], sharper, level)), n, n, lengths))
            share = self.path.move(s, t)[1].to(ahead.dtype)
            entering.append(share.reshape(share.shape + (1,) * (3 - share.ndim)) * ahead)
        told = None if told is None else F.silu(told)
        extra = [] if self.time_tokens is None else [self.time_tokens(told).unflatten(1, (-1, config.hidden_size))]
        extra += [] if self.registers is None else [self.registers.expand(len(y), -1, -1)]
        x = sum(entering[1:], entering[0])
        beside = torch.cat(extra, 1).to(x.dtype) if extra else None
        return self.trunk(x, told if config.timed else None, lengths=lengths, extra=beside)

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
        self, num_steps: int | None, given: bool, method: str | None = None, gamma: float | None = None, last: float | None = None
    ) -> dict[str, Any]:
        steps = num_steps or (1 if self.is_map else 64)
        method = method or ("stochastic" if gamma is not None else "flow_map" if self.is_map else "ode")
        if method not in ("ode", "flow_map", "stochastic", "ancestral"):
            raise ValueError(f"method must be ode, flow_map, stochastic or ancestral, not {method!r}")
        if method == "flow_map" and not self.is_map:
            raise ValueError("this is a flow and no flow map: use method ode, stochastic or ancestral")
        if method in ("stochastic", "ancestral") and self.config.prior["law"] != "gaussian":
            raise ValueError(f"method {method} adds Gaussian noise, and this flow starts from another: use ode or flow_map")
        if gamma is not None and (method != "stochastic" or not 0.0 <= gamma <= 1.0):
            raise ValueError("gamma is a number from 0 to 1 of method stochastic")
        if last is not None and not 0.0 < last < 1.0:
            raise ValueError(f"last is a share of the clock between 0 and 1, not {last}")
        if method == "stochastic" and gamma is None:
            gamma = 0.75
        if method == "flow_map" and steps > 1 and last is None:
            last = 0.5  # more steps refine the way to the middle of the clock
        balanced = self.is_map and steps == 1 and method in ("flow_map", "stochastic") and not given
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
        offsets = self.balance() if balanced else None
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

    def balance(self) -> Tensor:
        """Offsets (V,) by which one-step text has each token as often as training text has: the dual of an assignment, found once on
        noise of its own."""
        if self.offsets is not None:
            return self.offsets
        length, vocab, law = self.config.max_position_embeddings, self.config.vocab_size, self.fixed.log_prior.exp()
        total, found = -(-max(BALANCE_TOKENS, 4 * vocab) // length), []
        for first in range(0, total, BATCH):
            places = list(range(first, min(first + BATCH, total)))
            lengths, y = self.drawn_lengths(places, 0, 0), self.noise(places, 0, "balance noise")
            zero = torch.zeros(len(y), dtype=torch.float64, device=y.device)
            tops = [z.topk(min(CANDIDATES, vocab)) for z in self.all_logits(y, zero, zero + 1.0, lengths)]
            here = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
            here = here if lengths is None else torch.arange(length, device=y.device) < lengths[:, None]
            found.append([torch.cat(column)[here.flatten()] for column in zip(*tops, strict=True)])
        logits, ids = (torch.cat(column) for column in zip(*found, strict=True))
        due, candidate = law * len(ids), torch.zeros_like(law).index_fill_(0, ids.flatten(), 1.0)
        offsets = torch.zeros_like(law)
        for step in range(ROUNDS):
            written = torch.bincount(choose(logits, ids, offsets), minlength=vocab).to(law)
            offsets += candidate * ((due + 0.5) / (written + 0.5)).log() / (2.0 + step / 10.0)
        self.offsets = candidate * (offsets - (candidate * law * offsets).sum() / (candidate * law).sum())
        return self.offsets


def choose(logits: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The tokens (n,) that positions take among their candidates (n, K)."""
    return ids.gather(1, (logits + offsets[ids]).argmax(-1, keepdim=True))[:, 0]


# ---- baselines


class TokenModel(MegaFlowModel):
    """Tokens beside their neighbours into the trunk; `before` and `after` are how many."""

    def __init__(self, config: MegaFlowConfig, before: int, after: int, timed: bool) -> None:
        super().__init__(config)
        self.before, self.after = before, after
        self.table = nn.Parameter(torch.empty(config.vocab_size, config.belief_dim)) if config.own_table else None
        self.widen = Reading((before + after + 1) * config.belief_dim, config.hidden_size)
        self.time = TimeEmbedding(Path(), [-12.0, 12.0]) if timed else None
        self.trunk = Trunk(config, timed)

    def embedded(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding()) * self.table_scale

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight).float() + self.bias.float()


class CausalModel(TokenModel):
    """Every token from those before it, the first from a learned start."""

    def __init__(self, config: MegaFlowConfig) -> None:
        super().__init__(config, 2 * config.neighbors, 0, False)
        self.start = nn.Parameter(torch.empty(config.belief_dim))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Logits (B, L, V) of the token after each of input_ids (B, L), which may have padding at their ends; the mean loss of `labels`,
        those of -100 left out, as transformers' own models have it: of the tokens after the first."""
        if attention_mask is not None and bool((attention_mask.diff(dim=1) > 0).any()):
            raise ValueError("padding belongs behind a text: use a tokenizer with padding_side='right'")
        logits = self.row_logits(input_ids)[:, 1:]
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def row_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, L + 1, V) of every token of rows (B, L) given those before it, and of the one after."""
        embedded = torch.cat([self.start.expand(len(ids), 1, -1), self.embedded(ids)], 1)
        return self.logits(self.trunk(self.widen(windows(embedded, self.before, 0)), causal=True))

    def template(self, prompt: Tensor | None, mask: Tensor | None, count: int | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        known, given = super().template(prompt, mask, count)
        if given is not None and bool((given.int().diff(dim=1) > 0).any()):
            raise ValueError("an autoregressive network knows nothing of what comes later: give the beginning of a text alone")
        return known, given

    def settings(self, num_steps: int | None, given: bool, **options: Any) -> dict[str, Any]:
        if num_steps is not None or options:
            raise ValueError("an autoregressive network writes one token after another: no num_steps, method, gamma or last")
        return {}

    def write(
        self, places: list[int], lengths: Tensor | None, template: tuple[Tensor, Tensor] | None, temperature: float, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        length, columns = self.config.max_position_embeddings, []
        chance = torch.stack([uniform(length, seed, "token draws", place) for place in places]).to(self.device)
        caches: list[list] = [[] for _ in self.trunk.blocks]
        recent = F.pad(self.start.expand(len(places), 1, -1), (0, 0, self.before, 0))
        for position in range(length):
            hidden = self.trunk(self.widen(recent.flatten(1)[:, None]), causal=True, caches=caches)[:, 0]
            token = draw(self.logits(hidden), chance[:, position], temperature)
            if template is not None:
                token = torch.where(template[1][:, position], template[0][:, position], token)
            columns.append(token)
            recent = torch.cat([recent, self.embedded(token)[:, None]], 1)[:, 1:]
        ids, end = torch.stack(columns, 1), self.config.eos_token_id
        if lengths is None or end is None:
            return ids, lengths
        ended = (ids == end) & ((ids == end).cumsum(1) == self.config.ends)
        return ids, torch.where(ended.any(1), ended.int().argmax(1) + 1, length)


class DiscreteModel(TokenModel):
    """Tokens of which some are hidden (masked) or replaced by random ones (uniform), at a time."""

    def __init__(self, config: MegaFlowConfig) -> None:
        super().__init__(config, config.neighbors, config.neighbors, config.timed)
        self.mask = nn.Parameter(torch.empty(config.belief_dim)) if config.kind == "masked" else None
        self.post_init()

    def forward(self, input_ids: Tensor, time: Tensor, hidden: Tensor | None = None, lengths: Tensor | None = None) -> CausalLMOutput:
        """Logits (B, L, V) of the clean tokens; time: (B,); hidden: (B, L) which are hidden, of a masked network."""
        embedded = self.embedded(input_ids)
        if self.mask is not None:
            embedded = torch.where(hidden[..., None], self.mask, embedded)
        condition = None if self.time is None else F.silu(self.time(time))
        x = self.widen(windows(embedded, self.before, self.after, lengths))
        return CausalLMOutput(logits=self.logits(self.trunk(x, condition, lengths=lengths)))

    def settings(self, num_steps: int | None, given: bool, **options: Any) -> dict[str, Any]:
        if options:
            raise ValueError("discrete diffusion takes num_steps, and no method, gamma or last")
        return {"steps": num_steps or 64}

    def write(
        self,
        places: list[int],
        lengths: Tensor | None,
        template: tuple[Tensor, Tensor] | None,
        temperature: float,
        seed: int,
        steps: int,
    ) -> tuple[Tensor, Tensor | None]:
        length, vocab = self.config.max_position_embeddings, self.config.vocab_size
        times = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64).tolist()

        def chance(purpose: str, step: int) -> Tensor:
            return torch.stack([uniform(length, seed, purpose, step, place, dtype=torch.float64) for place in places]).to(self.device)

        if self.mask is None:
            ids = torch.stack([torch.randint(vocab, (length,), generator=source(seed, "initial noise", x)) for x in places]).to(self.device)
        else:
            ids = torch.zeros(len(places), length, dtype=torch.int64, device=self.device)
        hidden = torch.ones_like(ids, dtype=torch.bool)
        if template is not None:
            ids, hidden = template[0], ~template[1]
        for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
            time = torch.full((len(ids),), max(s, 1e-5), dtype=torch.float64, device=self.device)
            logits, drawn = self(ids, time, hidden, lengths).logits.flatten(0, 1), chance("token draws", step).flatten()
            if self.mask is None:
                p = torch.softmax(logits.double() / temperature, -1).mul_(t).add_((1.0 - t) / vocab)
                kept, own = s / t, p.gather(1, ids.flatten()[:, None])
                p.scatter_(1, ids.flatten()[:, None], own * (1.0 + kept * vocab / (1.0 - kept)))
                ids = invert(p, drawn).view(ids.shape)
            else:
                now = hidden & (chance("reveal", step) < (t - s) / (1.0 - s)) if t < 1.0 else hidden
                ids, hidden = torch.where(now, draw(logits, drawn, temperature).view(ids.shape), ids), hidden & ~now
        return ids, lengths
