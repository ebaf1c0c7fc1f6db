"""`megaflow evaluate --frontier`: texts at several temperatures and shares of fresh noise, and what they score at one entropy.

Fewer steps, a lower temperature and less noise all write with less entropy, which judges like: one point says little. So every number of
steps has a frontier, and is read where its entropy is that of real text: the judge's log-perplexity linear in the entropy, between the two
neighbours in entropy of one gamma. Nothing is read outside of what was sampled.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from megaflow.errors import UserError
from megaflow.evaluate.loaded import Run
from megaflow.evaluate.settings import Settings, check_temperature, resolved

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
NGRAM = "judge_bits_per_char"


class Asked(NamedTuple):
    """gammas: of the stochastic sampler, empty for the run's own. entropy: nats within a text that frontiers are read at, None for that of
    real text."""

    temperatures: list[float]
    gammas: list[float] = []
    entropy: float | None = None


def check(run: Run, asked: Asked) -> None:
    """Refuse what this run cannot write. Raises UserError."""
    for name, values in (("--temperatures", asked.temperatures), ("--gammas", asked.gammas)):
        if len(set(values)) < len(values):
            raise UserError(f"{name}: one value stands there twice; give each once")
    if not asked.temperatures:
        raise UserError("--temperatures: no temperature is given")
    for temperature in asked.temperatures:
        check_temperature(temperature, "--temperatures")
    for gamma in asked.gammas:
        if not 0.0 <= gamma <= 1.0:
            raise UserError(f"--gammas: {gamma} is not between 0 and 1")
    if asked.entropy is not None and not 0.0 <= asked.entropy < math.inf:
        raise UserError(f"--entropy: {asked.entropy} is not a finite number of nats of 0 or more")
    if asked.gammas and run.parts is None:
        raise UserError(f"--gammas: {run.directory} is a baseline (model.family={run.kind}) and its sampler takes no gamma; leave them out")
    if asked.gammas and run.parts is not None and run.parts.prior.law != "gaussian":
        raise UserError(f"--gammas: fresh noise is Gaussian, and {run.directory} has flow.prior={run.parts.prior.name}; leave them out")


def words(asked: dict[str, Any]) -> list[str]:
    """What asks `megaflow evaluate` for the frontier of these settings."""
    found = ["--frontier", "--temperatures", ",".join(map(str, asked["temperatures"]))]
    found += ["--gammas", ",".join(map(str, asked["gammas"]))] if asked["gammas"] else []
    return found + (["--entropy", str(asked["entropy"])] if asked["entropy"] is not None else [])


def ways(run: Run, asked: Asked, counts: Sequence[int | None], seed: int) -> list[Settings]:
    """Every combination that is a text of its own: one step is an argmax, which neither temperature nor noise changes. `counts`: numbers
    of steps, None of the autoregressive baseline."""
    found: list[Settings] = []
    for count in counts:
        if count == 1 and run.parts is not None:
            found.append(resolved(run, Settings(1, seed=seed)))
            continue
        gammas: list[float | None] = [*asked.gammas] or [None]
        for gamma in gammas:
            found += [resolved(run, Settings(count, "auto", heat, gamma, seed)) for heat in asked.temperatures]
    return found


def read(entries: Sequence[tuple[Settings, dict[str, Any]]], entropy: float) -> dict[str, Any]:
    """The points of a frontier, and `matched`, what each number of steps and gamma has at this entropy.

    Of the n-gram bits per character are read, of other judges nats per token and from these perplexity; None where the entropy is
    `outside` of what was sampled, or a judge has scored nothing.
    """
    points = [{"steps": way.steps, "temperature": way.temperature, "gamma": way.gamma, **entry} for way, entry in entries]
    matched = []
    for steps, gamma in dict.fromkeys((point["steps"], point["gamma"]) for point in points):
        own = [point for point in points if (point["steps"], point["gamma"]) == (steps, gamma)]
        spread = [point["entropy"] for point in own]
        low, high = min(spread), max(spread)
        outside = "below" if entropy < low else "above" if entropy > high else None
        found: dict[str, Any] = {"steps": steps, "gamma": gamma, "lowest_entropy": low, "highest_entropy": high, "outside": outside}
        found[NGRAM] = at(entropy, [(point["entropy"], point[NGRAM]) for point in own])
        judges = {}
        for path in own[0].get("judges", {}):
            nats = at(entropy, [(point["entropy"], point["judges"][path]["nats_per_token"]) for point in own])
            judges[path] = {"nats_per_token": nats, "perplexity": None if nats is None else math.exp(min(nats, 700.0))}
        matched.append(found | ({"judges": judges} if judges else {}))
    return {"entropy": entropy, "points": points, "matched": matched}


def at(entropy: float, points: Sequence[tuple[float, float | None]]) -> float | None:
    """The value at an entropy, linear between its neighbours among points (entropy, value) in any order; None outside of them. Of points of
    one entropy the lowest value counts."""
    curve: dict[float, float] = {}
    for x, y in points:
        if y is not None:
            curve[x] = min(y, curve.get(x, y))
    known = sorted(curve.items())
    for x, y in known:
        if x == entropy:
            return y
    for (x0, y0), (x1, y1) in zip(known, known[1:], strict=False):
        if x0 < entropy < x1:
            share = (entropy - x0) / (x1 - x0)
            return (1.0 - share) * y0 + share * y1
    return None


def table(found: dict[str, Any], judges: list[str]) -> list[str]:
    """The frontier and its reading, as a person reads them."""
    names = {path: f"judge {place}" for place, path in enumerate(judges, start=1)}
    lines = [f"{name}: perplexity under {path}" for path, name in names.items()]
    lines.append(_row("frontier", "temperature", "gamma", "entropy nats", "judge bits/char", *names.values()))
    for point in found["points"]:
        gamma = "" if point["gamma"] is None else f"{point['gamma']:g}"
        values = [point["judges"][path]["perplexity"] for path in judges]
        numbers = [f"{point['entropy']:.3f}", _number(point[NGRAM]), *map(_number, values)]
        lines.append(_row(_steps(point), f"{point['temperature']:g}", gamma, *numbers))
    lines.append(_row(f"at {found['entropy']:.3f} nats", "", "gamma", "from, to", "judge bits/char", *names.values()))
    for entry in found["matched"]:
        gamma = "" if entry["gamma"] is None else f"{entry['gamma']:g}"
        values = [entry["judges"][path]["perplexity"] for path in judges]
        numbers = [_number(entry[NGRAM]), *map(_number, values)]
        if entry["outside"]:
            numbers = [f"  outside: all texts have {'more' if entry['outside'] == 'below' else 'less'} entropy"]
        lines.append(_row(_steps(entry), "", gamma, f"{entry['lowest_entropy']:.3f} {entry['highest_entropy']:.3f}", *numbers))
    return lines


def _steps(entry: dict[str, Any]) -> str:
    return "autoregressive" if entry["steps"] is None else f"{entry['steps']} steps"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.3f}"


def _row(name: str, *cells: str) -> str:
    widths = (13, 7, 15, 17, *[13] * len(cells))
    return (name.ljust(18) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False))).rstrip()
