"""Every key a config may hold: one dataclass per part, one field per key.

A field says what it means, which values it takes and whether `auto` is one of them, so that the loader can
refuse a wrong value with one sentence (see load.py) and `megaflow config --keys` can list all of them.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    auto: bool = False,
    table: str = "",
) -> Any:
    """A config field: its default, its meaning and the values it accepts (`above` is an open lower end).

    table: 'module:NAME' of the functions that a value names, with options if they take any (flow/choice.py); read when it is needed,
    since what computes imports torch.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above, "auto": auto, "table": table}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


TOKENIZERS = ("characters", "bytes", "bpe", "gpt2", "bert")
"""Names of tokenizers; anything else is the path of a tokenizer.json."""


@dataclass
class RunConfig:
    dir: str = key("runs/run", "directory of the run; nothing is written outside it")
    seed: int = key(0, "seed of weights, order of samples, noise and times", low=0)


@dataclass
class DataConfig:
    path: str = key("runs/data", "folder of token shards: written by prepare, read by training")
    source: list[str] = key([], "files or glob patterns of raw text that prepare reads")
    source_format: str = key("auto", "format of the sources; auto goes by file name", choices=("auto", "text", "jsonl", "parquet"))
    text_field: str = key("text", "field of JSONL or column of Parquet that holds the text")
    target_field: str = key("", "of pairs: the field of what is to be written, where text_field's is given (data.packing=document)")
    document_separator: str = key("", "string between documents of a plain text file; empty: a file is one document")
    normalize: str = key("none", "letters: lower-case a-z, everything else one space (27 symbols)", choices=("none", "letters"))
    tokenizer: str = key("bpe", "characters, bytes, bpe (trained by prepare), gpt2, bert, or the path of a tokenizer.json")
    tokenizer_path: str = key("", "folder with the vocabulary files of gpt2 (encoder.json, vocab.bpe) or bert (vocab.txt)")
    vocab_size: int = key(4096, "size of the BPE that prepare trains", low=257)
    length: int = key(64, "tokens in a row", low=2)
    packing: str = key("wrap", "wrap: documents end to end, cut to length; document: one a row, padded", choices=("wrap", "document"))
    mask_documents: bool = key(False, "with packing=wrap, documents that share a row do not see each other in training")
    format: str = key(
        "mds",
        "shards that prepare writes: of mosaicml-streaming, or tar for WebDataset; the rows and their order are the same",
        choices=("mds", "webdataset"),
    )
    validation_fraction: float = key(0.05, "share of documents held out", above=0.0, high=0.5)
    on_bad_line: str = key("skip", "what a broken line of JSONL does", choices=("skip", "stop"))
    workers: Any = key("auto", "processes that tokenize", low=1, auto=True)


@dataclass
class ModelConfig:
    family: str = key(
        "flow",
        "what is trained on this trunk: a flow, or a baseline; masked and uniform are discrete diffusion by tokens hidden or replaced",
        choices=("flow", "autoregressive", "masked", "uniform"),
    )
    layers: int = key(4, "transformer blocks", low=1)
    hidden: int = key(128, "width of the trunk", low=8)
    heads: Any = key("auto", "attention heads; auto: of 64 dimensions each, at least 4", low=1, auto=True)
    mlp_ratio: int = key(4, "width of the MLP over the width of the trunk", low=1)
    input: str = key("auto", "what the trunk reads of the state", choices=("auto", "belief", "linear", "both"))
    belief_dim: Any = key(
        "auto",
        "dimensions of the belief (or token) embedding before the trunk's width; auto: 128, or those of a tied head",
        low=1,
        auto=True,
    )
    neighbors: int = key(1, "positions to each side that the input layer reads beside the token's own", low=0)
    attention: str = key("auto", "attention kernel", choices=("auto", "flash", "sdpa", "plain"))
    time: str = key(
        "adaptive",
        "how the trunk is told the time: by norms that it moves, by tokens beside the text, or not at all",
        choices=("adaptive", "tokens", "none"),
    )
    registers: int = key(0, "tokens beside the text, without a place in it, that a flow's trunk may write to", low=0)
    qk_norm: bool = key(True, "queries and keys are normalised before they meet")
    head: str = key("untied", "output weights; tied: they embed beliefs (or tokens) too", choices=("untied", "tied"))
    softcap: float = key(0.0, "attention scores are softcap tanh(score / softcap); 0: as they are", low=0.0)
    start: str = key("", "folder of a GPT-2 or Llama of transformers, whose weights the trunk begins with; empty: drawn")


