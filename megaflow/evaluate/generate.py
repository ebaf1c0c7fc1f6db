"""Text from a run: its network, a grid of its clock, a sampler, and its tokenizer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaflow.config import check
from megaflow.config.schema import Config
from megaflow.data.shards import length_counts, read_description
from megaflow.data.tokenizer import decode, end_id, load_tokenizer
from megaflow.errors import UserError
from megaflow.evaluate import discrete_text
from megaflow.evaluate import template as templates
from megaflow.evaluate.template import Template
from megaflow.export import folder
from megaflow.flow import balance, choice, laws, sampler
from megaflow.flow import clock as clocks
from megaflow.flow import head as heads
from megaflow.flow import profile as profiles
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup
from megaflow.flow.context import told
from megaflow.flow.head import Read
from megaflow.flow.sampler import Callback, Posterior
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.build import Baseline
from megaflow.model.discrete import Discrete
from megaflow.model.parts import Parts, draw_noise
from megaflow.model.text_dit import TextDiT
from megaflow.model.trunk import Cache
from megaflow.parallel import random
from megaflow.progress import Progress
from megaflow.train.run import read_run
from megaflow.train.stages import SHARDS, trained_baseline, trained_flow

BATCH = 64
BALANCE_TOKENS = 2**14
"""Positions that the balance of one-step text is found on, or four for every entry of the vocabulary where that is more."""
BLANK = 8
"""Tokens of a blank, unless asked otherwise."""
LAST_STEP = 0.5
"""Share of the clock that the last step of --method flow_map covers, unless asked otherwise: more steps refine the way to there."""


@dataclass
class Run:
    """A trained run, or a model that was converted from one, loaded for sampling and evaluation.

    parts and clock are None for a baseline. step, weights: what identifies its weights, see kept.py; kept: what its stage
    has measured.
    """

    directory: Path
    config: Config
    is_map: bool
    network: TextDiT | Baseline
    parts: Parts | None
    clock: Clock | None
    manifest: dict[str, Any]
    tokenizer: Any
    step: int
    weights: str
    kept: dict[str, Tensor]
    offsets: Tensor | None = None  # see one_step_offsets

    @property
    def kind(self) -> str:
        """flow, flow_map, or the family of a baseline."""
        return "flow_map" if self.is_map else self.config.model.family

    @property
    def flow(self) -> tuple[TextDiT, Parts, Clock]:
        """Network, parts and clock of a flow or flow map; asked of nothing else."""
        assert isinstance(self.network, TextDiT) and self.parts is not None and self.clock is not None
        return self.network, self.parts, self.clock


def load_run(directory: str | Path) -> Run:
    """Any run, baseline included, with its averaged weights; or a converted model, with those it has. Raises UserError."""
    directory = Path(directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if folder.is_model(directory):
        about = folder.read_manifest(directory)
        step, weights, kept = about["source"]["step"], folder.identity(about), folder.stage(directory)
        network, parts, clock, config = folder.load(directory, device)
        is_map = about["kind"] == "flow_map"
    else:
        config = read_run(directory).config
        is_map = check.is_map(config)
        if config.model.family != "flow":
            (network, found), parts, clock = trained_baseline(directory, config, device), None, None
        else:
            network, parts, clock, found = trained_flow(directory, config, is_map, device)
        step, weights, kept = found.state["step"], found.sha256, found.tensors("stage")
    manifest, tokenizer = read_description(directory / SHARDS), load_tokenizer(directory / SHARDS)
    return Run(directory, config, is_map, network, parts, clock, manifest, tokenizer, step, weights, kept)


def sample(
    directory: str | Path,
    count: int,
    steps: int | None,
    method: str = "auto",
    temperature: float = 1.0,
    gamma: float | None = None,
    seed: int = 0,
    last: float | None = None,
    clock: str = "auto",
    prompt: str | None = None,
    infill: str | None = None,
    blank: int | None = None,
) -> dict[str, Any]:
    """`megaflow sample RUN`: texts, their tokens and how they were made. `clock` is the law of flow/laws.py that the grid is even on, auto:
    that of training; prompt, infill and blank are of template.py. Raises UserError."""
    if count < 1:
        raise UserError(f"--count: {count} is not a positive number of texts")
    check_temperature(temperature)
    run = load_run(directory)
    template = given_text(run, prompt, infill, blank)
    method, steps, gamma, last = chosen(run, method, steps, gamma, last)
    if clock != "auto":
        run.clock = grid_clock(run, clock)
    if steps == 1 and method != "ancestral" and temperature != 1.0:
        raise UserError(f"--temperature: one step of {method} is an argmax, which no temperature changes; give --steps 2 or more")
    passes = (steps or run.manifest["length"]) * -(-count // BATCH)
    progress, done = Progress(f"sample {run.directory.name}", passes, "passes"), iter(range(1, passes + 1))

    def tick() -> None:
        progress.update(next(done))

    rows = generate(run, count, steps, method, temperature, gamma, seed, last, tick=tick, template=template)
    settings = {"method": method, "steps": steps, "last": last, "clock": None if run.parts is None else clock}
    settings |= {"temperature": temperature, "gamma": gamma, "seed": seed}
    made = {"run": str(directory), "step": run.step, **settings}
    if template is not None:
        made |= {"prompt": prompt, "infill": infill, "given_tokens": int(template.given.sum())}
        rows = [row[: template.shown] for row in rows]
    return {**made, "texts": [text_of(run, row) for row in rows], "tokens": rows}


def given_text(run: Run, prompt: str | None, infill: str | None, blank: int | None) -> Template | None:
    """What `megaflow sample` is given of every text. Raises UserError."""
    if blank is not None and infill is None:
        raise UserError("--blank is the size of the blanks of --infill; give both")
    if prompt is None and infill is None:
        if run.parts is not None and (run.config.flow.context.share, run.config.flow.context.law) == (1.0, "source"):
            raise UserError(
                f"{run.directory} writes what belongs to a source, which every row of its training had; give one, --prompt TEXT"
            )
        return None
    if prompt is not None and infill is not None:
        raise UserError("--prompt and --infill exclude each other: --infill takes all of the text, its beginning too")
    option = "--prompt" if infill is None else "--infill"
    if run.kind == "uniform":
        raise UserError(f"{option}: {run.directory} replaces tokens by random ones and is given none; use a flow, or model.family=masked")
    if infill is not None and run.kind == "autoregressive":
        raise UserError(f"--infill: {run.directory} is autoregressive and knows nothing of what comes later; use --prompt, or a flow")
    if run.parts is not None and run.config.flow.context.share == 0.0:
        raise UserError(
            f"{option}: {run.directory} has been trained without given tokens (flow.context.share=0) and does not heed them; train a flow "
            "with flow.context.share above 0"
        )
    if infill is not None:
        return templates.of_blanks(run.manifest, run.tokenizer, infill, BLANK if blank is None else blank)
    assert prompt is not None
    return templates.of_prompt(run.manifest, run.tokenizer, prompt)


def grid_clock(run: Run, name: str) -> Clock:
    """The clock of a law by name, fitted to what the run has measured. Raises UserError."""
    if run.parts is None:
        raise UserError(f"--clock: {run.directory} is a baseline (model.family={run.kind}) and has no clock")
    profile = profiles.kept(run.kept)
    try:
        return choice.call(laws.LAWS, name, laws.Measured(run.parts.path, run.parts.code.vocab, profile))
    except choice.ChoiceError as error:
        raise UserError(f"--clock must be {error}") from None
    except laws.NotMeasured as error:
        raise UserError(
            f"--clock {name} is fitted to {error}; use uniform, argmax or logit_normal, or the clock of training, auto"
        ) from None


def check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise UserError(f"--temperature: {temperature} is not a finite number above 0")


def chosen(
    run: Run, method: str, steps: int | None, gamma: float | None, last: float | None
) -> tuple[str, int | None, float | None, float | None]:
    """The sampler's settings after `auto`; refuses what this run cannot do. Raises UserError."""
    if run.kind in ("masked", "uniform"):
        if method not in ("auto", "ancestral") or gamma is not None or last is not None:
            family = f"model.family={run.kind}"
            raise UserError(f"{run.directory} is a baseline ({family}): it takes --steps, and no other --method, --last or --gamma")
        if steps is not None and steps < 1:
            raise UserError(f"--steps: {steps} is not a positive number of steps")
        return "ancestral", steps or 64, None, None
    if run.parts is None:
        if method != "auto" or any(given is not None for given in (steps, gamma, last)):
            raise UserError(
                f"{run.directory} is autoregressive: it writes one token after another and takes no --method, --steps, --last or --gamma"
            )
        return "autoregressive", None, None, None
    if method == "auto":
        method = "stochastic" if gamma is not None else ("flow_map" if run.is_map else "ode")
    if method == "flow_map" and not run.is_map:
        raise UserError(f"{run.directory} is a flow, not a flow map: use --method ode, stochastic or ancestral, or distill it first")
    if method in ("stochastic", "ancestral") and run.parts.prior.law != "gaussian":
        raise UserError(
            f"--method {method} adds Gaussian noise, and {run.directory} has flow.prior={run.parts.prior.name}; use ode or flow_map"
        )
    if gamma is not None and method != "stochastic":
        raise UserError(f"--gamma belongs to --method stochastic, not {method}")
    if method == "stochastic":
        gamma = 0.75 if gamma is None else gamma
        if not 0.0 <= gamma <= 1.0:
            raise UserError(f"--gamma: {gamma} is not between 0 and 1")
    steps = (1 if run.is_map else 64) if steps is None else steps
    if steps < 1:
        raise UserError(f"--steps: {steps} is not a positive number of steps")
    if last is not None and steps == 1:
        raise UserError("--last: with one step there is no other for the last one to differ from; give --steps 2 or more")
    if last is not None and not 0.0 < last < 1.0:
        raise UserError(f"--last: {last} is not a share of the clock between 0 and 1")
    return method, steps, gamma, last_step(method, steps) if last is None else last


