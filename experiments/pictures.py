"""Pictures of a step, measured or simulated: who did what when, and what filled memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from costs.ledger import MEMORY_PARTS
from costs.trace import COMMUNICATION, COMPUTE, WAIT, MemorySample, Slice, lanes
from simulator.timeline import Timeline

COLOURS = {
    "data": "#8c8c8c",
    "forward": "#4878cf",
    "loss": "#2f4f8f",
    "backward": "#3a9d5d",
    "backward_input": "#3a9d5d",
    "backward_weight": "#9ccb6b",
    "optimizer": "#b07aa1",
    "message": "#e8a33d",
    "exposed": "#d1495b",
    "idle": "#e9e9ec",
}
NAMES = {
    "backward": "backward",
    "backward_input": "backward, inputs",
    "backward_weight": "backward, weights",
    "message": "message under way",
    "exposed": "exposed communication",
    "idle": "idle",
}
MEMORY_COLOURS = dict(
    zip(
        MEMORY_PARTS,
        ("#4878cf", "#3a9d5d", "#b07aa1", "#e8a33d", "#d1495b", "#8c8c8c"),
        strict=True,
    )
)
WIDTH = 12.0  # inches
MARGIN_LEFT, MARGIN_RIGHT = 0.75, 0.15  # inches
COMPUTE_HEIGHT, MESSAGE_HEIGHT = 0.56, 0.22  # of a rank's row, which is 1 high
DIGIT = 0.075  # inches that a digit takes in a box
MOST_RANKS = 16  # that a timeline shows
MOST_PANELS = 4  # ranks of a picture of memory


def draw_timeline(slices: Sequence[Slice], path: Path, title: str) -> None:
    """Ranks as rows: what each computes, with numbers of micro-batches, and below it what it sends.

    Times in Slice are seconds; the picture shows milliseconds. `path` is without a suffix: .png and
    .svg are written. Of many ranks the first MOST_RANKS are shown.
    """
    ranks = sorted({piece.rank for piece in slices})[:MOST_RANKS]
    end = max(piece.end for piece in slices)
    figure, (axes,) = _figure([len(ranks) * 0.62], title)
    shown: set[str] = set()
    for row, rank in enumerate(ranks):
        own = [piece for piece in slices if piece.rank == rank]
        shown |= _draw_compute(axes, own, row + 0.08, COMPUTE_HEIGHT, end)
        top = row + 0.1 + COMPUTE_HEIGHT
        shown |= _draw_messages(axes, own, top, MESSAGE_HEIGHT)
    axes.set_ylim(len(ranks), 0)
    axes.set_yticks([row + 0.36 for row in range(len(ranks))], [f"rank {rank}" for rank in ranks])
    _finish_time_axis(axes, end)
    named = {k: COLOURS[k] for k in COLOURS if k in shown}
    _legend(figure, {NAMES.get(kind, kind): colour for kind, colour in named.items()})
    _save(figure, path)


def draw_memory(
    samples: Sequence[MemorySample], slices: Sequence[Slice], path: Path, title: str
) -> None:
    """What each rank holds over the step, by category, as stacked areas; above it what it does.

    Samples hold bytes; the picture shows megabytes (1e6). Of many ranks the MOST_PANELS fullest.
    """
    by_rank: dict[int, list[MemorySample]] = {}
    for sample in samples:
        by_rank.setdefault(sample.rank, []).append(sample)
    fullest = sorted(by_rank, key=lambda rank: -max(_total(s) for s in by_rank[rank]))
    ranks = sorted(fullest[:MOST_PANELS])
    figure, panels = _figure([height for _ in ranks for height in (0.22, 1.7)], title)
    end = max(piece.end for piece in slices)
    highest = max(_total(s) for rank in ranks for s in by_rank[rank]) / 1e6
    for strip, area, rank in zip(panels[::2], panels[1::2], ranks, strict=True):
        _draw_compute(strip, [s for s in slices if s.rank == rank], 0.0, 1.0, end)
        strip.set_ylim(1, 0)
        strip.set_xlim(0, end * 1e3)
        strip.set_axis_off()
        _draw_areas(area, by_rank[rank], end)
        area.set_ylim(0, highest * 1.12)
        area.set_ylabel(f"rank {rank}, MB")
        _finish_time_axis(area, end)
    for area in panels[1:-1:2]:
        area.set_xlabel("")
        area.tick_params(labelbottom=False)
    _legend(figure, {part: MEMORY_COLOURS[part] for part in MEMORY_PARTS})
    _save(figure, path)


def draw_schedules(timelines: dict[str, Timeline], path: Path) -> None:
    """One step under each schedule, one below the other on one scale: passes and idle time."""
    ranks = max(len(timeline.programs) for timeline in timelines.values())
    end = max(timeline.total for timeline in timelines.values())
    figure, panels = _figure([ranks * 0.28 + 0.25 for _ in timelines], "")
    shown: set[str] = set()
    for axes, (name, timeline) in zip(panels, timelines.items(), strict=True):
        for row, rank in enumerate(sorted(timeline.programs)):
            shown |= _draw_compute(axes, list(timeline.slices(rank)), row + 0.05, 0.9, end)
        axes.set_ylim(len(timeline.programs), -0.8)
        axes.set_yticks([])
        axes.text(0, -0.1, name, va="bottom", fontsize=9)
        _finish_time_axis(axes, end)
    for axes in panels[:-1]:
        axes.set_xlabel("")
        axes.tick_params(labelbottom=False)
    named = {k: COLOURS[k] for k in COLOURS if k in shown}
    _legend(figure, {NAMES.get(kind, kind): colour for kind, colour in named.items()})
    figure.savefig(path, dpi=80)


def _draw_compute(
    axes: Axes, slices: Sequence[Slice], top: float, height: float, end: float
) -> set[str]:
    """Boxes of one rank from `top` down; returns the kinds that were drawn."""
    axes.broken_barh([(0, end * 1e3)], (top, height), facecolors=COLOURS["idle"], linewidth=0)
    boxes = [s for s in slices if s.track == COMPUTE and s.kind in COLOURS]
    several = len({s.micro_batch for s in boxes} - {None}) > 1
    per_inch = end / (WIDTH - MARGIN_LEFT - MARGIN_RIGHT)
    for box in boxes:
        colour = _shade(COLOURS[box.kind], box.stage, boxes)
        edge = "white" if (box.end - box.start) / per_inch > 0.05 else "none"
        where = [(box.start * 1e3, (box.end - box.start) * 1e3)]
        axes.broken_barh(where, (top, height), facecolors=colour, edgecolor=edge, linewidth=0.6)
        numbered = several and box.micro_batch is not None and box.kind != "loss"
        label = str(box.micro_batch) if numbered else ""
        if label and (box.end - box.start) / per_inch > DIGIT * (len(label) + 0.6):
            middle = (box.start + box.end) / 2 * 1e3, top + height / 2
            axes.text(*middle, label, ha="center", va="center", color="white", fontsize=8)
    return {box.kind for box in boxes} | {"idle"} | _draw_waits(axes, slices, top, height)


def _draw_waits(axes: Axes, slices: Sequence[Slice], top: float, height: float) -> set[str]:
    """Over the boxes, what this rank could only wait: idle first, then exposed."""
    parts = waits(slices)
    for kind, found in parts.items():
        where = [(start * 1e3, seconds * 1e3) for start, seconds in found]
        axes.broken_barh(where, (top, height), facecolors=COLOURS[kind], linewidth=0)
    return {kind for kind, found in parts.items() if found}


def waits(slices: Sequence[Slice]) -> dict[str, list[tuple[float, float]]]:
    """Start and length, in seconds, of what a rank waited: idle first, then exposed."""
    parts: dict[str, list[tuple[float, float]]] = {"idle": [], "exposed": []}
    for wait in slices:
        if wait.track == COMPUTE and wait.kind == WAIT:
            idle = wait.args.get("bubble_s", 0.0)
            parts["idle"].append((wait.start, idle))
            parts["exposed"].append((wait.start + idle, wait.end - wait.start - idle))
    return parts


def _draw_messages(axes: Axes, slices: Sequence[Slice], top: float, height: float) -> set[str]:
    """What is under way, side by side."""
    tracks = moving(slices)
    each = height / max(1, len(tracks))
    for number, track in enumerate(tracks):
        where = [(s.start * 1e3, (s.end - s.start) * 1e3) for s in track]
        place = (top + number * each, each * 0.9)
        axes.broken_barh(where, place, facecolors=COLOURS["message"], linewidth=0)
    return {"message"} if tracks else set()


def moving(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Messages from when all who take part have handed them over, on tracks without overlap."""
    found = []
    for message in (s for s in slices if s.track == COMMUNICATION):
        start = max(message.start, message.args.get("ready", message.start))
        seconds = message.args.get("seconds")
        end = max(start, message.end if seconds is None else start + seconds)
        found.append(replace(message, start=start, end=end))
    return lanes(found)


