"""The interactive figures of a report, as plotly.js takes them: a list of traces and a layout."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from costs.ledger import MEMORY_PARTS, TIME_PARTS
from costs.trace import COMPUTE, MemorySample, Slice, Trace
from experiments.compare.comparison import Comparison, names_of_predictions
from experiments.compare.pictures import (
    MOST_BARS,
    MOST_LINES,
    TIME_COLOURS,
    losses_of,
    message_colours,
    name_of,
)
from experiments.compare.run_costs import PEAK, STEP, WIRE, error_of
from experiments.compare.sheets import human, words_of
from experiments.outside_text import visible
from experiments.pictures import COLOURS, MEMORY_COLOURS, MOST_RANKS, NAMES, moving, waits

UNITS = {PEAK: ("MB", 1e6), WIRE: ("MB", 1e6), STEP: ("ms", 1e-3)}
LINE_WIDTH = 18  # characters of a name beside a bar: two lines of them leave room on a telephone
LEGEND_WIDTH = 40  # as many as stand side by side on a telephone
ROW, ROOM = 48, 150  # pixels of a bar with its name, of legend and axis


@dataclass(frozen=True)
class PlotlyFigure:
    """What plotly.js draws, and what it shows in words."""

    title: str
    says: str  # for whoever cannot see it, and as the caption
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int

    def to_json(self) -> dict[str, Any]:
        """Return plotly.js' figure. Its texts are a kind of HTML, and so every string is escaped
        here; a line break is its own."""
        whole = {"data": self.data, "layout": {**self.layout, "height": self.height}}
        return _escaped(whole)


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner) for inner in value]
    if isinstance(value, str):
        return escape(visible(value, lines=True), quote=False).replace("\n", "<br>")
    return value


def figures_of(comparison: Comparison) -> list[PlotlyFigure]:
    """All that these runs have something to show for."""
    memory = {f"memory_bytes.{part}": MEMORY_COLOURS[part] for part in MEMORY_PARTS}
    time = {f"time_s.{part}": TIME_COLOURS[part] for part in TIME_PARTS}
    sent = message_colours(comparison)
    every = [
        bars(comparison, STEP, time, "Time of a step, by part"),
        bars(comparison, PEAK, memory, "Memory at the peak, by category"),
        bars(comparison, WIRE, sent, "What a rank sends in a step, by collective and axis"),
        losses(comparison, over_seconds=False),
        losses(comparison, over_seconds=True),
        errors(comparison),
    ]
    return [figure for figure in every if figure]


def bars(
    comparison: Comparison, whole: str, parts: dict[str, str], title: str
) -> PlotlyFigure | None:
    """A bar a run, the cheapest first; None where no run has any of it."""
    have = [i for i in comparison.by_cost() if whole in comparison.costs[i]]
    shown = have[:MOST_BARS]
    if not any(comparison.costs[i][whole].value for i in shown):
        return None
    unit, size = UNITS[whole]
    names = [_folded(name_of(comparison, i)) for i in shown]
    data = []
    for name, colour in parts.items():
        held = [comparison.costs[i].get(name) for i in shown]
        values = [cost.value if cost else None for cost in held]
        if any(values):
            said = [f"{words_of(name)}: {human(name, value)}" for value in values]
            lengths = [value and value / size for value in values]  # null where there is none
            data.append(_bar(words_of(name), colour, lengths, names, said))
    fewest = min(shown, key=lambda i: comparison.costs[i][whole].value)
    least = human(whole, comparison.costs[fewest][whole].value)
    says = f"Least: {least} (run {comparison.runs[fewest].number}). "
    says += f"{len(shown)} of {len(have)} runs." if len(have) > len(shown) else ""
    layout = {"barmode": "stack", "xaxis": {"title": {"text": unit}}, "yaxis": UPWARDS}
    return PlotlyFigure(title, says.strip(), data, layout, ROOM + ROW * len(shown))


UPWARDS = {"autorange": "reversed", "automargin": True, "tickfont": {"size": 11}}


def _bar(
    name: str, colour: str, x: Sequence[float | None], y: Sequence[Any], said: list[str]
) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": x,
        "y": y,
        "marker": {"color": colour},
        "hovertext": said,
        "hoverinfo": "text",
    }


def _folded(name: str, width: int = LINE_WIDTH) -> str:
    """In lines that break between words, three at most."""
    wrap = textwrap.TextWrapper(
        width, max_lines=3, placeholder="\u2026", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrap.wrap(name))


def losses(comparison: Comparison, over_seconds: bool) -> PlotlyFigure | None:
    """Loss over steps, or over seconds of training."""
    data = []
    trained = [i for i in comparison.by_cost() if comparison.runs[i].losses]
    for i in trained[:MOST_LINES]:
        values, seconds = losses_of(comparison, i)
        x = seconds if over_seconds else list(range(1, len(values) + 1))
        if x:
            y = [None if math.isnan(value) else value for value in values]
            name = _folded(name_of(comparison, i), LEGEND_WIDTH)
            line = {"type": "scatter", "mode": "lines", "name": name}
            data.append({**line, "x": x, "y": y, "line": {"width": 1.5}})
    if not data:
        return None
    unit = "seconds of training" if over_seconds else "steps"
    says = f"Training loss of {len(data)} of {len(trained)} trained runs."
    axes = {"xaxis": {"title": {"text": unit}}, "yaxis": {"title": {"text": "nats a token"}}}
    return PlotlyFigure(f"Loss over {unit}", says, data, axes, 360 + 30 * len(data))


def errors(comparison: Comparison) -> PlotlyFigure | None:
    """By how much each prediction is off, cost by cost."""
    data: list[dict[str, Any]] = []
    for i, j in comparison.differences.predictions:
        measured, predicted = comparison.costs[i], comparison.costs[j]
        names = [n for n in names_of_predictions(measured) if not n.startswith("payload")]
        found = {name: error_of(name, measured, predicted) for name in names}
        off = {_apart(name): 100 * error for name, error in found.items() if error is not None}
        name = f"{comparison.runs[j].number}, {comparison.runs[j].source}"
        said = [f"{cost}: {error:+.1f} %" for cost, error in off.items()]
        title = f"run {name} on {comparison.cluster(j)}, of {comparison.runs[i].number}"
        bar = _bar(title, f"rgb{SERIES[len(data) % len(SERIES)]}", [*off.values()], [*off], said)
        data.append(bar)
    if not data:
        return None
    rows = sum(len(bar["y"]) for bar in data)
    layout = {"barmode": "group", "xaxis": {"title": {"text": "error, %"}}, "yaxis": UPWARDS}
    says = "0 is a prediction that is right; below 0, less was predicted than was measured."
    return PlotlyFigure("Predicted against measured", says, data, layout, ROOM + 26 * rows)


def _apart(name: str) -> str:
    """A cost's name where those of time and of memory stand in one row: both have an optimizer."""
    kind = name.partition(".")[0]
    of = {"time_s": "time", "memory_bytes": "memory"}.get(kind)
    return f"{words_of(name)}, {of}" if of and name not in (STEP, PEAK) else words_of(name)


