"""What the playground shows beside its controls: numbers, memory, time, timeline, as HTML."""

from __future__ import annotations

from html import escape

from experiments.console import human_bytes, human_seconds, share
from experiments.pictures import COLOURS, MEMORY_COLOURS
from experiments.playground.plan import View
from experiments.playground.svg import TIME_COLOURS, legend, passes_of, stacked, timeline

# the parts of a position that is refused
EMPTY = {
    "numbers": "",
    **dict.fromkeys(("memory", "time", "timeline"), '<p class="note">not allowed</p>'),
}


def results_of(shown: View) -> dict[str, str]:
    """HTML of each part of the results."""
    command = f'<code class="command">{escape(shown.controls.command)}</code>'
    if shown.step is None:
        refused = f'<div class="verdict bad">{escape(shown.refused or "")}</div>'
        return {"verdict": refused, **EMPTY, "command": command}
    kind = "verdict" if shown.fits else "verdict bad"
    return {
        "verdict": f'<div class="{kind}">{escape(shown.verdict)}</div>',
        "numbers": numbers_of(shown),
        "memory": memory_of(shown),
        "time": time_of(shown),
        "timeline": timeline_of(shown),
        "command": command,
    }


def numbers_of(shown: View) -> str:
    """The few that a reader looks for first."""
    assert shown.step
    time = shown.time
    each = {
        "devices": f"{shown.devices:,}",
        "memory": human_bytes(shown.memory["peak"]),
        "step": human_seconds(time["total"]),
        "tokens/s": f"{shown.step['tokens_per_s']:,.0f}",
        "MFU": share(shown.step["mfu"], 1.0),
        "bubble": share(time["bubble"], time["total"]),
        "exposed": share(time["exposed_communication"], time["total"]),
        "tokens a step": f"{shown.step['tokens']:,}",
    }
    items = "".join(
        f'<div><b id="n-{k.split("/")[0].replace(" ", "-")}">{v}</b>{k}</div>'
        for k, v in each.items()
    )
    return f'<div class="numbers">{items}</div>'


def memory_of(shown: View) -> str:
    parts = [(name, float(value), human_bytes(value)) for name, value in shown.parts()]
    limit = human_bytes(shown.device_memory)
    about = f"{human_bytes(shown.memory['peak'])} of {limit}: " + said(parts)
    keys = legend((name for name, value, _ in parts if value), MEMORY_COLOURS)
    return (
        stacked(parts, about, shown.device_memory)
        + keys
        + (f'<p class="note">{escape(about)}. The line is the device.</p>')
    )


def time_of(shown: View) -> str:
    time = shown.time
    parts = [(n, time[n], human_seconds(time[n])) for n in TIME_COLOURS]
    about = f"{human_seconds(time['total'])}: " + said(parts)
    keys = legend((name for name, value, _ in parts if value), TIME_COLOURS)
    return stacked(parts, about) + keys + f'<p class="note">{escape(about)}.</p>'


def timeline_of(shown: View) -> str:
    if shown.timeline is None:
        return '<p class="note">too many passes to draw: fewer micro-batches or stages would do</p>'
    found, ranks = shown.timeline, len(shown.timeline.programs)
    about = f"{ranks} rank{'s' * (ranks > 1)}; replayed, it takes {human_seconds(found.total)}"
    kinds = {piece.kind for rank in found.programs for piece in passes_of(found, rank)}
    keys = legend((kind for kind in COLOURS if kind in kinds), COLOURS)
    drawn = f'<div class="wide" tabindex="0" aria-label="timeline">{timeline(found, about)}</div>'
    return drawn + keys + f'<p class="note">{about}.</p>'


def said(parts: list[tuple[str, float, str]]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, value, text in parts if value)
