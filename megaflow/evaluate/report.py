"""The report: one self-contained HTML page with the figures, tables and texts of a run.

What `data` may hold. Every part is optional, and so is every number in it: what is missing is said on the page to be so, never filled in.
A part or a model that has no place here raises ValueError, since it would be dropped in silence. Names of models are `flow`, `flow_map` and
`autoregressive`.

    title        str
    about        {"text": str (what was learned from), "sources": [str, …] (its files, as the commands need them),
                  "training_tokens", "validation_tokens", "vocab_size", "length": int,
                  "tokenizer": str, "characters_per_token": float, "machine": str}
    stages       [{"name": str, "parameters", "steps", "tokens": int, "seconds", "tokens_per_second": float, "peak_memory_bytes": int}, …],
                 in the order they were run
    likelihood   {"unigram" | model: {"nats_per_token", "nats_standard_error", "bits_per_char", "bits_standard_error": float},
                  "note": str (rows, weights, range of log-SNR: said below the table)}, on the validation split
    curves       {model: {"tokens", "loss": [N], "validation_tokens", "validation_loss": [M], "axis", "loss_is", "validation_is": str
                  (labels of the panel), "meaning": str (said below it: what the two losses of this model are),
                  "validation_rows": int (rows that a validation reads)}}
    profile      {"t", "cross_entropy": [K] (nats per token in each bin), "clock_t", "clock_cdf": [K'], "clock": str (its name)}
    samples      {"flow" | "flow_map" | "flow_map_even" | "flow_map_unbalanced": {"<steps>": SAMPLES},
                  "autoregressive" | "data" | "unigram": SAMPLES}
                 SAMPLES = {"judge_bits_per_char", "judge_standard_error", "entropy" (nats), "entropy_standard_error",
                 "reverse_bits_per_char": float, "count", "distinct": int (texts judged, and different ones of
                 them), "texts": [str, …] (from the first drawn on)}
    temperature  float, that `samples` were written at
    cooled       {model: {"<steps>" | "autoregressive": [SAMPLES and "temperature": float, …]}}: lower temperatures, without texts
    judged       {"flow" | "flow_map" | "autoregressive": an evaluation as evaluation.json has it, with causal judges, a frontier or MAUVE}
    trajectory   {"model": str, "times": [S], "tokens": [S][L] of str, "confidence": [S][L] in [0, 1]}, one text, the argmax at every
                 solver step; a time is that of the state the step reads
    judge        {"order", "symbols", "training_characters", "contexts_checked": int, "sum_error": float (see judge.sum_error)}
    commands     [str, …], that lead from the text sources to this page
    versions     {package: version}
"""

import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from megaflow.evaluate import figures, side_by_side
from megaflow.evaluate.compare_figures import Style, against_entropy
from megaflow.evaluate.side_by_side import Judge, Texts
from megaflow.files import write_atomically
from megaflow.progress import duration

PARTS = (
    "title",
    "about",
    "stages",
    "likelihood",
    "curves",
    "profile",
    "samples",
    "temperature",
    "cooled",
    "judged",
    "trajectory",
    "judge",
    "commands",
    "versions",
)
NAMES = {
    "flow": "flow",
    "flow_map": "flow map",
    "flow_map_even": "flow map, even grid",
    "flow_map_unbalanced": "flow map, unbalanced",
    "autoregressive": "autoregressive",
    "data": "real text",
    "unigram": "unigram draws",
}
STYLE = {
    "flow": Style(figures.COLOURS["flow"], "o"),
    "flow_map": Style(figures.COLOURS["flow_map"], "s"),
    "autoregressive": Style(figures.COLOURS["autoregressive"], "^"),
}
NGRAM = "judge_bits_per_char"
FAMILIES = ("flow", "flow_map", "flow_map_even", "flow_map_unbalanced")  # that have a number of steps
MEANING = {"unigram": "exact", "flow": "upper bound", "flow_map": "upper bound", "autoregressive": "exact"}
MOST_TEXTS = 3  # of a kind on the page
MOST_ROWS = 12  # of a trajectory on the page