SERIES = ((72, 120, 207), (232, 163, 61), (58, 157, 93), (209, 73, 91), (176, 122, 161))


def timeline(trace: Trace, title: str) -> PlotlyFigure:
    """Ranks as rows: what each computes, over it what it waits for, below it what it sends."""
    ranks = sorted({piece.rank for piece in trace.slices})
    shown = ranks[:MOST_RANKS]
    boxes: dict[str, list[Box]] = defaultdict(list)
    for row, rank in enumerate(shown):
        own = [piece for piece in trace.slices if piece.rank == rank]
        for box in _boxes_of(own, row):
            boxes[box[0]].append(box)
    data = [_boxes(kind, boxes[kind]) for kind in COLOURS if boxes.get(kind)]
    names = [f"rank {rank}" for rank in shown]
    rows = {"tickvals": [*range(len(shown))], "ticktext": names, "range": [len(shown) - 0.5, -0.5]}
    axes = {"xaxis": {"title": {"text": "ms"}}, "yaxis": {**rows, "fixedrange": True}}
    end = max(piece.end for piece in trace.slices)
    says = f"One step, {end * 1e3:.1f} ms, of {len(shown)} of {len(ranks)} ranks. "
    says += "Idle: a neighbour was still busy. Exposed: no compute hides the message."
    layout = {"barmode": "overlay", **axes, "plot_bgcolor": COLOURS["idle"]}
    return PlotlyFigure(title, says, data, layout, ROOM + 100 + 60 * len(shown))


