"""A network that MegaFlow has trained, for plain transformers: needs torch and transformers, and nothing of MegaFlow.

    modeling_megaflow_flow      flow, flow_map    a state and its time -> logits of every token; text in as many steps as asked for
    modeling_megaflow_tokens    autoregressive    tokens -> logits of the next one
                                masked, uniform   tokens, some hidden or replaced, and their time -> logits

Here is what these share: the config, the draws, the path, the trunk, and `generate`, which writes the texts that `megaflow sample` writes
from the same seed. Times go from 0, noise, to 1, text.
"""

import hashlib
import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

CONDITION, FREQUENCIES = 128, 16
LAST_LOG_SNR = 2.0 * math.log(9999.0)
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


def visible(length: int, past: int, causal: bool, keys: Tensor | None, documents: Tensor | None, device: Any) -> Tensor | None:
    """Which keys are seen, over (B, H, L, K), by `length` queries behind `past` others: keys (B, K) that are there, earlier ones alone,
    those of the same of documents (B, K); None where all are."""
    seen = None if keys is None else keys[:, None, None, :]
    if causal and length > 1:
        seen = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    if documents is not None:
        same = (documents[:, past:, None] == documents[:, None, :])[:, None]
        seen = same if seen is None else seen & same
    return seen


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, cap: float) -> Tensor:
    """Scores are capped at cap tanh(score / cap); 0 leaves them as they are."""
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

    def forward(self, x: Tensor, condition: Tensor | None, angles: Any, seen: Tensor | None, cache: list | None) -> Tensor:
        if self.modulation is None:
            x = x + self.attention(F.layer_norm(x, x.shape[-1:], self.gains[0]), angles, seen, cache)
            return x + self.mlp(F.layer_norm(x, x.shape[-1:], self.gains[1]))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        x = x + gate1 * self.attention(shift1 + F.layer_norm(x, x.shape[-1:]) * (1 + scale1), angles, seen, cache)
        return x + gate2 * self.mlp(shift2 + F.layer_norm(x, x.shape[-1:]) * (1 + scale2))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def attention(self, x: Tensor, angles: Any, seen: Tensor | None, cache: list | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.query_gain is not None:
            q, k = F.rms_norm(q, q.shape[-1:], self.query_gain), F.rms_norm(k, k.shape[-1:], self.key_gain)
        q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(cache, (k, v), strict=True)) if cache else (k, v)
            cache[:] = [k, v]
        return self.out(attend(q, k, v, seen, self.cap).transpose(1, 2).flatten(2))


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
        documents: Tensor | None = None,
    ) -> Tensor:
        """x: (B, L, d) after what `caches` hold; condition: (B, c) or (B, L, c); lengths: (B,) positions that may be seen; extra: (B, R, d)
        tokens beside the text; documents: (B, K) which one each position is of, that of the caches too, where others' are not seen.
        Returns (B, L, d)."""
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
        seen = visible(x.shape[1], past, causal, keys, documents, x.device)
        for index, block in enumerate(self.blocks):
            x = block(x, condition, angles, seen, None if caches is None else caches[index])
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


def windows(x: Tensor, before: int, after: int, lengths: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
    """(B, L, (before + 1 + after) d): every position beside its neighbours, zeros beyond the ends of a row or document."""
    if lengths is not None and before + after:
        x = x * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
    padded, count = F.pad(x, (0, 0, before, after)), x.shape[1]
    shifted = [padded[:, i : i + count] for i in range(before + 1 + after)]
    if documents is not None:
        of = F.pad(documents, (before, after), value=-1)
        shifted = [part * (of[:, i : i + count] == documents)[..., None] for i, part in enumerate(shifted)]
    return torch.cat(shifted, -1)


# ---- what all kinds share


def draw(logits: Tensor, chance: Tensor, temperature: float) -> Tensor:
    """Tokens (n,) by inverting the distribution function of logits (n, V) at uniform draws (n,)."""
    return invert(torch.softmax(logits.double() / temperature, -1), chance)


def whole(value: Any, name: str, least: int | None = None) -> int:
    """A whole number, of numpy or torch too, as Python has it. Raises ValueError."""
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool) or least is not None and found < least:
        raise ValueError(f"{name} must be a whole number" + ("" if least is None else f" of {least} or more") + f", not {value!r}")
    return found


