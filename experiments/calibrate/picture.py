"""What ./launch.sh calibrate has measured, beside the fitted curves: a picture and a table."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.ask.charts import DPI, PALETTE
from experiments.calibrate.profile import Calibration
from experiments.calibrate.spread import Point

COLUMNS = ("kind", "name", "ranks", "size", "work", "seconds", "low", "high", "fitted")
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm")
MARKS = "osD^vP*X"  # by number of ranks


def write(points: Iterable[Point], path: Path) -> None:
    """One row a point; low and high are the quartiles of its seconds."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for one in points:
            seconds = (f"{value:.6g}" for value in (*astuple(one.seconds), one.fitted))
            rows.writerow((one.kind, one.name, one.ranks, f"{one.size:.6g}", one.work, *seconds))


def draw(found: Calibration, path: Path) -> None:
    """Four panels: products and copies as rates, messages and operators as seconds. Marks are
    medians with their quartiles, lines are the fitted curves."""
    with rc_context({"font.size": 8, "axes.titlesize": 9}):
        figure = Figure(figsize=(11, 8.2), layout="constrained")
        FigureCanvasAgg(figure)
        products, memory, messages, operators = figure.subplots(2, 2).ravel()
        _draw_rates(products, _of(found, "product"), 1e9)
        products.set(xlabel="harmonic mean of the three sides", ylabel="GFLOP/s")
        products.set_title("matrix products of one device, alone", loc="left")
        _draw_rates(memory, _of(found, "memory"), 1e9)
        memory.set(xlabel="bytes read", ylabel="GB/s, read and written")
        memory.set_title("copies of one device, alone", loc="left")
        _draw_messages(messages, _of(found, "message"))
        _draw_operators(operators, _of(found, "operator"))
        overhead = 1e6 * found.cluster.operator_overhead
        said = f"operators in training steps; the host adds {overhead:.3g} µs to each"
        operators.set_title(said, loc="left")
        for axes in (products, memory, messages, operators):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{found.cluster.device.name}: measured, and the fitted curves")
        figure.savefig(path, dpi=DPI)


def _of(found: Calibration, kind: str) -> list[Point]:
    return [point for point in found.points if point.kind == kind]


def _named(points: list[Point]) -> dict[str, list[Point]]:
    by_name: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point.size):
        by_name[point.name].append(point)
    return by_name


def _draw_rates(axes: Any, points: list[Point], unit: float) -> None:
    for (name, same), colour in zip(_named(points).items(), PALETTE, strict=False):
        rates = [point.seconds.rate(point.work / unit) for point in same]
        size = [point.size for point in same]
        _marks(axes, size, rates, "o", colour, f"{name}, measured")
        fitted = [point.work / unit / point.fitted for point in same]
        axes.plot(size, fitted, color=colour, linewidth=1.2, label=f"{name}, curve")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=7)


def _marks(
    axes: Any, x: list[float], spreads: list[Any], mark: str, colour: str, name: Any
) -> None:
    middles = [one.middle for one in spreads]
    below = [one.middle - one.low for one in spreads]
    above = [one.high - one.middle for one in spreads]
    style = {"fmt": mark, "markersize": 4, "elinewidth": 1, "capsize": 2, "color": colour}
    axes.errorbar(x, middles, yerr=(below, above), label=name, **style)


def _draw_messages(axes: Any, points: list[Point]) -> None:
    """A colour a collective, a mark a number of ranks; between nodes dashed."""
    axes.set_title("messages", loc="left")
    if not points:
        axes.text(0.5, 0.5, "one device: no messages", ha="center", transform=axes.transAxes)
        return
    counts = sorted({point.ranks for point in points})
    collectives = list(dict.fromkeys(point.name.split()[1] for point in points))
    for name, same in _named(points).items():
        level, collective = name.split()
        colour = PALETTE[collectives.index(collective) % len(PALETTE)]
        for count in sorted({point.ranks for point in same}):
            mine = [point for point in same if point.ranks == count]
            size = [point.size for point in mine]
            mark = MARKS[counts.index(count) % len(MARKS)]
            label = f"{collective}, {count} ranks" + (" of nodes" if "between" in level else "")
            _marks(axes, size, [point.seconds for point in mine], mark, colour, label)
            line = "--" if "between" in level else "-"
            axes.plot(size, [point.fitted for point in mine], line, color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="payload, bytes", ylabel="seconds")
    axes.legend(frameon=False, fontsize=6, ncols=max(1, len(counts) // 2))


def _draw_operators(axes: Any, points: list[Point]) -> None:
    """Measured against fitted: on the line they are the same."""
    if not points:
        axes.text(
            0.5, 0.5, "a GPU's are not timed one by one", ha="center", transform=axes.transAxes
        )
        return
    products = [point for point in points if point.name in PRODUCTS]
    attention = [point for point in points if "scaled_dot_product" in point.name]
    rest = [point for point in points if point not in products and point not in attention]
    for same, name, colour in zip(
        (rest, products, attention), ("other", "products", "attention"), PALETTE, strict=False
    ):
        x = [point.fitted for point in same]
        axes.plot(
            x, [p.seconds.middle for p in same], "o", color=colour, markersize=2.5, label=name
        )
    ends = [min(p.fitted for p in points), max(p.fitted for p in points)]
    axes.plot(ends, ends, color="#8c8c8c", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="seconds, curve", ylabel="seconds, measured")
    axes.legend(frameon=False, fontsize=7)
