"""./launch.sh playground [port=8642]: a local page with sliders; memory, time and timeline follow.

It listens on 127.0.0.1 only, answers no page but its own, and runs the simulator in processes of
its own: nothing leaves the machine. The controls are the browser's own, so that keyboard and screen
reader know them.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from experiments.arguments import key_values
from experiments.console import progress
from experiments.playground.answers import Answers, Newest, Results, answer
from experiments.playground.guard import OwnPagesOnly
from experiments.playground.plan import Controls, choices, read_all
from experiments.refused import Refused

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
    "gradient_sync": "gradients are sent every",
}
STYLE = Path(__file__).resolve().parents[1] / "templates" / "playground.css"
# a control's key and value, to the server; what stands beside its label, at once
MOVED = """(event) => {
  const from = event.target, beside = document.querySelector(`output[for=${from.id}]`);
  const value = from.type === "checkbox" ? from.checked
    : from.type === "range" ? 2 ** Number(from.value) : from.value;
  if (beside) beside.textContent = value.toLocaleString("en");
  emit([from.id, value]);
}"""


def command(argv: list[str]) -> int:
    """Serve until Ctrl-C."""
    _, given = key_values("playground", "port=NUMBER", argv)
    port = given.get("port", str(PORT))
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise Refused(f"port={port}: must be between 1 and 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, int(port)))
        except OSError as error:
            raise Refused(f"port={port}: {error.strerror}; port=NUMBER takes another") from None
    serve(int(port))
    return 0


def serve(port: int) -> None:
    """The page at http://127.0.0.1:`port`/."""
    try:
        from nicegui import app, ui
    except ImportError:
        raise Refused(
            "playground: the package nicegui is not installed; pip install 'nicegui>=3,<4', or "
            "let ./launch.sh playground make its .venv"
        ) from None

    read_all()  # compose and import now, not at the first visit
    first, answers = answer(Controls()), Answers()
    ui.page("/")(lambda: build(ui, answers, first))
    app.add_middleware(OwnPagesOnly, port=port)
    app.on_shutdown(answers.close)
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


def build(ui: Any, answers: Answers, first: Results) -> None:
    """Build one visitor's page, which holds this visitor's controls. `first` is their answer."""
    controls = Controls()
    ui.add_head_html(f"<style>{STYLE.read_text()}</style>")
    results: dict[str, Any] = {}
    client = ui.context.client

    async def moved(event: Any) -> None:
        """Take a control's new value; one that no control can send changes nothing."""
        nonlocal controls
        try:
            controls = moved_by(controls, event.args)
        except ValueError as error:
            progress(f"playground: an event was refused: {error}")
            return
        await newest.ask(controls)

    def show(made: Results) -> None:
        if not client.is_deleted:
            for key, text in made.items():
                results[key].set_content(text)

    newest = Newest(answers, show)

    def result(key: str) -> None:
        results[key] = ui.html("", sanitize=False).props(f"id=result-{key}")

    with ui.element("main").classes("page"):
        ui.html("worldsize playground", sanitize=False, tag="h1").classes("title")
        with ui.element("section").classes("summary").props('aria-label="summary"'):
            result("verdict")
            results["verdict"].props("role=status aria-live=polite")
            result("numbers")
        form = ui.html(controls_html(controls), sanitize=False, tag="form")
        form.classes("controls").props('aria-label="controls"').on("input", moved, js_handler=MOVED)
        with ui.element("section").classes("details").props('aria-label="details"'):
            for key, title in DETAILS.items():
                ui.html(title, sanitize=False, tag="h2")
                result(key)
            copy = ui.html("copy", sanitize=False, tag="button").props("type=button id=copy")
            copy.on("click", lambda: ui.clipboard.write(controls.command))
    show(first)


def moved_by(controls: Controls, args: Any) -> Controls:
    """Return the controls after an event of the page, [key, value]. Raises ValueError for any
    other: an event comes from outside and may be anything that JSON can say."""
    if not isinstance(args, list) or len(args) != 2 or not isinstance(args[0], str):
        raise ValueError(f"{_short(args)}: must be a control's key and its value")
    return moved_to(controls, *args)


def moved_to(controls: Controls, key: str, value: Any) -> Controls:
    """The controls with one of them elsewhere. Raises ValueError for what no control can send."""
    if key in SLIDERS:
        allowed: list[Any] = [2**power for power in powers(key)]
    elif key in LISTS:
        allowed = list(choices()[key])
    elif key == "sequence_parallel":
        allowed = [True, False]
    else:
        raise ValueError(f"{_short(key)}: no such control")
    # the exact type: True is 1 and 8.0 is 8 to Python, and neither is a number of ranks
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise ValueError(f"{key}={_short(value)}: must be one of {', '.join(map(str, allowed))}")
    return replace(controls, **{key: type(getattr(controls, key))(value)})


def _short(value: Any) -> str:
    """Return what a message quotes of a value from outside."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def powers(key: str) -> range:
    """Of two, that a slider goes over."""
    _, most = SLIDERS[key]
    return range(7 if key == "seq_len" else 0, most + 1)


DETAILS = {
    "memory": "Memory of the fullest device",
    "time": "Time of a step",
    "timeline": "A step on the pipeline's ranks",
    "command": "The same on the command line",
}


def controls_html(controls: Controls) -> str:
    """The form: each control with its label, by the browser's own elements."""
    offered = choices()
    first = ("model", "cluster")
    made = [_list(key, offered[key], controls) for key in first]
    made += [_slider(key, controls) for key in SLIDERS]
    made += [_list(key, offered[key], controls) for key in LISTS if key not in first]
    checked = " checked" if controls.sequence_parallel else ""
    box = f'<input type="checkbox" id="sequence_parallel"{checked}>'
    label = f'<label for="sequence_parallel">{box}<span>sequence parallel with tp</span></label>'
    return "".join([*made, f'<div class="control check">{label}</div>'])


def _slider(key: str, controls: Controls) -> str:
    text, _ = SLIDERS[key]
    value, among = getattr(controls, key), powers(key)
    beside = f'<output for="{key}">{value:,}</output>'
    control = (
        f'<input type="range" id="{key}" min="{among[0]}" max="{among[-1]}" step="1" '
        f'value="{value.bit_length() - 1}">'
    )
    return _row(key, f"<span>{escape(text)}</span>{beside}", control)


def _list(key: str, names: list[str], controls: Controls) -> str:
    chosen = str(getattr(controls, key))
    options = "".join(
        f"<option{' selected' if name == chosen else ''}>{escape(name)}</option>" for name in names
    )
    return _row(key, escape(LISTS[key]), f'<select id="{key}">{options}</select>')


def _row(key: str, label: str, control: str) -> str:
    return f'<div class="control"><label for="{key}">{label}</label>{control}</div>'
