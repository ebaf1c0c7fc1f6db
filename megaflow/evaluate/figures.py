"""The figures of the report: matplotlib panels as inline SVG.

Every panel is an SVG of its own, so that a page can put panels side by side or, on a phone, one below the other. Black is written as
`currentColor`: a figure takes the ink of the page it stands in, light or dark. The same numbers always give the same bytes.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

INK = "#010203"  # stands for the page's ink until the SVG is written
COLOURS = {
    "flow": "#2a7fbf",
    "flow_map": "#d4622a",
    "flow_map_even": "#8a5bb0",
    "flow_map_unbalanced": "#b08a2e",
    "autoregressive": "#2e9e78",
    "data": INK,
    "unigram": "#8a8a8a",
}
DASHES = {"autoregressive": "dashed", "data": "solid", "unigram": "dotted"}
MARKERS = {"flow": "o", "flow_map": "s", "flow_map_even": "D", "flow_map_unbalanced": "v"}
MOST_POINTS = 1000  # of a raw curve: more are not seen, but weigh
CELLS = 40  # of time, that the density of a clock is averaged over

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "megaflow",  # ids of clip paths and markers would be random
    "svg.fonttype": "path",  # the page may not count on any font being there
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")},
}


def window(points: int) -> int:
    """Points in the running mean of a training curve of so many: a fiftieth, odd."""
    return max(points // 50, 1) | 1


def drawable(value: float | None) -> bool:
    """Whether a number was measured and is defined."""
    return value is not None and math.isfinite(value)


def learning(name: str, curve: dict) -> str:
    """Training loss (raw, faint, and its running mean) and validation loss against tokens.

    curve: tokens and loss (N,), optionally validation_tokens and validation_loss (M,), and what they are: axis, loss_is, validation_is.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(3.3, 2.6)
        tokens, loss = np.asarray(curve["tokens"], float), np.asarray(curve["loss"], float)
        units = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
        size, unit = next((pair for pair in units if tokens[-1] >= pair[0]), (1, ""))
        colour = COLOURS[name]
        thin = slice(None, None, -(-len(tokens) // MOST_POINTS))
        axes.plot(tokens[thin] / size, loss[thin], color=colour, alpha=0.3, linewidth=0.6)
        smooth = _running_mean(loss, window(len(loss)))[thin]
        axes.plot(tokens[thin] / size, smooth, color=colour, label=curve.get("loss_is", "training"))
        if curve.get("validation_loss"):
            held_out = np.asarray(curve["validation_tokens"], float) / size
            label = curve.get("validation_is", "validation")
            axes.plot(held_out, curve["validation_loss"], color=INK, marker="o", markersize=2.6, linewidth=0.8, label=label)
        axes.set_xlabel(f"tokens read ({unit})" if unit else "tokens read")
        axes.set_ylabel(curve.get("axis", "loss (nats per token)"))
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.2 * (high - low))  # the legend has room of its own
        axes.legend(loc="upper right")
        return svg(figure, f"learning-{name}", f"Learning curve, {name}")


def cross_entropy(profile: dict, unigram: float | None) -> str:
    """A model's measured cross-entropy against real time. profile: t, cross_entropy (K,), nats per token; unigram: the law's entropy."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(4.6, 3.1)
        axes.plot(profile["t"], profile["cross_entropy"], color=COLOURS["flow"], marker=".", markersize=3, linewidth=1)
        if unigram is not None:
            axes.axhline(unigram, color=COLOURS["unigram"], linestyle="dotted")
            axes.annotate("unigram entropy", (0.99, unigram), xytext=(0, 7), textcoords="offset points", ha="right", fontsize=9)
        axes.set_ylim(0, 1.15 * np.nanmax([*profile["cross_entropy"], unigram or 0.0]))
        axes.set_ylabel("cross-entropy (nats per token)")
        _time_axes(axes)
        return svg(figure, "cross-entropy", "Cross-entropy against time")


def clock(profile: dict) -> str:
    """The clock tau(t) and its density. profile: clock_t, clock_cdf (K,), linear in between."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(4.6, 3.1)
        t, tau = np.asarray(profile["clock_t"], float), np.asarray(profile["clock_cdf"], float)
        axes.plot(t, tau, color=COLOURS["flow"])
        axes.set_ylim(0, 1.02)
        axes.set_ylabel(r"clock $\tau(t)$", color=COLOURS["flow"])
        cells = np.linspace(0, 1, CELLS + 1)  # of one width: between two nodes, however close, the density is mostly noise of the fit
        density = np.diff(np.interp(cells, t, tau)) * CELLS
        right = axes.twinx()
        right.spines["right"].set_visible(True)
        right.stairs(density, cells, color=COLOURS["flow_map"], linewidth=1)
        right.set_ylim(0, 1.1 * density.max())
        right.set_ylabel(r"density $d\tau/dt$", color=COLOURS["flow_map"])
        _time_axes(axes)
        return svg(figure, "clock", "Clock and its density")


def quality(samples: dict, field: str, error: str, label: str, constant: set[tuple[str, int]]) -> str:
    """A number of the samples against the number of steps, with a level for each source that has no steps.

    samples: see report.py; field, error: the number and its standard error; constant: (family, steps) whose texts are all the same,
    drawn hollow and unconnected, and, where they would stretch the scale, at its edge with their value.
    """
    points = {
        (name, int(steps)): entry[field]
        for name in MARKERS
        for steps, entry in sorted((samples.get(name) or {}).items(), key=lambda item: int(item[0]))
        if drawable(entry.get(field))
    }
    levels = {name: samples[name][field] for name in DASHES if drawable((samples.get(name) or {}).get(field))}
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(4.6, 3.1)
        for name, marker in MARKERS.items():
            curve = [(steps, value) for (family, steps), value in points.items() if family == name and (family, steps) not in constant]
            errors = [samples[name][str(steps)].get(error) or 0.0 for steps, _ in curve]
            places, values = [steps for steps, _ in curve], [value for _, value in curve]
            axes.errorbar(places, values, errors, color=COLOURS[name], marker=marker, markersize=3.2, elinewidth=0.9, capsize=2.5)
        for name, level in levels.items():
            axes.axhline(level, color=COLOURS[name], linestyle=DASHES[name], linewidth=1.1)
        scale = [value for key, value in points.items() if key not in constant] + list(levels.values())
        _scale(axes, scale or list(points.values()))
        for (name, steps), value in points.items():
            if (name, steps) in constant:
                _hollow(axes, steps, value, name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({steps for _, steps in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.set_xlabel("steps (network evaluations per text)")
        axes.set_ylabel(label)
        return svg(figure, f"quality-{field}", f"{label} against steps")


def frontier(samples: dict, cooled: dict, constant: set[tuple[str, int]]) -> str:
    """Judge against entropy: for every number of steps a line from temperature 1, where the number stands, down to the lowest.

    samples, cooled: see report.py; constant: (family, steps) that are left out.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(4.6, 3.1)
        labels = []
        for name in (*MARKERS, "autoregressive"):
            own = samples.get(name) or {}
            for kind, entry in ({name: own} if name == "autoregressive" else own).items():
                line = [entry, *(cooled.get(name) or {}).get(kind, [])]
                line = [point for point in line if drawable(point.get("judge_bits_per_char"))]
                if not line or kind.isdigit() and (name, int(kind)) in constant:
                    continue
                places, values = [point["entropy"] for point in line], [point["judge_bits_per_char"] for point in line]
                axes.plot(places, values, color=COLOURS[name], marker=MARKERS.get(name, "^"), markersize=3.2, linewidth=0.9)
                if kind.isdigit():
                    labels.append((kind, (places[0], values[0]), COLOURS[name], name == "flow"))
        for name in ("data", "unigram"):
            if drawable((samples.get(name) or {}).get("judge_bits_per_char")):
                axes.plot(samples[name]["entropy"], samples[name]["judge_bits_per_char"], color=COLOURS[name], marker="*", markersize=8)
        axes.set_xlabel("entropy within a text (nats)")
        axes.set_ylabel("judge (bits per character)")
        place(figure, axes, labels)
        return svg(figure, "frontier", "Judge against entropy at falling temperature")


def place(
    figure: Figure, axes: Axes, labels: list[tuple[str, tuple[float, float], str, bool]], others: Sequence[tuple[float, float]] = ()
) -> None:
    """Write each label (text, point, colour, rather above than below) beside its point, clear of all points, the others' too, and of the
    labels before it, or not at all."""
    figure.draw_without_rendering()  # the layout is final, and what is written from here on leaves it so
    half = figure.dpi / 72 * 1.6  # of a marker
    points = [point for _, point, _, _ in labels] + list(others)
    taken = [Bbox([at - half, at + half]) for at in axes.transData.transform(points)] if points else []
    for text, point, colour, up_first in labels:
        above, below = ((5, 3), (-5, 3)), ((5, -9), (-5, -9))
        for right, up in above + below if up_first else below + above:
            label = axes.annotate(text, point, (right, up), textcoords="offset points", fontsize=9, color=colour)
            label.set_horizontalalignment("left" if right > 0 else "right")
            label.set_in_layout(False)
            box = label.get_window_extent()
            if axes.bbox.x0 < box.x0 and box.x1 < figure.bbox.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _scale(axes: Axes, values: list[float]) -> None:
    """Limits of the y axis with room around the values."""
    room = 0.12 * (max(values) - min(values)) or 0.5
    axes.set_ylim(min(values) - room, max(values) + room)


def _hollow(axes: Axes, steps: int, value: float, name: str) -> None:
    """A degenerate point; if it lies outside the scale, at the edge, with an arrow and its value beside it."""
    low, high = axes.get_ylim()
    inside = min(max(value, low + 0.04 * (high - low)), high - 0.04 * (high - low))
    axes.plot([steps], [inside], color=COLOURS[name], marker=MARKERS[name], linestyle="none", fillstyle="none")
    if not low <= value <= high:
        arrow = r"$\uparrow$" if value > high else r"$\downarrow$"
        label = f"{value:.2f} {arrow}"
        axes.annotate(label, (steps, inside), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9, color=COLOURS[name])


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """One panel, in inches, with quiet horizontal rules."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", alpha=0.12, linewidth=0.6)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_axisbelow(True)
    return figure, axes


def _time_axes(axes: Axes) -> None:
    """Real time below, from noise to data; log-SNR lambda = 2 log(t / (1 - t)) above."""
    axes.set_xlim(0, 1)
    axes.set_xlabel("time $t$ (0: noise, 1: data)")
    above = axes.twiny()
    above.set_xlim(0, 1)
    above.spines["top"].set_visible(True)
    marks = np.array([-6, -4, -2, 0, 2, 4, 6])
    above.set_xticks(1 / (1 + np.exp(-marks / 2)), [f"{mark}".replace("-", "\N{MINUS SIGN}") for mark in marks], fontsize=9)
    above.set_xlabel(r"log-SNR $\lambda = 2\,\log(t/(1-t))$")


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the `width` points around each, fewer at the ends; what is not finite is left out."""
    box = np.ones(min(width, len(values)))
    finite = np.isfinite(values)
    sums, counts = np.convolve(np.where(finite, values, 0.0), box, "same"), np.convolve(finite, box, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def svg(figure: Figure, name: str, title: str) -> str:
    """The <svg> element alone: without prolog, date and fixed size, in the page's ink, with ids that no other panel has."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue().replace(INK, "currentColor")
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    width = 4 / 3 * float(re.findall(r'width="([\d.]+)pt"', text)[0])
    head = f'<svg role="img" aria-label="{title}" style="max-width: {width:.0f}px"'
    return re.sub(r'<svg|\s(?:width|height)="[\d.]+pt"', lambda found: head if found[0] == "<svg" else "", text, count=3)
