"""The report of a sweep: one self-contained HTML page, tables and the config that won, from the numbers of `statistics`.

`data` is what statistics.py takes and, for the page, {title, dir, base (path of a config), seeds, commands, note} and of every point a
curve {tokens, loss [N], validation_tokens, validation_loss [M]}, all of which may be empty. Three more may be there: set {key: value} of
all points, overrides {axis: {value: {key: value}}} (of an axis that is not in it a value 'a.b=c, d.e=f' is of those keys, any other of the
axis' own), and stage (default pretrain). Nothing of it is changed. The same data give the same bytes. Drawings are SVG made here: the page
draws its curves in the browser's own font and can switch them.
"""

import csv
import io
import itertools
import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape
from omegaconf import OmegaConf

from megaflow.config.schema import keys
from megaflow.files import write_atomically
from megaflow.progress import duration
from megaflow.sweep import scaling, statistics
from megaflow.sweep.design import slug
from megaflow.sweep.statistics import Choice, Design, Effect, Law, Row, Winner

COSTS = {
    "flops": "FLOPs of training",
    "tokens": "tokens read in training",
    "seconds": "seconds of training steps",
    "parameters": "parameters",
}
STATES = ("done", "running", "pending", "paused", "stopped", "stopped early", "failed", "refused")
NUMBERS = 24_000  # of a page's curves: 300 points stay below 2 MB
MOST_NUMBERS = 240  # of one curve: more are not seen
SHOWN = 30  # choices whose curves are all shown at first; of more, the BEST of them
BEST = 10
ROUNDING = 1e-9  # an error below is none
LONGEST = 2000  # characters of an error
PALETTE = ("#2a7fbf", "#d4622a", "#2e9e78", "#8a5bb0", "#b08a2e", "#c2496e", "#5a7d8c", "#7a9a2e")
FLAT = re.compile(r",\s*(?=[A-Za-z_]\w*(?:\.\w+)+=)")  # between the keys of 'a.b=c, d.e=f'
ONE = re.compile(r"([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.S)


def write(data: dict[str, Any], folder: Path | str) -> None:
    """Write report.html, points.csv, choices.csv, choices.md and, where a point is done, best.yaml into a folder, each as a whole or not
    at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "points.csv", points_csv(data))
    write_atomically(folder / "choices.csv", choices_csv(data))
    write_atomically(folder / "choices.md", choices_md(data))
    if best := best_yaml(data, folder):
        write_atomically(folder / "best.yaml", best)
    else:
        (folder / "best.yaml").unlink(missing_ok=True)  # of points that are no more
    write_atomically(folder / "report.html", page(data, folder))


def points_csv(data: dict[str, Any]) -> str:
    """A line a point: its axes, seed, state, metrics (empty where it has none), costs, name and what it said last."""
    names = list(dict.fromkeys([data["metric"], *(name for point in data["points"] for name in point["metrics"])]))
    head = [*data["axes"], "seed", "state", *names, *(f"cost_{cost}" for cost in COSTS), "name", "said"]
    lines = [
        [
            *(point["values"][axis] for axis in data["axes"]),
            point["seed"],
            point["state"],
            *(point["metrics"].get(name) for name in names),
            *(point["cost"].get(cost) for cost in COSTS),
            point["name"],
            point["said"],
        ]
        for point in data["points"]
    ]
    return _csv([head, *lines])


def choices_csv(data: dict[str, Any]) -> str:
    """A line a choice: its axes, how many points it has, whether it is the baseline and the best, and of every metric its mean over seeds,
    standard error, and paired difference from the baseline with interval and p-values. Empty where there is no such number."""
    names, won, base = statistics.metrics(data), statistics.winner(data), statistics.baseline(data)
    head = [*data["axes"], "points", "baseline", "best"]
    parts = ("seeds", "mean", "standard_error", "shared_seeds", "difference", "difference_standard_error", "low", "high", "p", "p_holm")
    head += [f"{name}_{part}" for name in names for part in parts]
    by_metric = [statistics.rows(data, name) for name in names]
    lines = []
    for found in zip(*by_metric, strict=True):
        choice = found[0].choice
        line: list[Any] = [*choice, found[0].points, int(choice == base), int(won is not None and choice == won.choice)]
        for row in found:
            line += [len(row.values), row.mean, row.error, *(row.paired or [None] * 6), row.holm]
        lines.append(line)
    return _csv([head, *lines])


def choices_md(data: dict[str, Any]) -> str:
    """The same in short, to be put into a text: a line a choice, how many of its seeds are done, the metric that decides with its paired
    difference from the baseline, the others after it; mean ± standard error over seeds. Where some are not done it says what they said, and
    where one that is done lacks a number nothing."""
    names, base, points = statistics.metrics(data), statistics.baseline(data), statistics.choices(data)
    lines = [[*data["axes"], "seeds", names[0], "against the baseline", *names[1:]]]
    lines.append(["---"] * len(lines[0]))
    by_metric = [statistics.rows(data, name) for name in names]
    for found in zip(*by_metric, strict=True):
        choice, mine = found[0].choice, points[found[0].choice]
        done = [point for point in mine if point["state"] == "done"]
        cells = [
            pair(row.mean, row.error, digits_of(rows), "") if done and len(row.values) == len(done) else ""
            for row, rows in zip(found, by_metric, strict=True)
        ]
        apart, digits = found[0].paired, digits_apart(by_metric[0])
        difference = pair(apart.difference, apart.error, digits, "+") if apart is not None and choice != base and cells[0] else ""
        rest = next((point["state"] + (f": {point['said']}" if point["said"] else "") for point in mine if point["state"] != "done"), "")
        seeds = str(len(done)) if len(done) == len(mine) else f"{len(done)} of {len(mine)}; {rest}"
        lines.append([*(f"`{value}`" for value in choice), seeds, cells[0], difference, *cells[1:]])
    won = statistics.winner(data)
    best = f" The best: `{label(won.choice, list(data['axes']))}`." if won is not None else ""
    note = f"\nMean ± standard error over seeds; differences are of the same seeds.{best}\n"
    return "".join(f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in line)} |\n" for line in lines) + note


def pair(mean: float | None, error: float | None, digits: int, sign: str) -> str:
    """'5.243 ± 0.012'."""
    if mean is None:
        return ""
    return f"{round(mean, digits) + 0.0:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def best_yaml(data: dict[str, Any], folder: Path | str | None = None) -> str:
    """The choice that won as a config: `base:` and the keys that differ, typed as the command line would; '' where no point is done.

    Its seed is the first that the choice was trained with. folder: where the file is to lie; `base` is then written relative to it, as a
    config's `base` is read.
    """
    won = statistics.winner(data)
    if won is None:
        return ""
    row = next(row for row in statistics.rows(data, data["metric"]) if row.choice == won.choice)
    base = data["base"]
    if folder is not None and not os.path.isabs(base):
        base = os.path.relpath(os.path.realpath(base), os.path.realpath(folder))
    tree: dict[str, Any] = {"base": base}
    told, values = data.get("overrides") or {}, dict(zip(data["axes"], won.choice, strict=True))
    found = dict(data.get("set") or {})
    for axis, value in values.items():
        found |= told[axis][value] if value in told.get(axis, {}) else overrides({axis: value})
    mine = [point for point in data["points"] if tuple(point["values"][axis] for axis in data["axes"]) == won.choice]
    first = next(point for point in mine if point["state"] == "done")  # its seed, and the teacher of that
    found |= first.get("besides", {}) | {"run.seed": first["seed"]}
    for key, value in found.items():
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = typed(key, value) if isinstance(value, str) else value
    error = "" if row.error is None else f" ± {row.error:.2g}"
    about = f"{data['metric']} {row.mean:.6g}{error}, seeds: {len(row.values)}, choices: {len(statistics.choices(data))}"
    return f"# the best of the sweep {' '.join(data['title'].split())} ({' '.join(about.split())})\n" + OmegaConf.to_yaml(tree)


def overrides(values: dict[str, str]) -> dict[str, str]:
    """{config key: value} of {axis: value}, where a value 'a.b=c, d.e=f' is that of an axis of several keys at once."""
    found: dict[str, str] = {}
    for axis, value in values.items():
        parts = [ONE.fullmatch(part) for part in FLAT.split(value)]
        matched = [(part[1], part[2]) for part in parts if part is not None]
        found |= dict(matched) if len(matched) == len(parts) else {axis: value}
    return found


def typed(key: str, value: str) -> Any:
    """A value as `key=value` on the command line would be read: text stays text for a key of text, anything else is YAML."""
    schema = keys()
    if key in schema and schema[key].type is str and not value.lstrip().startswith(("'", '"')):
        return value.strip()
    try:
        found: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)
    except Exception:  # a YAML parser's errors have no common base class that OmegaConf promises
        return value
    return found["value"]


def page(data: dict[str, Any], folder: Path | str | None = None) -> str:
    """The HTML page. folder: where it is to lie, for its command. Raises ValueError where a seed of a choice is done twice."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    made.filters |= {"significance": significance, "fixed": fixed, "signed": signed, "cost": cost_text, "short": short_name}
    return made.get_template("page.html.j2").render(data=data, **_view(data, folder))


def fixed(value: float | None, digits: int) -> str:
    """'1.571'; a dash for what there is not; six digits of what would be too long otherwise."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}".replace("-", "−") if abs(value) < 1e7 else f"{value:.5e}"


def signed(value: float | None, digits: int) -> str:
    """'+0.012' or '−0.012', with a minus sign."""
    if value is None:
        return "–"
    return f"{value:+.{digits}f}".replace("-", "−") if abs(value) < 1e7 else f"{value:+.5e}"


def significance(p: float | None) -> str:
    """'0.031', '< 0.001', or a dash."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def compact(value: float, digits: int = 3) -> str:
    """'1.25M', '3e18', '0.001': a number in few characters, to so many digits."""
    value = float(f"{value:.{digits}g}")  # 999,999 is 1M
    size = abs(value)
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e15:
            return f"{value / unit:.{digits}g}{name}".replace("-", "−")
    text = f"{value:.{digits}g}"
    mantissa, e, exponent = text.partition("e")
    return (f"{mantissa}e{int(exponent)}" if e else text).replace("-", "−")


def cost_text(value: float | None, cost: str) -> str:
    """A cost as a person would say it."""
    if value is None:
        return "–"
    if cost == "seconds":
        return duration(value) if value >= 60 else f"{value:.3g}s"
    return compact(value)


def labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with their labels, in as many digits as say where they stand to a fiftieth of their distance, three or more."""
    near = 0.02 * min((abs(a - b) for a, b in itertools.pairwise(values)), default=math.inf)
    digits = next((d for d in range(3, 12) if all(abs(float(f"{value:.{d}g}") - value) <= near for value in values)), 12)
    return [(value, compact(value, digits)) for value in values]


def digits_of(rows: Iterable[Row]) -> int:
    """Decimals that show two digits of the middle standard error, or four digits of the values where there is none; 0 to 7."""
    rows = list(rows)
    return decimals([row.error for row in rows if row.error], [abs(row.mean) for row in rows if row.mean])


def digits_apart(rows: Iterable[Row]) -> int:
    """Decimals of paired differences, as many as their own errors ask for: pairing leaves less than the seeds differ by."""
    rows = list(rows)
    return finer(digits_of(rows), (row.paired.error for row in rows if row.paired is not None))


def digits_of_effects(found: Design, digits: int) -> int:
    """The same of the effects of axes, of numbers that have so many decimals."""
    return finer(digits, (level.error for effect in found.effects for level in effect.levels))


def finer(digits: int, errors: Iterable[float | None]) -> int:
    """So many decimals, or as many as these errors ask for."""
    found = [error for error in errors if error and error > ROUNDING]
    return max(digits, decimals(found, [])) if found else digits


def decimals(errors: list[float], means: list[float]) -> int:
    if errors:
        places = 1 - math.floor(math.log10(float(np.median(errors))))
    elif means:
        places = 3 - math.floor(math.log10(float(np.median(means))))
    else:
        places = 3
    return min(max(places, 0), 7)


def short_name(axis: str, axes: Iterable[str] = ()) -> str:
    """The end of a dotted key that no other axis has, without a last `.name`: 'clock' of 'flow.clock.name'."""
    others = [other.removesuffix(".name").split(".") for other in axes if other != axis]
    parts = axis.removesuffix(".name").split(".")
    counts = (count for count in range(1, len(parts)) if not any(other[-count:] == parts[-count:] for other in others))
    return ".".join(parts[-next(counts, len(parts)) :])


def short_value(value: str) -> str:
    """'b=c, e=f' of 'a.b=c, d.e=f'; any other value as it is."""
    parts = [ONE.fullmatch(part) for part in FLAT.split(value)]
    matched = [f"{part[1].rsplit('.', 1)[-1]}={part[2]}" for part in parts if part is not None]
    return ", ".join(matched) if len(matched) == len(parts) else value


def shortest(values: Sequence[str]) -> list[str]:
    """Values of an axis as they are told apart: of the same keys at once what these are, '2, 64' of 'model.layers=2, model.hidden=64'."""
    parts = [[ONE.fullmatch(part) for part in FLAT.split(value)] for value in values]
    keys_of = {tuple(part[1] if part is not None else None for part in each) for each in parts}
    if len(keys_of) == 1 and None not in next(iter(keys_of)):
        return [", ".join(part[2] for part in each if part is not None) for each in parts]
    return [short_value(value) for value in values]


def label(choice: Choice, axes: Sequence[str]) -> str:
    """'learning_rate=0.01, clock=plain': a choice in a line; 'the base config' where there is no axis."""
    parts = []
    for axis, value in zip(axes, choice, strict=True):
        brief = short_value(value)
        parts.append(brief if brief != value else f"{short_name(axis, axes)}={value}")
    return ", ".join(parts) or "the base config"


def thin(length: int, most: int) -> list[int]:
    """At most so many places of so many, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)).tolist() if length else []


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Mean over the `width` values around each, fewer at the ends; what is not finite is left out, and is NaN where nothing else is."""
    found = np.asarray(values, float)
    finite = np.isfinite(found)
    half = width // 2
    sums, counts = (np.concatenate([[0.0], np.cumsum(column)]) for column in (np.where(finite, found, 0.0), finite))
    ends, starts = np.minimum(np.arange(len(found)) + half + 1, len(found)), np.maximum(np.arange(len(found)) - half, 0)
    count = counts[ends] - counts[starts]
    return np.divide(sums[ends] - sums[starts], count, out=np.full(len(found), np.nan), where=count > 0)


class Scale(NamedTuple):
    """An axis of a drawing: from low to high, which differ, evenly or by logarithm."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the range; of a logarithm over less than a factor of ten, evenly spread ones."""
        if self.log and self.high / self.low >= 10:
            low, high = math.log10(self.low), math.log10(self.high)
            every = max(1, math.ceil((high - low) / most))
            leading = (1,) if high - low > 2.5 else (1, 2, 5)
            found = [d * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) if e % every == 0 for d in leading]
        else:
            raw = (self.high - self.low) / most
            unit = 10.0 ** math.floor(math.log10(raw))
            step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
            digits = 12 - math.floor(math.log10(step))
            found = [round(i * step, digits) for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in found if self.low <= value <= self.high]


