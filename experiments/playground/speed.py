"""How long the playground takes to answer. Prints docs/results/playground.md:

./launch.sh python -m experiments.playground.speed > docs/results/playground.md

Moves each control of the page and puts it back, in a headless Chromium. Server: from the message
of the browser to the last part of the answer. Page: from the moment a control moves to the frame in
which the new numbers stand. --pictures=DIR keeps how the page looks at 400 and 1400 pixels.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.document import heading, rule, table
from experiments.playground import browser
from experiments.playground.command import HOST, LISTS, SLIDERS, moved_to, powers
from experiments.playground.plan import Controls, choices, read_all, view
from experiments.playground.results import results_of

COMMAND = "./launch.sh python -m experiments.playground.speed > docs/results/playground.md"
BAR_S = 0.2
ROUNDS = 3
WIDTHS = (400, 1400)
STARTED_S = 300.0  # nicegui takes a second to import, and a busy machine a minute
# moves a control as a hand does, and waits until the command line has changed and was painted
MOVE = """([id, value]) => new Promise((done) => {
  const control = document.getElementById(id), line = document.getElementById("result-command");
  const before = line.innerText;
  const seen = new MutationObserver(() => {
    if (line.innerText === before) return;
    seen.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start)));
  });
  seen.observe(line, {childList: true, subtree: true, characterData: true});
  if (control.type === "checkbox") control.checked = value; else control.value = value;
  const start = performance.now();
  control.dispatchEvent(new Event("input", {bubbles: true}));
})"""


def main(argv: list[str]) -> int:
    pictures = next((Path(a.partition("=")[2]) for a in argv if a.startswith("--pictures=")), None)
    moves = moves_of(Controls())
    server = [seconds for _ in range(ROUNDS) for seconds in on_the_server(moves)]
    with started() as (address, _process):
        page = in_the_browser(address, moves)
        if pictures:
            keep_pictures(address, pictures)
    print(heading("The playground's answers", COMMAND))
    print(f"{len(page)} moves of {len({key for key, _ in moves})} controls, each in turn from")
    print(f"`{Controls().command}`; the aim is at most {1e3 * BAR_S:g} ms.")
    print(f"Load of the machine at the end: {os.getloadavg()[0]:.1f}.\n")
    print(table("milliseconds", "median", "90th percentile", "slowest"))
    print(rule(4))
    for name, seconds in (("server: from message to answer", server), ("page: to the frame", page)):
        deciles = statistics.quantiles(seconds, n=10)
        figures = (statistics.median(seconds), deciles[-1], max(seconds))
        print(table(name, *(f"{1e3 * figure:.0f}" for figure in figures)))
    return 0


def moves_of(start: Controls) -> list[tuple[str, Any]]:
    """Each control at its neighbours and at its ends, by key and value."""
    moves: list[tuple[str, Any]] = []
    for key in SLIDERS:
        among = powers(key)
        now = getattr(start, key).bit_length() - 1
        wanted = {among[0], now - 1, now + 1, among[-1]} & {*among} - {now}
        moves += [(key, 2**power) for power in sorted(wanted)]
    for key, names in ((key, choices()[key]) for key in LISTS):
        moves += [(key, name) for name in names if name != str(getattr(start, key))]
    return [*moves, ("sequence_parallel", not start.sequence_parallel)]


def on_the_server(moves: list[tuple[str, Any]]) -> Iterator[float]:
    """Seconds of each move, without the page."""
    start = Controls()
    read_all()
    for key, value in moves:
        began = time.perf_counter()
        results_of(view(moved_to(start, key, value)))
        yield time.perf_counter() - began


def in_the_browser(address: str, moves: list[tuple[str, Any]]) -> list[float]:
    """Seconds of each move, and of each move back."""
    found = []
    with browser.opened(address, WIDTHS[-1]) as opened:
        opened.page.locator("#n-memory").wait_for()
        for _ in range(ROUNDS):
            for key, value in moves:
                for to in (value, getattr(Controls(), key)):
                    shown = to.bit_length() - 1 if key in SLIDERS else to
                    shown = shown if isinstance(shown, bool) else str(shown)
                    found.append(opened.page.evaluate(MOVE, [key, shown]) / 1e3)
        assert not opened.errors, opened.errors
    return found


def keep_pictures(address: str, folder: Path) -> None:
    """The whole page, as it opens and as it refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        with browser.opened(address, width) as opened:
            opened.page.locator("#n-memory").wait_for()
            opened.page.screenshot(path=folder / f"playground-{width}.png", full_page=True)


@contextmanager
def started() -> Iterator[tuple[str, subprocess.Popen]]:
    """A playground on a free port: its address, and its process."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "experiments", "playground", f"port={port}"]
    # nicegui would take itself for a test of its own
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield f"http://{HOST}:{port}/", process
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + STARTED_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the playground ended with status {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the playground does not answer")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
