"""docs/results/reliability.md, of whole runs: stuck, started again, pre-empted, two at once, a
long one."""

from __future__ import annotations

import itertools
import math
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from experiments.compose import configs_of
from experiments.launch import Torchrun, prepare_job, run
from experiments.process import ranks_below
from experiments.reliability import faults
from experiments.reliability.trials import (
    AT_ONCE,
    SMALL,
    STRATEGIES,
    Launch,
    few,
    losses_of,
    newest_in,
    side_by_side,
)
from experiments.step_log import read_metrics
from experiments.verdict import path_of

EVERY = 5  # steps between checkpoints
HANGS, HANG_TIMEOUT_S, HANG_BOUND_S = 10, 12, 30
RESTARTS, PREEMPTIONS, DOUBLES = 6, 10, 20
RESTART_TIMEOUT_S = 20  # a busy machine may need so long to start a rank after the other
SOAK_STEPS, SOAK_WARM = 5000, 1000
SOAK_REST = 100  # steps that are left when the ranks are looked at for the last time
STUCK = ("hang", "stop", "other-collective", "raise")


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
    end = run(faults.with_fault(job, fault, rank, step), quiet=True)
    ended = time.time()
    came = path_of(folder, rank, "fault")
    begun = float(came.read_text()) if came.exists() else math.nan
    stacks = any(
        (path := path_of(folder, rank, what)).exists() and path.stat().st_size > 0
        for what in ("stacks.txt", "traceback.txt")
    )
    return Outcome(end.status, end.reason or "", ended - begun, stacks)


Trial = tuple[Path, list[str], str, int, int]  # what with_fault takes


def with_faults(trials: list[Trial], *options: str) -> Iterator[Outcome]:
    """Each in a process that launches, as its signals need; several at once wait beside another."""
    with ProcessPoolExecutor(AT_ONCE, get_context("spawn")) as pool:
        yield from pool.map(partial(_with_fault, options), trials)


def _with_fault(options: tuple[str, ...], trial: Trial) -> Outcome:
    return with_fault(*trial, *options)


def hangs(folder: Path, share: float) -> Iterator[str]:
    """Each fault on a random rank of each strategy, at a random step."""
    times = few(HANGS, share)
    yield f"timeout_s={HANG_TIMEOUT_S}; a random rank at a random step, the strategies in turn."
    yield "Seconds from the fault until no process is left.\n"
    yield "| fault | times | ended | longest | rank named | its stacks or traceback kept |"
    yield "|---|--:|--:|--:|--:|--:|"
    trials: list[Trial] = []
    for fault in STUCK:
        dice = random.Random(fault)
        for number in range(times):
            strategy = list(STRATEGIES)[number % len(STRATEGIES)]
            rank, step = dice.randrange(STRATEGIES[strategy]), dice.randint(1, 6)
            asked = [f"strategy={strategy}", "steps=1000", f"timeout_s={HANG_TIMEOUT_S}"]
            trials.append((folder / f"{fault}{number}", asked, fault, rank, step))
    ended = with_faults(trials)
    examples, unnamed = [], []
    for fault in STUCK:
        counts, longest = Counter[str](), 0.0
        for number, outcome in enumerate(itertools.islice(ended, times)):
            rank = trials[STUCK.index(fault) * times + number][3]
            counts["none"] += math.isnan(outcome.seconds)
            longest = max(longest, outcome.seconds)  # a NaN comes second, and is never taken
            counts["ended"] += outcome.status != 0 and outcome.seconds <= HANG_BOUND_S
            # two that call different things are both named: neither is wrong by itself
            found = rf"rank {rank} (stands|is stopped|called)|^rank {rank}: "
            named = bool(re.search(found, outcome.said))
            counts["named"] += named
            counts["stacks"] += outcome.stacks
            said = outcome.said.replace(str(folder), "RUN")
            if number == 0:
                examples.append(f"- `{said}`")
            if not named:
                unnamed.append(f"- rank {rank}, {fault}: `{said}`")
        none = f" ({counts['none']} failed before it came)" if counts["none"] else ""
        ends = f"| {fault} | {times}{none} | {counts['ended']} | {longest:.1f} s |"
        yield f"{ends} {counts['named']} | {counts['stacks']} |"
    yield "\nWhat the launcher says, the first of each:\n"
    yield from examples
    if unnamed:
        yield "\nWhere the rank is not named:\n"
        yield from unnamed


