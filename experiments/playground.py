"""./launch.sh playground [port=8642]: a local page with sliders; memory, time and timeline follow.

It listens on 127.0.0.1 only, and calls the simulator of this process: nothing leaves the machine.
The controls are the browser's own, so that keyboard and screen reader know them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html import escape
from typing import Any

from experiments.compose import Refused
from experiments.console import human_bytes, human_seconds, share
from experiments.pictures import COLOURS, MEMORY_COLOURS
from experiments.playground_plan import Controls, View, choices, view
from experiments.playground_svg import TIME_COLOURS, legend, passes_of, stacked, timeline

PORT = 8642
HOST = "127.0.0.1"
# sliders over powers of two: key -> (what it says, the highest power)
SLIDERS: dict[str, tuple[str, int]] = {
    "pp": ("pipeline stages (pp)", 5),
    "dp_replicate": ("replicas (dp_replicate)", 9),
    "dp_shard": ("shards (dp_shard)", 9),
    "cp": ("context (cp)", 4),
    "tp": ("tensor (tp)", 4),
    "micro_batch_size": ("sequences of a micro-batch", 5),
    "gradient_accumulation_steps": ("micro-batches of a step", 8),
    "seq_len": ("tokens of a sequence", 17),
}
LISTS = {
    "model": "model",
    "cluster": "cluster",
    "schedule": "pipeline schedule",
    "precision": "precision",
    "activation_checkpointing": "activation checkpointing",
    "zero_stage": "ZeRO stage of the shards",
}
STYLE = """
<style>
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1d1d24; background: #fff; margin: 0; }
.page { display: grid; grid-template-columns: minmax(250px, 330px) minmax(0, 1fr); gap: 28px;
  max-width: 1360px; margin: 0 auto; padding: 16px; width: 100%; box-sizing: border-box; }
