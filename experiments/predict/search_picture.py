"""plot=FILE: memory against time of all plans that fit, and the front that no plan beats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from experiments.predict.plan_config import SearchConfig
from experiments.predict.search import plan_of
from experiments.predict.search_tables import schedule_of
from simulator.search import Found

GB = 1e9
SLOWEST = 6.0  # times the fastest: what is slower is not shown
ROOM = 2.6  # times the fastest, left of it, where labels are
MOST_LABELS = 14
BLUE, RED, GREY = "#4878cf", "#d1495b", "#8c8c8c"
TICKS = np.array([1, 1.5, 2, 3, 4, 5, 7])


def draw(found: Found, config: SearchConfig, path: Path, svg_too: bool = True) -> None:
    """Write `path`, and the same beside it as .svg. Raises ValueError where no plan fits."""
    if not found.fits.any():
        raise ValueError(f"plot={path}: no plan fits, so there is nothing to draw")
    with rc_context({"svg.hashsalt": "worldsize", "font.size": 9}):
        figure = Figure(figsize=(11, 6.2), layout="constrained")
        FigureCanvasAgg(figure)
        _draw_plans(figure.subplots(), found, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix in {path.suffix or ".png", *([".svg"] if svg_too else [])}:
            metadata = {"Date": None} if suffix == ".svg" else None
            figure.savefig(path.with_suffix(suffix), dpi=130, metadata=metadata)


def _draw_plans(axes: Any, found: Found, config: SearchConfig) -> None:
    """Seconds to the right, both axes logarithmic: a front is steep at one end and flat at the
    other."""
    time = found.predicted.time_s["total"]
    memory = found.predicted.memory_bytes["peak"] / GB
    fastest = float(time[found.fits].min())
    near = found.fits & (time <= SLOWEST * fastest)
    low, high = float(memory[near].min()) / 1.3, config.cluster.device.memory_bytes / GB
    bounds = (fastest / ROOM, SLOWEST * fastest, low, high * 1.15)
    cells = axes.hexbin(
        time[near],
        memory[near],
        gridsize=(70, 40),
        extent=np.log10(bounds),
        xscale="log",
        yscale="log",
        bins="log",
        mincnt=1,
        cmap="Blues",
        linewidths=0.1,
        vmin=0.3,
    )
    axes.figure.colorbar(cells, ax=axes, label="plans in a cell", pad=0.01, shrink=0.6)
    front = found.front()
    front = front[time[front] <= SLOWEST * fastest]
    axes.plot(time[front], memory[front], color=RED, linewidth=1.2, marker="o", markersize=3.5)
    _label(axes, found, front, memory, bounds)
    _draw_limits(axes, found.limit / GB, high, bounds)
    axes.set(xlim=bounds[:2], ylim=bounds[2:])
    _ticks(axes.xaxis, bounds[:2])
    _ticks(axes.yaxis, bounds[2:])
    axes.set(xlabel="seconds of a step", ylabel="memory of the fullest rank, GB")
    device = config.cluster.device.name or config.cluster.name
    axes.set_title(
        f"{config.gpus:,} x {device}, {config.batch_size:,} sequences of {config.seq_len:,} tokens "
        f"a step: {near.sum():,} of {found.fits.sum():,} plans that fit "
        f"(the others take more than {SLOWEST:g} times the fastest)",
        loc="left",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)


def _draw_limits(axes: Any, limit: float, whole: float, bounds: tuple[float, ...]) -> None:
    """What the device has, and what of it may be filled."""
    axes.axhline(whole, color=GREY, linewidth=1)
    place = {"xytext": (-4, 3), "textcoords": "offset points", "ha": "right", "color": GREY}
    axes.annotate(f"memory of the device, {whole:.1f} GB", (bounds[1], whole), **place)
    axes.axhspan(limit, whole, color=GREY, alpha=0.12, linewidth=0)


def _label(
    axes: Any, found: Found, front: np.ndarray, memory: np.ndarray, bounds: tuple[float, ...]
) -> None:
    """Layouts of the front, in the empty space left of it, one below the other."""
    time, plans = found.predicted.time_s["total"], [plan_of(found, int(i)) for i in front]
    new = [k for k, p in enumerate(plans) if k == 0 or p["label"] != plans[k - 1]["label"]]
    steps = np.linspace(0, len(new) - 1, min(MOST_LABELS, len(new))).round().astype(int)
    shown = [new[k] for k in steps]
    lowest, highest = np.log(bounds[2] * 1.08), np.log(bounds[3] / 1.2)
    wanted = np.log([float(memory[front[k]]) for k in shown])
    places = _apart(wanted, (highest - lowest) / (MOST_LABELS + 6), highest, lowest)
    for k, place in zip(shown, places, strict=True):
        at = float(time[front[k]]), float(memory[front[k]])
        axes.annotate(
            _said(plans[k]),
            at,
            xytext=(bounds[0] * 1.02, float(np.exp(place))),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": RED, "linewidth": 0.4, "alpha": 0.6},
        )


def _said(plan: dict[str, Any]) -> str:
    schedule = f", {schedule_of(plan)}" if plan["schedule"] else ""
    again = plan["activation_checkpointing"]
    return f"{plan['label']}{schedule}" + ("" if again == "none" else f", {again}")


def _apart(wanted: np.ndarray, gap: float, highest: float, lowest: float) -> np.ndarray:
    """Heights, from the top down, at least `gap` apart and as near as may be to what is wanted."""
    places, above = [], highest + gap
    for height in wanted:
        above = min(float(height), above - gap)
        places.append(above)
    below = lowest - gap
    for k in reversed(range(len(places))):
        below = places[k] = max(places[k], below + gap)
    return np.array(places)


def _ticks(axis: Any, ends: tuple[float, ...]) -> None:
    """Plain numbers on a logarithmic axis."""
    powers = 10.0 ** np.arange(np.floor(np.log10(ends[0])), np.ceil(np.log10(ends[1])) + 1)
    values = np.unique(np.outer(powers, TICKS))
    axis.set_major_locator(FixedLocator(values[(values >= ends[0]) & (values <= ends[1])].tolist()))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
