"""Runs side by side: what differs, what that changed, what cannot be compared. No torch."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from experiments.compare.config_differences import (
    CLUSTER,
    SIMULATED,
    Difference,
    Differences,
    differences_of,
)
from experiments.compare.find_runs import Run, find_runs, unread
from experiments.compare.run_costs import (
    LOSS,
    MEMORY,
    PEAK,
    STEP,
    TIMES,
    TOKENS,
    WIRE,
    Change,
    Costs,
    changes_of,
    costs_of_all,
    error_of,
    says,
)
from experiments.outside_text import csv_cell

# what a user may sort by: the cost, and whether more is better
ORDERS: dict[str, tuple[str, bool]] = {
    "tokens": (TOKENS, True),
    "time": (STEP, False),
    "memory": (PEAK, False),
    "bytes": (WIRE, False),
    "loss": (LOSS, False),
}
# facts of a run's environment, and what two runs that differ in one cannot say
FACTS = {
    "corpus": "their losses are of different text",
    "torch": "times and memory may differ for that alone",
    "machine": "their seconds are of different machines",
}


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they were given; the first is what others are compared with."""

    runs: list[Run]
    differences: Differences
    costs: list[Costs]
    problems: list[str]  # a line for each ledger that could not be read
    unread: list[str]  # what was asked for and gave no run at all
    order: str = "tokens"

    def by_cost(self) -> list[int]:
        """Positions of the runs, the best first; those that lack the cost last."""
        if self.order == "given":
            return list(range(len(self.runs)))
        name, more = ORDERS[self.order]

        def key(i: int) -> tuple[bool, float]:
            cost = self.costs[i].get(name)
            return cost is None, 0.0 if cost is None else -cost.value if more else cost.value

        return sorted(range(len(self.runs)), key=key)

    def cluster(self, i: int) -> str:
        return self.differences.values[i].get(CLUSTER, "-")

    def changes(self, difference: Difference) -> dict[str, list[Change]]:
        return changes_of(difference, self.runs, self.costs)

    def message_kinds(self) -> list[str]:
        """Costs of kinds of messages, wire_bytes.COLLECTIVE.AXIS, the largest first."""
        most: dict[str, float] = defaultdict(float)
        for costs in self.costs:
            for name, cost in costs.items():
                if name.startswith(f"{WIRE}."):
                    most[name] = max(most[name], cost.value)
        return sorted(most, key=lambda name: -most[name])

    @cached_property
    def warnings(self) -> list[str]:
        """A line for each fact that makes runs hard to compare."""
        real = [run for run in self.runs if run.source not in SIMULATED]
        lines = []
        for fact, matter in FACTS.items():
            by_value: dict[str, list[int]] = defaultdict(list)
            for run in real:
                value = fact_of(run, fact)
                if value is not None:
                    by_value[value].append(run.number)
            if len(by_value) > 1:
                who = "; ".join(f"{v} ({numbers(runs)})" for v, runs in by_value.items())
                lines.append(f"{fact} differs, {matter}: {who}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "runs": [self._run(i) for i in range(len(self.runs))],
            "differences": [self._difference(d) for d in self.differences.elementary],
            "predictions": [self._prediction(i, j) for i, j in self.differences.predictions],
            "warnings": self.warnings,
            "problems": self.problems,
        }

    def _run(self, i: int) -> dict[str, Any]:
        run = self.runs[i]
        return {
            "number": run.number,
            "name": run.name,
            "path": str(run.path),
            "source": run.source,
            "differs": self.differences.values[i],
            "costs": {
                name: {"value": cost.value, "noise": cost.noise}
                for name, cost in self.costs[i].items()
            },
        }

    def _difference(self, difference: Difference) -> dict[str, Any]:
        """Medians over the pairs of runs; `noise` is the largest, null where one is not known."""
        before, after = (
            next(iter(side.values())) if len(side) == 1 else side
            for side in (difference.before, difference.after)
        )
        return {
            "key": ", ".join(difference.keys),
            "keys": difference.keys,
            "values": [before, after],
            "pairs": [[self.runs[i].number, self.runs[j].number] for i, j in difference.pairs],
            "costs": {name: summary(found) for name, found in self.changes(difference).items()},
        }

    def _prediction(self, i: int, j: int) -> dict[str, Any]:
        measured, predicted = self.costs[i], self.costs[j]
        costs = {}
        for name in names_of_predictions(measured):
            error = error_of(name, measured, predicted)
            if error is not None:
                values = {"measured": measured[name].value, "predicted": predicted[name].value}
                costs[name] = {**values, "error": error}
        return {
            "measured": self.runs[i].number,
            "predicted": self.runs[j].number,
            "source": self.runs[j].source,
            "cluster": self.cluster(j),
            "costs": costs,
        }

    def to_csv(self) -> str:
        """A row a run: what differs, then every cost and its noise."""
        costs = list(dict.fromkeys(name for own in self.costs for name in own))
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        noises = [f"{name}.noise" for name in costs]
        head = ["number", "run", "path", *self.differences.keys, *costs, *noises]
        out.writerow(map(csv_cell, head))
        for i in self.by_cost():
            run, own, values = self.runs[i], self.costs[i], self.differences.values[i]
            differs = [
                "" if values.get(key) is None else values[key] for key in self.differences.keys
            ]
            numbers = [own[name].value if name in own else "" for name in costs]
            spread = [own[name].noise if name in own else "" for name in costs]
            row = [run.number, run.name, run.path, *differs, *numbers, *spread]
            out.writerow(map(csv_cell, row))
        return text.getvalue()


MEDIANS = ("before", "after", "difference")


def compared(words: list[str], order: str = "tokens") -> Comparison:
    """Find and compare runs. Raises ValueError, one line, where none can be read."""
    runs, problems = find_runs(words)
    if not runs:
        raise ValueError("; ".join(problems) or "no run is given")
    differences = differences_of(runs)
    return Comparison(
        runs, differences, costs_of_all(runs, differences), problems, unread(words, runs), order
    )


def names_of_predictions(costs: Costs) -> list[str]:
    """What of a step is predicted: its times, memory and messages."""
    sent = [name for name in costs if name.startswith((WIRE, "payload_bytes"))]
    return [name for name in (*TIMES, TOKENS, *MEMORY, *sent) if name in costs]


def summary(changes: list[Change]) -> dict[str, Any]:
    """Of all pairs of runs that show a difference."""
    ratios = [change.ratio for change in changes if change.ratio is not None]
    noises = [change.noise for change in changes if change.noise is not None]
    return {
        **{part: median([getattr(c, part) for c in changes]) for part in MEDIANS},
        "noise": max(noises) if len(noises) == len(changes) else None,
        "ratio": median(ratios) if ratios else None,
        "ratios": ratios,
        "says": says(changes),
    }


def fact_of(run: Run, fact: str) -> str | None:
    """What a run's environment says of one of FACTS, None where it says nothing."""
    environment = run.ledger["environment"]
    if fact == "corpus":
        corpus = environment.get("corpus") or {}
        sha256 = corpus.get("sha256")
        return sha256 and f"{corpus.get('source')} {sha256[:8]}"
    if fact == "torch":
        return environment.get("torch")
    known = [environment.get(key) for key in ("device_name", "processor", "cores")]
    cores = [f"{known[2]} cores"] if known[2] else []
    return ", ".join([*(name for name in known[:2] if name), *cores]) or None


def numbers(runs: list[int]) -> str:
    """1, 2, 3 and 7 more."""
    shown = ", ".join(map(str, runs[:5]))
    return f"{shown} and {len(runs) - 5} more" if len(runs) > 5 else shown
