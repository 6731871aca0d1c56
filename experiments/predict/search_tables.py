"""What a search found, as tables that fit 100 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.console import DASH, human_bytes, human_seconds, make_console, share
from experiments.predict.plan_command import wrapped
from experiments.predict.plan_config import SearchConfig
from experiments.predict.scale import say_scale
from parallel.layout import GradientSync, PipelineConfig, PipelineSchedule
from simulator.search import CLOSE, OUT_OF_MEMORY, Found

SHORT = {  # names of schedules, for a column; "x2" behind one is two stages a rank
    "interleaved_1f1b": "1f1b",
    "looped_bfs": "bfs",
    "interleaved_zero_bubble": "zb",
    "zbv_zero_bubble": "zbv",
}
LABEL_WIDTH = 26  # of a layout: longer ones go on in a second line, between two axes
SLOWEST_SHOWN = 2.0  # times the fastest: of the front
MOST_SHOWN = 12  # plans of the front


def show(config: SearchConfig, found: Found, said: dict[str, Any]) -> None:
    """Tables: the best plans, the front, why the others lost."""
    console = make_console()
    device = config.cluster.device
    console.print(
        f"{said['predicted']:,} plans of {config.gpus:,} x {device.name or config.cluster.name}, "
        f"{config.batch_size:,} sequences of {config.seq_len:,} tokens a step; "
        f"{human_bytes(found.limit)} may be filled",
        highlight=False,
    )
    odd = config.odd_tensor_parallel
    if odd:
        size, rows = config.model.vocab_size, said["pad_vocab_to"]
        console.print(
            f"model.vocab_size={size} does not divide by tp={', '.join(map(str, odd))}: all plans "
            f"pad it, model.pad_vocab_to={rows}; model.pad_vocab_to={size} searches without",
            highlight=False,
            soft_wrap=True,
        )
    if not said["plans"]:
        console.print("no plan fits: more devices, or a smaller micro-batch, would be needed")
    else:
        console.print(plans_table("the fastest plans that fit", said["plans"]))
        print_commands(console, said["plans"])
        if said["simplest"] != said["plans"][0]:
            title = f"fewest axes of those within {100 * CLOSE:g} % of the fastest"
            console.print(plans_table(title, [said["simplest"]]))
            print_commands(console, [said["simplest"]])
        less = thinned(said["front"])[1:]
        if less:
            console.print(plans_table("less memory, more time", less))
            print_commands(console, less)
    reasons = Table(title="why the others lost", title_justify="left")
    reasons.add_column("reason")
    reasons.add_column("plans", justify="right")
    reasons.add_column("by, in the median", justify="right")
    for reason, count in said["rejected"].items():
        reasons.add_row(reason, f"{count:,}", _margin(reason, said["lost_by"].get(reason)))
    console.print(reasons)
    if said["plans"] and "cost_per_million_tokens" in said["plans"][0]:
        costs = [plan["cost_per_million_tokens"] for plan in (said["plans"][0], said["plans"][-1])]
        console.print(
            f"a million tokens cost {costs[0]:.4g} with the fastest plan, {costs[1]:.4g} with the "
            "last one shown",
            highlight=False,
        )
    if "explained" in said:
        say_explained(console, said)
    if said.get("to_the_end"):
        say_scale(console, said["to_the_end"])
    if "verified" in said:
        console.print(said["verified"]["says"], markup=False)


def print_commands(console: Console, plans: list[dict[str, Any]]) -> None:
    """Print the command that rebuilds each row of a table, in the order of its rows.

    On a terminal a command is broken so that a shell still takes it as one; elsewhere each is one
    line.
    """
    console.print("the same plans as commands, row by row" if len(plans) > 1 else "as a command")
    for plan in plans:
        command = plan["command"]
        said = wrapped(command, console.width) if console.is_terminal else command
        console.print(said, markup=False, highlight=False, soft_wrap=True)


def _margin(reason: str, by: float | None) -> str:
    if by is None:
        return DASH
    return human_bytes(by) if reason == OUT_OF_MEMORY else human_seconds(by)


def thinned(front: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a front, fastest first, the first and the plans that save most against the one before.

    None slower than SLOWEST_SHOWN times the fastest, at most MOST_SHOWN and the first.
    """
    near = [p for p in front if p["time_s"] <= SLOWEST_SHOWN * front[0]["time_s"]]
    saved = {i: near[i - 1]["memory_bytes"] / near[i]["memory_bytes"] for i in range(1, len(near))}
    most = sorted(saved, key=lambda i: -saved[i])[:MOST_SHOWN]
    return [near[i] for i in sorted([0, *most])]