.page h1 { font-size: 20px; line-height: 1.3; margin: 0 0 10px; font-weight: 650; }
.page h2 { font-size: 15px; line-height: 1.3; margin: 18px 0 4px; font-weight: 650; }
.control { margin: 0 0 9px; width: 100%; }
.control label { display: flex; justify-content: space-between; font-size: 13.5px; }
.control output { font-variant-numeric: tabular-nums; font-weight: 600; }
.control input[type=range], .control select { width: 100%; accent-color: #2f4f8f; }
.control select { padding: 4px; border: 1px solid #8c8c8c; border-radius: 4px; background: #fff; }
.control.check label { justify-content: flex-start; gap: 8px; }
.numbers { display: flex; flex-wrap: wrap; gap: 6px 26px; }
.numbers b { font-size: 21px; font-variant-numeric: tabular-nums; display: block; }
.verdict { padding: 8px 12px; border-left: 4px solid #3a9d5d; background: #f1f7f3; }
.verdict.bad { border-color: #b3263a; background: #fbf0f1; }
.picture { width: 100%; display: block; }
.picture .limit { stroke: #1d1d24; stroke-width: 3; }
.picture text { font-size: 12px; fill: #1d1d24; }
.picture text.number { fill: #fff; text-anchor: middle; font-size: 11px; }
.key { display: inline-block; margin-right: 14px; font-size: 13px; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; margin-right: 5px; }
.command { display: block; padding: 9px 12px; background: #f2f2f5; border-radius: 4px;
  font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.page button { padding: 5px 14px; border: 1px solid #2f4f8f; border-radius: 4px; background: #fff;
  color: #2f4f8f; cursor: pointer; margin-top: 6px; }
.page :focus-visible { outline: 3px solid #e8a33d; outline-offset: 2px; }
.note { font-size: 13px; color: #55555f; }
@media (max-width: 760px) {
  .page { grid-template-columns: minmax(0, 1fr); gap: 10px; padding: 12px; }
  .results { order: -1; }
}
</style>
"""


def command(argv: list[str]) -> int:
    """Serve until Ctrl-C."""
    given = dict(argument.partition("=")[::2] for argument in argv)
    port = given.pop("port", str(PORT))
    if given:
        raise Refused(f"{next(iter(given))}: playground takes port=NUMBER")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise Refused(f"port={port}: must be between 1 and 65535")
    serve(int(port))
    return 0


def serve(port: int) -> None:
    """The page at http://127.0.0.1:`port`/."""
    try:
        from nicegui import ui
    except ImportError:
        raise Refused(
            "playground: the package nicegui is not installed; pip install 'nicegui>=3,<4', or "
            "let ./launch.sh playground make its .venv"
        ) from None

    view(Controls())  # compose and import now, not at the first visit
    ui.page("/")(lambda: build(ui))
    print(f"http://{HOST}:{port}/   (Ctrl-C ends it)", flush=True)
    ui.run(
        host=HOST,
        port=port,
        title="worldsize playground",
        show=False,
        reload=False,
        show_welcome_message=False,
        dark=False,
    )


def build(ui: Any) -> None:
    """One visitor's page: controls to the left, results to the right."""
    page = Page(ui)
    ui.add_head_html(STYLE)
    with ui.element("main").classes("page"):
        with ui.element("form").props('aria-label="controls"'):
            ui.html("<h1>worldsize playground</h1>", sanitize=False)
            page.add_controls()
        with ui.element("section").classes("results").props('aria-label="results"'):
            page.add_results()
    page.show()


class Page:
    """Holds where the controls of one visitor stand, and what shows the results."""

    def __init__(self, ui: Any) -> None:
        self.ui, self.controls = ui, Controls()
        self.outputs: dict[str, Any] = {}
        self.results: dict[str, Any] = {}

    # controls

    def add_controls(self) -> None:
        offered = choices()
        for key in ("model", "cluster"):
            self._list(key, offered[key])
        for key in SLIDERS:
            self._slider(key)
        for key in ("schedule", "precision", "activation_checkpointing", "zero_stage"):
            self._list(key, offered[key])
        self._check("sequence_parallel", "sequence parallel with tp")

    def _labelled(self, key: str, text: str) -> Any:
        """A row with its label, whose `for` is the control's id."""
        row = self.ui.element("div").classes("control")
        with row, self.ui.element("label").props(f"for={key}"):
            self.ui.html(f"<span>{escape(text)}</span>", sanitize=False)
            output = self.ui.html("", sanitize=False, tag="output").props(f"for={key}")
            self.outputs[key] = output
        return row

    def _slider(self, key: str) -> None:
        text, most = SLIDERS[key]
        low = 7 if key == "seq_len" else 0
        start = getattr(self.controls, key).bit_length() - 1
        with self._labelled(key, text):
            said = f"id={key} type=range min={low} max={most} step=1 value={start}"
            self._input("input", said, lambda value: self.move(key, 2 ** int(value)))

    def _list(self, key: str, names: list[str]) -> None:
        chosen = str(getattr(self.controls, key))
        options = "".join(
            f"<option{' selected' if name == chosen else ''}>{escape(name)}</option>"
            for name in names
        )
        kind = int if key == "zero_stage" else str
        with self._labelled(key, LISTS[key]):
            made = self.ui.html(options, sanitize=False, tag="select").props(f"id={key}")
            made.on("change", lambda event: self.move(key, kind(event.args)), js_handler=VALUE)

    def _check(self, key: str, text: str) -> None:
        row = self.ui.element("div").classes("control check")
        with row, self.ui.element("label").props(f"for={key}"):
            box = self.ui.element("input").props(f"id={key} type=checkbox checked")
            box.on("change", lambda event: self.move(key, bool(event.args)), js_handler=CHECKED)
            self.ui.html(f"<span>{escape(text)}</span>", sanitize=False)

    def _input(self, tag: str, said: str, moved: Callable[[str], None]) -> None:
        made = self.ui.element(tag).props(said)
        made.on("input", lambda event: moved(event.args), js_handler=VALUE)

    def move(self, key: str, value: Any) -> None:
        """A control stands elsewhere."""
        self.controls = replace(self.controls, **{key: value})
        self.show()

    # results

    def add_results(self) -> None:
        for key, title in (
            ("verdict", ""),
            ("numbers", ""),
            ("memory", "Memory of the fullest device"),
            ("time", "Time of a step"),
            ("timeline", "A step on the pipeline's ranks"),
            ("command", "The same on the command line"),
        ):
            if title:
                self.ui.html(f"<h2>{title}</h2>", sanitize=False)
            self.results[key] = self.ui.html("", sanitize=False)
        self.results["verdict"].props("role=status aria-live=polite id=verdict")
        for key in ("numbers", "memory", "time", "timeline", "command"):
            self.results[key].props(f"id=result-{key}")
        copy = self.ui.element("button").props("type=button id=copy")
        with copy:
            self.ui.html("copy", sanitize=False, tag="span")
        copy.on("click", lambda: self.ui.clipboard.write(self.controls.command))

    def show(self) -> None:
        """Predict, and put everything in its place."""
        shown = view(self.controls)
        for key in (*SLIDERS, *LISTS):
            if key in SLIDERS:
                self.outputs[key].set_content(f"{getattr(self.controls, key):,}")
        for key, text in results_of(shown).items():
            self.results[key].set_content(text)


# what the browser sends of an event
VALUE = "(event) => emit(event.target.value)"
CHECKED = "(event) => emit(event.target.checked)"


def results_of(shown: View) -> dict[str, str]:
    """HTML of each part of the results."""
    command = f'<code class="command">{escape(shown.controls.command)}</code>'
    if shown.step is None:
        refused = f'<div class="verdict bad">{escape(shown.refused or "")}</div>'
        empty = dict.fromkeys(("memory", "time", "timeline"), '<p class="note">not allowed</p>')
        return {"verdict": refused, "numbers": "", **empty, "command": command}
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
    found = shown.timeline
    about = f"{len(found.programs)} ranks, {human_seconds(found.total)}, event by event"
    kinds = {piece.kind for rank in found.programs for piece in passes_of(found, rank)}
    keys = legend((kind for kind in COLOURS if kind in kinds), COLOURS)
    return timeline(found, about) + keys + f'<p class="note">{about}.</p>'


def said(parts: list[tuple[str, float, str]]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {text}" for name, value, text in parts if value)