def scale_of(values: Iterable[float], log: bool = False, room: float = 0.06) -> Scale:
    """A scale around these finite values, with room at both ends."""
    found = [value for value in values if math.isfinite(value)]
    low, high = min(found), max(found)
    if log:
        factor = max(high / low, 1.05) ** room
        return Scale(low / factor, high * factor, True)
    span = (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - room * span, high + room * span)


def wide(values: Iterable[float]) -> bool:
    """Whether values are better drawn by their logarithm: all above zero, and over more than a factor of ten."""
    found = list(values)
    return bool(found) and min(found) > 0 and max(found) / min(found) > 10


class Panel:
    """A drawing of two scales in a box of width times height units, which grows by `add`."""

    def __init__(self, width: int, height: int, x: Scale, y: Scale, left: int = 54, bottom: int = 40) -> None:
        self.width, self.height, self.x, self.y = width, height, x, y
        self.left, self.right, self.top, self.bottom = left, width - 12, 10, height - bottom
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a pair of numbers lies."""
        across = self.left + self.x.place(x) * (self.right - self.left)
        return round(across, 1), round(self.bottom - self.y.place(y) * (self.bottom - self.top), 1)

    def add(self, text: str) -> None:
        self.parts.append(text)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """The `points` of a polyline; what is not finite is left out."""
        return " ".join("{:g},{:g}".format(*self.at(x, y)) for x, y in points if math.isfinite(x) and math.isfinite(y))

    def rules(self, kind: str = "") -> None:
        """Ticks and rules of the y axis."""
        marks = [(text, self.at(self.x.low, value)[1]) for value, text in labelled(self.y.ticks())]
        lines = "".join(f'<path class="rule" d="M{self.left} {at}H{self.right}"/>' for _, at in marks)
        texts = "".join(f'<text x="{self.left - 6}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>' for text, at in marks)
        self.add(f'<g class="ticks {kind}">{lines}{texts}</g>')

    def below(self, marks: Iterable[tuple[float, str]], rows: int = 1) -> None:
        """Ticks of the x axis with these labels, in one row or by turns in several; one that would touch another is left out."""
        self.add(f'<path class="axis" d="M{self.left} {self.bottom}H{self.right}"/>')
        last = [-math.inf] * rows
        for place, (value, text) in enumerate(marks):
            at, row = self.at(value, self.y.low)[0], place % rows
            self.add(f'<path class="axis" d="M{at} {self.bottom}v3"/>')
            if at - last[row] >= 3.2 * len(text) + 6:
                self.add(f'<text x="{at}" y="{self.bottom + 15 + 12 * row}" text-anchor="middle">{escape(text)}</text>')
                last[row] = at + 3.2 * len(text)

    def names(self, x: str, y: str) -> None:
        """What the two axes are."""
        middle = (self.top + self.bottom) / 2
        self.add(f'<text x="{(self.left + self.right) / 2}" y="{self.height - 5}" text-anchor="middle">{escape(x)}</text>')
        self.add(f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')

    def svg(self, title: str, kind: str = "") -> Markup:
        """The element; of what the data say, everything in it is escaped."""
        head = f'<svg class="{kind}" role="img" aria-label="{escape(title)}" viewBox="0 0 {self.width} {self.height}">'
        return Markup(head + "".join(self.parts) + "</svg>")


def curves(data: dict[str, Any], ranked: Sequence[Choice], shown: set[Choice]) -> Markup | None:
    """Running means of the training loss (lines) and validation losses (dashed) against tokens, a group for each choice in this order.

    Two heights are drawn: over all losses, and over those of the last three quarters of the tokens, which the page starts with.
    """
    groups = statistics.choices(data)
    lines: dict[Choice, list[tuple[str, str, list[tuple[float, float]]]]] = {}
    drawn = sum(bool(point["curve"].get(part)) for point in data["points"] for part in ("loss", "validation_loss"))
    most = max(12, min(MOST_NUMBERS, NUMBERS // max(drawn, 1)))
    for choice in ranked:
        for point in groups[choice]:
            for kind, tokens, losses in (("t", "tokens", "loss"), ("v", "validation_tokens", "validation_loss")):
                x, y = point["curve"].get(tokens) or [], point["curve"].get(losses) or []
                smooth = running_mean(y, max(len(y) // 50, 1) | 1) if kind == "t" else np.asarray(y, float)
                found = [(float(x[i]), float(smooth[i])) for i in thin(min(len(x), len(y)), most)]
                lines.setdefault(choice, []).append((kind, point["name"], [pair for pair in found if math.isfinite(pair[1])]))
    every = [pair for found in lines.values() for _, _, line in found for pair in line]
    if not every:
        return None
    end = max(x for x, _ in every)
    late: list[float] = []
    for kind in "tv":  # apart: validations are few, and lie elsewhere
        some = np.array([y for found in lines.values() for own, _, line in found for x, y in line if own == kind and x >= end / 4])
        if len(some):
            low, high = np.quantile(some, [0.25, 0.75])
            late += some[some <= high + 3 * (high - low)].tolist()  # a point that diverged would flatten the others
    x, whole, close = Scale(0.0, end or 1.0), scale_of((y for _, y in every), room=0.04), scale_of(late, room=0.04)
    panel = Panel(760, 380, x, whole)
    panel.rules("all")
    panel.y = close
    panel.rules("end")
    panel.below(labelled(x.ticks(8)))
    panel.names("tokens read", "loss")
    panel.add(f'<clipPath id="inside"><rect x="{panel.left}" y="0" width="{panel.width - panel.left}" height="{panel.bottom}"/></clipPath>')
    stretch = (close.high - close.low) / (whole.high - whole.low)
    shift = panel.bottom * (1 - stretch) - whole.place(close.low) * (panel.bottom - panel.top)
    panel.add(f'<g clip-path="url(#inside)"><g id="lines" data-all="matrix(1 0 0 {stretch:.6g} 0 {shift:.6g})">')
    for place, choice in enumerate(ranked):
        title = escape(label(choice, list(data["axes"])))
        panel.add(f'<g class="c{"" if choice in shown else " off"}" data-c="{place}"><title>{title}</title>')
        for kind, _, line in lines.get(choice, []):
            if len(line) == 1:  # a stroke of its own, which keeps its width however the heights are stretched
                line = [line[0], (line[0][0] + 0.006 * end, line[0][1])]
            panel.add(f'<polyline class="{kind}" points="{panel.path(line)}"/>' if line else "")
        panel.add("</g>")
    panel.add("</g></g>")
    return panel.svg("Loss curves", "curves")


def effect_figure(effect: Effect, y: Scale, name: str, metric: str) -> Markup | None:
    """The mean of the metric at each value of an axis with the standard error of its effect; numbers lie where they are."""
    found = [(place, level) for place, level in enumerate(effect.levels) if level.mean is not None]
    if not found or len(effect.levels) > 24:
        return None
    ats = [level.at for _, level in found if level.at is not None]
    numeric = len(ats) == len(found)
    x = scale_of(ats, wide(ats), 0.08) if numeric else Scale(-0.6, len(effect.levels) - 0.4)
    rows = 1 if numeric else min(3, max(1, len(found) // 2))
    panel = Panel(330, 208 + 12 * rows, x, y, bottom=28 + 12 * rows)
    panel.rules()
    spots = [(level.at if numeric and level.at is not None else float(place), level) for place, level in found]
    exact = numeric and len(found) <= 8 and not effect.binned
    named = shortest([level.label for _, level in spots])
    marks = [(at, compact(at) if exact else _cut(name, 44 * rows // len(found) + 1)) for (at, _), name in zip(spots, named, strict=True)]
    panel.below(labelled(x.ticks(5)) if numeric and not exact else marks, rows)
    if numeric:
        panel.add(f'<polyline class="effect" points="{panel.path((at, level.mean or 0.0) for at, level in spots)}"/>')
    for at, level in spots:
        mean, error = level.mean or 0.0, level.error or 0.0
        across, up = panel.at(at, mean)
        ends = panel.at(at, mean - error)[1], panel.at(at, mean + error)[1]
        text = escape(f"{level.label}: {mean:.6g}" + (f" ± {error:.2g}" if level.error is not None else ""))
        panel.add(f'<path class="error" d="M{across} {ends[0]}V{ends[1]}"/>')
        panel.add(f'<circle cx="{across}" cy="{up}" r="3.4"><title>{text}</title></circle>')
    panel.names(_cut(name, 44), _cut(metric, 30))
    return panel.svg(f"Main effect of {effect.axis}")


def effect_figures(found: Design, metric: str) -> list[Markup | None]:
    """One drawing for each axis, all on one scale, so that their heights compare."""
    ends = [
        level.mean + sign * (level.error or 0.0)
        for effect in found.effects
        for level in effect.levels
        if level.mean is not None
        for sign in (-1, 1)
    ]
    axes = [effect.axis for effect in found.effects]
    return [effect_figure(effect, scale_of(ends), short_name(effect.axis, axes), metric) if ends else None for effect in found.effects]


class Frontier(NamedTuple):
    """Quality against a cost. front: (place in the ranking, cost, mean) of choices that no other beats; same: whether all cost alike;
    unknown: the places of choices that have a mean and not this cost, and are not drawn."""

    cost: str
    svg: Markup
    front: list[tuple[int, float, float]]
    same: bool
    unknown: list[int]


def frontiers(data: dict[str, Any], ranked: Sequence[Row]) -> list[Frontier]:
    """A drawing for each cost that the points tell: the mean of a choice over seeds against its mean cost, with the Pareto front of those
    with the most seeds. Costs that differ come first."""
    groups, found = statistics.choices(data), []
    most = max((len(row.values) for row in ranked), default=0)
    for cost in COSTS:
        spots = []
        for place, row in enumerate(ranked):
            costs = [point["cost"].get(cost) for point in groups[row.choice] if point["seed"] in row.values and point["state"] == "done"]
            known = [float(value) for value in costs if value is not None and math.isfinite(value)]
            if known and row.mean is not None:
                spots.append((place, float(np.mean(known)), row.mean, row.error or 0.0))
        if not spots:
            continue
        xs = [x for _, x, _, _ in spots]
        unknown = sorted({place for place, row in enumerate(ranked) if row.mean is not None} - {place for place, *_ in spots})
        known_of_all = not unknown
        if len(spots) == 1 and not known_of_all:  # a cost of one choice compares nothing
            continue
        same = known_of_all and max(xs) - min(xs) <= 1e-6 * abs(max(xs))
        x, y = scale_of(xs, wide(xs)), scale_of([end for _, _, mean, error in spots for end in (mean - error, mean + error)])
        fair = [spot for spot in spots if len(ranked[spot[0]].values) == most] or spots
        places = statistics.pareto([x for _, x, _, _ in fair], [mean for _, _, mean, _ in fair], data["lower_is_better"])
        front = [fair[i] for i in places]
        panel = Panel(760, 340, x, y)
        panel.rules()
        panel.below(cost_ticks(x, cost))
        panel.names(COSTS[cost], _cut(data["metric"], 50))
        steps: list[tuple[float, float]] = []
        for _, across, mean, _ in front:
            steps += [(across, steps[-1][1]), (across, mean)] if steps else [(across, mean)]
        panel.add(f'<polyline class="front" points="{panel.path([*steps, (x.high, steps[-1][1])])}"/>')
        best = {place for place, _, _, _ in front}
        for place, across, mean, error in sorted(spots, key=lambda spot: spot[0] in best):
            at, up = panel.at(across, mean)
            text = escape(f"{label(ranked[place].choice, list(data['axes']))}: {mean:.6g} at {cost_text(across, cost)}")
            bar = (
                f'<path class="error" d="M{at} {panel.at(across, mean - error)[1]}V{panel.at(across, mean + error)[1]}"/>' if error else ""
            )
            kind = "best" if place in best else "beaten" if len(ranked[place].values) == most else "partial"
            panel.add(f'<g class="{kind}" data-c="{place}">{bar}<circle cx="{at}" cy="{up}" r="4"><title>{text}</title></circle></g>')
        found.append(Frontier(cost, panel.svg(f"{data['metric']} against {COSTS[cost]}"), [spot[:3] for spot in front], same, unknown))
    return sorted(found, key=lambda one: (one.same, len(one.unknown)))


def cost_ticks(x: Scale, cost: str) -> list[tuple[float, str]]:
    """Ticks of a cost, round in the unit in which they are told: seconds are told in hours or minutes where there are as many."""
    unit, name = 1.0, ""
    if cost == "seconds":
        unit, name = next(((unit, name) for unit, name in ((3600.0, "h"), (60.0, "m")) if x.high >= 2 * unit), (1.0, "s"))
    return [(value * unit, text + name) for value, text in labelled(Scale(x.low / unit, x.high / unit, x.log).ticks(7))]


def law_figure(law: Law, cost: str, metric: str) -> Markup:
    """The points of a scaling law, its curve and the interval of the curve, both axes by their logarithm."""
    ends = [end for _, _, low, high in law.curve for end in (low, high)]
    panel = Panel(760, 340, scale_of(law.x, True), scale_of([*law.y, *ends], True))
    panel.rules()
    panel.below(labelled(panel.x.ticks(7)))
    panel.names(COSTS[cost], _cut(metric, 50))
    band = [(x, high) for x, _, _, high in law.curve] + [(x, low) for x, _, low, _ in reversed(law.curve)]
    panel.add(f'<polygon class="band" points="{panel.path(band)}"/>')
    panel.add(f'<polyline class="effect" points="{panel.path((x, y) for x, y, _, _ in law.curve)}"/>')
    for x, y in zip(law.x, law.y, strict=True):
        across, up = panel.at(x, y)
        panel.add(f'<circle cx="{across}" cy="{up}" r="3.4"><title>{compact(x)}: {y:.6g}</title></circle>')
    return panel.svg(f"Scaling law against {COSTS[cost]}")


def interval_figure(row: Row, scale: Scale | None) -> Markup | str:
    """The paired difference and its interval as a bar in a table's cell, zero at the rule; nothing where there is none."""
    if scale is None or row.paired is None or row.paired.difference is None:
        return ""
    low = row.paired.difference if row.paired.low is None else row.paired.low
    high = row.paired.difference if row.paired.high is None else row.paired.high
    at = [round(min(max(scale.place(value), 0.0), 1.0) * 120, 1) for value in (low, high, row.paired.difference, 0.0)]
    bar = f'<path class="error" d="M{at[0]} 7H{at[1]}"/><circle cx="{at[2]}" cy="7" r="2.6"/>'
    return Markup(f'<svg class="interval" aria-hidden="true" viewBox="0 0 120 14"><path class="axis" d="M{at[3]} 0V14"/>{bar}</svg>')


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(most - 1, 1)] + "…"


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(["" if value is None else value for value in line] for line in lines)
    return out.getvalue()


