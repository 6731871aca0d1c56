"""What the user sees: a progress bar on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from experiments.outside_text import visible

if TYPE_CHECKING:  # it needs torch, and the launcher, which prints too, does without
    from experiments.explain import Explanation

PLAIN_LINE_EVERY_S = 2.0
DASH = "-"  # a value that was not measured
PLAIN_WIDTH = 100


class PatientConsole(Console):
    """A console whose reader may leave (`| head`): a run goes on, and only its display ends."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # the interpreter flushes what is left at exit, and would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as it reads. Every line, title and cell passes here; none of them is
        markup, and none reaches the terminal as an escape sequence."""
        as_it_reads = {**options, "markup": False, "emoji": False}
        return super().render_str(visible(text, lines=True), **as_it_reads)


class LastingOutput:
    """Standard output for what goes on without it: a disk may fill up, a terminal be closed.

    The first error is told on standard error, except a reader who left (`| head`); what is printed
    from then on is lost. A rank's standard error is a log, so the error is also left in `note`,
    which the launcher reads.
    """

    def __init__(self, stream: TextIO, note: Path | None = None) -> None:
        self.stream, self.note = stream, note

    def write(self, text: str) -> int:
        """Write a text; what the device cannot take is dropped."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Hand over what is buffered; what the device cannot take is dropped."""
        try:
            self.stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _drop(self, error: OSError) -> None:
        # what is buffered would fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if isinstance(error, BrokenPipeError):
            return
        with suppress(OSError):
            progress(output_lost(str(error.strerror)))
        with suppress(OSError):
            if self.note:
                self.note.write_text(str(error.strerror))


def output_lost(reason: str) -> str:
    """Return the warning of a run whose standard output failed."""
    return f"launch.sh: warning: standard output: {reason}; the run goes on, unseen, in its folder"


def make_console(file: Any = None) -> Console:
    """Return a console: colours on a terminal, lines of a fixed width elsewhere."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return PatientConsole(file=file, highlight=False, width=width)


def progress(text: str) -> None:
    """To the person who waits; results go to standard output."""
    print(visible(text, lines=True), file=sys.stderr, flush=True)


class Reporter:
    """Progress of one run. Rank 0 shows it; every other rank has one that says nothing."""

    def __init__(self, steps: int, shown: bool, done: int = 0, note: Path | None = None) -> None:
        self.shown = shown
        self.console = make_console(LastingOutput(sys.stdout, note))
        self.steps = steps
        self.last_line = 0.0
        self.progress: Progress | None = None
        if shown and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
                TimeRemainingColumn(),
                refresh_per_second=4,  # drawn on a thread of rank 0, which has better to do
                console=self.console,
            )
            self.task = self.progress.add_task(
                "training", total=steps, completed=done, loss=DASH, speed=DASH
            )

    def __enter__(self) -> Reporter:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.progress:
            self.progress.stop()

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.shown:
            self.console.print(text, markup=False, soft_wrap=True)

    def step(self, step: int, loss: float, tokens_per_s: float) -> None:
        """After each step; `step` counts from 0."""
        if not self.shown:
            return
        speed = f"{tokens_per_s:,.0f}"
        if self.progress:
            self.progress.update(self.task, completed=step + 1, loss=f"{loss:.4f}", speed=speed)
            return
        now = time.monotonic()
        if now - self.last_line >= PLAIN_LINE_EVERY_S or step + 1 in (1, self.steps):
            self.last_line = now
            self.say(f"step {step + 1}/{self.steps}  loss {loss:.4f}  {speed} tokens/s")

    def finish(self, ledger: dict[str, Any], explained: Explanation, folder: Path) -> None:
        """The end of a run: its costs, its held-out loss, its folder."""
        if not self.shown:
            return
        print_costs(self.console, ledger, explained)
        loss = ledger["training"]["validation_loss"]
        entropy = ledger["environment"]["corpus"]["unigram_entropy"]
        if loss is not None:
            self.say(f"validation loss {loss:.4f} nats a token (unigram entropy {entropy:.4f})")
        self.say(f"run folder {folder}")


def human_bytes(number: float | None) -> str:
    """Decimal units, as networks and datasheets use them: 3.21 MB."""
    if number is None:
        return DASH
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 1000 or unit == "TB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000
    raise AssertionError


def human_flops(number: float | None) -> str:
    """Decimal units: 1.23 GFLOP."""
    if number is None:
        return DASH
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:.3g} {unit}FLOP"
        number /= 1000
    raise AssertionError


def human_seconds(number: float | None) -> str:
    """Milliseconds below a second."""
    if number is None:
        return DASH
    return f"{number * 1e3:.2f} ms" if number < 1 else f"{number:.2f} s"


def share(part: float | None, whole: float | None) -> str:
    """A part of the whole, in per cent."""
    if part is None or not whole:
        return DASH
    return f"{100 * part / whole:.1f} %"


def costs_tables(ledger: dict[str, Any]) -> list[Table]:
    """The step's costs: time by part, memory by category, communication by collective and axis."""
    step = ledger["step"]
    return [
        parts_table("time of a step", step["time_s"], "total", human_seconds),
        parts_table("memory at the peak", step["memory_bytes"], "peak", human_bytes),
        communication_table(step["communication"]),
    ]


