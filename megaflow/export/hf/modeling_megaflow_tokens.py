"""Autoregressive networks and those of discrete diffusion for plain transformers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from .modeling_megaflow import MegaFlowConfig, MegaFlowModel, Path, Reading, TimeEmbedding, Trunk, draw, invert, source, uniform, windows


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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        use_cache: bool | None = None,
        token_type_ids: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """Logits (B, L, V) of the token after each of input_ids (B, L), which may have padding at their ends; the mean loss of `labels`,
        those of -100 left out, as transformers' own models have it: of the tokens after the first, and over num_items_in_batch where that
        is given, of the passes of a step together. There is no cache to use, and tokens have no types. Raises ValueError of anything else
        that is asked for."""
        unasked = {name for name, value in others.items() if value is None or value is (name == "return_dict")}
        if asked := sorted(others.keys() - unasked):
            raise ValueError(f"forward takes input_ids, attention_mask and labels, and no {', '.join(asked)}")
        if attention_mask is not None and bool((attention_mask.int().diff(dim=1) > 0).any()):
            raise ValueError("padding belongs behind a text: use a tokenizer with padding_side='right'")
        logits = self.row_logits(input_ids)[:, 1:]
        loss = None
        if labels is not None:
            how = "mean" if num_items_in_batch is None else "sum"
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction=how)
            if isinstance(num_items_in_batch, Tensor):  # of another device, maybe
                num_items_in_batch = num_items_in_batch.to(loss.device)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutput(loss=loss, logits=logits)

    def row_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, L + 1, V) of every token of rows (B, L) given those before it, and of the one after."""
        embedded = torch.cat([self.start.expand(len(ids), 1, -1), self.embedded(ids)], 1)
        documents = None
        if self.config.documents_end is not None:  # which do not see each other
            documents = F.pad((ids == self.config.documents_end).cumsum(1), (1, 0))
        read = self.widen(windows(embedded, self.before, 0, documents=documents))
        return self.logits(self.trunk(read, causal=True, documents=documents))

    def template(self, prompt: Tensor | None, mask: Tensor | None, count: int | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        known, given = super().template(prompt, mask, count)
        if given is not None and bool((given.int().diff(dim=1) > 0).any()):
            raise ValueError("an autoregressive network knows nothing of what comes later: give the beginning of a text alone")
        return known, given

    def settings(self, num_steps: int | None, given: bool, **options: Any) -> dict[str, Any]:
        if num_steps is not None or options:
            none = f"an autoregressive network writes one token after another and takes no {', '.join(options) or 'num_steps'}"
            raise ValueError(f"{none}; it takes prompt, mask, num_texts, temperature and seed")
        return {}

    def write(
        self, places: list[int], lengths: Tensor | None, template: tuple[Tensor, Tensor] | None, temperature: float, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        length, columns = self.config.max_position_embeddings, []
        chance = torch.stack([uniform(length, seed, "token draws", place) for place in places]).to(self.device)
        caches: list[list] = [[] for _ in self.trunk.blocks]
        recent = F.pad(self.start.expand(len(places), 1, -1), (0, 0, self.before, 0))
        closing, documents = self.config.documents_end, None
        if closing is not None:  # documents do not see each other
            documents = torch.zeros(len(places), 1, dtype=torch.int64, device=self.device)
        for position in range(length):
            near = recent
            if documents is not None:
                near = recent * (F.pad(documents, (self.before, 0), value=-1)[:, -self.before - 1 :] == documents[:, -1:])[..., None]
            hidden = self.trunk(self.widen(near.flatten(1)[:, None]), causal=True, caches=caches, documents=documents)[:, 0]
            token = draw(self.logits(hidden), chance[:, position], temperature)
            if template is not None:
                token = torch.where(template[1][:, position], template[0][:, position], token)
            columns.append(token)
            if documents is not None:
                documents = torch.cat([documents, documents[:, -1:] + (token == closing)[:, None]], 1)
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

    def forward(
        self,
        input_ids: Tensor,
        time: Tensor,
        hidden: Tensor | None = None,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> CausalLMOutput:
        """Logits (B, L, V) of the clean tokens; time: (B,); hidden: (B, L) which are hidden, of a masked network; documents: (B, L) which
        one each token is of, of a network that was trained on documents apart."""
        embedded = self.embedded(input_ids)
        if self.mask is not None and hidden is None:
            raise ValueError("a masked network has to be told which tokens are hidden: give hidden, (B, L)")
        if self.mask is not None:
            embedded = torch.where(hidden[..., None], self.mask, embedded)
        condition = None if self.time is None else F.silu(self.time(time))
        x = self.widen(windows(embedded, self.before, self.after, lengths, documents))
        return CausalLMOutput(logits=self.logits(self.trunk(x, condition, lengths=lengths, documents=documents)))

    def settings(self, num_steps: int | None, given: bool, **options: Any) -> dict[str, Any]:
        if options:
            raise ValueError(f"discrete diffusion takes num_steps, and no {', '.join(options)}")
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