def _colours(values: Sequence[str]) -> list[str]:
    """One for each value: along a scale for numbers, apart from one another for names."""
    if statistics.numbers(values) is not None and len(values) > 2:
        return [f"hsl({225 - 205 * place / (len(values) - 1):.0f} 62% 48%)" for place in range(len(values))]
    if len(values) <= len(PALETTE):
        return list(PALETTE[: len(values)])
    return [f"hsl({(137.5 * place + 205) % 360:.0f} {55 + place % 3 * 10}% {46 + place % 2 * 10}%)" for place in range(len(values))]


def best_run(data: dict[str, Any], won: Winner | None) -> str:
    """Where the winner's own run goes: beside the sweep, which has points of its own, and apart from those of other sweeps and winners."""
    found = [] if won is None else [f"{axis}={value}" for axis, value in zip(data["axes"], won.choice, strict=True)]
    folder = data["dir"] if Path(data["dir"]).name not in ("", "..") else os.path.abspath(data["dir"])
    return f"{folder}.best/{slug(', '.join([data.get('title') or 'sweep', *found]))}"


def _view(data: dict[str, Any], folder: Path | str | None) -> dict[str, Any]:
    """What the template shows beside the data themselves: rows of tables in their order, figures, numbers in words."""
    axes = list(data["axes"])
    won, base = statistics.winner(data), statistics.baseline(data)
    sign = 1 if data["lower_is_better"] else -1
    groups = statistics.choices(data)
    ranked = sorted(statistics.rows(data, data["metric"]), key=lambda row: math.inf if row.mean is None else sign * row.mean)
    order = [row.choice for row in ranked]
    shown = set(order if len(order) <= SHOWN else order[:BEST])
    shown |= {base} if base is not None else set()
    pairs = [row.paired for row in ranked if row.paired is not None]
    reach = [abs(pair.difference) for pair in pairs if pair.difference is not None]
    halves = [(pair.high - pair.low) / 2 for pair in pairs if pair.low is not None and pair.high is not None]
    spread = 1.1 * max(reach, default=0.0) + (float(np.median(halves)) if halves else 0.0)  # few seeds give some intervals that reach far
    found = statistics.design(data)
    crossed = scaling.triples(data)
    by_cost = {} if crossed else {cost: statistics.by_size(data, cost) for cost in ("flops", "parameters")}
    laws = [(cost, statistics.scaling_law(by_cost[cost])) for cost in [cost for cost in by_cost if by_cost[cost]][:1]]
    done = [point for point in data["points"] if point["state"] == "done"]
    sizes = {point["cost"]["parameters"] for point in done if point["cost"].get("parameters")}
    values = {axis: list(dict.fromkeys([*data["axes"][axis], *(choice[place] for choice in order)])) for place, axis in enumerate(axes)}
    where = {axis: {value: place for place, value in enumerate(found)} for axis, found in values.items()}
    others = [name for name in statistics.metrics(data) if name != data["metric"]]
    by_metric = {name: {row.choice: row for row in statistics.rows(data, name)} for name in others}
    tables = {name: [known[choice] for choice in order] for name, known in by_metric.items()}
    waiting = {state: [point["name"] for point in data["points"] if point["state"] == state] for state in ("running", "pending")}
    file = Path(folder if folder is not None else data["dir"]) / "best.yaml"
    command = ["megaflow", data.get("stage") or "pretrain", str(file), f"run.dir={best_run(data, won)}"]
    return {
        "axes": axes,
        "names": {axis: short_name(axis, axes) for axis in axes},
        "label": lambda choice: label(choice, axes),
        "short_value": short_value,
        "counts": [(state, sum(point["state"] == state for point in data["points"])) for state in STATES],
        "won": won,
        "best": next((row for row in ranked if won is not None and row.choice == won.choice), None),
        "fair": sum(len(row.values) == max(len(other.values) for other in ranked) for row in ranked),
        "base": base,
        "ranked": ranked,
        "digits": digits_of(ranked),
        "apart": digits_apart(ranked),
        "of_effects": digits_of_effects(found, digits_of(ranked)) if found else 0,
        "bars": [interval_figure(row, Scale(-spread, spread) if spread > 0 else None) for row in ranked],
        "seeds": [(row, sum(point["state"] == "done" for point in groups[row.choice])) for row in ranked],
        "compared": sum(pair.p is not None for pair in pairs),
        "uncompared": [row for row in ranked if row.mean is not None and row.paired is not None and row.paired.p is None],
        "tables": tables,
        "digits_by": {name: (digits_of(rows), digits_apart(rows)) for name, rows in tables.items()},
        "curves": curves(data, order, shown),
        "shown": shown,
        "colours": _colours([f"choice {place}" for place in range(len(order))]),
        "switches": {
            "axes": [{"values": values[axis], "colours": _colours(values[axis])} for axis in axes],
            "choices": [[where[axis][value] for axis, value in zip(axes, choice, strict=True)] for choice in order],
        },
        "values": values,
        "design": found,
        "effects": effect_figures(found, data["metric"]) if found else [],
        "least": statistics.LAW_SIZES,
        "frontiers": frontiers(data, ranked),
        "costs": COSTS,
        "left_out": sum(0 < len(row.values) < max(len(other.values) for other in ranked) for row in ranked),
        "surface": scaling.surface_law(crossed) if crossed else None,
        "laws": [(cost, law, law_figure(law, cost, data["metric"])) for cost, law in laws],
        "sizes": statistics.count_alike(sizes),
        "unfinished": [point for point in data["points"] if point["state"] in ("failed", "refused", "stopped early", "stopped", "paused")],
        "undefined": [point["name"] for point in done if not statistics.measured([point], data["metric"])],
        "waiting": waiting,
        "longest": LONGEST,
        "most_values": statistics.MOST_VALUES,
        "yaml": best_yaml(data, folder),
        "command": " ".join(map(shlex.quote, command)),
    }