def _shade(colour: str, stage: int | None, boxes: Iterable[Slice]) -> tuple[float, float, float]:
    """Later stages of one rank are lighter, so that its laps are told apart."""
    stages = sorted({box.stage for box in boxes if box.stage is not None})
    lap = stages.index(stage) / len(stages) if stage is not None else 0.0
    red, green, blue = (part + (1 - part) * 0.7 * lap for part in to_rgb(colour))
    return red, green, blue


def _draw_areas(axes: Axes, samples: Sequence[MemorySample], end: float) -> None:
    """Memory stays as it is until the next sample: steps, not slopes."""
    times = np.array([*[s.time for s in samples], end]) * 1e3
    held = np.array([[s.held[part] for part in MEMORY_PARTS] for s in samples]).T / 1e6
    edges = np.repeat(times, 2)[1:-1]
    colours = [MEMORY_COLOURS[part] for part in MEMORY_PARTS]
    axes.stackplot(edges, np.repeat(held, 2, axis=1), colors=colours, linewidth=0)
    totals = held.sum(axis=0)
    peak = int(totals.argmax())
    axes.plot(times[peak], totals[peak], "v", color="black", markersize=4)
    side = "left" if times[peak] < end * 500 else "right"
    text = f" peak {totals[peak]:.2f} MB "
    axes.text(times[peak], totals[peak], text, ha=side, va="bottom", fontsize=8)


