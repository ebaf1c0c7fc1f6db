"""The model card: what the network is, what it has learned from, how it was measured, and what it cannot do. Filled from the run alone."""

import json
import math
from typing import Any

import megaflow
from megaflow import evaluation_file
from megaflow.config.load import flatten
from megaflow.config.schema import Config
from megaflow.data import shards
from megaflow.export.source import Source
from megaflow.files import read_if_whole
from megaflow.train.stages import SHARDS, TEACHER_FILE

KINDS = {
    "flow": "A flow language model: it refines every position of a text at once, from noise to tokens, in as many steps as asked for.",
    "flow_map": "A flow map, distilled from a flow language model: it writes every position of a text at once, in one to a few steps.",
    "autoregressive": "An autoregressive language model, the baseline of flow language models: one token after another.",
    "masked": "A masked diffusion language model, a baseline of flow language models: hidden tokens are written, some at every step.",
    "uniform": "A uniform diffusion language model, a baseline of flow language models: random tokens are replaced, some at every step.",
}
FLOWS = "flow", "flow_map"
SHOWN = ("data", "model", "flow", "distill", "optim", "train", "parallel")
"""Sections of the config that say how the network was made."""


def card(source: Source, name: str, about: dict[str, Any], group: str) -> str:
    """README.md. about: config.json; group: 'averaged' or 'weights', which were converted."""
    config, state = source.loaded.config, source.found.state
    manifest = shards.read_description(source.run / SHARDS)
    train = manifest["splits"]["train"]
    layers, heads = about["num_hidden_layers"], about["num_attention_heads"]
    count = sum(math.prod(shape) for shape in source.shapes.values())
    lines = [
        "---",
        "library_name: transformers",
        "tags: [megaflow]",
        "---",
        "",
        f"# {name}",
        "",
    ]
    lines += [KINDS[source.kind], "", "## Use", "", *_code(source.kind, about), ""]
    size = "up to " * (manifest["packing"] == "document") + f"{manifest['length']} tokens"
    lines += [f"Texts have {size}. The same seed gives the same tokens, those of `megaflow sample`.", ""]
    if about["ends"] == 2:
        lines += [
            "It was trained on pairs: a prompt is a source, and the end token has to follow it; what is written ends with another.",
            "",
        ]
    lines += ["## Made of", "", "| | |", "|---|---|"]
    rows = {
        "network": f"{count:,} weights: {layers} layers of {about['hidden_size']}, {heads} heads",
        "text": "; ".join(f"{each['name']} ({each['bytes']:,} bytes, SHA-256 {each['sha256'][:12]}…)" for each in manifest["sources"]),
        "began with": f"weights of {config.model.start} (transformers), as far as this network has a place for them",
        "tokenizer": f"{manifest['tokenizer']['kind']}, {manifest['tokenizer']['vocab_size']:,} tokens",
        "training split": f"{train['tokens']:,} tokens in rows of {manifest['length']}, packing {manifest['packing']}",
        "trained for": f"{state['step']:,} steps" + (f", {state['tokens']:,} tokens" if state.get("tokens") else "") + _before(source),
        "weights": "moving average of training's" if group == "averaged" else "those that training moves, not averaged",
        "made by": f"megaflow {megaflow.__version__}, checkpoint {source.found.sha256[:12]}…, seed {config.run.seed}",
    }
    if not config.model.start:
        del rows["began with"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    lines += ["", "## Measured", "", *_measured(source, group), "", "## Limits", "", *_limits(source, about), ""]
    lines += [
        "## Config",
        "",
        "Every value is in `config.yaml`. What of " + ", ".join(SHOWN) + " was not left at its default:",
        "",
        "```yaml",
        *_chosen(source),
        "```",
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(kind: str, about: dict[str, Any]) -> list[str]:
    steps = {"autoregressive": "", "flow_map": "num_steps=1, "}.get(kind, "num_steps=64, ")
    prompt = [
        'prompt = tokenizer("SOURCE", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]',
        f"tokens = model.generate({steps}prompt=torch.tensor(prompt), num_texts=4, seed=0)",
    ]
    return [
        "```python",
        *(["import torch"] if about["ends"] == 2 else []),
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)',
        *(prompt if about["ends"] == 2 else [f"tokens = model.generate({steps}num_texts=4, seed=0)"]),
        f"print(tokenizer.batch_decode(tokens{'' if about['ends'] == 2 else ', skip_special_tokens=True'}))",
        "```",
    ]


def _measured(source: Source, group: str) -> list[str]:
    found = evaluation_file.read(source.run / evaluation_file.FILE)
    if group != "averaged" or (found.get("step"), found.get("weights")) != (source.found.state["step"], source.found.sha256):
        return ["Nothing: these weights have not been evaluated (`megaflow evaluate` before `megaflow convert`)."]
    likelihood, reference = found["likelihood"], found["reference"]
    lines = []
    given = f", of what is not given by flow.context.law={likelihood['given']}" if "given" in likelihood else ""
    if likelihood.get("bits_per_char") is not None:
        draws, rows = (likelihood.get(f"{name}_bits_per_char") for name in ("standard_error", "row_error"))
        kind = "exact" if likelihood["kind"] == "exact" else "at most"
        beside = f" ± {draws:.3f} of draws" if draws else ""
        beside += f"; other rows of the split would change it by {rows:.3f} beyond what their unigram entropy does" if rows else ""
        unigram = likelihood["unigram_bits_per_char"]
        lines += [
            f"Validation text: {kind} {likelihood['bits_per_char']:.3f} bits per character{given}{beside} (unigram entropy {unigram:.3f}).",
            "",
        ]
    for name, what in (("continuation", "What follows a given first half, or source"), ("ode", "By the flow's equation")):
        if (rest := likelihood.get(name, {})).get("bits_per_char") is not None:
            lines += [f"{what}: {rest['bits_per_char']:.3f} bits per character.", ""]
    judged = found.get("samples", {})
    parts = ", which hold what was given of them too" if given else ""
    asked = found["settings"]
    how = f"{asked['samples']} of each number of steps from --seed {asked['seed']}, at temperature {asked['temperature']:g}"
    how += f", steps even on the clock {asked['clock']}" if "clock" in asked else ""
    how += " (one step is an argmax, which no temperature changes)" if asked["temperature"] != 1.0 and source.kind in FLOWS else ""
    lines += [
        f"Generated texts{parts}, {how}, under a {found['judge']['name']}; always to be read with the entropy beside it "
        "(±: one standard error over texts):",
        "",
    ]
    judges = list(found.get("judges", {}))
    words = [
        "steps",
        "judge, bits per character",
        "entropy of tokens within a text, nats",
        *(f"perplexity under {each}" for each in judges),
    ]
    lines += [f"| {' | '.join(map(_cell, words))} |", "|---" * len(words) + "|"]
    for steps, texts in [*judged.items(), ("real text", reference["data"])]:
        bits, perplexities = texts["judge_bits_per_char"], [texts["judges"][each]["perplexity"] for each in judges]
        errors = [texts.get("judge_standard_error"), texts.get("entropy_standard_error")]
        errors += [texts["judges"][each].get("perplexity_standard_error") for each in judges]
        values = [_with_error(*each) for each in zip((bits, texts["entropy"], *perplexities), errors, strict=True)]
        lines.append(f"| {' | '.join([steps, *values])} |")
    for steps, entry in found.get("mauve", {}).get("samples", {}).items():
        if entry["mauve"] is not None:
            lines += ["", f"MAUVE of texts of {_steps(steps)}: {entry['mauve']:.3f}, of {entry['texts'][0]} texts."]
    for steps, entry in found.get("verify", {}).get("samples", {}).items():
        solved = f"{entry['solved']} of {entry['count']} (95 %: {entry['low']:.3f} to {entry['high']:.3f})"
        lines += ["", f"Solved problems of {found['verify']['task']}, {_steps(steps)}: {solved}."]
    return lines


def _with_error(value: float | None, error: float | None) -> str:
    return "none" if value is None else f"{value:,.2f}" + ("" if error is None else f" ± {error:,.2f}")


def _steps(name: str) -> str:
    return f"{name} steps" if name.isdigit() else name


def _limits(source: Source, about: dict[str, Any]) -> list[str]:
    alone = "and from what the weights it began with had learned" if source.loaded.config.model.start else "alone"
    lines = [
        f"- It has learned from the text above {alone}, says what that says, and has been taught nothing about what not to say.",
        *([f"- A text has at most {about['max_position_embeddings']} tokens."] if about["fixed"].get("length_counts") else []),
    ]
    if source.loaded.config.data.normalize == "letters":
        lines.append(
            "- It reads and writes a to z and spaces alone, and `tokenizer` takes no others: lower the letters, and make the rest spaces."
        )
    if about["no_given"]:
        lines.append(f"- No prompt: {about['no_given']}.")
    if about["needs_given"]:
        lines.append(f"- No text without a prompt: {about['needs_given']}.")
    if about["documents_end"] is not None and source.kind != "autoregressive":
        lines.append(
            "- Documents of a row did not see each other in training, which `documents` tells `forward`; text is written as one of them."
        )
    if source.kind == "autoregressive":
        lines.append(
            "- `forward` takes padding behind a text only. Tokens are embedded by a scaled table and no `nn.Embedding`: what asks for "
            "`get_input_embeddings` finds none."
        )
    elif source.kind in ("flow", "flow_map"):
        lines.append(
            "- Its likelihood is a bound" + (", and that of the flow: a flow map's texts have none." if source.kind == "flow_map" else ".")
        )
    return lines


def _chosen(source: Source) -> list[str]:
    origin, flat, usual = source.loaded.origin, flatten(source.loaded.config), flatten(Config())
    return [
        f"{key}: {json.dumps(flat[key], ensure_ascii=False)}"
        for key in sorted(flat)
        if key.partition(".")[0] in SHOWN and origin.get(key) != "default" and flat[key] != usual[key]
    ]


def _before(source: Source) -> str:
    """Of a flow map, that its training began from a flow's."""
    found = read_if_whole(source.run / TEACHER_FILE)
    return f", from a flow of {found['step']:,} steps" if "step" in found else ""
