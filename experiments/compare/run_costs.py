"""What a step of each run cost, how sure that is, and what a difference changed. No torch.

The noise of a time is half the distance between the quartiles of the run's timed steps, from
metrics.jsonl. The log has whole steps, so a part of a step has the noise of the whole. That of a
loss is the same over the last tenth of the steps; of two runs that saw the same batches, over the
differences step by step. Bytes are counted and have none. Where one configuration was run several
times, half the range of these runs widens it. Two runs' noises add up, and a difference that is no
larger is called none.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from costs.ledger import MEMORY_PARTS, TIME_PARTS
from experiments.compare.config_differences import OF_THE_BATCHES, Difference, Differences
from experiments.compare.find_runs import Run
from experiments.step_log import half_spread, timed_seconds

STEP, PEAK, WIRE, TOKENS = "time_s.total", "memory_bytes.peak", "wire_bytes", "tokens_per_s"
EXPOSED = "time_s.exposed_communication"
LOSS, VALIDATION = "loss", "validation_loss"
TIMES = (STEP, *(f"time_s.{part}" for part in TIME_PARTS))
MEMORY = (PEAK, *(f"memory_bytes.{part}" for part in MEMORY_PARTS))
TAIL = 10  # the loss is that of the last tenth of the steps
TAIL_STEPS = 8  # and of no fewer, but of at most half of them
NONE, WITHIN = "none", "none (within noise)"


@dataclass(frozen=True)
class Cost:
    """A number, and by how much it may be off: 0 of what is counted, None where nobody knows."""

    value: float
    noise: float | None = 0.0


Costs = dict[str, Cost]


@dataclass(frozen=True)
class Change:
    """One cost of two runs. `difference` is after - before."""

    before: float
    after: float
    difference: float
    noise: float | None

    @property
    def ratio(self) -> float | None:
        return self.after / self.before if self.before else None

    @property
    def is_none(self) -> bool:
        return self.difference == 0 or (
            self.noise is not None and abs(self.difference) <= self.noise
        )


def costs_of_all(runs: list[Run], differences: Differences) -> list[Costs]:
    """The costs of each run; repeats of one configuration widen each other's noise."""
    found = [costs_of(run) for run in runs]
    for group in differences.repeats:
        for name in set.intersection(*(set(found[i]) for i in group)):
            values = [found[i][name].value for i in group]
            half = (max(values) - min(values)) / 2
            for i in group:
                found[i][name] = replace(found[i][name], noise=max(found[i][name].noise or 0, half))
    return found


def costs_of(run: Run) -> Costs:
    """By name, without those that were not measured. Seconds, bytes, tokens/s, nats a token."""
    step = run.ledger["step"]
    noise = time_noise(run)
    values: dict[str, Any] = {f"time_s.{part}": value for part, value in step["time_s"].items()}
    found = {name: Cost(value, noise) for name, value in values.items() if value is not None}
    total = step["time_s"]["total"]
    for name in ("tokens_per_s", "mfu"):
        if step[name] is not None:
            relative = None if noise is None or not total else noise / total
            found[name] = Cost(step[name], None if relative is None else step[name] * relative)
    for part, held in step["memory_bytes"].items():
        if held is not None:
            found[f"memory_bytes.{part}"] = Cost(held)
    return found | _bytes_of(step["communication"]) | _losses_of(run)


def time_noise(run: Run) -> float | None:
    """Of a step of this run, seconds. A simulation has none."""
    if run.source != "measured":
        return 0.0
    if run.seconds is None:
        return None
    compiled = bool(run.ledger["config"].get("compile"))
    return half_spread(timed_seconds(run.seconds, run.ledger["training"]["steps"], compiled))


def _bytes_of(rows: list[dict[str, Any]] | None) -> Costs:
    """By collective and axis, and all together; nothing where messages were not seen."""
    if rows is None:
        return {}
    sums: dict[str, int] = defaultdict(int)
    for row in rows:
        for kind in (WIRE, "payload_bytes"):
            sums[f"{kind}.{row['collective']}.{row['axis']}"] += row[kind]
    total = sum(row[WIRE] for row in rows)
    return {WIRE: Cost(total), **{name: Cost(n) for name, n in sums.items() if n}}