def plans_table(title: str, plans: list[dict[str, Any]]) -> Table:
    """A row a plan. No lines between columns: there are ten, and 100 characters."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    for name in ("layout", "schedule", "batch", "recompute", "zero"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "MFU", "memory", "exposed", "bubble"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        total, time = plan["time_s"], plan["time_parts"]
        table.add_row(
            broken(plan["label"]),
            schedule_of(plan),
            f"{plan['micro_batch_size']} x {plan['gradient_accumulation_steps']}",
            plan["activation_checkpointing"],
            zero_of(plan),
            human_seconds(total),
            share(plan["mfu"], 1.0),
            human_bytes(plan["memory_bytes"]),
            share(time["exposed_communication"], total),
            share(time["bubble"], total),
        )
    return table


def scatters_each(plan: dict[str, Any]) -> bool:
    """Whether each micro-batch scatters its gradients."""
    return bool(plan["gradient_sync"] == GradientSync.micro_batch.value)


def zero_of(plan: dict[str, Any]) -> str:
    """The ZeRO stage, as "3 each" where each micro-batch scatters its gradients."""
    if plan["zero_stage"] is None:
        return DASH
    return f"{plan['zero_stage']}{' each' * scatters_each(plan)}"


def schedule_of(plan: dict[str, Any]) -> str:
    """Short, as "1f1b x4": interleaved, four stages a rank."""
    if plan["schedule"] is None:
        return DASH
    name, how = plan["schedule"], PipelineConfig(PipelineSchedule(plan["schedule"]))
    loops = not (how.one_stage_a_rank or how.is_v_shaped)
    return SHORT.get(name, name) + (f" x{plan['stages_per_rank']}" if loops else "")


def broken(label: str) -> str:
    """A layout's label in lines of LABEL_WIDTH, broken between axes only."""
    lines = [""]
    for axis in label.split("-"):
        whole = f"{lines[-1]}-{axis}" if lines[-1] else axis
        if lines[-1] and len(whole) > LABEL_WIDTH:
            lines[-1] += "-"
            lines.append(axis)
        else:
            lines[-1] = whole
    return "\n".join(lines)


def say_explained(console: Console, said: dict[str, Any]) -> None:
    """The named layout's parts beside the winner's."""
    own, reason = said["explained"]["plan"], said["explained"]["loses_by"]
    console.print(plans_table(f"explained: loses by {reason or 'nothing, it is the best'}", [own]))
    print_commands(console, [own])
    if not said["plans"]:
        return
    best = said["plans"][0]
    table = Table(title=f"{own['label']} beside {best['label']}", title_justify="left")
    for name in ("part", broken(own["label"]), broken(best["label"]), "more"):
        table.add_column(name, justify="left" if name == "part" else "right")
    whole = best["time_s"]
    for name, a, b in [
        ("step", own["time_s"], whole),
        *((key, own["time_parts"][key], best["time_parts"][key]) for key in own["time_parts"]),
    ]:
        more = f"{100 * (a - b) / whole:+.1f} % of the step"
        table.add_row(name.replace("_", " "), human_seconds(a), human_seconds(b), more)
    a, b = own["memory_bytes"], best["memory_bytes"]
    table.add_row("memory", human_bytes(a), human_bytes(b), f"{100 * (a / b - 1):+.1f} %")
    console.print(table)