@dataclass
class ClockConfig:
    name: str = key(
        "auto",
        "law of training times and grid of samplers; auto: variance for flow.objective=likelihood, else ce_linear",
        auto=True,
        table="megaflow.flow.laws:LAWS",
    )
    uniform_share: float = key(0.1, "share of draws uniform in log-SNR, mixed into every law but uniform and mixture", low=0.0, high=1.0)
    bins: int = key(200, "bins of log-SNR that a model's scores are measured in", low=20)
    refit_every: int = key(25, "steps between refits of laws that are measured", low=1)
    memory: float = key(0.98, "decay per step of the running average that laws are fitted to", low=0.0, high=0.9999)


@dataclass
class ContextConfig:
    share: float = key(0.0, "share of rows of which some tokens are given, clean; with 1 validation has them too", low=0.0, high=1.0)
    law: str = key(
        "mixture:prefix=1,suffix=1,infilling=1,random=1",
        "which tokens of such a row are given; source: those up to its first end token",
        table="megaflow.flow.context:CONTEXTS",
    )


@dataclass
class FlowConfig:
    code: str = key(
        "auto",
        "identity: the one-hot state; of code_dim dimensions: frame, a fixed tight frame; semantic, one by what tokens stand beside, or by "
        "code_from; learned, the trained input of one-hot flows; embedding, trained rows of one norm",
        choices=("auto", "identity", "frame", "semantic", "learned", "embedding"),
    )
    code_from: str = key("", "of flow.code=semantic: a run whose output weights say which tokens are alike; empty: the training text does")
    code_dim: Any = key("auto", "dimensions of the state", low=2, auto=True)
    interpolant: str = key("linear", "path from noise to data", table="megaflow.flow.interpolant:PATHS")
    prior: str = key("gaussian", "law of the noise", table="megaflow.flow.prior:PRIORS")
    objective: str = key("cross_entropy", "loss of stage 1", table="megaflow.flow.objective:OBJECTIVES")
    weighting: str = key("none", "weight of a token's loss besides its objective's", table="megaflow.flow.weighting:WEIGHTINGS")
    self_conditioning: float = key(
        0.0,
        "share of rows that are told, in training, what a first pass has said of them; above 0 sampling and the bound tell it too",
        low=0.0,
        high=1.0,
    )
    skip: str = key("auto", "the exact channel term in the logits", choices=("auto", "on", "off"))
    times: str = key("rows", "what has a time of its own in stage 1: every row, or every token", choices=("rows", "tokens"))
    clock: ClockConfig = field(default_factory=ClockConfig)
    context: ContextConfig = field(default_factory=ContextConfig)


@dataclass
class OptimConfig:
    name: str = key(
        "auto",
        "adamw, or muon for the matrices of the blocks and adamw for the rest; auto: muon",
        choices=("auto", "adamw", "muon"),
    )
    learning_rate: float = key(3e-3, "peak learning rate", above=0.0)
    schedule: str = key("cosine", "decay after the warm-up", choices=("constant", "cosine", "linear"))
    final_fraction: float = key(0.1, "learning rate at the last step over its peak", low=0.0, high=1.0)
    warmup_steps: Any = key("auto", "steps of linear warm-up; auto: 2500, at most a tenth of the run", low=0, auto=True)
    beta1: float = key(0.9, "AdamW's first decay", low=0.0, high=0.9999)
    beta2: float = key(0.99, "AdamW's second decay", low=0.0, high=0.99999)
    weight_decay: float = key(0.0, "decoupled decay of the weights", low=0.0)
    clip_norm: float = key(1.0, "largest norm of the gradient; 0: never clipped", low=0.0)
    ema_decay: float = key(0.9999, "decay of the averaged weights, at most (1 + n) / (10 + n) after n steps", low=0.0, high=0.999999)


@dataclass
class ParallelConfig:
    tensor: int = key(1, "tensor-parallel processes: how many hold one network together; the others are data-parallel", low=1)
    vocab_multiple: int = key(1, "entries of the vocabulary that each process holds come in multiples of this, padding included", low=1)
    zero: int = key(0, "ZeRO stage: 0 replicates, 1 shards the optimizer, 2 the gradients too, 3 the weights too", choices=(0, 1, 2, 3))
    recompute: str = key(
        "off",
        "what the backward pass computes again instead of keeping it: selective, what is elementwise; full, every block",
        choices=("off", "selective", "full"),
    )
    compile: bool = key(False, "the blocks by torch.compile")
    offload: str = key("none", "optimizer: its state and step on the CPU, under ZeRO 1 to 3", choices=("none", "optimizer"))


