"""docs/reliability.md, of whole runs: stuck, started again, pre-empted, two at once, a long one."""

from __future__ import annotations

import math
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments import faults
from experiments.compose import configs_of
from experiments.launch import Torchrun, prepare_job, run
from experiments.process import ranks_below
from experiments.step_log import read_metrics
from experiments.trials import SMALL, STRATEGIES, Launch, few, losses_of, newest_in
from experiments.verdict import failure, path_of

EVERY = 5  # steps between checkpoints
HANGS, HANG_TIMEOUT_S, HANG_BOUND_S = 10, 12, 30
RESTARTS, PREEMPTIONS, DOUBLES = 6, 10, 20
SOAK_STEPS, SOAK_WARM = 5000, 1000


# --- a rank that fails by itself


@dataclass(frozen=True)
class Outcome:
    """How a run with a fault in it ended."""

    status: int
    said: str  # why, in the launcher's one line
    seconds: float  # from the fault on; NaN where the run failed before it
    stacks: bool  # those of the rank with the fault were written down


def with_fault(
    folder: Path, overrides: list[str], fault: str, rank: int, step: int, *options: str
) -> Outcome:
    """Launch here, with a fault on one rank."""
    (config,) = configs_of("train", [*SMALL, *overrides, f"run.dir={folder}"])
    job = prepare_job(config, overrides, Torchrun(list(options)), folder)
    status = run(faults.with_fault(job, fault, rank, step), quiet=True)
    ended = time.time()
    came = path_of(folder, rank, "fault")
    begun = float(came.read_text()) if came.exists() else math.nan
    said = failure(folder) if status else ""
    stacks = any(
        (path := path_of(folder, rank, what)).exists() and path.stat().st_size > 0
        for what in ("stacks.txt", "traceback.txt")
    )
    return Outcome(status, said, ended - begun, stacks)


def hangs(folder: Path, share: float) -> Iterator[str]:
    """Each fault on a random rank of each strategy, at a random step."""
    times = few(HANGS, share)
    yield f"timeout_s={HANG_TIMEOUT_S}; a random rank at a random step, the strategies in turn."
    yield "Seconds from the fault until no process is left.\n"
    yield "| fault | times | ended | longest | rank named | its stacks or traceback kept |"
    yield "|---|--:|--:|--:|--:|--:|"
    examples = []
    for fault in ("hang", "stop", "other-collective", "raise"):
        dice, counts, longest = random.Random(fault), Counter[str](), 0.0
        for number in range(times):
            strategy = list(STRATEGIES)[number % len(STRATEGIES)]
            rank, step = dice.randrange(STRATEGIES[strategy]), dice.randint(1, 6)
            asked = [f"strategy={strategy}", "steps=1000", f"timeout_s={HANG_TIMEOUT_S}"]
            outcome = with_fault(folder / f"{fault}{number}", asked, fault, rank, step)
            counts["none"] += math.isnan(outcome.seconds)
            longest = max(longest, outcome.seconds)  # a NaN comes second, and is never taken
            counts["ended"] += outcome.status != 0 and outcome.seconds <= HANG_BOUND_S
            # two that call different things are both named: neither is wrong by itself
            found = rf"rank {rank} (stands|is stopped|called)|^rank {rank}: "
            counts["named"] += bool(re.search(found, outcome.said))
            counts["stacks"] += outcome.stacks
            if number == 0:
                examples.append(outcome.said.replace(str(folder), "RUN"))
        none = f" ({counts['none']} failed before it came)" if counts["none"] else ""
        ended = f"| {fault} | {times}{none} | {counts['ended']} | {longest:.1f} s |"
        yield f"{ended} {counts['named']} | {counts['stacks']} |"
    yield "\nWhat the launcher says, the first of each:\n"
    yield from (f"- `{said}`" for said in examples)


