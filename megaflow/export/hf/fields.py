"""What a network's config.json says, and the fixed tensors that lie beside its weights, in the words of modeling_megaflow*.py."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflow.config.schema import Config
from megaflow.data import shards
from megaflow.data.tokenizer import TOKENIZER_FILE, end_id, load_tokenizer
from megaflow.flow import choice, context, interpolant
from megaflow.flow import code as codes
from megaflow.flow.vocabulary import whole
from megaflow.model import build
from megaflow.model.parts import Parts

SHARED = "modeling_megaflow"
CLASSES = {
    "flow": "modeling_megaflow_flow.FlowModel",
    "flow_map": "modeling_megaflow_flow.FlowModel",
    "autoregressive": "modeling_megaflow_tokens.CausalModel",
    "masked": "modeling_megaflow_tokens.DiscreteModel",
    "uniform": "modeling_megaflow_tokens.DiscreteModel",
}


def modeling(kind: str) -> list[Path]:
    """The files of Python that transformers opens a network by: what all share, and what is its kind's."""
    return [Path(__file__).with_name(f"{module}.py") for module in (SHARED, CLASSES[kind].partition(".")[0])]


def fixed_tensors(config: Config, folder: Path, parts: Parts | None, code_weight: Tensor | None) -> tuple[dict[str, Tensor], Parts | None]:
    """The fixed tensors by name, and the parts with the code that the weights have. folder: shards' description; code_weight: (V, d_c) of
    a network that trains its code."""
    found: dict[str, Tensor] = {}
    if (counts := shards.length_counts(folder)) is not None:
        found["length_counts"] = torch.from_numpy(counts).long()
    if parts is None:
        return found, None
    if code_weight is not None:
        code = codes.TRAINED[config.flow.code](code_weight.float(), parts.code.vocab, whole(parts.code.vocab)).detached()
        parts = replace(parts, code=code)
    found |= {"log_prior": parts.log_prior, "leverage": parts.code.leverage}
    found |= {} if parts.code.matrix is None else {"code": parts.code.matrix}
    found |= {} if parts.code.mixing is None else {"mixing": parts.code.mixing}
    return {name: value.contiguous() for name, value in found.items()}, parts


def described(
    config: Config,
    kind: str,
    precision: torch.dtype,
    folder: Path,
    fixed: dict[str, Tensor],
    parts: Parts | None,
    clock: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """config.json. parts: with the network's own code; clock: times and what it shows at each, of a flow."""
    manifest, tokenizer = shards.read_description(folder), load_tokenizer(folder)
    vocab, end = manifest["tokenizer"]["vocab_size"], end_id(tokenizer)
    shape, name = build.shape_of(config, vocab), CLASSES[kind]
    auto = {"AutoConfig": f"{SHARED}.MegaFlowConfig", "AutoModel": name}
    auto |= {"AutoModelForCausalLM": name} if kind == "autoregressive" else {}
    found: dict[str, Any] = {
        "model_type": "megaflow",
        "architectures": [name.rpartition(".")[2]],
        "auto_map": auto,
        "torch_dtype": str(precision).removeprefix("torch."),
        "kind": kind,
        "vocab_size": vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp_ratio * shape.hidden,
        "max_position_embeddings": manifest["length"],
        "belief_dim": shape.belief_dim,
        "neighbors": shape.neighbors,
        "qk_norm": shape.qk_norm,
        "softcap": config.model.softcap,
        "tied": shape.tied,
        "own_table": not shape.tied or kind == "flow_map" and not config.train.joint,
        "timed": shape.timed,
        "ends": 2 if manifest["settings"].get("target_field") else 1,
        "eos_token_id": end,
        "pad_token_id": end,
        "documents_end": end if config.data.mask_documents else None,
        "no_given": no_given(config, kind),
        "needs_given": needs_given(config, kind),
        "fixed": {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in fixed.items()},
    }
    if parts is None or clock is None or parts.moments is None:
        return found
    path, options = choice.split(interpolant.PATHS, parts.path.name)
    law, noise = parts.prior.law, parts.moments
    is_map = kind == "flow_map"
    return found | {
        "code_dim": parts.code.dim,
        "mean_leverage": parts.code.mean_leverage,
        "reads": ["belief", "linear"] if config.model.input == "both" else [config.model.input],
        "map_reads": config.distill.state_input if is_map else None,
        "recalls": config.flow.self_conditioning > 0.0 and not is_map,
        "skip": config.flow.skip == "on",
        "time_tokens": shape.time_tokens,
        "registers": shape.registers,
        "span": [parts.span.low, parts.span.high],
        "path": {"name": path, "scale": parts.path.scale, **(choice.options(interpolant.PATHS, path) or {}), **options},
        "prior": {"law": law, "temperature": parts.prior.temperature if math.isfinite(parts.prior.temperature) else None},
        "noise_square": noise.square,
        "noise_overlap": noise.overlap,
        "clock": [values.double().tolist() for values in clock],
    }


def no_given(config: Config, kind: str) -> str | None:
    """Why a network takes no given tokens, a sentence; None where it does."""
    if kind == "uniform":
        return "this network replaces tokens by random ones and is given none"
    if kind in ("flow", "flow_map") and config.flow.context.share == 0.0:
        return "this flow was trained without given tokens (flow.context.share=0) and does not heed them"
    return None


def needs_given(config: Config, kind: str) -> str | None:
    """Why a network writes nothing without given tokens, a sentence; None where it does."""
    if kind in ("flow", "flow_map") and config.flow.context.share == 1.0 and context.laws(config.flow.context.law) == {"source"}:
        return "this flow writes what belongs to a source, which every row of its training had: give it as the prompt, with the end token"
    return None


def tokenizer_files(folder: Path) -> dict[str, str]:
    """tokenizer.json and what AutoTokenizer reads beside it: text that spells a special token stays text, as in training."""
    manifest, tokenizer = shards.read_description(folder), load_tokenizer(folder)
    end = end_id(tokenizer)
    name = None if end is None else tokenizer.id_to_token(end)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": manifest["length"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "eos_token": name,
        "pad_token": name,
    }
    about = {key: value for key, value in about.items() if value is not None}
    return {TOKENIZER_FILE: (folder / TOKENIZER_FILE).read_text("utf-8"), "tokenizer_config.json": json.dumps(about, indent=1) + "\n"}
