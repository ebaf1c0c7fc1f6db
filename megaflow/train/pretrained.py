"""A trunk that begins with the weights of a causal language model of transformers (model.start=FOLDER), as far as shapes allow it.

    GPT-2     token embeddings, attention, MLPs, norms with their shifts, output weights
    Llama     token embeddings, attention, gains of norms, output weights; its MLP has three matrices and ours two, which are drawn

What has no place here is left: learned positions (ours are rotary), biases of attention. Norms of Llama do not take the mean away, and
ours do. So this is a start of training and no conversion; with model.qk_norm=false attention itself is Llama's.

The table by which tokens or beliefs are embedded has belief_dim dimensions: it is the best approximation of the embeddings with so many
(the first singular vectors), exact where they are as many as model.hidden. Neighbours are read by zeros at first. Tokens are matched by
what they are called in both tokenizers; what the model does not know begins at the mean of the others.

The folder is data: tensors are bytes of safetensors, everything else JSON.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflow.config.schema import Config
from megaflow.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from megaflow.errors import UserError, reason
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.build import Baseline
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import boxes
from megaflow.parallel.cut import put
from megaflow.train import tensor_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LEAST_KNOWN = 0.95
"""Share of the vocabulary that the model must know by name."""
LEFT = {"gpt2": "learned positions and biases of attention", "llama": "MLPs"}
"""What of a model has no place here."""
GPT2_AS_OURS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "layer_norm_epsilon": (1e-5,),
}
LLAMA_AS_OURS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,), "rms_norm_eps": (1e-5, 1e-6)}
"""Of config.json the values by which a model computes as our trunk does; Llama's MLPs are left anyway."""
Read = Callable[[str], Tensor]


def check(folder: Path, config: Config, shards: Path) -> str:
    """Refuse a folder that this trunk cannot begin with, before anything is made. Returns what it begins with. Raises UserError."""
    about, _ = opened(folder)
    check_shapes(about, config, folder)
    rows = matched(folder, shards)
    known = sum(row is not None for row in rows)
    taken = f"{config.model.layers} of {about['layers']} layers and {known:,} of {len(rows):,} tokens of {about['kind']} in {folder}"
    said = f"begins with {taken}, without its {LEFT[about['kind']]}"
    if about["differs"]:
        said += f"; it has {', '.join(about['differs'])}, which this trunk has not"
    return f"{said}; its attention is turned by {about['turned']}, and ours by a base of 10,000" if about.get("turned") else said


@torch.no_grad()
def begin_with(network: TextDiT | Baseline, folder: Path, config: Config, shards: Path) -> None:
    """Put the weights of the model in `folder` into a drawn network. shards: a prepared folder of its tokens. Raises UserError."""
    about, read = opened(folder)
    check_shapes(about, config, folder)
    found = blocks(about, read, config)
    rows = matched(folder, shards)
    embeddings, output = (rows_of(read(name), rows) for name in about["tables"])
    found |= ends(network, embeddings, output, about, read, rows)
    for name, p in network.named_parameters():
        if name in found:
            put(p, found[name].to(p.dtype))


