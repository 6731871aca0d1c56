"""Pictures of a comparison: memory, messages and time as stacked bars, losses as lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from costs.ledger import MEMORY_PARTS, TIME_PARTS
from experiments.compare.comparison import Comparison
from experiments.compare.run_costs import PEAK, STEP, WIRE
from experiments.compare.sheets import human, in_words, words_of
from experiments.console import DASH
from experiments.pictures import MEMORY_COLOURS

TIME_COLOURS = dict(
    zip(TIME_PARTS, ("#3a9d5d", "#d1495b", "#c9c9cf", "#b07aa1", "#8c8c8c"), strict=True)
)
MESSAGE_COLOURS = ("#4878cf", "#e8a33d", "#3a9d5d", "#d1495b", "#b07aa1", "#2f4f8f", "#8c8c8c")
MOST_BARS = 30  # runs of a picture, the cheapest first
MOST_LINES = 10
MOST_WORDS = 60  # characters of a bar's name
WIDTH = 11.0  # inches


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Write memory, bytes, time and loss into `folder`, each as .png and .svg; returns the .png.

    What no run has is left out. Raises ValueError, one line, where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [*_draw_bars(comparison, folder), *_draw_losses(comparison, folder)]
    except OSError as error:
        raise ValueError(f"out={folder}: {error.strerror}") from error
    return drawn


def _draw_bars(comparison: Comparison, folder: Path) -> Iterator[Path]:
    memory = {f"memory_bytes.{part}": MEMORY_COLOURS[part] for part in MEMORY_PARTS}
    time = {f"time_s.{part}": TIME_COLOURS[part] for part in TIME_PARTS}
    yield from bars(comparison, PEAK, memory, folder / "memory", "memory at the peak")
    yield from bars(comparison, STEP, time, folder / "time", "time of a step")
    title = "what a rank sends in a step"
    yield from bars(comparison, WIRE, message_colours(comparison), folder / "bytes", title)


def message_colours(comparison: Comparison) -> dict[str, str]:
    """Kinds of messages; those after the largest share the last colour."""
    last = len(MESSAGE_COLOURS) - 1
    kinds = enumerate(comparison.message_kinds())
    return {name: MESSAGE_COLOURS[min(k, last)] for k, name in kinds}


def bars(
    comparison: Comparison, whole: str, parts: dict[str, str], path: Path, title: str
) -> Iterator[Path]:
    """A bar a run, its parts side by side, the whole written at its end. Nothing where no run has
    the whole, or all have 0 of it."""
    have = [i for i in comparison.by_cost() if whole in comparison.costs[i]]
    shown = have[:MOST_BARS]
    most = max((comparison.costs[i][whole].value for i in shown), default=0.0)
    if not most:
        return
    more = f", {len(shown)} of {len(have)} runs" if len(have) > len(shown) else ""
    with figure_for(path, 1.3 + 0.3 * len(shown)) as figure:
        axes = figure.subplots()
        left = np.zeros(len(shown))
        for name, colour in parts.items():
            held = [comparison.costs[i].get(name) for i in shown]
            values = np.array([cost.value if cost else 0.0 for cost in held])
            if values.any():
                axes.barh(range(len(shown)), values, left=left, color=colour, label=words_of(name))
                left += values
        for row, i in enumerate(shown):
            cost = comparison.costs[i][whole]
            noise = cost.noise if whole == STEP else None
            if noise:
                axes.errorbar(cost.value, row, xerr=noise, color="black", capsize=2, linewidth=1)
            text = f"  {human(whole, cost.value)}"
            axes.annotate(text, (cost.value + (noise or 0), row), va="center", fontsize=8)
        axes.set_yticks(range(len(shown)), [name_of(comparison, i) for i in shown], fontsize=8)
        axes.set_xlim(0, most * 1.15)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(lambda value, _: human(whole, value))
        axes.set_title(title + more, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    yield path.with_suffix(".png")


def name_of(comparison: Comparison, i: int) -> str:
    """A run by its number and what differs, or its name, short enough for a picture."""
    run, differs = comparison.runs[i], in_words(comparison.differences.values[i])
    text = f"{run.number} {run.name if differs == DASH else differs}"
    return text if len(text) <= MOST_WORDS else text[: MOST_WORDS - 1] + "\u2026"


def losses_of(comparison: Comparison, i: int) -> tuple[list[float], list[float] | None]:
    """A run's losses by step, NaN where one was not finite, and the seconds of training after
    which each was there; None where its log is not."""
    run = comparison.runs[i]
    values = [np.nan if loss is None else loss for loss in run.losses]
    if run.seconds is None or len(run.seconds) != len(values):
        return values, None
    return values, np.cumsum(run.seconds).tolist()


def _draw_losses(comparison: Comparison, folder: Path) -> Iterator[Path]:
    """Over steps, and over seconds."""
    shown = [i for i in comparison.by_cost() if comparison.runs[i].losses][:MOST_LINES]
    if not shown:
        return
    with figure_for(folder / "loss", 4.2) as figure:
        by_step, by_second = figure.subplots(1, 2, sharey=True)
        for k, i in enumerate(shown):
            values, seconds = losses_of(comparison, i)
            line: dict[str, Any] = {"color": f"C{k}", "linewidth": 1}
            by_step.plot(range(1, len(values) + 1), values, label=name_of(comparison, i), **line)
            if seconds:
                by_second.plot(seconds, values, **line)
        by_step.set(xlabel="steps", ylabel="loss, nats a token")
        by_second.set(xlabel="seconds of training")
        for axes in (by_step, by_second):
            axes.spines[["top", "right"]].set_visible(False)
        handles = by_step.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower left", ncols=1, frameon=False, fontsize=8)
    yield folder / "loss.png"


@contextmanager
def figure_for(path: Path, height: float) -> Iterator[Figure]:
    """A figure that is saved at the end, as .png and .svg: the same numbers, the same bytes."""
    settings = {"svg.hashsalt": "worldsize", "svg.fonttype": "none", "font.size": 9}
    with rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
