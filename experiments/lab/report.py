"""docs/results/lab.md: when a network holds a step up, measured in the lab and predicted.

./launch.sh python -m experiments.lab.report > docs/results/lab.md        three minutes; Linux,
root or user
                                                                  namespaces

DDP and FSDP train on two nodes of one rank over links of several rates (command.py). The
prediction is the one that `./launch.sh lab` shows (command.py: predicted_seconds): a run on links
as fast as the machine, replayed over these. Rates take turns, in rounds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from costs import ledger as ledgers
from experiments.calibrate.command import measured as calibrated
from experiments.console import DASH, progress
from experiments.document import heading, rule, table
from experiments.lab.command import predicted_seconds, rate_of
from experiments.lab.shaped_links import Links
from simulator.hardware import Cluster

COMMAND = "./launch.sh python -m experiments.lab.report > docs/results/lab.md"
PICTURE = Path("docs/results/lab.png")
NODES = 2
STRATEGIES = ("ddp", "fsdp")
RATES = ("100mbit", "1gbit", "10gbit")
ROUNDS = 3
ATTEMPTS = 4  # at a run that others leave alone
QUIET = 0.05  # share of the cores that others may take
STEPS = 16
MODEL = ("sample.tokens=0", "validation.batches=0", "run.save=false", f"steps={STEPS}")
BAR = 0.10
CURVE = np.logspace(7, 11, 60)  # bits/s
COLOURS = {"ddp": "#4878cf", "fsdp": "#d1495b"}


@dataclass
class Found:
    """One strategy: seconds of a step."""

    fast: list[float] = field(default_factory=list)  # on links as fast as the machine, by round
    measured: dict[str, list[float]] = field(default_factory=dict)  # by rate
    predicted: dict[str, list[float]] = field(default_factory=dict)
    exposed: dict[str, list[float]] = field(default_factory=dict)  # measured
    curves: list[list[float]] = field(default_factory=list)  # predicted, at each rate of CURVE

    others: float = 0.0  # share of the cores that other programs took in the most disturbed run

    def error(self, rate: str) -> float:
        """The median of the rounds' own errors, signed: what slows a whole round is in both."""
        pairs = zip(self.predicted[rate], self.measured[rate], strict=True)
        return statistics.median(said / seen - 1 for said, seen in pairs)


Seconds = tuple[float, float, float]


def spent() -> Seconds:
    """Of the clock, of all cores, of this process's children. Interrupts are the network's."""
    cores, times = psutil.cpu_times(), os.times()
    idle = sum(getattr(cores, n, 0.0) for n in ("idle", "iowait", "irq", "softirq", "guest"))
    children = times.children_user + times.children_system
    return time.monotonic(), sum(cores) - idle, children + times.user + times.system


class Neighbours:
    """While open, what share of this machine's cores others take than this process's children."""

    def __init__(self, seconds: Callable[[], Seconds] = spent) -> None:
        self.seconds = seconds

    def __enter__(self) -> Neighbours:
        self.begin = self.seconds()
        return self

    def __exit__(self, *error: object) -> None:
        wall, busy, own = (b - a for a, b in zip(self.begin, self.seconds(), strict=True))
        self.share = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def run(folder: Path, *arguments: str) -> tuple[Path, dict[str, Any], float]:
    """One run in the lab that others left alone, or the most so of ATTEMPTS: its folder, its
    ledger's step, and the share that others took of the cores."""
    found = []
    for number in range(ATTEMPTS):
        place = folder / str(number)
        command = [sys.executable, "-m", "experiments", "lab", f"nodes={NODES}", f"run.dir={place}"]
        with Neighbours() as others:
            subprocess.run(
                [*command, *MODEL, *arguments, "--json"], check=True, stdout=subprocess.DEVNULL
            )
        found.append((others.share, place))
        if others.share < QUIET:
            break
    share, place = min(found)
    return place, ledgers.read(place / "ledger.json")["step"], share


def measure(folder: Path, machine: Cluster) -> dict[str, Found]:
    """All rounds."""
    found = {strategy: Found() for strategy in STRATEGIES}
    for number in range(ROUNDS):
        for strategy, its in found.items():
            progress(f"round {number + 1} of {ROUNDS}: {strategy}")
            of_round = folder / f"{strategy}-{number}"
            fast, step, share = run(of_round / "fast", f"strategy={strategy}", "trace=true")
            its.fast.append(step["time_s"]["total"])
            its.others = max(its.others, share)
            for rate in RATES:
                slow = (f"strategy={strategy}", f"rate={rate}", f"recorded={fast}")
                _, step, share = run(of_round / rate, *slow)
                its.others = max(its.others, share)
                its.measured.setdefault(rate, []).append(step["time_s"]["total"])
                its.exposed.setdefault(rate, []).append(step["time_s"]["exposed_communication"])
                one = predicted_seconds(fast, Links(NODES, rate_of(rate)), machine)
                its.predicted.setdefault(rate, []).append(one)
            curve = [predicted_seconds(fast, Links(NODES, rate), machine) for rate in CURVE]
            its.curves.append(curve)
    return found


