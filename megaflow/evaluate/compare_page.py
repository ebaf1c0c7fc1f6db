"""The page of `megaflow compare --html`: one self-contained HTML file with the figures, tables and texts of evaluations side by side.

Everything on it is in the comparison (see compare.py) or the evaluations; nothing is measured here. What no run has is left out. The same
evaluations give the same bytes. A run has one colour and one marker all over the page, and a short name, the end of its path.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from megaflow.evaluate import compare_figures as drawn
from megaflow.evaluate import kept, side_by_side
from megaflow.evaluate.report import environment, judge_figures
from megaflow.train.run import versions

MOST_TEXTS = 3
"""Of a run at a number of steps on the page."""
BAR = 120.0
"""Width of a bar of an interval, in its own units."""


def html(result: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> str:
    """The page of a comparison, as compare.compare returns it, of these evaluations {run: what evaluation.json holds}."""
    page = environment()
    page.filters |= {"signed": signed, "significance": significance}
    style = drawn.styles(list(evaluations))
    judges = side_by_side.judges_of(evaluations)
    return page.get_template("compare.html.j2").render(
        generator=Markup(kept.GENERATOR),
        result=result,
        evaluations=evaluations,
        names=side_by_side.short_names(list(evaluations)),
        style=style,
        levels=levels(result, evaluations),
        rows=rows_figures(result, evaluations, style),
        parts=parts_figures(evaluations, style),
        panels=judge_figures(evaluations, judges, style),
        judges=judges,
        writers={judge.sha256: run for judge in judges for run in evaluations if Path(run).resolve() == Path(judge.path).resolve()},
        samples=[texts for run, found in evaluations.items() for texts in side_by_side.samples_of(run, found)],
        others=[texts for run, found in evaluations.items() for texts in side_by_side.others_of(run, found)],
        matched=side_by_side.matched_of(evaluations, judges),
        mauve=side_by_side.mauve_of(evaluations),
        repetition=side_by_side.repetition_of(evaluations),
        nearest=side_by_side.nearest_of(evaluations),
        solved=side_by_side.solved_of(result["verify"]),
        asked_others=result["verify_others"],
        answers=side_by_side.answers_of(evaluations, result["verify"]),
        written=written(evaluations),
        most_texts=MOST_TEXTS,
        told={run: told(found["settings"]) for run, found in evaluations.items()},
        text_hashes=list(dict.fromkeys(pair for found in evaluations.values() for pair in found["settings"].get("texts", {}).items())),
        versions=versions(),
    )


def signed(value: float | None, digits: int = 4) -> str:
    """'+0.0120' or '−0.0120', with a minus sign; a dash for what there is not."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def significance(p: float | None) -> str:
    """'0.031', '< 0.001', or a dash."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def told(settings: dict[str, Any]) -> str:
    """Settings in a line, without files, whose hashes stand by themselves."""
    words = (
        f"{key} {json.dumps(value, ensure_ascii=False)}"
        for key, value in settings.items()
        if key not in ("texts", "judges") and value is not None
    )
    return ", ".join(words)


def levels(result: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The tables of likelihood: title, first (the run that differences are from), entries {run: of compare.against_first}, unigram
    entropies in nats per token {run: float}, and of each difference a bar of its interval."""
    measured = {run: found["likelihood"] for run, found in evaluations.items()}
    found: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [("validation", "", result["likelihood"], measured)]
    rest = {run: entry["continuation"] for run, entry in measured.items() if "continuation" in entry}
    found.append(("continuation", "", result["continuation"], rest))
    equations = {run: entry["ode"] for run, entry in measured.items() if "ode" in entry}
    found.append(("equation", "", result["equation"], equations))
    for path, entries in result["texts"].items():
        first = next(iter(evaluations))
        sha256 = evaluations[first]["settings"]["texts"][path]
        paths = {run: next(own for own, sha in each["settings"]["texts"].items() if sha == sha256) for run, each in evaluations.items()}
        found.append(("text", path, entries, {run: evaluations[run]["texts"][own] for run, own in paths.items()}))
    tables = []
    for kind, path, entries, whole in found:
        if not entries:
            continue
        apart = [entry["difference"] for entry in entries.values() if entry.get("difference")]
        reach = max((abs(x) for one in apart for x in (one["difference"], one["low"], one["high"]) if x is not None), default=0.0)
        tables.append(
            {
                "kind": kind,
                "path": path,
                "first": next(iter(entries)),
                "entries": entries,
                "whole": {run: whole[run] for run in entries},
                "one_way": side_by_side.one_way(entries),
                "bars": {run: bar(entry["difference"], reach) for run, entry in entries.items() if entry.get("difference")},
            }
        )
    return tables


