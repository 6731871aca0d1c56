"""Small charts for answers: bars of parts, lines, a roofline. Each is a PNG of a few tens of kB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.pictures import MEMORY_COLOURS

PALETTE = ("#4878cf", "#3a9d5d", "#d1495b", "#e8a33d", "#b07aa1", "#2f4f8f", "#9ccb6b", "#8c8c8c")
DPI = 100
WIDTH = 8.6  # inches
# of a name from its point, in points, and its side that is there
PLACES = (
    *(((4, -3), "left"), ((-4, -3), "right")),
    *(((0, height), "center") for height in (5, -11, 13, -19, 21, -27)),
)


@dataclass(frozen=True)
class Bars:
    """Rows of parts, one after the other. `parts`: name -> one value a row."""

    title: str
    rows: list[str]
    parts: dict[str, list[float]]
    unit: str
    limit: float | None = None  # a line, as what a device has


@dataclass(frozen=True)
class Lines:
    """`lines`: name -> (x, y). `points`: those that are measured, drawn as marks."""

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    labels: bool = False  # write each point's name beside it, with no legend


def draw(path: Path, *panels: Bars | Lines) -> None:
    """Panels side by side; panels of bars one below the other. `path`: a PNG."""
    stacked = all(isinstance(panel, Bars) for panel in panels)
    shape = (len(panels), 1) if stacked else (1, len(panels))
    rows = [len(p.rows) if isinstance(p, Bars) else 12 for p in panels]
    height = sum(0.24 * n + 0.9 for n in rows) if stacked else 3.6
    with rc_context({"font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        ratios = {"height_ratios": [n + 3 for n in rows]} if stacked else {}
        grid = figure.subplots(*shape, squeeze=False, gridspec_kw=ratios)
        for axes, panel in zip(grid.ravel(), panels, strict=True):
            if isinstance(panel, Bars):
                _draw_bars(axes, panel)
            else:
                _draw_lines(axes, panel)
            axes.set_title(panel.title, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
        figure.draw_without_rendering()  # only then it is known where things lie
        for axes, panel in zip(grid.ravel(), panels, strict=True):
            if isinstance(panel, Lines) and panel.labels:
                _label(axes, panel.points)
        figure.savefig(path, dpi=DPI)


def _label(axes: Any, points: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Write names beside their points, each at the first place where it covers no other."""
    taken: list[Any] = []
    for name, (x, y) in points.items():
        for place, side in PLACES:
            text = axes.annotate(
                name, (x[0], y[0]), place, textcoords="offset points", fontsize=7, ha=side
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or (place, side) == PLACES[-1]:
                taken.append(box)
                break
            text.remove()


def _draw_bars(axes: Any, bars: Bars) -> None:
    places = np.arange(len(bars.rows))
    left = np.zeros(len(bars.rows))
    for (name, values), colour in zip(bars.parts.items(), PALETTE, strict=False):
        if any(values):
            colour = MEMORY_COLOURS.get(name, colour)
            axes.barh(places, values, left=left, color=colour, label=name, height=0.72)
        left += np.array(values)
    axes.set_yticks(places, bars.rows)
    axes.invert_yaxis()
    axes.set_xlabel(bars.unit)
    if bars.limit is not None:
        axes.axvline(bars.limit, color="#8c8c8c", linewidth=1, linestyle="--")
    axes.legend(frameon=False, fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_lines(axes: Any, lines: Lines) -> None:
    colours = {}
    for (name, (x, y)), colour in zip(lines.lines.items(), PALETTE * 3, strict=False):
        axes.plot(x, y, color=colour, label=name, linewidth=1.3)
        colours[name] = colour
    for i, (name, (x, y)) in enumerate(lines.points.items()):
        colour = colours.get(name, PALETTE[i % len(PALETTE)])
        label = None if name in colours or lines.labels else name
        axes.plot(x, y, "o", color=colour, markersize=4, label=label)
    if lines.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"
        )
    if lines.log_y:
        axes.set_yscale("log")
    axes.set(xlabel=lines.x, ylabel=lines.y)
    if lines.lines and not (lines.labels and len(lines.lines) < 2):
        axes.legend(frameon=False, fontsize=7)