Box = tuple[str, float, float, float, float, str]


def _boxes_of(slices: Sequence[Slice], row: int) -> Iterator[Box]:
    """Kind, start, length, place and height of each box of a rank, and its words."""
    for piece in slices:
        if piece.track == COMPUTE and piece.kind in COLOURS:
            stage = "" if piece.stage is None else f", stage {piece.stage}"
            words = f"{piece.name}{stage}: {(piece.end - piece.start) * 1e3:.2f} ms"
            yield piece.kind, piece.start, piece.end - piece.start, row - 0.1, 0.56, words
    for kind, found in waits(slices).items():
        for start, seconds in found:
            words = f"{NAMES[kind]}: {seconds * 1e3:.2f} ms"
            yield kind, start, seconds, row - 0.1, 0.56, words
    tracks = moving(slices)
    each = 0.22 / max(1, len(tracks))
    for number, track in enumerate(tracks):
        for piece in track:
            seconds, place = piece.end - piece.start, row + 0.22 + (number + 0.5) * each
            yield (
                "message",
                piece.start,
                seconds,
                place,
                each,
                f"{piece.kind}: {seconds * 1e3:.2f} ms",
            )


def _boxes(kind: str, found: Sequence[Box]) -> dict[str, Any]:
    _, starts, lengths, places, heights, words = zip(*found, strict=True)
    return {
        **_bar(NAMES.get(kind, kind), COLOURS[kind], _ms(lengths), list(places), list(words)),
        "base": _ms(starts),
        "width": list(heights),
    }


def _ms(seconds: Sequence[float]) -> list[float]:
    return [round(s * 1e3, 4) for s in seconds]


def memory_over_time(trace: Trace, title: str) -> PlotlyFigure | None:
    """What the fullest rank holds over the step, by category."""
    by_rank: dict[int, list[MemorySample]] = defaultdict(list)
    for sample in trace.memory:
        by_rank[sample.rank].append(sample)
    if not by_rank:
        return None
    peaks = {rank: max(sum(s.held.values()) for s in own) for rank, own in by_rank.items()}
    rank = max(peaks, key=lambda r: peaks[r])
    own = by_rank[rank]
    area = {
        "type": "scatter",
        "mode": "lines",
        "stackgroup": "held",
        "line": {"width": 0, "shape": "hv"},
    }
    data = [
        {
            **area,
            "name": part,
            "x": _ms([s.time for s in own]),
            "y": [s.held.get(part, 0) / 1e6 for s in own],
            "fillcolor": MEMORY_COLOURS[part],
            "hovertemplate": "%{y:.2f} MB",
        }
        for part in MEMORY_PARTS
        if any(s.held.get(part, 0) for s in own)
    ]
    says = f"Rank {rank}, the fullest of {len(by_rank)}; peak {peaks[rank] / 1e6:.2f} MB."
    axes = {"xaxis": {"title": {"text": "ms"}}, "yaxis": {"title": {"text": "MB"}}}
    return PlotlyFigure(title, says, data, {**axes, "hovermode": "x unified"}, 380)