def real(value: Any, name: str) -> float:
    """A number, of numpy or torch too, as Python has it. Raises ValueError."""
    try:
        if not isinstance(value, (str, bytes, bool)):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a number, not {value!r}")


def numbers(value: Any, name: str, device: Any) -> Tensor:
    """Whole numbers as a tensor. Raises ValueError."""
    found = torch.as_tensor(value, device=device)
    if found.is_floating_point() or found.is_complex():
        raise ValueError(f"{name} must be whole numbers, not {found.dtype}")
    return found


def invert(weights: Tensor, chance: Tensor) -> Tensor:
    cumulative = weights.cumsum(-1)
    return torch.searchsorted(cumulative, chance[:, None].double() * cumulative[:, -1:], right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


class Fixed(nn.Module):
    """What is no weight, and stays in fp32 whatever the weights are cast to: parameters, since transformers keeps these alone so."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name, value in self._parameters.items():
            moved = fn(value)
            kept = moved if moved.dtype == value.dtype else value.to(moved.device)
            self._parameters[name] = nn.Parameter(kept.detach(), requires_grad=False)
        return self


class MegaFlowModel(PreTrainedModel):
    config_class = MegaFlowConfig
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected = [r"^uncertainty\.", r"^map_weights\.", r"^code_weight$"]

    def __init__(self, config: MegaFlowConfig) -> None:
        super().__init__(config)
        vocab, hidden = config.vocab_size, config.hidden_size
        self.weight, self.bias = nn.Parameter(torch.empty(vocab, hidden)), nn.Parameter(torch.empty(vocab))
        self.fixed = Fixed()
        for name, (shape, kind) in config.fixed.items():
            self.fixed.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=getattr(torch, kind)), requires_grad=False))
        if config.fixed:
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = ["fixed"]
        self.table_scale = math.sqrt(hidden) / 0.1 if config.tied else 1.0

    @classmethod
    def from_pretrained(cls, *words: Any, **named: Any) -> Any:
        found = super().from_pretrained(*words, **named)
        (found[0] if isinstance(found, tuple) else found).fixed.requires_grad_(False)  # as they were, before they were loaded
        return found

    def _init_weights(self, module: nn.Module) -> None:
        """All weights come from the files."""

    def embedding(self) -> Tensor:
        return self.weight if self.table is None else self.table

    def drawn_lengths(self, places: list[int], seed: int, least: Tensor | None = None) -> Tensor | None:
        """(B,) lengths of rows, by the law of those of training that are longer than `least` (B,); None where all rows are full."""
        if "length_counts" not in self.config.fixed:
            return None
        counts = self.fixed.length_counts.cpu().double()
        beyond = torch.zeros(len(places), dtype=torch.int64) if least is None else least.cpu()
        counts = counts * (torch.arange(len(counts)) > beyond[:, None])
        counts[:, -1] += ~counts.any(1)
        cumulative = (counts / counts.sum(1, keepdim=True)).cumsum(1)
        chance = torch.stack([uniform((), seed, "length", place, dtype=torch.float64) for place in places])
        return torch.searchsorted(cumulative, chance[:, None], right=True)[:, 0].clamp(max=counts.shape[1] - 1).to(self.device)

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
        prompt: (n,) or (B, n) tokens, of a network of pairs those of the source and the end token; mask: which of them are given, all if
        None, the others are written; num_texts: B. Flows also take
        method 'ode', 'flow_map', 'stochastic' with gamma, or 'ancestral', and last, the share of the clock that the last step covers.
        lengths: (B,) of rows, if they are to be others than the law of training's rows says; what is beyond them is filled with the token
        of config.pad_token_id. Raises ValueError.
        """
        if not 0.0 < real(temperature, "temperature") < math.inf:
            raise ValueError(f"temperature must be a finite number above 0, not {temperature!r}")
        seed, num_steps = whole(seed, "seed"), None if num_steps is None else whole(num_steps, "num_steps", 1)
        num_texts = None if num_texts is None else whole(num_texts, "num_texts", 1)
        known, given = self.template(prompt, mask, num_texts)
        count = num_texts if num_texts is not None else 1 if known is None else len(known)
        settings, wanted = self.settings(num_steps, given is not None, **options), self.wanted(lengths, count, given)
        if settings.get("method", "ancestral") != "ancestral" and settings["steps"] == 1 and temperature != 1.0:
            raise ValueError("one step is an argmax, which no temperature changes: use num_steps=2 or more")
        rows, counts = [], []
        for start in range(0, count, BATCH):
            places = list(range(start, min(start + BATCH, count)))
            some = None if known is None else (known[places], given[places])
            least = None if some is None else (torch.arange(1, some[1].shape[1] + 1, device=self.device) * some[1]).amax(1)
            length = self.drawn_lengths(places, seed, least) if wanted is None else wanted[places]
            ids, length = self.write(places, length, some, temperature=temperature, seed=seed, **settings)
            rows.append(ids)
            counts.append(torch.full((len(ids),), ids.shape[1], device=ids.device) if length is None else length)
        sequences, counted = torch.cat(rows), torch.cat(counts)
        beyond = torch.arange(sequences.shape[1], device=sequences.device) >= counted[:, None]
        sequences = sequences.masked_fill(beyond, self.config.pad_token_id or 0)
        return Texts(sequences, counted) if return_dict_in_generate else sequences

    def wanted(self, lengths: Any, count: int, given: Tensor | None) -> Tensor | None:
        """(B,) lengths that are asked for; given: (B, L) which tokens are. Raises ValueError."""
        if lengths is None:
            return None
        if self.config.kind == "autoregressive":
            raise ValueError("an autoregressive network ends its texts itself and takes no lengths")
        if "length_counts" not in self.config.fixed:
            raise ValueError(f"all rows of this network have {self.config.max_position_embeddings} tokens: it takes no lengths")
        found, longest = numbers(lengths, "lengths", self.device).long(), self.config.max_position_embeddings
        if found.shape != (count,) or bool(((found < 1) | (found > longest)).any()):
            raise ValueError(f"lengths are {count} numbers, one for each text, from 1 to {longest}")
        if given is not None and bool((given & (torch.arange(given.shape[1], device=self.device) >= found[:, None])).any()):
            raise ValueError("lengths end before what is given of a text: ask for as many tokens, or give less of it")
        if given is not None and bool((given.sum(1) >= found).any()):
            raise ValueError("lengths leave nothing to write: ask for more tokens than are given")
        return found

    def template(self, prompt: Tensor | None, mask: Tensor | None, count: int | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """(B, L) tokens and which of them are given. Raises ValueError."""
        if prompt is None:
            if mask is not None:
                raise ValueError("mask says which tokens of the prompt are given; give a prompt too")
            if refused := self.config.needs_given:
                raise ValueError(refused)
            return None, None
        if refused := self.config.no_given:
            raise ValueError(refused)
        length = self.config.max_position_embeddings
        try:
            ids = torch.as_tensor(prompt, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            how = "such as tokenizer(text)['input_ids']; several of other lengths padded on the right, with mask=their attention_mask"
            raise ValueError(f"the prompt must be tokens, {how}") from error
        ids = ids.long() if ids.numel() == 0 else numbers(ids, "the tokens of the prompt", self.device).long()
        if ids.ndim not in (1, 2) or ids.numel() == 0:
            raise ValueError(f"the prompt has the shape {tuple(ids.shape)}; give tokens (n,), or (B, n) of B texts")
        ids = ids[None] if ids.ndim == 1 else ids
        given = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None:
            mask = numbers(mask, "the mask", self.device).bool()
            if mask.shape not in (ids.shape, ids.shape[1:]):
                raise ValueError(f"the mask has the shape {tuple(mask.shape)}, and the prompt {tuple(ids.shape)}")
            given = mask.expand_as(ids)
        if self.config.needs_given and not bool(given.any()):
            raise ValueError(self.config.needs_given)
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