def _losses_of(run: Run) -> Costs:
    """Where the loss ended. The held-out one has the noise of the other."""
    found: Costs = {}
    last = [loss for loss in tail_of(run.losses) if loss is not None]
    noise = half_spread(last)
    if last:
        found[LOSS] = Cost(statistics.median(last), noise)
    held_out = run.ledger.get("training", {}).get("validation_loss")
    if held_out is not None:
        found[VALIDATION] = Cost(held_out, noise)
    return found


def tail_of(losses: list[float | None]) -> list[float | None]:
    """The last tenth."""
    count = min(max(len(losses) // TAIL, TAIL_STEPS), -(-len(losses) // 2))
    return losses[len(losses) - count :]


def changes_of(
    difference: Difference, runs: list[Run], costs: list[Costs]
) -> dict[str, list[Change]]:
    """What a difference changed, by cost, in each pair of runs that has it."""
    found: dict[str, list[Change]] = defaultdict(list)
    for i, j in difference.pairs:
        for name, change in _changes(runs[i], runs[j], costs[i], costs[j]).items():
            found[name].append(change)
    if any(key.startswith(OF_THE_BATCHES) for key in difference.keys):
        return found
    for name in (LOSS, VALIDATION):
        for k, (i, j) in enumerate(difference.pairs):
            if len(found.get(name, ())) == len(difference.pairs):
                found[name][k] = _same_batches(found[name][k], name, runs[i], runs[j])
    return found


def _changes(one: Run, other: Run, before: Costs, after: Costs) -> dict[str, Change]:
    """A kind of message that only one of two runs sends is 0 in the other."""
    counted = WIRE in before and WIRE in after
    found = {}
    for name in [*before, *(name for name in after if name not in before)]:
        absent = Cost(0.0) if counted and name.startswith((WIRE, "payload_bytes")) else None
        a, b = before.get(name, absent), after.get(name, absent)
        if a and b:
            unknown = a.noise is None or b.noise is None
            noise = None if unknown else a.noise + b.noise  # type: ignore[operator]
            found[name] = Change(a.value, b.value, b.value - a.value, noise)
    return found


def _same_batches(change: Change, name: str, one: Run, other: Run) -> Change:
    """The same change, its noise from the differences of the losses step by step; as it is, where
    the steps are not as many, or not of as many tokens: then they had other batches."""
    tokens = [run.ledger["step"]["tokens"] for run in (one, other)]
    if len(one.losses) != len(other.losses) or tokens[0] != tokens[1]:
        return change
    both = zip(tail_of(one.losses), tail_of(other.losses), strict=True)
    apart = [b - a for a, b in both if a is not None and b is not None]
    noise = half_spread(apart)
    if noise is None:
        return change
    difference = statistics.median(apart) if name == LOSS else change.difference
    return replace(change, difference=difference, noise=noise)


def says(changes: list[Change]) -> str:
    """In words: a ratio, the range of ratios of several pairs, or none."""
    none = [change for change in changes if change.is_none]
    if len(none) == len(changes):
        return NONE if all(change.difference == 0 for change in none) else WITHIN
    ratios = [change.ratio for change in changes if change.ratio is not None]
    if not ratios:
        return "new"
    if max(ratios) == 0:
        return "gone"
    low, high = ratio_text(min(ratios)), ratio_text(max(ratios))
    text = low if low == high else f"{low} to {high}"
    if none:
        text += f", in {len(none)} of {len(changes)} none"
    unknown = any(change.noise is None for change in changes)
    return f"{text} (noise not known)" if unknown else text


def ratio_text(ratio: float) -> str:
    """0.572x; near 1 by how much it is off, and no exponent where it is large."""
    if ratio == 1:
        return "1x"
    if abs(ratio - 1) < 0.005:
        return f"{100 * (ratio - 1):+.2g} %"
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def error_of(name: str, measured: Costs, predicted: Costs) -> float | None:
    """Of a prediction, signed, as a share of what was measured."""
    if name not in measured or name not in predicted or not measured[name].value:
        return None
    return predicted[name].value / measured[name].value - 1