@dataclass
class TrainConfig:
    steps: int = key(1000, "optimizer steps of the whole run", low=1)
    global_batch: int = key(32, "rows in a step, whatever the layout", low=1)
    micro_batch: int = key(32, "most rows a process holds at once; accumulation follows", low=1)
    precision: str = key("fp32", "arithmetic of the trunk; weights, channel and reductions stay fp32", choices=("fp32", "bf16"))
    checkpoint_every: int = key(200, "steps between checkpoints", low=1)
    keep_checkpoints: int = key(2, "checkpoints that are kept", low=1)
    validate_every: Any = key("auto", "steps between validations; auto: a twentieth of the run, 50 at least", low=1, auto=True)
    validation_rows: int = key(64, "validation rows a validation reads", low=1)
    pause_at: int = key(0, "step after which the run validates, saves and leaves with exit code 75, as at a signal; 0: none", low=0)
    hang_timeout: float = key(600.0, "seconds without progress after which a job of several processes ends; 0: it waits for ever", low=0.0)
    joint: bool = key(False, "megaflow pretrain trains flow and map together: rows with s < t by distill.objective beside the flow's own")
    skip_nonfinite: int = key(
        0, "steps in a row that are passed over where loss or gradient is not finite; the next one ends the run", low=0
    )


@dataclass
class DistillConfig:
    teacher: str = key("", "run of the flow that is distilled")
    objective: str = key(
        "psd",
        "what rows with s < t are trained by: psd, the semigroup identity in KL form, or fmlm_mse, by least squares; lsd and esd, "
        "Lagrangian and Eulerian in logits, lsd_cfm and ecld, the Lagrangian residual and a bound on it, by forward-mode derivatives; "
        "dmd, the law of what the map writes, by an auxiliary denoiser",
        table="megaflow.train.map_objective:OBJECTIVES",
    )
    anchor: str = key(
        "auto",
        "what rows with s = t are trained towards: the teacher, or the data by the flow's own objective; auto: the teacher if there is one",
        choices=("auto", "teacher", "data"),
    )
    surgery: bool = key(
        False,
        "the gradient of rows with s < t loses what works against that of rows with s = t; it costs a second backward pass",
    )
    between: str = key(
        "middle", "u of the semigroup identity: the middle on the clock, or uniform between s and t", choices=("middle", "uniform")
    )
    times: str = key(
        "gap",
        "law of s < t on the clock: the gap t - s is uniform, and s in the room that it leaves; or the end t is uniform, and s before it",
        choices=("gap", "end"),
    )
    diagonal_fraction: float = key(0.5, "share of rows with s = t", low=0.0, high=1.0)
    boundary_fraction: float = key(0.03125, "share of the other rows with (s, t) = (0, 1)", low=0.0, high=1.0)
    weighting: str = key(
        "auto",
        "adaptive: detached (|q - p|^2 + c)^-r of the distance to the target; learned: exp(-w) loss + w with w of s and t, or of s alone; "
        "auto: adaptive, but none in joint training",
        choices=("auto", "none", "adaptive", "learned", "learned_start"),
    )
    adaptive_power: float = key(0.5, "r of the adaptive weight", low=0.0, high=1.0)
    adaptive_constant: float = key(0.01, "c of the adaptive weight", above=0.0)
    state_input: str = key(
        "auto",
        "what the map reads of the state besides; auto: hot_belief where the flow reads beliefs, else linear",
        choices=("auto", "hot_belief", "linear", "none"),
    )


@dataclass
class LogConfig:
    every: int = key(1, "steps between lines of metrics.jsonl", low=1)
    wandb: str = key("offline", "Weights & Biases; offline writes below the run directory", choices=("off", "offline", "online"))
    project: str = key("megaflow", "Weights & Biases project")
    group: str = key("", "Weights & Biases group of the run; a sweep's points are one")
    tensorboard: bool = key(False, "metrics as TensorBoard reads them too, below the run directory (pip install megaflow[tensorboard])")
    spike: float = key(4.0, "a loss or norm above this many running medians goes into spikes.jsonl with its samples; 0: none does", low=0.0)


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    log: LogConfig = field(default_factory=LogConfig)


def entries(item: dataclasses.Field) -> Mapping[str, Callable[..., Any]]:
    """The functions that a key with a table chooses from."""
    module, _, name = item.metadata["table"].partition(":")
    return getattr(importlib.import_module(module), name)


def keys(node: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf key of the tree, dotted, with its field: {'run.dir': Field, …}."""
    found: dict[str, dataclasses.Field] = {}
    for item in dataclasses.fields(node):
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            found |= keys(item.type, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = item
    return found