def parts_table(title: str, parts: dict[str, float | None], whole: str, human: Any) -> Table:
    """Parts, each with its share, and the whole below them."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("value", justify="right")
    table.add_column("share", justify="right")
    for name, value in parts.items():
        if name != whole:
            table.add_row(name.replace("_", " "), human(value), share(value, parts[whole]))
    table.add_section()
    table.add_row(whole, human(parts[whole]), "")
    return table


def communication_table(rows: list[dict[str, Any]] | None) -> Table:
    """One row a collective, axis, dtype and phase: per rank and step."""
    title = "communication of a step, per rank"
    table = Table(title=title, title_justify="left", caption_justify="left", collapse_padding=True)
    for name in ("collective", "axis", "ranks", "dtype", "phase", "calls", "payload", "wire"):
        words = name in ("collective", "axis", "dtype", "phase")
        side: Any = "left" if words else "right"
        table.add_column(name, justify=side, overflow="fold", no_wrap=words and name != "axis")
    table.add_column("time", justify="right")
    for row in rows or []:
        table.add_row(
            row["collective"],
            row["axis"],
            str(row["group_size"]),
            row["dtype"],
            row.get("phase") or DASH,
            str(row["calls"]),
            human_bytes(row["payload_bytes"]),
            human_bytes(row["wire_bytes"]),
            human_seconds(row["time_s"]),
        )
    if not rows:
        table.add_row("not measured" if rows is None else "none", *[DASH] * 8)
    own = sum(row.get("backend_bytes") or row["wire_bytes"] for row in rows or [])
    ring = sum(row["wire_bytes"] for row in rows or [])
    if own != ring:
        table.caption = f"gloo itself sends {human_bytes(own)}: its reduce_scatter is an all_reduce"
    return table


def pipeline_table(pipeline: dict[str, Any]) -> Table:
    """Idle time of each rank's stages beside the schedule's own."""
    ideal = share(pipeline["ideal_bubble"], 1.0)
    schedule, micro_batches = pipeline["schedule"], pipeline["micro_batches"]
    title = f"bubble of {schedule} with {micro_batches} micro-batches, ideally {ideal}"
    table = Table(title=title, title_justify="left")
    for name in ("rank", "stages", "bubble", "of forward and backward"):
        table.add_column(name, justify="right")
    for row in pipeline["stages"]:
        stages = ", ".join(map(str, row["stages"]))
        idle = human_seconds(row["bubble_s"]), share(row["bubble"], 1.0)
        table.add_row(str(row["rank"]), stages, *idle)
    return table


def memory_line(step: dict[str, Any]) -> str:
    """What the process, and on a GPU its allocator, say of the peak."""
    process = step.get("process_bytes") or {}
    resident, allocator = process.get("resident_peak"), process.get("allocator_peak")
    said = f"peak of the whole process {human_bytes(resident)}, libraries included"
    return said if allocator is None else f"{said}; of the GPU's allocator {human_bytes(allocator)}"


def explained_table(explained: Explanation) -> Table:
    """Each cost, the formula that it should follow, and whether it does."""
    table = Table(title="what the formulas say", title_justify="left", caption_justify="left")
    table.add_column("cost", overflow="fold")
    table.add_column("formula", overflow="fold")
    for name in ("gives", "measured", "off"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in explained.rows:
        human = human_bytes if row.unit == "B" else human_flops
        said = row.formula or DASH
        if row.why:
            said = f"{said} ({row.why})" if row.formula else row.why
        off = "0" if row.off == 0 else human(row.off)
        table.add_row(row.cost, said, human(row.closed_form), human(row.measured), off)
    table.caption = explained.letters
    return table


def print_costs(console: Console, ledger: dict[str, Any], explained: Explanation) -> None:
    """The end-of-run tables and the one line of rates."""
    for table in (*costs_tables(ledger), explained_table(explained)):
        console.print(table)
    if "pipeline" in ledger:
        console.print(pipeline_table(ledger["pipeline"]))
    step = ledger["step"]
    console.print(memory_line(step))
    speed = DASH if step["tokens_per_s"] is None else f"{step['tokens_per_s']:,.0f}"
    rates = "  ".join(f"{name.upper()} {share(step[name], 1.0)}" for name in ("mfu", "hfu"))
    console.print(f"{speed} tokens/s  {rates}")


SweepRow = tuple[list[str], str, str | None, dict[str, Any] | None]


def print_sweep(folder: Path, rows: list[SweepRow]) -> None:
    """The jobs of a sweep: what differs, how each ended, and what a step of it cost."""
    shared = set(rows[0][0]).intersection(*(row[0] for row in rows))
    table = Table(title=f"sweep {folder}", title_justify="left")
    for name in ("run", "what differs", "status"):
        table.add_column(name, overflow="fold")
    for name in ("step", "peak memory", "on the wire", "validation loss"):
        table.add_column(name, justify="right")
    for number, (overrides, status, reason, ledger) in enumerate(rows):
        differs = " ".join(o for o in overrides if o not in shared) or DASH
        ended = f"{status}: {reason}" if reason and status != "dry" else status
        table.add_row(str(number), differs, ended, *costs_in_short(ledger))
    console = make_console()
    console.print(table)
    ended_as = [row[1] for row in rows]
    if "kept" in ended_as:
        again = "run.dir=DIR measures them afresh in another folder"
        console.print(f"{ended_as.count('kept')} kept: they were done before; {again}")
    if {"failed", "stopped"} & set(ended_as):
        console.print("the same command line again runs what is not done")
    if {"done", "kept"} & set(ended_as):
        console.print(f"side by side: ./launch.sh compare {folder}", markup=False, soft_wrap=True)


def costs_in_short(ledger: dict[str, Any] | None) -> list[str]:
    """Time of a step, memory at its peak, bytes sent by a rank, held-out loss."""
    if ledger is None:
        return [DASH] * 4
    step, loss = ledger["step"], ledger["training"]["validation_loss"]
    rows = step["communication"]
    sent = None if rows is None else sum(row["wire_bytes"] for row in rows)
    return [
        human_seconds(step["time_s"]["total"]),
        human_bytes(step["memory_bytes"]["peak"]),
        human_bytes(sent),
        DASH if loss is None else f"{loss:.4f}",
    ]