def opened(folder: Path) -> tuple[dict[str, Any], Read]:
    """What the model's config says of its shape, and a function that reads a tensor in fp32. Raises UserError."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model.start={folder}: no model of transformers is here (no config.json); give such a folder, or leave it empty")
    try:
        said = json.loads((folder / "config.json").read_text("utf-8"))
        about = SHAPES[said["model_type"]](said)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model.start={folder}: config.json cannot be read ({reason(error)}); copy the model anew") from None
    except KeyError as error:
        raise UserError(f"model.start={folder}: a model of GPT-2's or Llama's shape is needed; config.json has no {error} of one") from None
    try:
        names = [SINGLE]
        if (folder / INDEX).exists():
            names = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{INDEX} names files of other folders")
        places = {key: (folder / name, entry) for name in names for key, entry in tensor_file.entries(folder / name).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"its weights cannot be read ({reason(error)}); they must be safetensors, copied whole"
        raise UserError(f"model.start={folder}: {told}") from None

    def read(name: str) -> Tensor:
        for prefix in ("", "transformer.", "model."):
            if prefix + name in places:
                file, entry = places[prefix + name]
                try:
                    value = tensor_file.read(file, entry, boxes.full(entry.shape)).float()
                except (OSError, ValueError) as error:
                    raise UserError(f"{file}: {name} cannot be read ({reason(error)}); copy the model anew") from None
                if not bool(value.isfinite().all()):
                    raise UserError(f"{file}: {name} has values that are no finite numbers; give another model")
                return value
        raise UserError(f"model.start={folder}: its files have no {name}; copy the model whole")

    if about["tied"] or not any(key.endswith("lm_head.weight") for key in places):
        about["tables"] = (about["tables"][0],) * 2
    return about, read


def gpt2(said: dict[str, Any]) -> dict[str, Any]:
    hidden = int(said["n_embd"])
    return {
        "kind": "gpt2",
        "layers": int(said["n_layer"]),
        "hidden": hidden,
        "heads": int(said["n_head"]),
        "inner": int(said.get("n_inner") or 4 * hidden),
        "tied": bool(said.get("tie_word_embeddings", True)),
        "tables": ("wte.weight", "lm_head.weight"),
        "first": said.get("bos_token_id"),
        "differs": other(said, GPT2_AS_OURS),
    }


def llama(said: dict[str, Any]) -> dict[str, Any]:
    heads = int(said["num_attention_heads"])
    return {
        "kind": "llama",
        "layers": int(said["num_hidden_layers"]),
        "hidden": int(said["hidden_size"]),
        "heads": heads,
        "groups": heads // int(said.get("num_key_value_heads") or heads),
        "head_dim": int(said.get("head_dim") or int(said["hidden_size"]) // heads),
        "inner": None,
        "tied": bool(said.get("tie_word_embeddings", False)),
        "tables": ("embed_tokens.weight", "lm_head.weight"),
        "first": said.get("bos_token_id"),
        "turned": turned(said),
        "differs": other(said, LLAMA_AS_OURS),
    }


def other(said: dict[str, Any], ours: dict[str, tuple[Any, ...]]) -> list[str]:
    """What a config says that is not as our trunk computes."""
    return [f"{key}={said[key]}" for key, values in ours.items() if key in said and said[key] not in values]


def turned(said: dict[str, Any]) -> str:
    """Rotary angles that are not those of our trunk, as config.json says them, in the words of any version; else empty."""
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    base, way = float(said.get("rope_theta") or rope.get("rope_theta") or 10_000.0), rope.get("rope_type") or rope.get("type") or "default"
    found = ([f"rope_theta={base:g}"] if base != 10_000.0 else []) + ([f"rope_type={way}"] if way != "default" else [])
    return " and ".join(found)


SHAPES = {"gpt2": gpt2, "llama": llama}


def check_shapes(about: dict[str, Any], config: Config, folder: Path) -> None:
    """Refuse a trunk of another shape. Raises UserError."""
    model = config.model
    ours = {"model.hidden": model.hidden, "model.heads": model.heads}
    theirs = {"model.hidden": about["hidden"], "model.heads": about["heads"]}
    if about["inner"] is not None:
        ours["model.mlp_ratio"], theirs["model.mlp_ratio"] = model.mlp_ratio, about["inner"] / about["hidden"]
    if differs := [key for key in ours if ours[key] != theirs[key]]:
        wanted = ", ".join(f"{key}={theirs[key]:g}" for key in differs)
        raise UserError(f"model.start={folder}: the model has {wanted}, and the config {differs[0]}={ours[differs[0]]}; set what it has")
    if model.layers > about["layers"]:
        raise UserError(
            f"model.start={folder}: the model has {about['layers']} layers; set model.layers to that or fewer, the first are taken"
        )
    if about.get("head_dim", about["hidden"] // about["heads"]) != about["hidden"] // about["heads"]:
        raise UserError(f"model.start={folder}: its heads are of {about['head_dim']} dimensions, and the trunk's are hidden / heads")


def blocks(about: dict[str, Any], read: Read, config: Config) -> dict[str, Tensor]:
    """Weights of the blocks and of the last norm, by their names in our network; norms moved by the time begin as theirs, at all times."""
    found: dict[str, Tensor] = {}
    timed = config.model.family not in ("autoregressive",) and config.model.time == "adaptive"
    for layer in range(config.model.layers):
        part, gains, shifts = BLOCKS[about["kind"]](about, read, layer)
        where = f"trunk.blocks.{layer}."
        if timed:
            one = torch.ones_like(gains[0])
            found[f"{where}modulation.bias"] = torch.cat([shifts[0], gains[0] - 1.0, one, shifts[1], gains[1] - 1.0, one])
        else:
            found[f"{where}gains"] = torch.stack(gains)
            if "up.bias" in part:  # the shift before the MLP, through its first matrix
                part["up.bias"] = part["up.bias"] + part["up.weight"] @ shifts[1]
        found |= {where + name: value for name, value in part.items()}
    gain, shift = last_norm(about, read)
    if timed:
        found["trunk.last_modulation.bias"] = torch.cat([shift, gain - 1.0])
    else:
        found["trunk.last_gain"] = gain
    return found


def gpt2_block(about: dict[str, Any], read: Read, layer: int) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Its matrices are (inputs, outputs)."""
    h = f"h.{layer}."
    part = {
        "qkv.weight": read(f"{h}attn.c_attn.weight").T,
        "out.weight": read(f"{h}attn.c_proj.weight").T,
        "up.weight": read(f"{h}mlp.c_fc.weight").T,
        "up.bias": read(f"{h}mlp.c_fc.bias"),
        "down.weight": read(f"{h}mlp.c_proj.weight").T,
        "down.bias": read(f"{h}mlp.c_proj.bias"),
    }
    return part, [read(f"{h}ln_{i}.weight") for i in (1, 2)], [read(f"{h}ln_{i}.bias") for i in (1, 2)]


