"""`megaflow sample RUN`: text from a run of any kind."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from megaflow.errors import UserError
from megaflow.evaluate import autoregressive_text, discrete_text, flow_text
from megaflow.evaluate import template as templates
from megaflow.evaluate.loaded import Run, load_run, row_lengths, text_of
from megaflow.evaluate.settings import Settings, check_temperature, resolved
from megaflow.evaluate.template import Template
from megaflow.flow import context, sampler
from megaflow.flow.sampler import Callback
from megaflow.progress import Progress

BLANK = 8
"""Tokens of a blank, unless asked otherwise."""


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
    settings = resolved(run, Settings(steps, method, temperature, gamma, seed, last))
    if clock != "auto":
        run.clock = flow_text.grid_clock(run, clock)
    rows = generate(run, count, settings, template, tick=ticking(f"sample {run.directory.name}", run, settings, [count]))
    made = {"run": str(directory), "step": run.step, **settings._asdict(), "clock": None if run.parts is None else clock}
    if template is not None:
        made |= {"prompt": prompt, "infill": infill, "given_tokens": int(template.given.sum())}
        rows = [row[: template.shown] for row in rows]
    return {**made, "texts": [text_of(run, row) for row in rows], "tokens": rows}


UNTRAINED = {
    "--prompt": {"suffix": "what is written before an end alone; use --infill '___ TEXT'"},
    "--infill": {
        "prefix": "what is written after a beginning alone; use --prompt",
        "source": "what belongs to a source alone; use --prompt",
    },
}
"""Laws of contexts by which what an option gives never came up, and what a flow knows then."""


def given_text(run: Run, prompt: str | None, infill: str | None, blank: int | None) -> Template | None:
    """What `megaflow sample` is given of every text. Raises UserError."""
    if blank is not None and infill is None:
        raise UserError("--blank is the size of the blanks of --infill; give both")
    if prompt is None and infill is None:
        if needs_source(run):
            raise UserError(
                f"{run.directory} writes what belongs to a source, which every row of its training had; give one, --prompt TEXT"
            )
        return None
    if prompt is not None and infill is not None:
        raise UserError("--prompt and --infill exclude each other: --infill takes all of the text, its beginning too")
    option = "--prompt" if infill is None else "--infill"
    if not (prompt or infill or "").strip():
        raise UserError(f"{option} holds nothing but spaces; leave it out, or give some text")
    check_given(run, option, option)
    if infill is not None:
        return templates.of_blanks(run.manifest, run.tokenizer, infill, BLANK if blank is None else blank)
    assert prompt is not None
    return templates.of_prompt(run.manifest, run.tokenizer, prompt)


def needs_source(run: Run) -> bool:
    """Whether a flow was never without a source."""
    return run.parts is not None and run.config.flow.context.share == 1.0 and context.laws(run.config.flow.context.law) == {"source"}


def check_given(run: Run, form: str, option: str) -> None:
    """Refuse to give a run what it has not been trained for, in the form of --prompt or --infill, by any option. Raises UserError."""
    if run.kind == "uniform":
        raise UserError(f"{option}: {run.directory} replaces tokens by random ones and is given none; use a flow, or model.family=masked")
    if form == "--infill" and run.kind == "autoregressive":
        raise UserError(f"{option}: {run.directory} is autoregressive and knows nothing of what comes later; use --prompt, or a flow")
    if run.parts is not None and run.config.flow.context.share == 0.0:
        raise UserError(
            f"{option}: {run.directory} has been trained without given tokens (flow.context.share=0) and does not heed them; train a flow "
            "with flow.context.share above 0"
        )
    laws = context.laws(run.config.flow.context.law)
    if run.parts is not None and laws <= set(UNTRAINED[form]):
        law, knows = run.config.flow.context.law, UNTRAINED[form][min(laws)]
        raise UserError(
            f"{option}: {run.directory} has been trained with flow.context.law={law} and knows {knows}, or a flow "
            "with flow.context.law=mixture"
        )


def ticking(label: str, run: Run, settings: Settings, counts: Iterable[int], patience: float = 0.0) -> Callable[[], None]:
    """What `generate` is to call after every pass, so that the passes of calls for so many texts show their progress."""
    passes = (settings.steps or run.manifest["length"]) * sum(-(-count // flow_text.BATCH) for count in counts)
    progress, done = Progress(label, passes, "passes", patience=patience), iter(range(1, passes + 1))
    return lambda: progress.update(next(done))


@torch.no_grad()
def generate(
    run: Run,
    count: int,
    settings: Settings,
    template: Template | None = None,
    unbalanced: bool = False,
    callback: Callback | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """`count` rows of tokens, each a function of (seed, its index) alone; `callback` sees the steps of the first batch, `tick` is
    called after every pass of the network. The settings are `resolved`.

    The one-step text of a map is balanced, so that its tokens are as frequent as the law says (flow/balance.py), or `unbalanced`, as are
    those that are given something by a template.
    """
    balanced = run.is_map and settings.steps == 1 and settings.method in ("flow_map", "stochastic") and not unbalanced and template is None
    offset = run.balance() if balanced else None
    rows: list[list[int]] = []
    for start in range(0, count, flow_text.BATCH):
        places = list(range(start, min(start + flow_text.BATCH, count)))
        lengths = row_lengths(run, places, settings.seed, None if template is None else template.ends(places))
        if template is not None and template.lengths is not None:
            lengths = [template.lengths[place % len(template.lengths)] for place in places]
        if run.kind == "autoregressive":
            ids = autoregressive_text.write(run, settings, places, template, tick)
            lengths = None if lengths is None else autoregressive_text.written_lengths(run, ids, lengths)
        elif run.parts is None:
            ids = discrete_text.write(run, settings, places, lengths, template, tick)
        else:
            see = callback if callback is not None and start == 0 else sampler.silent
            ids = flow_text.write(run, settings, places, lengths, template, tick, see, offset)
        rows += ids.tolist() if lengths is None else [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    return rows
