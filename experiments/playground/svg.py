"""Inline pictures of the playground: a stacked bar with its limit, and the timeline of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from costs.trace import COMPUTE, WAIT, Slice
from experiments.pictures import COLOURS, MEMORY_COLOURS
from simulator.timeline import Timeline

WIDTH, ROW, BAR = 1000, 22, 26  # units of the picture; it scales to the page
LABEL = 62  # of the ranks' names
LEAST = 1.2  # what is narrower joins its neighbour of the same kind
DIGIT = 8.5  # that a number takes
MOST_ROWS = 16
TIME_COLOURS = {
    "compute": COLOURS["forward"],
    "exposed_communication": COLOURS["exposed"],
    "bubble": "#c9c9d1",
    "optimizer": COLOURS["optimizer"],
}


def stacked(parts: Sequence[tuple[str, float, str]], about: str, limit: float | None = None) -> str:
    """A bar of (name, value, as text), and a line at `limit`. `about`: for a screen reader."""
    whole = sum(value for _, value, _ in parts)
    scale = WIDTH / (max(whole, limit or 0.0) * 1.02 or 1.0)
    colours = {**MEMORY_COLOURS, **TIME_COLOURS}
    left, boxes = 0.0, []
    for name, value, text in parts:
        width = value * scale
        title = f"<title>{escape(name.replace('_', ' '))}: {escape(text)}</title>"
        boxes.append(_box(left, 2, width, BAR - 4, colours[name], title))
        left += width
    line = ""
    if limit is not None:
        x = limit * scale
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{BAR}" class="limit"/>'
    return _picture(BAR, about, "".join(boxes) + line)


def timeline(found: Timeline, about: str) -> str:
    """A row a rank of the pipeline; numbers are micro-batches, what is empty is idle."""
    ranks = sorted(found.programs)[:MOST_ROWS]
    scale = (WIDTH - LABEL) / found.total
    drawn = []
    for row, rank in enumerate(ranks):
        top = row * ROW + 2
        drawn.append(f'<text x="0" y="{top + 14}">rank {rank}</text>')
        drawn.append(_box(LABEL, top, WIDTH - LABEL, ROW - 4, COLOURS["idle"]))
        for piece, text in joined(passes_of(found, rank), LEAST / scale):
            left, width = LABEL + piece.start * scale, (piece.end - piece.start) * scale
            title = f"<title>{escape(f'{piece.kind} {text}'.strip())}</title>"
            drawn.append(_box(left, top, width, ROW - 4, COLOURS[piece.kind], title))
            if text and width > DIGIT * (len(text) + 0.4):
                x, y = left + width / 2, top + 13
                drawn.append(f'<text x="{x:.1f}" y="{y}" class="number">{text}</text>')
    return _picture(len(ranks) * ROW, about, "".join(drawn))


def passes_of(found: Timeline, rank: int) -> Iterator[Slice]:
    """What a rank computes."""
    return (s for s in found.slices(rank) if s.track == COMPUTE and s.kind != WAIT)


def joined(passes: Iterable[Slice], least: float) -> list[tuple[Slice, str]]:
    """Passes with their micro-batch as text; those shorter than `least` seconds join the one of
    their kind that they touch, and lose the text."""
    made: list[tuple[Slice, str]] = []
    for piece in passes:
        last = made[-1][0] if made else None
        short = piece.end - piece.start < least
        if last and short and last.kind == piece.kind and piece.start - last.end < least:
            last.end = piece.end
            made[-1] = (last, "")
        else:
            number = "" if piece.micro_batch is None else str(piece.micro_batch)
            made.append((piece, number))
    return made


def legend(names: Iterable[str], colours: dict[str, str]) -> str:
    """Names beside their colours."""
    each = (
        f'<span class="key"><i style="background:{colours[name]}"></i>'
        f"{escape(name.replace('_', ' '))}</span>"
        for name in names
    )
    return "".join(each)


def _box(x: float, y: float, width: float, height: float, colour: str, inside: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.0f}" width="{max(width, 0):.1f}" height="{height}"'
    return f'<rect {place} fill="{colour}">{inside}</rect>'


def _picture(height: float, about: str, inside: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" height="{height}" role="img" '
        f'aria-label="{escape(about)}" preserveAspectRatio="none" class="picture">{inside}</svg>'
    )