def last_step(method: str, steps: int | None) -> float | None:
    """Share of the clock that the last step covers unless asked otherwise; None: as much as any other."""
    return LAST_STEP if method == "flow_map" and steps is not None and steps > 1 else None


@torch.no_grad()
def generate(
    run: Run,
    count: int,
    steps: int | None,
    method: str,
    temperature: float,
    gamma: float | None,
    seed: int,
    last: float | None = None,
    callback: Callback | None = None,
    unbalanced: bool = False,
    tick: Callable[[], None] = lambda: None,
    template: Template | None = None,
) -> list[list[int]]:
    """`count` rows of tokens, each a function of (seed, its index) alone; `callback` sees the steps of the first batch, `tick` is
    called after every pass of the network.

    `last` is the share of the clock that the last step covers; None is an even grid. The one-step text of a map is balanced, so that
    its tokens are as frequent as the law says (flow/balance.py), or `unbalanced`, as are those that are given something by a template.
    """
    check_temperature(temperature)
    balanced = run.is_map and steps == 1 and method in ("flow_map", "stochastic") and not unbalanced and template is None
    offset = one_step_offsets(run) if balanced else None
    rows: list[list[int]] = []
    for start in range(0, count, BATCH):
        places = list(range(start, min(start + BATCH, count)))
        lengths = row_lengths(run, places, seed, 0 if template is None else template.longest)
        if template is not None and template.lengths is not None:
            lengths = [template.lengths[place % len(template.lengths)] for place in places]
        if run.kind == "autoregressive":
            ids = write_autoregressively(run, places, temperature, seed, tick, template)
            lengths = None if lengths is None else written_lengths(run, ids, lengths)
        elif run.parts is None:
            assert isinstance(run.network, Discrete)
            ids = discrete_text.write(run.network, run.manifest["length"], places, lengths, steps or 1, temperature, seed, tick, template)
        else:
            see = callback if callback is not None and start == 0 else sampler.silent
            ids = write_by_flow(run, places, lengths, steps or 1, last, method, temperature, gamma, seed, see, offset, tick, template)
        rows += ids.tolist() if lengths is None else [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    return rows


def write_by_flow(
    run: Run,
    places: list[int],
    lengths: list[int] | None,
    steps: int,
    last: float | None,
    method: str,
    temperature: float,
    gamma: float | None,
    seed: int,
    see: Callback,
    offset: Tensor | None,
    tick: Callable[[], None],
    template: Template | None = None,
) -> Tensor:
    """(B, L) tokens by one of the samplers, on `steps` steps of the run's own clock."""
    network, parts, clock = run.flow
    device = network.weight.device
    shape = (run.manifest["length"], parts.code.dim)
    counted = None if lengths is None else torch.tensor(lengths, device=device)

    def fresh(step: int) -> Tensor:
        return random.normal(places, shape, seed, "sampler noise", step).to(device)

    denoise = denoiser(run, places, counted, temperature, seed, method == "ancestral", offset, tick, template)
    path = parts.path
    y = path.scale * draw_noise(parts, places, shape[0], seed, "initial noise")
    times = clocks.grid(clock, steps, last).tolist()
    if method == "ode":
        return sampler.ode(denoise, path, y, times, see)
    if method == "flow_map":
        return sampler.flow_map(denoise, path, y, times, see)
    if method == "stochastic":
        assert gamma is not None
        towards = denoise if run.is_map else (lambda y, s, t: denoise(y, s, s))
        return sampler.stochastic(towards, path, y, times, gamma, fresh, see)
    return sampler.ancestral(denoise, path, lambda ids: lookup(parts.code, ids), y, times, fresh, see)


def denoiser(
    run: Run,
    places: list[int],
    lengths: Tensor | None,
    temperature: float,
    seed: int,
    draws: bool,
    offset: Tensor | None,
    tick: Callable[[], None],
    template: Template | None = None,
) -> Callable[[Tensor, float, float], Posterior]:
    """The network as samplers see it. `draws`: tokens are drawn from the posterior instead of its most likely ones, after `offset`. A
    network that recalls is told what it said a step before. What a template gives is clean in every state that the network sees, and
    certain in what it says."""
    network, parts, _ = run.flow
    known, given = (None, None) if template is None else template.rows(places, network.weight.device)
    clean = None if known is None else lookup(parts.code, known)
    calls = iter(range(10**9))
    said: list[Tensor | None] = [None]

    def denoise(y: Tensor, s: float, t: float) -> Posterior:
        start, end = (told(torch.full((len(y),), x, dtype=torch.float64, device=y.device), given) for x in (s, t))
        if clean is not None and given is not None:
            y = torch.where(given[..., None], clean, y)
        hidden = network(y, start, end if run.is_map else None, lengths, said=said[0])
        read, shape = network.read(hidden, y, start), y.shape[:2]
        mean, tokens, confidence = heads.posterior(network.head(), read, temperature, offset)
        if draws:
            step = next(calls)
            uniform = torch.stack([torch.rand(shape[1], generator=random.generator(seed, "token draws", step, place)) for place in places])
            tokens, confidence = heads.draw(network.head(), read, uniform.flatten().to(y.device), temperature)
        tick()
        said[0] = mean.view(y.shape) if network.recall is not None else None
        found = Posterior(mean.view(y.shape), tokens.view(shape), confidence.view(shape))
        if clean is None or known is None or given is None:
            return found
        certain = torch.where(given, 1.0, found.confidence)
        return Posterior(torch.where(given[..., None], clean, found.mean), torch.where(given, known, found.tokens), certain)

    return denoise


@torch.no_grad()
def one_step_offsets(run: Run) -> Tensor:
    """Offsets (V,) of the balance of a map's one-step text: a function of its weights alone, found once for as long as it is loaded."""
    if run.offsets is not None:
        return run.offsets
    network, parts, _ = run.flow
    width, law = run.manifest["length"], parts.log_prior.exp()
    total = -(-max(BALANCE_TOKENS, 4 * len(law)) // width)
    progress, found = Progress(f"balance {run.directory.name}", total, "rows"), []
    for start in range(0, total, BATCH):
        places = list(range(start, min(start + BATCH, total)))
        lengths = row_lengths(run, places, 0)
        counted = None if lengths is None else torch.tensor(lengths, device=law.device)
        y = parts.path.scale * draw_noise(parts, places, width, 0, "balance noise")
        zero = torch.zeros(len(y), dtype=torch.float64, device=law.device)
        read = network.read(network(y, zero, zero + 1.0, counted), y, zero)
        logits, ids = heads.likeliest(network.head(), read)
        here = slice(None) if counted is None else (torch.arange(width, device=law.device) < counted[:, None]).flatten()
        found.append((logits[here], ids[here]))
        progress.update(places[-1] + 1)
    logits, ids = (torch.cat(column) for column in zip(*found, strict=True))
    run.offsets = balance.offsets(logits, ids, law.to(logits))
    return run.offsets


def write_autoregressively(
    run: Run, places: list[int], temperature: float, seed: int, tick: Callable[[], None], template: Template | None = None
) -> Tensor:
    """(B, L) tokens drawn one after another, keys and values cached; those that a template gives are taken from it."""
    network, cache, width = run.network, Cache(), run.manifest["length"]
    assert isinstance(network, Autoregressive)
    uniform = torch.stack([torch.rand(width, generator=random.generator(seed, "token draws", place)) for place in places])
    previous, columns = None, []
    known, given = (None, None) if template is None else template.rows(places, network.weight.device)
    for position in range(width):
        hidden = network.step(previous, len(places), cache)
        previous, _ = heads.draw(network.head(), Read(hidden), uniform[:, position].to(hidden.device), temperature)
        if known is not None and given is not None:
            previous = torch.where(given[:, position], known[:, position], previous)
        columns.append(previous)
        tick()
    return torch.stack(columns, 1)


def written_lengths(run: Run, ids: Tensor, drawn: list[int]) -> list[int]:
    """How far a baseline wrote each row (B, L) of one document: up to its end token, which counts. Without such a token it cannot
    say where a text ends, which is then as long as is `drawn` for a flow."""
    end = run.manifest["tokenizer"]["end_id"]
    if end is None:
        return drawn
    ended = (ids == end) & ((ids == end).cumsum(1) == ends(run))
    return torch.where(ended.any(1), ended.int().argmax(1) + 1, ids.shape[1]).tolist()


def ends(run: Run) -> int:
    """End tokens in a row of one document: one, and of a pair two."""
    return 2 if run.manifest["settings"].get("target_field") else 1


def row_lengths(run: Run, places: list[int], seed: int, least: int = 0) -> list[int] | None:
    """Lengths of rows of single documents, drawn from those of the training rows that are longer than `least`, or the whole width where
    there is none; None where every row is full."""
    counts = length_counts(run.directory / SHARDS)
    if counts is None:
        return None
    counts = np.where(np.arange(len(counts)) > least, counts, 0)
    counts[-1] += not counts.any()
    cumulative = np.cumsum(counts / counts.sum())
    return [min(int(np.searchsorted(cumulative, random.uniform(seed, "length", place), side="right")), len(counts) - 1) for place in places]


def text_of(run: Run, row: list[int]) -> str:
    """Decoded text of a row. A row of one document (packing=document) ends before its end token; what is given of a pair is a line of its
    own."""
    end = end_id(run.tokenizer)
    if run.manifest["packing"] == "document" and end is not None:
        places = [place for place, token in enumerate(row) if token == end]
        row = row[: places[ends(run) - 1]] if len(places) >= ends(run) else row
    return decode(run.tokenizer, row)
