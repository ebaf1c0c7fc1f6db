"""How many problems of a verifiable task a run solves (`megaflow evaluate --verify NAME`), by the samplers that write judged texts.

Of a run of pairs the prompts are given and the answers are checked; of others whole texts are. Problems are those that training texts have
none of (verifiable.py), which the run's own rows are held to: those of validation must be solved problems of the task, and no training
row may be one that is held out.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import decode, end_id
from megaflow.errors import UserError
from megaflow.evaluate import template as templates
from megaflow.evaluate import verifiable
from megaflow.evaluate.generate import check_given, generate
from megaflow.evaluate.loaded import Run
from megaflow.evaluate.real_text import RealText
from megaflow.evaluate.settings import Settings
from megaflow.evaluate.verifiable import Problem, Task
from megaflow.flow.choice import ChoiceError
from megaflow.progress import Progress

OPTION = "--verify"
SHOWN, AT_ONCE = 8, 1024


def named(name: str) -> Task:
    """The task of a name. Raises UserError."""
    try:
        return verifiable.task(name)
    except ChoiceError as error:
        raise UserError(f"{OPTION} must be {error}") from None


def asked_task(run: Run, name: str) -> Task:
    """The task of a name, of a run that can be asked it. Raises UserError."""
    task = named(name)
    option, pairs = f"{OPTION} {task.name}", bool(run.manifest["settings"].get("target_field"))
    if run.manifest["packing"] != "document" or end_id(run.tokenizer) is None:
        raise UserError(
            f"{option}: a row of {run.directory} is no single text with an end; prepare data.packing=document with such a tokenizer"
        )
    if pairs != task.prompted:
        has, needs = ("pairs", "whole texts") if pairs else ("whole texts", "pairs of data.target_field")
        raise UserError(f"{option}: {run.directory} was trained on {has}, and the task is of {needs}; give a run of texts of {task.name}")
    if task.prompted:
        check_given(run, "--prompt", option)
    elif run.parts is not None and run.config.flow.context.share == 1.0:
        raise UserError(f"{option}: every row of {run.directory} had something given; give a run with flow.context.share below 1")
    return task


def check_rows(run: Run, task: Task, held_out: RealText) -> None:
    """Refuse a run whose validation rows are no solved problems of the task, or which was trained on problems that are to be asked: all of
    its training rows are read. Raises UserError."""
    option = f"{OPTION} {task.name}"
    for row in held_out.rows:
        problem = said(run, task, row)
        if not task.solved(*problem):
            read = " ".join(map(repr, filter(None, problem)))
            raise UserError(f"{option}: a row of {run.config.data.path} is no solved problem of it, {read}; give the task it was made for")
    stream = TokenStream(run.config.data.path, "train", run.config.run.seed, shuffle=False)
    progress, asked, example = Progress("training problems", len(stream), "rows"), 0, ""
    for start in range(0, len(stream), AT_ONCE):
        ids, lengths = stream.rows(torch.arange(start, min(start + AT_ONCE, len(stream))))
        for row, length in zip(ids.tolist(), lengths.tolist(), strict=True):
            problem = said(run, task, row[:length])
            if (task.prompted or task.solved(*problem)) and verifiable.is_held_out(task, problem):  # with a wrong answer, too
                asked, example = asked + 1, "".join(problem)
        progress.update(min(start + AT_ONCE, len(stream)))
    if asked:
        raise UserError(
            f"{option}: {asked:,} of the {len(stream):,} training rows of {run.config.data.path} are problems that are to be asked, such "
            f"as {example!r}; train on texts of tools/verifiable_text.py, which leaves those out"
        )


def said(run: Run, task: Task, row: list[int]) -> Problem:
    """What a row of one document gives and says: up to its end, and of a pair from one end to the next; all of it where none comes."""
    end, parts = end_id(run.tokenizer), []
    for _ in range(2 if task.prompted else 1):
        stop = row.index(end) if end in row else len(row)
        parts.append(decode(run.tokenizer, row[:stop]))
        row = row[stop + 1 :]
    return Problem(*parts) if task.prompted else Problem("", parts[0])


def measured(run: Run, name: str, count: int, seed: int, ways: list[Settings], tick: Callable[[Settings], None]) -> dict[str, Any]:
    """Solved problems by number of steps, with the interval of their share; the same problems, as many as `count`, for every way of
    writing. Of whole texts, how many differ, and how many of those that are solved are held out, is beside it. `tick` is called after
    each way. Raises UserError."""
    task = asked_task(run, name)
    problems, template = [Problem("", "")] * count, None
    if task.prompted:
        problems = list(itertools.islice(verifiable.drawn(task, seed, held_out=True), count))
        template = templates.of_prompts(run.manifest, run.tokenizer, [problem.prompt for problem in problems], f"{OPTION} {task.name}")
    found: dict[str, Any] = {"task": task.name, "held_out_share": verifiable.HELD_OUT, "samples": {}}
    for way in ways:
        rows = generate(run, count, way, template)
        answers = [said(run, task, row).answer for row in rows]
        entry = scored(task, [problem.prompt for problem in problems], answers)
        found["samples"]["autoregressive" if way.steps is None else str(way.steps)] = entry
        tick(way)
    return found


def scored(task: Task, prompts: list[str], answers: list[str]) -> dict[str, Any]:
    """solved, of count, their share and its interval (`low` to `high`), `distinct` answered problems, and how many solved ones are held
    out; `right` of each, and the first of them."""
    both = list(map(Problem, prompts, answers))
    right = [task.solved(*problem) for problem in both]
    solved = [problem for problem, is_right in zip(both, right, strict=True) if is_right]
    low, high = verifiable.wilson(len(solved), len(both))
    return {
        "solved": len(solved),
        "count": len(both),
        "share": len(solved) / len(both),
        "low": low,
        "high": high,
        "distinct": len(set(both)),
        "held_out": sum(verifiable.is_held_out(task, problem) for problem in solved),
        "right": right,
        "answers": [[*problem] for problem in both[:SHOWN]],
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines of the evaluation's table."""
    head = f"solved of {found['task']}"
    lines = [f"{head:<34}{'share':>10}{'95%':>18}{'solved':>12}{'distinct':>10}{'held out':>10}"]
    for name, entry in found["samples"].items():
        label = f"{name} steps" if name.isdigit() else name
        interval, of = f"{entry['low']:.3f} to {entry['high']:.3f}", f"{entry['solved']}/{entry['count']}"
        lines.append(f"{label:<34}{entry['share']:>10.3f}{interval:>18}{of:>12}{entry['distinct']:>10}{entry['held_out']:>10}")
    return lines
