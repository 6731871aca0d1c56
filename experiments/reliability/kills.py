"""docs/results/reliability.md, of runs that are killed again and again, and go on."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from experiments.checkpoints import folder_of, newest_whole, part_of, parts_in, publish
from experiments.reliability.trials import (
    NOTHING_ELSE,
    SMALL,
    STRATEGIES,
    VICTIMS,
    Launch,
    few,
    losses_of,
    newest_in,
    side_by_side,
    wait_for,
)
from parallel.layout import Layout

EVERY = 5  # steps between checkpoints
LENGTH = 120  # steps of a run
KILLS, INSIDE = 100, 40  # in all, and those of them that are inside of a save
SAVES = 40  # kills of a process that does nothing but save


@dataclass
class Kills:
    """What came of the kills of one strategy."""

    counts: Counter[str] = field(default_factory=Counter)
    worst_loss: int = 0  # steps done again after a resume

    def row(self, strategy: str, equal: int, runs: int) -> str:
        c = self.counts
        return (
            f"| {strategy} | {STRATEGIES[strategy]} | {c['kills']} | {c['inside']} | "
            f"{c['resumed']} | {c['afresh']} | {self.worst_loss} | {c['survivors']} | "
            f"{equal} of {runs} |"
        )


def kills(folder: Path, share: float) -> Iterator[str]:
    """Runs that are killed again and again, and go on with resume=auto until they are done."""
    yield f"SIGKILL of a random rank, of torchrun, of the launcher, or of all, in turn; {LENGTH}"
    yield f"steps, a checkpoint every {EVERY}. Each time the same command with resume=auto follows."
    yield "Inside: a checkpoint was left half-written. Again: most steps that were done twice.\n"
    columns = "kills | inside | from the newest | from the start | again | alive after 10 s"
    yield f"| strategy | ranks | {columns} | losses equal to the bit |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    total: Counter[str] = Counter()
    parts = [list(shares(few(count, share), len(STRATEGIES))) for count in (KILLS, INSIDE)]
    folders = [folder / strategy for strategy in STRATEGIES]
    came = side_by_side(_kill, folders, STRATEGIES, *parts)
    for strategy, (kept, equal, runs) in zip(STRATEGIES, came, strict=True):
        total += kept.counts
        yield kept.row(strategy, equal, runs)
    yield f"\nTogether: {total['kills']} kills, {total['inside']} inside of a save,"
    yield f"{total['resumed']} resumed from the newest checkpoint,"
    yield f"{total['afresh']} from the start: killed before the first one, but for"
    yield f"{total['forgot']}; {total['silent']} of them without a word."
    yield f"{total['survivors']} processes left."


def _kill(folder: Path, strategy: str, wanted: int, inside: int) -> tuple[Kills, int, int]:
    """Runs of one strategy until so many kills, and so many of them inside of a save: what came of
    them, runs that were equal, runs."""
    asked = [*SMALL, f"strategy={strategy}", f"steps={LENGTH}"]
    whole = Launch(folder / "whole", asked)
    assert whole.wait() == 0, whole.said
    losses = losses_of(whole)
    kept, equal, runs, dice = Kills(), 0, 0, random.Random(strategy)
    asked += [f"checkpoint.every={EVERY}"]

    def enough() -> bool:
        return kept.counts["kills"] >= wanted and kept.counts["inside"] >= inside

    while not enough():
        runs += 1
        place = folder / f"run{runs}"
        newest, reached = None, 0
        while True:
            launch = Launch(place, [*asked, "resume=auto"])
            over = enough() or not _killed(
                launch, kept.counts, dice, kept.counts["inside"] < inside
            )
            if over:
                status = launch.wait()
            _count(kept, launch, newest, reached)
            if over:
                assert status == 0, launch.said
                break
            newest, reached = newest_in(place), launch.steps()
        equal += losses_of(launch) == losses
    return kept, equal, runs


def _killed(launch: Launch, counts: Counter[str], dice: random.Random, inside: bool) -> bool:
    """Kill a launch at a random moment; False where it ended before that."""
    at = launch.steps() + dice.randint(1, 30)

    def saving() -> bool:
        return bool(parts_in(launch.folder))

    # a part that an earlier kill left is gone when the first new step is there
    if not launch.reach(at):
        return False
    victims = launch.victims(VICTIMS[counts["kills"] % len(VICTIMS)], dice.randrange(8))
    if inside:
        if not wait_for(saving, launch, poll_s=0.0005):
            return False
        time.sleep(dice.uniform(0, 0.01))
    launch.kill_these(victims)
    counts["kills"] += 1
    counts["survivors"] += launch.survivors(10.0)
    launch.wait()
    counts["inside"] += saving()
    return True


def _count(kept: Kills, launch: Launch, newest: int | None, reached: int) -> None:
    """How a launch began: from the newest checkpoint that was there, or not."""
    if not launch.said or (newest is None and reached == 0):
        return
    went_on = re.search(r"going on from .*, after (\d+) steps", launch.said)
    if went_on is None:
        kept.counts["afresh"] += 1
        kept.counts["forgot"] += newest is not None
        kept.counts["silent"] += "starting from step 0" not in launch.said
        return
    kept.counts["resumed"] += int(went_on[1]) == newest
    kept.worst_loss = max(kept.worst_loss, reached - int(went_on[1]))


def shares(count: int, parts: int) -> Iterator[int]:
    """A number as a sum of so many that are as equal as can be."""
    for part in range(parts):
        yield count * (part + 1) // parts - count * part // parts


# --- a process that does nothing but save


def saves(folder: Path, share: float) -> Iterator[str]:
    """A process that saves over and over, two kept, is killed at a random moment.

    `Lost`: a checkpoint whose name was there before the kill is not there, or not whole.
    """
    dice, counts, inside, times = random.Random(0), Counter[str](), 0, few(SAVES, share)
    for number in range(times):
        run = folder / f"killed{number}"
        reading, writing = os.pipe()
        saver = os.fork()
        if saver == 0:
            _save_until_killed(run, writing)
        os.close(writing)
        os.read(reading, 1)  # the first is published
        time.sleep(dice.uniform(0.0, 0.3))
        os.kill(saver, signal.SIGKILL)
        os.waitpid(saver, 0)
        published = 1 + len(os.read(reading, 2**16))
        os.close(reading)
        inside += bool(parts_in(run))
        found, skipped = newest_whole(run)
        counts["loaded"] += found is not None and not skipped
        counts["lost"] += found is None or found.step < published
        shutil.rmtree(run)
    yield f"{times} SIGKILLs of a process that saves all the time, each at a random moment;"
    yield f"{inside} of them left a folder half-written.\n"
    yield "| newest one whole | a published one lost or damaged |"
    yield "|--:|--:|"
    yield f"| {counts['loaded']} of {times} | {counts['lost']} |"


def _save_until_killed(run: Path, writing: int) -> None:
    import torch

    from parallel.checkpoint import Writer
    from parallel.mesh import Mesh

    writer = Writer(Mesh(Layout(), torch.device("cpu"), None, None), asynchronous=False)
    state = {f"model/{i}": torch.randn(2**16) for i in range(16)}
    for step in itertools.count(1):
        folder = folder_of(run, step)

        def seal(folder: Path = folder, step: int = step) -> None:
            publish(folder, {**NOTHING_ELSE, "step": step}, keep=2)

        writer.write(state, part_of(folder), seal)
        os.write(writing, b".")
