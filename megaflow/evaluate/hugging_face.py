"""A local folder of a Hugging Face causal language model, opened without trust: no code of its own, no pickle, nothing outside of it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from megaflow.errors import UserError
from megaflow.export.hf import quiet
from megaflow.files import PICKLES

INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"
READ = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What a model and its tokenizer are made of, and so what identifies them."""
CAUSALITY = 8
"""Tokens that a model is tried on for seeing what comes later."""


USED = 0.9
"""Share of a model's tokens that its tokenizer knows at least: tables are padded, by a few hundred rows."""


@dataclass(frozen=True)
class Folder:
    """tokenizer: never reads a special token out of text, adds none, keeps every character in its offsets. prefix: ids that the folder's
    tokenizer by itself puts before a text. context: most tokens in a row, prefix included; None: no limit is known."""

    path: Path
    model: Any
    tokenizer: Tokenizer
    prefix: list[int]
    prefix_text: str | None
    end: int | None
    end_text: str | None
    context: int | None


def check(path: Path) -> None:
    """Refuse what is no folder of a model in safetensors, by its names alone. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"--judge {path}: no such folder; give that of a causal language model, or of an autoregressive run")
    if not (path / "config.json").is_file():
        raise UserError(f"--judge {path}: no model is here (no config.json) and no run; give a folder that save_pretrained has written")
    if (path / ADAPTER).is_file():
        raise UserError(f"--judge {path}: {ADAPTER} would load another model's weights; merge the adapter, and save the whole model")
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"--judge {path}: {pickles[0]} is a pickle, which can run code when it is read; save the model as safetensors instead"
            )
        raise UserError(f"--judge {path}: the folder holds no weights (no .safetensors); save the model there with save_pretrained")
    if (path / INDEX).is_file():
        try:
            named = set(json.loads((path / INDEX).read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            raise UserError(f"--judge {path}: {INDEX} is damaged; copy the model anew") from None
        if outside := sorted(name for name in map(str, named) if Path(name).name != name):
            raise UserError(f"--judge {path}: {INDEX} names {outside[0]}, which is outside of the folder; copy the model anew")
        if missing := sorted(name for name in map(str, named) if not (path / name).is_file()):
            raise UserError(f"--judge {path}: {missing[0]} is missing, which {INDEX} names; copy the model anew")


def identity(path: Path) -> str:
    """SHA-256 over names and contents of the files that a model and its tokenizer are made of. Raises UserError."""
    whole = hashlib.sha256()
    for file in sorted({file for pattern in READ for file in path.glob(pattern) if file.is_file()}):
        try:
            with open(file, "rb") as opened:
                whole.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise UserError(f"--judge {path}: {file.name} cannot be read ({error.strerror}); copy the model anew") from None
    return whole.hexdigest()


def open_folder(path: Path, device: torch.device) -> Folder:
    """Model in fp32, in evaluation mode, and its tokenizer. Raises UserError."""
    check(path)
    with quiet():
        fast = _tokenizer(path)
        model = _model(path).to(device).eval()
    backend = fast.backend_tokenizer
    plain = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}))
    plain.encode_special_tokens = True  # text that spells a special token stays text
    entries = model.get_input_embeddings().weight.shape[0]
    largest = max(plain.get_vocab(with_added_tokens=True).values(), default=-1)
    if not USED * entries <= largest + 1 <= entries:
        raise UserError(
            f"--judge {path}: its tokenizer has ids up to {largest} and its model {entries} of them; give the tokenizer of this model"
        )
    prefix = _prefix(backend)
    end = fast.eos_token_id
    limits = [getattr(model.config, "max_position_embeddings", None), fast.model_max_length]
    limits = [int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    _causal(path, model, entries, device)
    texts = [None if not ids else "".join(str(backend.id_to_token(i)) for i in ids) for ids in (prefix, [] if end is None else [end])]
    return Folder(path, model, plain, prefix, texts[0], end, texts[1], min(limits, default=None))


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(path.glob("*token*")) and not any((path / name).exists() for name in ("vocab.json", "vocab.txt", "spiece.model")):
        raise UserError(f"--judge {path}: it has no tokenizer.json: save the model's own tokenizer there (tokenizer.save_pretrained)")
    try:
        found = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever went wrong
        raise UserError(f"--judge {path}: it has no tokenizer that can be read ({_short(error)}); save the model's own there") from None
    if not found.is_fast or not found.backend_tokenizer.get_vocab_size():
        raise UserError(
            f"--judge {path}: its tokenizer is not a fast one, which says where tokens lie in a text; save a tokenizer.json there"
        )
    return found


def _model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    safely: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32, output_loading_info=True, **safely)
    except Exception as error:  # transformers and safetensors raise whatever went wrong
        raise UserError(
            f"--judge {path}: its model cannot be loaded ({_short(error)}); give a causal language model, copied whole"
        ) from None
    model, told = found
    if told["missing_keys"]:
        some = sorted(told["missing_keys"])[0]
        raise UserError(f"--judge {path}: its weights lack {some}, which would be random; give a folder of a whole causal language model")
    return model


def _prefix(backend: Tokenizer) -> list[int]:
    """What the tokenizer by itself puts before a text, such as a beginning of sequence."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


@torch.no_grad()
def _causal(path: Path, model: Any, entries: int, device: torch.device) -> None:
    """Refuse a model that sees what comes later, whose likelihood of a text is none."""
    ids = (torch.arange(2 * CAUSALITY, device=device) * 7 % entries).view(2, CAUSALITY)
    ids[1, :-1] = ids[0, :-1]
    ids[1, -1] = (ids[0, -1] + 1) % entries
    first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    if not bool(torch.isfinite(first).all()):
        raise UserError(f"--judge {path}: its model gives numbers that are not finite; give a trained one, copied whole")
    if (first - second).abs().max() > 1e-3 * (1.0 + first.abs().max()):
        raise UserError(f"--judge {path}: its model sees later tokens and gives no likelihood of a text; give a causal language model")


def _short(error: Exception) -> str:
    """The first sentence of what a library said, on one line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line.split(". ")[0].rstrip(".")[:160]