def crossover(its: Found) -> float:
    """Bits/s at which a step takes twice what it does on fast links: the network is then half."""
    curve = np.median(np.array(its.curves), axis=0)
    wanted = 2 * statistics.median(its.fast)
    return float(np.exp(np.interp(-wanted, -curve, np.log(CURVE))))


def rows(found: dict[str, Found]) -> list[str]:
    head = ("strategy", "links", "measured, ms", "of rounds", "predicted, ms", "error", "exposed")
    lines = [table(*head), rule(len(head))]
    for strategy, its in found.items():
        fast = statistics.median(its.fast)
        lines.append(
            table(strategy, "as fast as the machine", ms(fast), span(its.fast), *[DASH] * 3)
        )
        for rate in RATES:
            seconds = statistics.median(its.measured[rate])
            exposed = statistics.median(its.exposed[rate]) / seconds
            lines.append(
                table(
                    strategy,
                    rate,
                    ms(seconds),
                    span(its.measured[rate]),
                    ms(statistics.median(its.predicted[rate])),
                    f"{its.error(rate):+.1%}",
                    f"{exposed:.0%}",
                )
            )
    return lines


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def span(seconds: list[float]) -> str:
    return f"{ms(min(seconds))} to {ms(max(seconds))}"


def draw(found: dict[str, Found]) -> None:
    """Step time against the links' rate: predicted curves, measured points."""
    with rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for strategy, its in found.items():
            colour = COLOURS[strategy]
            curve = 1e3 * np.median(np.array(its.curves), axis=0)
            axes.loglog(CURVE, curve, color=colour, label=f"{strategy}, predicted")
            at = [rate_of(rate) or np.inf for rate in RATES]
            middle = [1e3 * statistics.median(its.measured[rate]) for rate in RATES]
            ends = [[1e3 * pick(its.measured[rate]) for rate in RATES] for pick in (min, max)]
            bars = [np.subtract(middle, ends[0]), np.subtract(ends[1], middle)]
            style: dict[str, Any] = {"fmt": "o", "color": colour, "capsize": 3, "markersize": 5}
            axes.errorbar(at, middle, yerr=bars, label=f"{strategy}, measured", **style)
            half = crossover(its)
            axes.axvline(half, color=colour, linewidth=0.8, linestyle=":")
            place: dict[str, Any] = {
                "xycoords": axes.get_xaxis_transform(),  # from the bottom up
                "xytext": (3, 4),
                "textcoords": "offset points",
                "color": colour,
            }
            text = f"half of it is network: {said_rate(half)}"
            axes.annotate(text, (half, 0), rotation=90, **place)
        axes.set_xlim(CURVE[0], CURVE[-1])
        axes.set(xlabel="rate of each link, bits/s", ylabel="milliseconds of a step")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(PICTURE, dpi=130)


def said_rate(rate: float) -> str:
    """Two digits, and tc's own unit."""
    unit, name = (1e9, "Gbit/s") if rate >= 1e9 else (1e6, "Mbit/s")
    return f"{float(f'{rate / unit:.2g}'):g} {name}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress("calibrate")
        found = measure(folder, calibrated())
    draw(found)
    print(heading("The network lab", COMMAND))
    print(
        f"{NODES} nodes of one rank on this machine, each a network namespace behind a link of the "
        "given rate (`./launch.sh lab`); the default model, fp32. The prediction is the run on "
        "links as fast as the machine, replayed over the lab's cluster profile, which is the "
        "machine's calibration and the rate: a message takes what the profile says, or what it "
        "took on fast links, whichever is longer. Steps are medians of "
        f"{ROUNDS} rounds in which the rates take turns, errors those of the rounds' own pairs; a "
        f"run in which other programs took more than {QUIET:.0%} of the cores is done again, "
        f"{ATTEMPTS} times at most. Bar: an error of {BAR:.0%}.\n"
    )
    print("\n".join(rows(found)))
    print("\n![Step time against the rate of the links](lab.png)\n")
    for strategy, its in found.items():
        print(
            f"- {strategy}: the network takes as long as all else at {said_rate(crossover(its))} "
            "(predicted); below it, twice the rate is nearly twice the speed."
        )
    worst = max(abs(its.error(rate)) for its in found.values() for rate in RATES)
    others = max(its.others for its in found.values())
    print(f"\nThe largest error is {worst:.1%}. Of the most disturbed run others had {others:.0%}.")


if __name__ == "__main__":
    main()