def write_report(data: dict[str, Any], out: Path | str) -> None:
    """Render the page to `out`. The same data gives the same bytes. Raises ValueError if the data break the contract above."""
    models = ("flow", "flow_map", "autoregressive")
    known = {"samples": NAMES, "cooled": models, "judged": models, "curves": models, "likelihood": (*MEANING, "note")}
    unknown = [key for key in data if key not in PARTS]
    unknown += [f"{part}.{key}" for part, names in known.items() for key in data.get(part) or {} if key not in names]
    if unknown:
        raise ValueError(f"the report has no place for {', '.join(unknown)}")
    page = environment()
    parts = {part: data.get(part) for part in PARTS}
    write_atomically(Path(out), page.get_template("report.html.j2").render(**parts, **_view(data)))


def environment() -> jinja2.Environment:
    """Templates of this folder with the filters below; all that is not Markup is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"fixed": fixed, "error": error, "count": count, "gibibytes": gibibytes, "fine": fine, "fine_error": fine_error}
    page.filters |= {"duration": duration, "visible": visible, "blank": blank, "folder": lambda path: Path(path).name or path}
    return page


def fixed(value: float | None, digits: int = 3) -> str:
    """'1.571'; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if math.isfinite(value) else "undefined"


def error(value: float | None) -> str:
    """' ± 0.021', with a digit that is not zero; nothing for what is exact or has no error given."""
    if value is None or value < 1e-9:  # rounding of what is the same in every text
        return ""
    return f" ± {value:.3f}" if not value < 0.0005 else f" ± {value:.0e}"


def fine(value: float | None, digits: int = 2) -> str:
    """'1,234.57', of more than six digits before the point '1.23e+07'; a dash for what there is not."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < 1e7 else f"{value:.2e}"


def fine_error(value: float | None) -> str:
    """' ± 12.34' of a number as `fine` writes it; nothing for what is exact or has no error."""
    return "" if value is None or value < 1e-9 else f" ± {fine(value)}"


def blank(text: str) -> str:
    """What a text of nothing but white space is, in words, '(128 spaces)'; nothing for any other."""
    if text.strip():
        return ""
    kinds = [(text.count(" "), "space"), (text.count("\n"), "line break")]
    kinds.append((len(text) - sum(number for number, _ in kinds), "other white space"))
    named = [f"{number} {name}{'s' if number > 1 and not name.startswith('other') else ''}" for number, name in kinds if number]
    return f"({' and '.join(named)})" if named else "(no characters)"


def count(value: float | None) -> str:
    """'4,295,537'; a dash for what was not measured."""
    return "–" if value is None else f"{value:,.0f}"


def gibibytes(value: float | None) -> str:
    """'1.25' GiB of a number of bytes; a dash for what was not measured."""
    return "–" if value is None else f"{value / 2**30:.2f}"


def visible(token: str) -> str:
    """A token with its white space made visible."""
    marked = token.replace("\n", "↵").replace("\t", "⇥")
    return marked if marked.strip() else marked.replace(" ", "␣") or "∅"


def constant_samples(samples: dict[str, Any]) -> set[tuple[str, int]]:
    """(family, steps) whose texts, two or more, are all the same: the network's answer did not depend on the noise."""
    return {
        (family, int(steps))
        for family in FAMILIES
        for steps, entry in (samples.get(family) or {}).items()
        if entry.get("distinct") == 1 and entry["count"] > 1
    }