def llama_block(about: dict[str, Any], read: Read, layer: int) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Keys and values of a group of heads are each head's."""
    h, size, groups = f"layers.{layer}.", about["head_dim"], about["groups"]
    q = read(f"{h}self_attn.q_proj.weight")
    k, v = (read(f"{h}self_attn.{name}_proj.weight").unflatten(0, (-1, size)).repeat_interleave(groups, 0).flatten(0, 1) for name in "kv")
    gains = [read(f"{h}{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")]
    part = {"qkv.weight": torch.cat([q, k, v]), "out.weight": read(f"{h}self_attn.o_proj.weight")}
    return part, gains, [torch.zeros_like(gain) for gain in gains]


BLOCKS = {"gpt2": gpt2_block, "llama": llama_block}


def last_norm(about: dict[str, Any], read: Read) -> tuple[Tensor, Tensor]:
    if about["kind"] == "gpt2":
        return read("ln_f.weight"), read("ln_f.bias")
    gain = read("norm.weight")
    return gain, torch.zeros_like(gain)


def matched(folder: Path, shards: Path) -> list[int | None]:
    """Of every token of ours the model's row, None where it knows none of that name. Raises UserError."""
    if not (folder / TOKENIZER_FILE).is_file():
        raise UserError(
            f"model.start={folder}: it has no {TOKENIZER_FILE}, by which its rows are matched with tokens; save its tokenizer there"
        )
    theirs = load_tokenizer(folder).get_vocab(with_added_tokens=True)
    ours = load_tokenizer(shards).get_vocab(with_added_tokens=True)
    rows: list[int | None] = [None] * (max(ours.values()) + 1)
    for token, place in ours.items():
        rows[place] = theirs.get(token)
    known = sum(row is not None for row in rows) / len(rows)
    if known < LEAST_KNOWN:
        told = f"the model knows {known:.0%} of the shards' tokens; prepare shards with its tokenizer, data.tokenizer={folder}"
        raise UserError(f"model.start={folder}: {told}")
    return rows


def rows_of(table: Tensor, rows: list[int | None]) -> Tensor:
    """(V, d) of our tokens."""
    found = table.mean(0).repeat(len(rows), 1)
    known = [place for place, row in enumerate(rows) if row is not None and row < len(table)]
    found[known] = table[[rows[place] for place in known]]
    return found


def ends(
    network: TextDiT | Baseline, embeddings: Tensor, output: Tensor, about: dict[str, Any], read: Read, rows: list[int | None]
) -> dict[str, Tensor]:
    """What embeds tokens or beliefs, and the head. A flow's bias stays: its skip adds the unigram law's own."""
    found = {"weight": output}
    if isinstance(network, Autoregressive):
        found["bias"] = output @ last_norm(about, read)[1]  # the shift of the last norm, which has none here
    widen = getattr(network, "widen", None)
    if widen is None:
        return found
    hidden, width = widen.weight.shape[0], network.table.shape[1] if network.table is not None else output.shape[1]
    if network.table is None:
        own = torch.eye(hidden) / network.table_scale
    else:
        left, size, right = torch.linalg.svd(embeddings, full_matrices=False)
        left, right = left[:, :width] * size[:width], right[:width]
        scale = left.square().mean().sqrt().clamp(min=1e-12)
        found["table"] = torch.nn.functional.pad(left / scale, (0, width - left.shape[1]))
        own = torch.nn.functional.pad((right * scale).T, (0, width - len(right)))
    window = widen.weight.shape[1] // width
    place = window - 1 if isinstance(network, Autoregressive) else window // 2
    found["widen.weight"] = torch.nn.functional.pad(own, (place * width, (window - 1 - place) * width))
    if isinstance(network, Autoregressive) and about["first"] in rows:
        found["start"] = (found["table"] if network.table is not None else output * network.table_scale)[rows.index(about["first"])]
    return found
