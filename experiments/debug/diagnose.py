"""From what was seen to what is wrong. A check compares one figure with what a sound run has.

A fault often breaks several checks; they stand in the order in which causes come before effects,
and the first that fails and has a name is the answer. Bounds stand between what sound runs and
broken runs were seen to have: docs/results/debug.md shows both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from experiments.config import TrainConfig
from experiments.debug.observe import Gradients, Seen, watch
from experiments.debug.probes import JUMP, RAMP_STEPS, Probes, ask, first_half, rise
from experiments.figures.parity import Trajectory, compare

TWICE = 0.25  # of the sequences: windows at random places may be the same one by chance
GRADIENT = 1e-3  # relative: a hundred times what a change of order makes in fp32
GROWTH = 1.8  # of the largest gradient, from one block's output to the one before it
HEADS = 1e-3  # relative, in fp32
LEAK = 1e-4  # relative
START = 1e-6  # of a weight, against 0.02 of their spread
SAME = 1e-9  # relative


class Patient(Protocol):
    """A program that may be broken: all that a diagnosis gets."""

    config: TrainConfig

    def on_ranks(self, function: Callable, *args: Any) -> Any: ...

    def alone(self, function: Callable, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Finding:
    """One check. `value` above `bound`, or not a number, fails."""

    check: str
    value: float
    bound: float
    says: str  # what was measured, in words
    names: str | None  # the fault that it means, where it fails; None: a symptom of several

    @property
    def holds(self) -> bool:
        return self.value <= self.bound  # which NaN is not


@dataclass(frozen=True)
class Diagnosis:
    found: str | None
    evidence: list[Finding]
    seen: Seen

    def said(self, fault: str) -> dict[str, Any]:
        """For --json; what is not finite is null, for JSON has no such number."""
        evidence = [{**asdict(f), "holds": f.holds} for f in self.evidence]
        for one in evidence:
            one["value"] = one["value"] if math.isfinite(one["value"]) else None
        return {"fault": fault, "found": self.found, "evidence": evidence}


def diagnose(program: Patient) -> Diagnosis:
    """Run it, ask it, and name what is wrong; None where all that has a name holds."""
    return conclude(program, program.on_ranks(watch, program.config))


def conclude(program: Patient, seen: Seen) -> Diagnosis:
    """The same of a run that was watched already."""
    probes = program.alone(ask, program.config, seen)
    evidence = list(findings(seen, probes))
    # a figure that is NaN fails, but shows no more than that something overflowed
    named = [f for f in evidence if f.names and not f.holds and not math.isnan(f.value)]
    found = named[0].names if named else None
    return Diagnosis(found, evidence, seen)


def findings(seen: Seen, probes: Probes) -> Iterator[Finding]:
    """Every check, causes before effects."""
    yield from of_ranks(seen, probes)
    yield from of_the_model(seen, probes)
    yield from of_the_run(seen, probes)


def of_ranks(seen: Seen, probes: Probes) -> Iterator[Finding]:
    """Do the ranks read and hold what they should?"""
    read = [row for rows in seen.rows for row in set(rows)]
    twice = 1 - len(set(read)) / len(read)
    yield Finding(
        "sequences read by two shares of the batch",
        twice,
        TWICE,
        f"{twice:.0%} of {len(read)}",
        "data-overlap",
    )
    foreign = sum(row not in probes.rows for row in read) / len(read)
    yield Finding(
        "sequences that the seed does not give",
        foreign,
        0.0,
        f"{foreign:.0%} of {len(read)}",
        "rank-with-another-seed",
    )
    yield Finding(
        "copies of weights over ranks, before step 1",
        seen.drift[0],
        0.0,
        f"{seen.drift[0]:.2g} apart",
        "rank-with-another-seed",
    )
    yield Finding(
        "first weights against those of one process",
        probes.start,
        START,
        f"{probes.start:.2g} apart",
        "rank-with-another-seed",
    )


def of_the_model(seen: Seen, probes: Probes) -> Iterator[Finding]:
    """Does it compute what it should?"""
    first, again = seen.held_out
    apart = abs(first - again) / abs(first)
    yield Finding(
        "held-out loss, twice on the same weights",
        apart,
        SAME,
        f"{first:.6f} and {again:.6f}",
        "validation-in-train-mode",
    )
    yield Finding(
        "attention to equal tokens, error of their value",
        probes.head_error,
        HEADS,
        f"{probes.head_error:.1e}",
        "heads-merged-wrongly",
    )
    yield Finding(
        "earlier logits, where the last token is changed",
        probes.earlier_change,
        LEAK,
        f"change by {probes.earlier_change:.1e}",
        "missing-causal-mask",
    )
    if seen.tie is not None:
        yield Finding(
            "tied head and embedding after the run",
            seen.tie,
            0.0,
            f"{seen.tie:.2g} apart",
            "tied-head-lost",
        )
    before, after = probes.overfit
    yield Finding(
        "one batch learned by heart",
        after / before,
        1.0,
        f"loss {before:.2f} to {after:.2f}",
        None,
    )


def of_the_run(seen: Seen, probes: Probes) -> Iterator[Finding]:
    """How gradients and losses behave."""
    growth = growth_by_block(seen.flows[0])
    yield Finding(
        "growth of activations' gradients, step 1",
        growth,
        GROWTH,
        f"x {growth:.2f} a block, to {seen.flows[0][0]:.2g}",
        "exploding-gradients",
    )
    even, uneven = (gradient_error(seen.gradients[k], probes.gradients[k]) for k in (False, True))
    yield Finding(
        "gradient against one process, even token counts", even, GRADIENT, f"{even:.1e} apart", None
    )
    yield Finding(
        "gradient against one process, uneven token counts",
        uneven,
        GRADIENT,
        f"{uneven:.1e} apart",
        "mean-of-means" if even <= GRADIENT else None,
    )
    yield from of_finiteness(seen, probes)
    jump = rise(first_half(seen.losses))
    first_rate = seen.rates[0] / max(seen.rates)
    ramped = probes.rise_with_ramp
    cured = ramped is not None and ramped < jump / 2
    yield Finding(
        "the loss's rise above the first",
        jump,
        JUMP,
        f"{jump:.2f} nats; step 1 has {first_rate:.0%} of the highest learning rate"
        + ("" if ramped is None else f"; with {RAMP_STEPS} steps up to it {ramped:.2f} nats"),
        "no-warm-up" if cured and first_rate > 0.5 else None,
    )
    yield Finding(
        "copies of weights over ranks, after the run",
        seen.drift[1],
        0.0,
        f"{seen.drift[1]:.2g} apart",
        None,
    )


def of_finiteness(seen: Seen, probes: Probes) -> Iterator[Finding]:
    """Did a step's gradient overflow, and would it have in fp32?"""
    if seen.failed_step is None:
        largest = max(seen.ranges[-1].values())
        says = f"finite in {seen.dtype}; activations up to {largest:.3g}"
        yield Finding("gradients of all steps", 0.0, 0.0, says, None)
        return
    assert probes.fp32_norm is not None
    narrow = seen.dtype == "float16" and math.isfinite(probes.fp32_norm)
    went_on = "the update was made" if seen.updated else "the run stopped"
    yield Finding(
        "gradients of all steps",
        math.inf,
        0.0,
        f"not finite in step {seen.failed_step + 1} in {seen.dtype}, with norm "
        f"{probes.fp32_norm:.2g} in float32; {went_on}",
        f"nan-after-{seen.failed_step}" if narrow else None,
    )


def growth_by_block(flows: dict[int, float]) -> float:
    """By how much gradients grow from a block's output to the one before it, on average."""
    last, first = flows[max(flows)], flows[min(flows)]
    if not math.isfinite(first):
        return math.inf
    if max(flows) == min(flows):
        return 1.0
    return (first / max(last, 1e-30)) ** (1 / (len(flows) - 1))


def gradient_error(ours: Gradients, wanted: Gradients) -> float:
    """The largest relative difference of a parameter's gradient; parity's own measure."""
    if not ours:
        return math.inf
    return compare(Trajectory([0.0], [], ours), Trajectory([0.0], [], wanted)).gradient
