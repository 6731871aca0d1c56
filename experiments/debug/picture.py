"""The evidence of a diagnosis as a picture, beside the same run without the fault."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.debug.diagnose import Diagnosis

BLUE, RED, GREY = "#4878cf", "#d1495b", "#8c8c8c"
LEAST, MOST = 1e-3, 1e3  # times the bound: what is beyond is drawn there


def draw(broken: Diagnosis, sound: Diagnosis, path: Path, title: str) -> None:
    """Write `path`, a PNG of four panels; `sound` is grey in each."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left")
    checks, losses, flows, ranges = figure.subplots(2, 2).flat
    draw_checks(checks, broken)
    for diagnosis, colour, label in ((sound, GREY, "without the fault"), (broken, RED, "this run")):
        seen = diagnosis.seen
        draw_line(losses, seen.losses, colour, label)
        draw_line(flows, [seen.flows[0][i] for i in sorted(seen.flows[0])], colour, label)
        draw_line(ranges, [max(one.values()) for one in seen.ranges], colour, label)
    finish(losses, "loss by step", "linear")
    finish(flows, "gradient of each block's output, step 1, at most", "log")
    finish(ranges, "largest activation by step", "log")
    figure.savefig(path, dpi=130)


def draw_checks(axes: Any, diagnosis: Diagnosis) -> None:
    """Each check as a bar: how far its value is from its bound, to the right if it fails.

    A value whose bound is 0 holds or fails and has no distance.
    """
    places = range(len(diagnosis.evidence))
    for place, finding in zip(places, diagnosis.evidence, strict=True):
        times = MOST if not finding.holds else LEAST
        if finding.bound > 0 and math.isfinite(finding.value):
            times = min(MOST, max(LEAST, finding.value / finding.bound))
        colour = BLUE if finding.holds else RED
        axes.barh(place, math.log10(times), color=colour, height=0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [finding.check for finding in diagnosis.evidence], fontsize=8)
    axes.set_xticks([-3, 0, 3], ["1/1000", "the bound", "x 1000"])
    axes.invert_yaxis()
    axes.set_title("value over its bound", loc="left", fontsize=10)


def draw_line(axes: Any, values: Sequence[float], colour: str, label: str) -> None:
    """What is not finite is a gap, and a cross above the last that is."""
    finite = [value if math.isfinite(value) else math.nan for value in values]
    marker = "o" if len(values) < 10 else None
    axes.plot(range(len(values)), finite, color=colour, label=label, marker=marker, linewidth=1.4)
    gone = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    if gone:
        axes.plot(gone, finite[gone - 1], "x", color=colour, markersize=10)


def finish(axes: Any, title: str, scale: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_yscale(scale)
    axes.legend(frameon=False, fontsize=8)