def _total(sample: MemorySample) -> int:
    return sum(sample.held.values())


def _figure(heights: Sequence[float], title: str) -> tuple[Figure, list[Axes]]:
    """Panels of those heights in inches, one below the other, with room for a legend on top."""
    top, bottom, gap = 0.85, 0.5, 0.12
    whole = top + bottom + sum(heights) + gap * (len(heights) - 1)
    figure = Figure(figsize=(WIDTH, whole))
    FigureCanvasAgg(figure)
    figure.suptitle(
        title, x=MARGIN_LEFT / WIDTH, y=1 - 0.12 / whole, ha="left", va="top", fontsize=11
    )
    panels, y = [], whole - top
    for height in heights:
        y -= height
        inner = WIDTH - MARGIN_LEFT - MARGIN_RIGHT
        box = (MARGIN_LEFT / WIDTH, y / whole, inner / WIDTH, height / whole)
        panels.append(figure.add_axes(box))
        y -= gap
    return figure, panels


def _finish_time_axis(axes: Axes, end: float) -> None:
    axes.set_xlim(0, end * 1e3)
    axes.set_xlabel("ms")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _legend(figure: Figure, colours: dict[str, str]) -> None:
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    place = (MARGIN_LEFT / WIDTH, 1 - 0.36 / figure.get_figheight())
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=place,
        ncols=len(patches),
        frameon=False,
        fontsize=8,
        borderaxespad=0.0,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _save(figure: Figure, path: Path) -> None:
    """The same picture for the same step, to the byte."""
    with rc_context({"svg.hashsalt": "worldsize", "svg.fonttype": "none"}):
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