def restarts(folder: Path, share: float) -> Iterator[str]:
    """--max-restarts: a rank dies or hangs, and the run is done nevertheless."""
    asked = ["steps=40", f"timeout_s={RESTART_TIMEOUT_S}", "strategy=fsdp"]
    whole = Launch(folder / "whole", [*SMALL, *asked])
    assert whole.wait() == 0, whole.said
    losses = losses_of(whole)
    asked += [f"checkpoint.every={EVERY}"]
    times, faults_ = few(RESTARTS, share), ("kill", "hang", "raise")
    trials = [
        (folder / f"{fault}{number}", asked, fault, number % 2, 23)
        for fault in faults_
        for number in range(times)
    ]
    ended = with_faults(trials, "--max-restarts=2")
    yield "| fault | times | done | from the newest checkpoint | losses equal to the bit |"
    yield "|---|--:|--:|--:|--:|"
    for fault in faults_:
        counts = Counter[str]()
        for number, outcome in enumerate(itertools.islice(ended, times)):
            place = folder / f"{fault}{number}"
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
    asked = [*SMALL, "strategy=fsdp", "steps=150"]
    whole = Launch(folder / "whole", asked)
    assert whole.wait() == 0, whole.said
    losses, times = losses_of(whole), few(PREEMPTIONS, share)

    odd = []  # what else came of it

    def preempted(place: Path, number: signal.Signals, at: int) -> Counter[str]:
        launch = Launch(place, asked)
        launch.reach(at)
        launch.process.send_signal(number)
        status, step = launch.wait(), newest_in(place)
        saved = status == 128 + number and step == launch.steps()
        if not saved:
            told = f"status {status} after {launch.steps()} steps, checkpoint of {step}"
            odd.append(f"- {number.name} after {at} steps: {told}: `{launch.said[-300:].strip()}`")
        again = Launch(place, [*asked, "resume=auto"])
        again.wait()
        went_on, equal = f"after {step} steps" in again.said, losses_of(again) == losses
        return Counter(saved=int(saved), went_on=int(went_on), equal=int(equal))

    for number in (signal.SIGTERM, signal.SIGUSR1):
        dice = random.Random(number)
        places = [folder / f"{number.name}{trial}" for trial in range(times)]
        moments = [dice.randint(1, 40) for _ in places]
        came = side_by_side(preempted, places, itertools.repeat(number), moments)
        counts = sum(came, Counter[str]())
        left = f"| {number.name} | {times} | {counts['saved']} |"
        yield f"{left} {counts['went_on']} | {counts['equal']} |"
    if odd:
        yield "\nWhere it was not so:\n"
        yield from odd


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
    steps = max(few(SOAK_STEPS, share), 2 * SOAK_REST)
    warm = min(SOAK_WARM, steps // 2)
    launch = Launch(folder / "long", [*SMALL, f"steps={steps}", "checkpoint.every=250"])
    launch.reach(warm)
    before = resident(launch)
    launch.reach(steps - SOAK_REST)
    after = resident(launch)
    status = launch.wait()
    grown, size = max((a / b - 1, a) for a, b in zip(after, before, strict=True))
    yield f"{steps:,} steps of two ranks with a checkpoint every 250 (status {status}): resident "
    yield f"memory from step {warm:,} to step {steps - SOAK_REST:,} grew by {100 * grown:.2f} %"
    yield f"on the rank that grew most ({size / 1e6:,.0f} MB)."


def resident(launch: Launch) -> list[int]:
    """Resident bytes of each rank, in the order in which they were started."""
    ranks = sorted(ranks_below(launch.process.pid), key=lambda rank: rank.pid)
    return [rank.memory_info().rss for rank in ranks]
