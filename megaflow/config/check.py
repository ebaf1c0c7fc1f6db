"""What the values of a config mean together: contradictions, and what `auto` stands for once the data is known."""

import copy
import importlib.metadata
from pathlib import Path
from typing import Any

from megaflow.config import check_flow
from megaflow.config.load import ConfigError, Loaded, assemble, flatten
from megaflow.config.schema import TOKENIZERS, Config
from megaflow.flow import context, laws
from megaflow.flow.prior import on_simplex
from megaflow.flow.weighting import learns

IDENTITY_UP_TO = 256
"""Largest vocabulary whose one-hot state is carried as it is; above, a frame costs less and loses nothing."""

TIME_TOKENS = 4
"""Tokens that tell a trunk the time with model.time=tokens."""

COMPILES_ZERO_3 = (2, 13)
"""torch from which on compiled blocks train under ZeRO 3; 2.11 fails in the backward pass."""


def resolve(loaded: Loaded, vocab: int) -> Loaded:
    """Replace every `auto` by what it stands for with this vocabulary, and refuse contradictions. Raises ConfigError.

    The origin of a replaced value becomes 'auto'.
    """
    config, origin = copy.deepcopy(loaded.config), dict(loaded.origin)

    def settle(section: Any, name: str, dotted: str, value: Any) -> None:
        if getattr(section, name) == "auto":
            setattr(section, name, value)
            origin[dotted] = "auto"

    flow, model, train, optim = config.flow, config.model, config.train, config.optim
    simplex = on_simplex(flow.prior)
    dense = flow.code_dim == vocab or flow.code_dim == "auto" and (vocab <= IDENTITY_UP_TO or flow.skip == "off")
    settle(flow, "code", "flow.code", "identity" if dense else "frame")
    settle(flow, "code_dim", "flow.code_dim", vocab if flow.code == "identity" else min(64, max(2, vocab // 2)))
    settle(flow.clock, "name", "flow.clock.name", "variance" if flow.objective == "likelihood" else "ce_linear")
    settle(model, "heads", "model.heads", heads(model.hidden))
    settle(model, "belief_dim", "model.belief_dim", model.hidden if model.head == "tied" else 128)
    settle(model, "input", "model.input", "linear" if simplex else "belief")
    settle(flow, "skip", "flow.skip", "off" if simplex or model.input == "linear" and flow.code == "identity" else "on")
    if is_map(config):
        settle(config.distill, "state_input", "distill.state_input", "linear" if model.input == "linear" else "hot_belief")
        settle(config.distill, "anchor", "distill.anchor", "data" if train.joint else "teacher")
        settle(config.distill, "weighting", "distill.weighting", "none" if train.joint else "adaptive")
    settle(optim, "name", "optim.name", "muon")
    settle(optim, "warmup_steps", "optim.warmup_steps", min(2500, train.steps // 10))
    settle(train, "validate_every", "train.validate_every", max(50, train.steps // 20))
    found = Loaded(config, origin)
    contradictions(found, vocab)
    return found


def is_map(config: Config) -> bool:
    """Whether what a config trains is a flow map: of a teacher, or together with its flow."""
    return bool(config.distill.teacher) or config.train.joint


def heads(hidden: int) -> int:
    """Attention heads of a trunk of this width: 64 dimensions each, at least four, or what comes nearest with an even number."""
    fitting = [count for count in range(1, hidden // 2 + 1) if hidden % count == 0 and hidden // count % 2 == 0]
    return min(fitting, key=lambda count: abs(count - max(4, hidden / 64)), default=1)


def contradictions(loaded: Loaded, vocab: int | None = None) -> None:
    """Refuse values that cannot hold together. With `vocab` unknown only what does not depend on it. Raises ConfigError."""
    config = loaded.config
    model, train = config.model, config.train

    def refuse(sentence: str, *names: str) -> None:
        places = dict.fromkeys(loaded.origin[name] for name in names if loaded.origin[name] not in ("default", "auto"))
        raise ConfigError((f"{', '.join(places)}: " if places else "") + sentence)

    if not config.run.dir.strip():
        refuse("run.dir is empty; name the directory that the run is to have of its own", "run.dir")
    if not config.data.path.strip():
        refuse("data.path is empty; name the folder of token shards that megaflow prepare has written", "data.path")
    run, data = Path(config.run.dir).resolve(), Path(config.data.path).resolve()
    if run == data or run in data.parents or data in run.parents:
        refuse(
            f"run.dir={config.run.dir} and data.path={config.data.path} lie in one another; a run and its shards need folders of their own",
            "run.dir",
            "data.path",
        )
    count = heads(model.hidden) if model.heads == "auto" else model.heads
    if model.hidden % count:
        refuse(
            f"model.hidden={model.hidden} is not a multiple of model.heads={count}: every head needs the same width",
            "model.hidden",
            "model.heads",
        )
    if model.hidden // count % 2:
        chosen = " (auto)" if loaded.origin["model.heads"] in ("default", "auto") else ""
        refuse(
            f"model.hidden={model.hidden} over model.heads={count}{chosen} gives heads of {model.hidden // count} dimensions; "
            "rotary positions need an even number",
            "model.hidden",
            "model.heads",
        )
    if model.neighbors >= config.data.length:
        refuse(
            f"model.neighbors={model.neighbors} reads beyond both ends of every row of data.length={config.data.length}; give less",
            "model.neighbors",
            "data.length",
        )
    if model.head == "tied" and model.belief_dim not in ("auto", model.hidden):
        refuse(
            f"model.head=tied embeds by output weights of model.hidden={model.hidden} dimensions; model.belief_dim={model.belief_dim} "
            "contradicts it, leave it auto",
            "model.head",
            "model.belief_dim",
        )
    if model.head == "tied" and model.family == "flow" and model.input == "linear":
        refuse("model.head=tied embeds beliefs, and model.input=linear reads none; use untied", "model.head", "model.input")
    if model.time == "none" and model.family == "flow":
        if learns(config.flow.weighting):
            refuse(
                f"flow.weighting={config.flow.weighting} makes weights of what the network is told of the time, and model.time=none tells "
                "it nothing; use balanced, or model.time=adaptive",
                "flow.weighting",
                "model.time",
            )
        if is_map(config):
            refuse("a flow map must be told where it goes, and its flow has model.time=none; train one with adaptive", "model.time")
    parallel = config.parallel
    for name, size in (("model.heads", count), ("data.length", config.data.length)):
        if size % parallel.tensor:
            what = "each of its processes has as many heads" if name == "model.heads" else "each holds as many positions between layers"
            refuse(f"parallel.tensor={parallel.tensor} does not divide {name}={size}: {what}", "parallel.tensor", name)
    if vocab is not None:
        part = -(-vocab // (parallel.tensor * parallel.vocab_multiple)) * parallel.vocab_multiple
        if (parallel.tensor - 1) * part >= vocab:
            refuse(
                f"parallel.tensor={parallel.tensor} processes with multiples of parallel.vocab_multiple={parallel.vocab_multiple} leave "
                f"the last one nothing of a vocabulary of {vocab}; give smaller ones",
                "parallel.tensor",
                "parallel.vocab_multiple",
            )
    if parallel.zero == 0 and train.precision == "bf16" and parallel.tensor > 1:
        refuse(
            f"parallel.zero=0 with train.precision=bf16 and parallel.tensor={parallel.tensor}: DeepSpeed's norm of the gradient, by which "
            "it is clipped, is wrong there; use parallel.zero=1, which needs less memory too",
            "parallel.zero",
            "train.precision",
            "parallel.tensor",
        )
    extra = model.registers + (TIME_TOKENS if model.time == "tokens" and model.family == "flow" else 0)
    beside = f"model.registers={model.registers}" + (f" and {TIME_TOKENS} tokens of the time" if extra > model.registers else "")
    named = ("model.registers", "model.time")
    if extra and model.family != "flow":
        refuse(f"{beside} are of a flow: tokens that all others see have no place in a baseline; use 0", "model.registers")
    if model.time == "tokens" and model.family in ("masked", "uniform"):
        refuse("model.time=tokens are of a flow; a baseline is told the time by model.time=adaptive, or not at all", "model.time")
    if extra % parallel.tensor:
        refuse(f"parallel.tensor={parallel.tensor} does not divide {beside}: each process has as many", "parallel.tensor", *named)
    if extra and config.data.mask_documents:
        refuse(f"{beside} are seen by all documents of a row, which data.mask_documents keeps apart", *named, "data.mask_documents")
    if config.data.mask_documents and config.data.packing == "document":
        refuse(
            "data.mask_documents has no meaning with data.packing=document, whose rows hold one document each; leave it false",
            "data.mask_documents",
            "data.packing",
        )
    if parallel.offload == "optimizer" and parallel.zero == 0:
        refuse(
            "parallel.offload=optimizer needs parallel.zero=1, 2 or 3: what is not sharded stays where the weights are",
            "parallel.offload",
            "parallel.zero",
        )
    torch = importlib.metadata.version("torch")
    if parallel.compile and parallel.zero == 3 and tuple(int(part) for part in torch.split(".")[:2]) < COMPILES_ZERO_3:
        refuse(
            f"parallel.compile=true with parallel.zero=3 needs torch {'.'.join(map(str, COMPILES_ZERO_3))} or later, and here is {torch}: "
            "gradients of weights that are scattered have no shape there; use parallel.zero=1 or 2, or no compile",
            "parallel.compile",
            "parallel.zero",
        )
    if model.family == "flow":
        check_flow.of_flow(config, vocab, refuse)
    if train.joint:
        check_flow.of_joint(config, refuse)
    if is_map(config):
        check_flow.of_map(config, refuse)


def doubts(loaded: Loaded) -> list[str]:
    """What a resolved config says that is allowed and seldom meant, a sentence each."""
    config, found = loaded.config, []
    if int(config.optim.warmup_steps) > config.train.steps:
        reached = f"optim.warmup_steps={config.optim.warmup_steps} of train.steps={config.train.steps}"
        found.append(f"{reached}: the run ends before it comes to optim.learning_rate")
    if config.model.family == "flow" and on_simplex(config.flow.prior):
        found.append(
            f"flow.prior={config.flow.prior} has no likelihood: validation says the cross-entropy at log-SNRs that are evenly spread"
        )
    elif config.model.family == "flow" and config.flow.skip == "off" and config.flow.code not in ("auto", "identity"):
        found.append(f"flow.skip=off with flow.code={config.flow.code} has no likelihood: its tokens are never resolved")
    if is_map(config) and config.distill.state_input == "none" and config.model.input == "belief":
        found.append("distill.state_input=none: beliefs say nothing of the noise at s = 0, and the map's one-step text is the same for all")
    if config.model.family == "flow":
        share, by = config.flow.context.share, context.laws(config.flow.context.law)
        if share and by == {"source"} and not config.data.target_field:
            found.append("flow.context.law=source gives what stands before a row's first end token, and these shards are no pairs")
        if config.data.target_field and not share:
            found.append("these shards are pairs, and flow.context.share=0 gives nothing of them: sources are written as answers are")
        if config.flow.clock.uniform_share == 1.0 and laws.follows_scores(config.flow.clock.name):
            found.append(f"flow.clock.uniform_share=1 leaves nothing of flow.clock.name={config.flow.clock.name}: all times are uniform")
    # a file may share values with other runs; on the command line they are meant for this one
    given = [name for name, origin in loaded.origin.items() if origin == "command line"]
    return found + [f"{name} changes nothing of {why}" for name in given if (why := _without(config, name))]


def _without(config: Config, name: str) -> str:
    """The value that leaves a key unread; empty where it is read."""
    flow, distill = config.flow, config.distill
    if config.model.family != "flow" and name.startswith(("flow.", "model.input")):
        return f"the baseline model.family={config.model.family}"
    if config.model.family == "autoregressive" and name == "model.time":
        return "model.family=autoregressive, which has no time"
    if name.startswith("distill.") and not is_map(config):
        return "a flow: it is of megaflow distill, or of train.joint=true"
    if name == "flow.clock.uniform_share" and flow.clock.name.partition(":")[0] in ("uniform", "mixture"):
        return f"flow.clock.name={flow.clock.name}"
    if name == "flow.clock.refit_every" and not laws.follows_scores(flow.clock.name):
        return f"flow.clock.name={flow.clock.name}, which is not fitted to the run's scores"
    if name == "flow.context.law" and not flow.context.share:
        return "flow.context.share=0"
    if name in ("distill.adaptive_power", "distill.adaptive_constant") and is_map(config) and distill.weighting != "adaptive":
        return f"distill.weighting={distill.weighting}"
    return ""


def of_shards(loaded: Loaded, manifest: dict[str, Any]) -> Loaded:
    """The config with what its shards were made with: values that were set must agree with it, defaults give way. Raises ConfigError."""
    values, origin = flatten(loaded.config), dict(loaded.origin)
    # what prepare was told, of the keys that shape shards; where no target is named there are no pairs
    for name, made in ({"target_field": ""} | manifest["settings"]).items():
        key = f"data.{name}"
        if values[key] == made:
            continue
        if name == "tokenizer" and values[key] not in TOKENIZERS and made not in TOKENIZERS:
            continue  # the same tokenizer.json may lie elsewhere now; its hash is compared with the model's
        if origin[key] != "default":
            those = f"the shards in {values['data.path']}, which were made with {made or 'none'}"
            raise ConfigError(f"{origin[key]}: {key}={values[key]} contradicts {those}; use the value they were made with, or other shards")
        values[key], origin[key] = made, "shards"
    return Loaded(assemble([("shards", values)]).config, origin)


def batch_split(config: Config, processes: int) -> tuple[int, int]:
    """(rows a process holds at once, passes it accumulates) for a global batch. Raises ConfigError where it does not divide.

    train.micro_batch is an upper limit: the largest divisor of a process's rows that does not exceed it is taken.
    """
    rows, remainder = divmod(config.train.global_batch, processes)
    if remainder or rows == 0:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} does not divide over {processes} data-parallel processes; "
            f"use a multiple of {processes}, or another number of processes"
        )
    micro = max(size for size in range(1, min(rows, config.train.micro_batch) + 1) if rows % size == 0)
    return micro, rows // micro
