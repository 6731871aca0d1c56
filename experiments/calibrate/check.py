"""./launch.sh check [cluster=NAME|FILE] [--json]: layouts on this machine, predicted and measured.

Each layout trains for some steps on two ranks. Beside its step's time and its peak of memory stand
those of the same program traced, and those of the closed forms, on a profile of this machine, which
is measured first: a minute; cluster=FILE takes one that ./launch.sh calibrate to=FILE wrote.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from costs.ledger import step_of
from experiments.arguments import key_values
from experiments.config import TrainConfig
from experiments.console import human_bytes, human_seconds, make_console, progress
from experiments.predict import clusters
from experiments.predict.plan_config import Method, SimulateConfig
from simulator.formula_ledger import formula_steps
from simulator.hardware import Cluster

TIME_BAR, MEMORY_BAR = 0.15, 0.03
KINDS = {"single": "fp32", "ddp": "ddp", "fsdp": "fsdp", "tp": "tp", "pp": "pp"}  # of the contest
ROUNDS = 3  # in which layouts take turns
STEPS = 8  # of each turn; the ledger shows the median of the last four


@dataclass(frozen=True)
class Checked:
    """One layout. Seconds of a step; bytes of the fullest rank."""

    name: str
    config: TrainConfig
    measured_s: float
    traced_s: float
    formula_s: float
    measured_bytes: int
    traced_bytes: int
    formula_bytes: int

    @property
    def time_error(self) -> float:
        """Of the traced program; signed."""
        return self.traced_s / self.measured_s - 1

    @property
    def formula_error(self) -> float:
        return self.formula_s / self.measured_s - 1

    @property
    def memory_error(self) -> float:
        return self.traced_bytes / self.measured_bytes - 1


def command(argv: list[str]) -> int:
    """Measure, predict, and print the table or JSON."""
    _, given = key_values("check", "cluster=NAME|FILE, --json", argv)
    found = check(clusters.named_or_file(given["cluster"]) if given else None)
    if "--json" in argv:
        print(json.dumps({"layouts": [said(one) for one in found]}, indent=1))
    else:
        show(found)
    return 0


def check(cluster: Cluster | None = None) -> list[Checked]:
    """Every layout of KINDS; without `cluster` this machine is measured first."""
    from experiments.calibrate.command import measured

    if cluster is None:
        progress("calibrate: this machine's operators and messages")
        cluster = measured()
    configs = configurations()
    steps = measure(configs)
    return [checked(name, config, steps[name], cluster) for name, config in configs.items()]


def configurations() -> dict[str, TrainConfig]:
    """What is trained, by name: the yardstick's larger shape."""
    from experiments.figures.benchmark import SHAPES
    from experiments.figures.contest import KINDS as LAYOUTS
    from experiments.figures.contest import our_config

    found = {name: LAYOUTS[kind] for name, kind in KINDS.items()}
    return {
        name: our_config(SHAPES["L"], layout, STEPS, changes)
        for name, (layout, changes) in found.items()
    }


def measure(configs: dict[str, TrainConfig]) -> dict[str, list[list[dict[str, Any]]]]:
    """`step` of each rank of each round, by name; the layouts take turns."""
    from experiments.calibrate.models import PATIENCE_S
    from experiments.figures.short_runs import step_costs
    from experiments.ranks import run_ranks

    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in configs}
    for number in range(ROUNDS):
        for name, config in configs.items():
            progress(f"measure: {name}, round {number + 1} of {ROUNDS}")
            size = config.layout.world_size
            ranks = run_ranks(size, step_costs, [config], timeout_s=PATIENCE_S)
            found[name].append([steps[0] for steps in ranks])
    return found


def checked(
    name: str, config: TrainConfig, rounds: list[list[dict[str, Any]]], cluster: Cluster
) -> Checked:
    """One layout's measured steps beside what is predicted of it."""
    from experiments.predict.simulate_traced import traced_steps

    progress(f"predict: {name}")
    with tempfile.TemporaryDirectory() as folder:
        traced = step_of(traced_steps(simulated(config, cluster), Path(folder))[1])
    plan = (config.model, config.layout, config.options)
    formula = step_of(formula_steps(*plan, cluster, config.clip is not None))
    steps = [step_of(ranks) for ranks in rounds]
    return Checked(
        name,
        config,
        statistics.median(step["time_s"]["total"] for step in steps),
        traced["time_s"]["total"],
        formula["time_s"]["total"],
        *(one["memory_bytes"]["peak"] for one in (steps[0], traced, formula)),
    )


def simulated(config: TrainConfig, cluster: Cluster) -> SimulateConfig:
    """The same run, to be simulated on a cluster by tracing it."""
    own = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    return SimulateConfig(**own, cluster=cluster, method=Method.trace)


def said(one: Checked) -> dict[str, Any]:
    """For --json."""
    return {
        "layout": one.name,
        "measured_time_s": one.measured_s,
        "predicted_time_s": one.traced_s,
        "time_error": one.time_error,
        "memory_error": one.memory_error,
        "formula_time_s": one.formula_s,
        "formula_time_error": one.formula_error,
    }


def show(found: list[Checked]) -> None:
    """The table, and which bars are missed."""
    console = make_console()
    table = Table(title="a step of each layout on this machine", title_justify="left")
    for name in ("layout", "measured", "traced", "off", "formula", "off", "peak", "traced", "off"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for one in found:
        seconds = [human_seconds(s) for s in (one.measured_s, one.traced_s, one.formula_s)]
        sizes = [human_bytes(b) for b in (one.measured_bytes, one.traced_bytes)]
        table.add_row(
            one.name,
            *(*seconds[:2], f"{one.time_error:+.1%}", seconds[2], f"{one.formula_error:+.1%}"),
            *(*sizes, f"{one.memory_error:+.2%}"),
        )
    console.print(table)
    missed = [
        f"{one.name}: {what} {error:+.1%}, not within {bar:.0%}"
        for one in found
        for what, error, bar in (
            ("time", one.time_error, TIME_BAR),
            ("memory", one.memory_error, MEMORY_BAR),
        )
        if abs(error) > bar
    ]
    held = f"traced times are within {TIME_BAR:.0%} of the measured, memory within {MEMORY_BAR:.0%}"
    console.print("\n".join(missed) or held, markup=False)