def _view(data: dict[str, Any]) -> dict[str, Any]:
    """What the template shows beside the data themselves: figures, rows of tables, texts in their order."""
    samples, profile, curves = (data.get(part) or {} for part in ("samples", "profile", "curves"))
    constant = constant_samples(samples)
    unigram = ((data.get("likelihood") or {}).get("unigram") or {}).get("nats_per_token")
    panels: dict[str, Any] = {}
    panels["learning"] = [(NAMES[name], _safe(figures.learning(name, curves[name]))) for name in NAMES if curves.get(name, {}).get("loss")]
    panels["cross_entropy"] = _safe(figures.cross_entropy(profile, unigram)) if profile.get("cross_entropy") else None
    panels["clock"] = _safe(figures.clock(profile)) if profile.get("clock_cdf") else None
    for field, error, label in (
        ("judge_bits_per_char", "judge_standard_error", "judge (bits per character)"),
        ("entropy", "entropy_standard_error", "entropy within a text (nats)"),
        ("reverse_bits_per_char", "", "reverse (bits per character)"),
    ):
        measured = any(figures.drawable(entry.get(field)) for _, _, entry in _entries(samples))
        panels[field] = _safe(figures.quality(samples, field, error, label, constant)) if measured else None
    panels["frontier"] = _safe(figures.frontier(samples, data["cooled"], constant)) if data.get("cooled") else None
    judged = data.get("judged") or {}
    judges = side_by_side.judges_of(judged)
    return {
        "judges": judges,
        "judge_panels": [panel for panel in judge_figures(judged, judges, STYLE) if panel["judge"] is not None],
        "style": STYLE,
        "judge_samples": [texts for name, found in judged.items() for texts in side_by_side.samples_of(name, found)],
        "judge_others": [texts for name, found in judged.items() for texts in side_by_side.others_of(name, found)],
        "matched": side_by_side.matched_of(judged, judges),
        "mauve": side_by_side.mauve_of(judged),
        "names": NAMES,
        "meaning": MEANING,
        "most_texts": MOST_TEXTS,
        "most_points": figures.MOST_POINTS,
        "cells": figures.CELLS,
        "panels": panels,
        "windows": {NAMES[name]: figures.window(len(curve["loss"])) for name, curve in curves.items() if curve},
        "validation_rows": sorted({curve["validation_rows"] for curve in curves.values() if curve and curve.get("validation_rows")}),
        "constant": constant,
        "entries": _entries(samples),
        "families": FAMILIES,
        "step_counts": sorted({int(steps) for family in FAMILIES for steps in samples.get(family) or {}}),
        "path": _trajectory(data["trajectory"]) if data.get("trajectory") else None,
        "seconds": sum(stage.get("seconds") or 0.0 for stage in data.get("stages") or []),
    }


def judge_figures(evaluations: dict[str, dict[str, Any]], judges: list[Judge], style: dict[str, Style]) -> list[dict[str, Any]]:
    """A panel for the n-gram and each causal judge: judge (None of the n-gram) and drawing; those whose texts have no value are left
    out."""
    if not evaluations:
        return []
    reference = next(iter(evaluations.values()))["reference"]
    panels = []
    for place, judge in enumerate([None, *judges]):

        def value(texts: Texts, judge: Judge | None = judge) -> float | None:
            entry = texts.entry if judge is None else judge.of(texts) or {}
            return entry.get(NGRAM if judge is None else "perplexity")

        stars: list[tuple[float, float] | None] = []
        for name in ("data", "unigram"):
            seen = reference[name][NGRAM] if judge is None else judge.reference[name]["perplexity"]
            stars.append(None if seen is None else (reference[name]["entropy"], seen))
        lines = side_by_side.lines_of(evaluations, value)
        if lines:
            label = "bits per character" if judge is None else "perplexity"
            svg = against_entropy(lines, style, stars[0], stars[1], label, f"judge-{place}", judge is not None)
            panels.append({"judge": judge, "svg": Markup(svg)})
    return panels


def _entries(samples: dict[str, Any]) -> list[tuple[str, int | None, dict[str, Any]]]:
    """Every kind of samples as (name, steps or None, entry), in the order of the table."""
    found: list[tuple[str, int | None, dict[str, Any]]] = []
    for family in FAMILIES:
        found += [(family, int(steps), samples[family][steps]) for steps in sorted(samples.get(family) or {}, key=int)]
    return found + [(name, None, samples[name]) for name in ("autoregressive", "data", "unigram") if samples.get(name)]


def _trajectory(trajectory: dict[str, Any]) -> dict[str, Any]:
    """At most MOST_ROWS of the steps, evenly chosen, the first and the last among them; a cell is (token, confidence, final?)."""
    times, tokens, confidence = (trajectory[key] for key in ("times", "tokens", "confidence"))
    if len({len(times), len(tokens), len(confidence)}) > 1:
        raise ValueError("times, tokens and confidence of a trajectory have one row for every step")
    rows = []
    for step in np.unique(np.linspace(0, len(times) - 1, MOST_ROWS).round().astype(int)).tolist():
        cells = [(token, sure, token == last) for token, sure, last in zip(tokens[step], confidence[step], tokens[-1], strict=True)]
        rows.append({"step": step + 1, "time": times[step], "mean": sum(confidence[step]) / len(confidence[step]), "cells": cells})
    return {"rows": rows, "steps": len(times), "length": len(tokens[-1]), "model": NAMES[trajectory.get("model", "flow")]}


def _safe(svg: str) -> Markup:
    """Our own drawing: the one thing on the page that is not escaped. It holds no text of the data."""
    return Markup(svg)