def restarts(folder: Path, share: float) -> Iterator[str]:
    """--max-restarts: a rank dies or hangs, and the run is done nevertheless."""
    asked = ["steps=40", f"checkpoint.every={EVERY}", f"timeout_s={HANG_TIMEOUT_S}"]
    whole = Launch(folder / "whole", [*SMALL, *asked, "strategy=fsdp"])
    assert whole.wait() == 0, whole.said
    losses = losses_of(whole)
    yield "| fault | times | done | from the newest checkpoint | losses equal to the bit |"
    yield "|---|--:|--:|--:|--:|"
    for fault in ("kill", "hang", "raise"):
        counts, times = Counter[str](), few(RESTARTS, share)
        for number in range(times):
            place = folder / f"{fault}{number}"
            outcome = with_fault(
                place, [*asked, "strategy=fsdp"], fault, number % 2, 23, "--max-restarts=2"
            )
            counts["done"] += outcome.status == 0
            log = (place / "logs" / "torchrun.log").read_text()
            counts["newest"] += "step-000020, after 20 steps" in log
            lines = read_metrics(place / "metrics.jsonl")
            counts["equal"] += [line["loss"] for line in lines] == losses
        begun = f"| {fault} in step 23 | {times} | {counts['done']} |"
        yield f"{begun} {counts['newest']} | {counts['equal']} |"


def preemption(folder: Path, share: float) -> Iterator[str]:
    """SIGTERM and USR1 to the launcher at random moments: all ranks save the same step."""
    yield "| signal | times | saved, exit 128 + its number | went on | losses equal to the bit |"
    yield "|---|--:|--:|--:|--:|"
    asked = [*SMALL, "strategy=fsdp", "steps=200"]
    whole = Launch(folder / "whole", asked)
    assert whole.wait() == 0, whole.said
    for number in (signal.SIGTERM, signal.SIGUSR1):
        counts, times, dice = Counter[str](), few(PREEMPTIONS, share), random.Random(number)
        for trial in range(times):
            place = folder / f"{number.name}{trial}"
            launch, at = Launch(place, asked), dice.randint(1, 120)
            launch.reach(at)
            launch.process.send_signal(number)
            status, step = launch.wait(), newest_in(place)
            counts["saved"] += status == 128 + number and step == launch.steps()
            again = Launch(place, [*asked, "resume=auto"])
            again.wait()
            counts["went on"] += f"after {step} steps" in again.said
            counts["equal"] += losses_of(again) == losses_of(whole)
        left = f"| {number.name} | {times} | {counts['saved']} |"
        yield f"{left} {counts['went on']} | {counts['equal']} |"


# --- two at once, and a long one


def doubles(folder: Path, share: float) -> Iterator[str]:
    """Two launches at the same moment, which must not meet at one port."""
    times, good = few(DOUBLES, share), 0
    for number in range(times):
        pair = [
            Launch(folder / f"{number}-{which}", [*SMALL, "steps=3", f"seed={which}"])
            for which in (0, 1)
        ]
        ended = [launch.wait() for launch in pair]
        good += ended == [0, 0] and losses_of(pair[0]) != losses_of(pair[1])
    yield f"{times} times two launches at once: both trained, each on its own, {good} times;"
    yield f"{times - good} clashes."


def soak(folder: Path, share: float) -> Iterator[str]:
    """Resident memory of the ranks over a long run."""
    steps = few(SOAK_STEPS, share)
    warm = min(SOAK_WARM, steps // 2)
    launch = Launch(folder / "long", [*SMALL, f"steps={steps}", "checkpoint.every=250"])
    launch.reach(warm)
    before = resident(launch)
    launch.reach(steps - 50)
    after = resident(launch)
    status = launch.wait()
    grown, size = max((a / b - 1, a) for a, b in zip(after, before, strict=True))
    yield f"{steps:,} steps of two ranks with a checkpoint every 250 (status {status}): resident "
    yield f"memory from step {warm:,} to step {steps - 50:,} grew by {100 * grown:.2f} % on the "
    yield f"rank that grew most ({size / 1e6:,.0f} MB)."


def resident(launch: Launch) -> list[int]:
    """Resident bytes of each rank, in the order in which they were started."""
    ranks = sorted(ranks_below(launch.process.pid), key=lambda rank: rank.pid)
    return [rank.memory_info().rss for rank in ranks]
