"""`megaflow config`: the resolved tree with origins, and the list of all keys."""

import os
from pathlib import Path
from typing import Any

from megaflow.config.check import contradictions, doubts, of_shards, resolve
from megaflow.config.load import ConfigError, Loaded, describe, flatten, load
from megaflow.config.schema import keys
from megaflow.errors import UserError
from megaflow.files import read_if_whole
from megaflow.train.run import load_distill


def is_there(run: str | Path) -> bool:
    """Whether a run's directory is there. One that only jobs have written to, which wait to begin it, is not yet."""
    return os.path.isdir(run) and (not os.path.isdir(os.path.join(run, "slurm")) or os.path.isfile(os.path.join(run, "config.yaml")))


def known(path: str, overrides: list[str], sizes: bool = False) -> tuple[Loaded, int | None]:
    """A config with what its teacher and its shards say, where these are there, and the size of their vocabulary, else None.

    sizes: whether it is asked for its network's sizes, which a flow map has from its teacher: ConfigError where that is not there.
    """
    loaded = load(path, overrides)
    there = is_there(loaded.config.distill.teacher)
    if sizes and loaded.config.distill.teacher and not there:
        raise ConfigError(
            f"distill.teacher={loaded.config.distill.teacher}: no such directory, and a flow map has its network and its rows from its "
            "teacher; start that first, or give another distill.teacher=RUN"
        )
    if loaded.config.distill.teacher and there:
        loaded = load_distill(path, overrides)
    contradictions(loaded)
    if not os.path.isfile(os.path.join(loaded.config.data.path, "prepared.json")):
        return loaded, None
    from megaflow.data.shards import read_manifest

    manifest = read_manifest(loaded.config.data.path)
    return of_shards(loaded, manifest), manifest["tokenizer"]["vocab_size"]


def rows_of(path: str) -> str:
    """What tells the rows of shards from others, wherever they lie; the path where nothing is there yet. Raises UserError."""
    if not os.path.isfile(os.path.join(path, "prepared.json")):
        return path
    from megaflow.data.shards import identity, read_manifest

    return identity(read_manifest(path))


def tokenizer_of(path: str) -> str:
    """What tells the tokenizer of shards from others; empty where nothing is there yet, or damaged."""
    found = read_if_whole(Path(path) / "prepared.json").get("tokenizer")
    return str(found.get("hash", "")) if isinstance(found, dict) else ""


def rows_read(run: Path) -> str:
    """The same of the rows that a run has been trained on, by what it has kept of its shards; empty where it has kept nothing whole."""
    from megaflow.data.shards import identity, read_description

    try:
        return identity(read_description(run / "shards"))
    except UserError:
        return ""


def foreseen(loaded: Loaded) -> int | None:
    """The entries of the vocabulary that prepare will find or make, None where only the text knows, or a file that is not here.

    A BPE has as many as it is asked for; with very little text fewer, which prepare says.
    """
    from megaflow.data.tokenizer import given_tokenizer, vocabulary_size

    data = loaded.config.data
    if data.tokenizer == "bpe":
        said = any(loaded.origin[name] != "default" for name in ("data.tokenizer", "data.vocab_size"))
        return data.vocab_size if said else None
    try:
        tokenizer = given_tokenizer(data)
    except UserError:
        return None
    return None if tokenizer is None else vocabulary_size(tokenizer)


def resolved(path: str | None, overrides: list[str]) -> str:
    """Every key with its value and origin, as YAML with comments. `auto` is resolved where data.path is already prepared."""
    if path is None:
        raise ConfigError("megaflow config needs a CONFIG file, or --keys")
    loaded, vocab = known(path, overrides)
    if vocab is not None:
        loaded = resolve(loaded, vocab)
    lines: list[str] = []
    section: tuple[str, ...] = ()
    for name, value in flatten(loaded.config).items():
        *parents, leaf = name.split(".")
        for depth, parent in enumerate(parents):
            if tuple(parents[: depth + 1]) != section[: depth + 1]:
                lines.append("  " * depth + parent + ":")
        section = tuple(parents)
        lines.append(f"{'  ' * len(parents)}{leaf}: {_yaml(value)}".ljust(47) + f" # {loaded.origin[name]}")
    if vocab is None:
        lines.append(f"# auto values, and what depends on the vocabulary, are known once {loaded.config.data.path} is prepared")
    else:
        lines += [f"# warning: {sentence}" for sentence in doubts(loaded)]
    return "\n".join(lines)


def all_keys() -> str:
    """One line a key: name, what it accepts, default, meaning."""
    return "\n".join(
        f"{name:<28} {item.metadata['help']}\n{'':<28}   {describe(item)}; default {_yaml(_default(item))}" for name, item in keys().items()
    )


def _default(item: Any) -> Any:
    return item.default_factory() if callable(item.default_factory) else item.default


def _yaml(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, list, bool)) else repr(value)