def bar(apart: dict[str, Any], reach: float) -> Markup:
    """A paired difference and its interval, from -reach to +reach, as a small drawing; zero is the rule in the middle."""
    if reach <= 0.0:
        return Markup("")
    value = apart["difference"]
    ends = (value if x is None else x for x in (apart["low"], apart["high"], value))
    low, high, at = (round(BAR / 2 * (1 + 0.97 * x / reach), 1) for x in ends)
    rule = f'<path class="zero" d="M{BAR / 2:g} 0V14"/>'
    interval = f'<path d="M{low} 7H{high}"/><circle cx="{at}" cy="7" r="2.6"/>'
    return Markup(f'<svg class="bar" aria-hidden="true" viewBox="0 0 {BAR:g} 14">{rule}{interval}</svg>')


def rows_figures(result: dict[str, Any], evaluations: dict[str, dict[str, Any]], style: dict[str, drawn.Style]) -> dict[str, Any]:
    """Of `validation` and `continuation`, where any run has a difference: the drawing, and {run: (lower, equal, rows)} how many rows of it
    have fewer nats than those of the `first` that has such rows."""
    found = {}
    for kind, part in (("validation", "likelihood"), ("continuation", "continuation")):
        differences, first = {}, next(iter(result[part]), "")
        for run in (run for run, entry in result[part].items() if "difference" in entry):
            both = [evaluations[each]["likelihood"] for each in (run, first)]
            own, base = ((one if kind == "validation" else one["continuation"])["rows"] for one in both)
            differences[run] = (np.asarray(own["nats"]) - np.asarray(base["nats"])) / np.maximum(np.asarray(own["tokens"]), 1)
        if differences:
            counts = {run: (int((each < 0).sum()), len(each)) for run, each in differences.items()}
            svg = drawn.sorted_rows({run: each.tolist() for run, each in differences.items()}, style, f"rows-{kind}")
            found[kind] = {"svg": Markup(svg), "lower": counts, "first": first}
    return found


def parts_figures(evaluations: dict[str, dict[str, Any]], style: dict[str, drawn.Style]) -> dict[str, Any]:
    """Of every run whose bound says where it comes from: `parts`, its drawing and the sums of its columns. Runs of one axis have one
    scale."""
    parts = {run: found["likelihood"]["parts"] for run, found in evaluations.items() if found["likelihood"].get("parts")}
    tops = {axis: drawn.top_of([each for each in parts.values() if each["axis"] == axis]) for axis in {p["axis"] for p in parts.values()}}
    return {
        run: {
            "parts": each,
            "svg": Markup(drawn.stretches(each, style[run], tops[each["axis"]], f"parts-{place}")),
            "network": math.fsum(each["nats"]),
            "unigram": math.fsum(each["unigram"]),
            "sum": math.fsum([*each["nats"], each["before"], each["after"], each["rest"]]),
        }
        for place, (run, each) in enumerate(parts.items())
    }


def written(evaluations: dict[str, dict[str, Any]]) -> list[tuple[int | None, dict[str, dict[str, Any]]]]:
    """(number of steps, {run: its samples}) of all numbers of steps, of what is written one token after another last."""
    found: dict[int | None, dict[str, dict[str, Any]]] = {}
    for run, evaluation in evaluations.items():
        for texts in side_by_side.samples_of(run, evaluation):
            found.setdefault(texts.steps, {})[run] = texts.entry
    return sorted(found.items(), key=lambda item: math.inf if item[0] is None else item[0])
