"""Figures of evaluations side by side: inline SVG as in figures.py. They hold no text of the data but numbers."""

import colorsys
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megaflow.evaluate.figures import INK, STYLE, panel, place, svg
from megaflow.evaluate.side_by_side import Line

PALETTE = ("#2a7fbf", "#d4622a", "#2e9e78", "#8a5bb0", "#b08a2e", "#c2496e", "#5a7d8c", "#7a9a2e")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "<": "◀"}
"""Of matplotlib, and as they stand in a legend."""
GREY = "#8a8a8a"
DASHES = ("dashed", "dotted", "dashdot", (0, (6, 1, 1, 1, 1, 1)))
"""Of lines with fresh noise, by gamma."""
MOST_POINTS = 600
"""Of a sorted curve of rows: more are not seen."""
HIGHEST = 1e30
"""What is above is drawn there."""
DECADE = 5.0
"""Below this ratio of its ends a logarithmic axis has ticks that are evenly spread."""


class Style(NamedTuple):
    """How a run is drawn, everywhere on a page."""

    colour: str
    marker: str

    @property
    def glyph(self) -> str:
        return MARKERS[self.marker]


def styles(runs: Sequence[str]) -> dict[str, Style]:
    """One for each run: of the palette as far as it reaches, apart from one another in hue beyond."""
    if len(runs) <= len(PALETTE):
        colours = list(PALETTE)
    else:
        colours = [_hex(colorsys.hls_to_rgb(place / len(runs), 0.42 + 0.12 * (place % 2), 0.6)) for place in range(len(runs))]
    markers = list(MARKERS)
    return {run: Style(colours[place], markers[place % len(markers)]) for place, run in enumerate(runs)}


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * x):02x}" for x in rgb)


def sorted_rows(differences: dict[str, Sequence[float]], style: dict[str, Style], name: str) -> str:
    """Differences of rows from the first run, {run: (R,) in nats per token}, each run's in their order from the lowest to the highest."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(6.2, 3.1)
        axes.axhline(0.0, color=INK, linewidth=0.8)
        for run, values in differences.items():
            ordered = np.sort(np.asarray(values, float))
            shares = 100.0 * (np.arange(len(ordered)) + 0.5) / len(ordered)
            shown = np.unique(np.linspace(0, len(ordered) - 1, MOST_POINTS).round().astype(int))
            dots = style[run].marker if len(ordered) <= 40 else ""
            axes.plot(shares[shown], ordered[shown], color=style[run].colour, marker=dots, markersize=3)
        axes.set_xlim(0, 100)
        axes.set_xlabel("rows, from the lowest difference to the highest (%)")
        axes.set_ylabel("difference (nats per token)")
        return svg(figure, name, "Differences of rows from the first run, in nats per token")


def stretches(parts: dict[str, Any], style: Style, top: float, name: str) -> str:
    """Where a bound comes from: nats per token in each stretch over the width of the stretch, with errors, and those of independent tokens;
    `parts` as in evaluation.json. The y axis ends at `top`."""
    edges, network, errors, unigram = (np.asarray(parts[key], float) for key in ("edges", "nats", "errors", "unigram"))
    widths = np.diff(edges)
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(3.3, 2.6)
        axes.stairs(unigram / widths, edges, color=INK, linewidth=1.0, linestyle=(0, (1.5, 1.5)))
        axes.stairs(network / widths, edges, color=style.colour, fill=True, alpha=0.18)
        axes.stairs(network / widths, edges, color=style.colour, linewidth=1.3)
        middle, errors = (edges[1:] + edges[:-1]) / 2.0, np.where(np.isfinite(errors), errors, 0.0)
        axes.errorbar(middle, network / widths, errors / widths, color=style.colour, linestyle="none", elinewidth=1.0, capsize=1.8)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(min(0.0, 1.05 * float((network / widths).min())), top)
        axes.set_xlabel("log-SNR (noise to data)" if parts["axis"] == "log-SNR" else "time $t$ (noise to data)")
        axes.set_ylabel(f"nats per token per unit of {parts['axis']}", fontsize=9)
        return svg(figure, name, f"Nats per token against {parts['axis']}")


def top_of(parts: Sequence[dict[str, Any]]) -> float:
    """Where the y axis of `stretches` ends, so that these compare."""
    heights = [
        max(x + (error if math.isfinite(error) else 0.0), base) / (high - low)
        for each in parts
        for x, error, base, low, high in zip(each["nats"], each["errors"], each["unigram"], each["edges"], each["edges"][1:], strict=False)
    ]
    return 1.06 * max(heights, default=1.0) or 1.0


def against_entropy(
    lines: Sequence[Line],
    style: dict[str, Style],
    real: tuple[float, float] | None,
    drawn: tuple[float, float] | None,
    label: str,
    name: str,
    logarithmic: bool = False,
) -> str:
    """A judge's value against entropy; `real` and `drawn` (entropy, value) of real text and of tokens drawn one by one. Numbers of steps
    stand where there is room, with the gamma of fresh noise where there is one, each with dashes of its own; texts of another way than the
    samples are hollow."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(4.6, 3.4)
        if logarithmic:
            axes.set_yscale("log")
        labels, others = [], []
        gammas = sorted({line.gamma for line in lines if line.gamma is not None})
        for number, line in enumerate(lines):
            own, x, y = style[line.run], [point[0] for point in line.points], [min(point[1], HIGHEST) for point in line.points]
            fill: Any = "none" if line.way else "full"
            dashes = DASHES[gammas.index(line.gamma) % len(DASHES)] if line.gamma is not None else "solid"
            axes.plot(x, y, color=own.colour, marker=own.marker, markersize=4, linewidth=0.9, fillstyle=fill, alpha=0.9, linestyle=dashes)
            others += list(zip(x, y, strict=True))[1:]
            if line.steps is not None and not line.way:
                text = str(line.steps) if line.gamma is None else f"{line.steps}, γ {line.gamma:g}"
                labels.append((text, (x[0], y[0]), own.colour, number % 2 == 0))
        if real is not None:
            axes.axvline(real[0], color=INK, linewidth=0.6, linestyle="dotted")
        for star, colour in ((drawn, GREY), (real, INK)):
            if star is not None:
                others.append((star[0], min(star[1], HIGHEST)))
                axes.plot(*others[-1], color=colour, marker="*", markersize=10, linestyle="none")
        axes.margins(0.08)
        if logarithmic:
            _plain_ticks(axes)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel("entropy within a text (nats)")
        axes.set_ylabel(label)
        place(figure, axes, labels, others)
        return svg(figure, name, f"{label} against entropy")


def _plain_ticks(axes: Axes) -> None:
    """Of a logarithmic y axis: numbers as they are read, at 1, 2 and 5 times powers of ten, or evenly over a short range."""
    low, high = axes.get_ylim()
    short = high / low < DECADE
    axes.yaxis.set_major_locator(MaxNLocator(5) if short else LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}" if y < 1e6 else f"{y:.3g}"))
