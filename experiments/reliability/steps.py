"""docs/results/reliability.md, of saves and steps: no room on the disk, NaN, saves beside steps."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from experiments.checkpoints import FOLDER, newest_whole
from experiments.figures.matrix import plan_named
from experiments.figures.parity import make_config, mesh_of
from experiments.ranks import run_ranks
from experiments.reliability import faults
from experiments.reliability.resuming import train_on
from experiments.reliability.trials import (
    NOTHING_ELSE,
    SMALL,
    Launch,
    few,
    losses_of,
    side_by_side,
    wait_for,
)
from parallel.layout import Layout

DISKS = 5  # of each kind
DISK_BYTES = (2_300_000, 4_000_000)  # room for one checkpoint of 1.5 MB and less than three
ROOMY_BYTES = 10**9
# of 10 million parameters, 120 MB with the optimizer
WIDE = {"model.n_layer": 8, "model.d_model": 320, "steps": 99}
SAVES = 10


# --- no room on the disk


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A file system in memory at `place`, of `size` bytes. Needs the right to mount."""
    place.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def disk(folder: Path, share: float) -> Iterator[str]:
    """Whole runs whose checkpoints go to a disk that fills up, or turns read-only."""
    yield "Whole runs of two ranks whose checkpoints go to a file system of random size, or one"
    yield "that is made read-only at a random step. Then there is room again, and resume=auto.\n"
    yield "| disk | times | run ended with status 1 | newest published one whole | went on |"
    yield "|---|--:|--:|--:|--:|"
    examples = []
    for kind in ("full", "read-only"):
        times, dice = few(DISKS, share), random.Random(kind)
        places = [folder / f"{kind}{number}" for number in range(times)]
        full = kind == "full"
        sizes = [dice.randint(*DISK_BYTES) if full else ROOMY_BYTES for _ in places]
        steps = [None if full else dice.randint(6, 40) for _ in places]
        try:
            came = list(side_by_side(_without_room, places, sizes, steps))
        except subprocess.CalledProcessError as error:
            yield f"\nNot run: this user may not mount ({error.stderr.decode().strip()})."
            return
        counts = sum((count for count, _ in came), Counter[str]())
        examples.append(came[0][1].replace(str(folder), "RUNS"))
        ended = f"| {kind} | {times} | {counts['ended']} | {counts['whole']} |"
        yield f"{ended} {counts['went_on']} |"
    yield ""
    yield from (f"- `{said}`" for said in examples)


def _without_room(place: Path, size: int, read_only_at: int | None) -> tuple[Counter[str], str]:
    """A run whose disk gives out, and the one that goes on: what held, and what the first said."""
    asked = [*SMALL, "strategy=ddp", "steps=60", "checkpoint.every=5"]
    with small_disk(place / FOLDER, size):
        launch = Launch(place, asked)
        if read_only_at is not None:
            _turn_read_only(launch, read_only_at)
        ended = launch.wait() == 1
        said = launch.said.strip().splitlines()[-1]  # before the next overwrites it
        found, skipped = newest_whole(place)
        _mount("-o", f"remount,rw,size={ROOMY_BYTES}", str(place / FOLDER))
        again = Launch(place, [*asked, "resume=auto"])
        went_on = again.wait() == 0 and len(losses_of(again)) == 60
        went_on = went_on and "going on from" in again.said
    whole = found is not None and not skipped
    return Counter(ended=int(ended), whole=int(whole), went_on=int(went_on)), said


def _turn_read_only(launch: Launch, step: int) -> None:
    """Between two saves: the kernel refuses while a file is open for writing."""

    def turned() -> bool:
        try:
            _mount("-o", "remount,ro", str(launch.folder / FOLDER))
        except subprocess.CalledProcessError:
            return False
        return True

    launch.reach(step)
    wait_for(turned, launch, poll_s=0.002)


# --- numbers that are not finite


def nonfinite(_folder: Path, _share: float) -> Iterator[str]:
    """NaN and infinity in the loss, in a gradient, in a shard of one, on one rank of two."""
    cases = list(itertools.product(("ddp2", "fsdp2"), faults.PLACES, (math.nan, math.inf)))
    seen = run_ranks(2, meet_nonfinite, cases)
    yield "On one rank of two. nonfinite=skip for the first, and more in a row than it lets pass.\n"
    yield "| strategy | where | what | both ranks skip | both ranks stop | weights as before |"
    yield "|---|---|---|---|---|---|"
    good = 0
    for (name, where, value), *ranks in zip(cases, *seen, strict=True):
        alike = [all(rank[key] for rank in ranks) for key in ("skipped", "stopped", "unchanged")]
        good += all(alike)
        said = " | ".join("yes" if yes else "**NO**" for yes in alike)
        yield f"| {name} | {where} | {value} | {said} |"
    yield f"\n{good} of {len(cases)}."


def meet_nonfinite(cases: list[tuple[str, str, float]]) -> list[dict[str, bool]]:
    """On ranks: what this one decides, and whether its weights are left alone."""
    from experiments.assemble import make_trainer
    from parallel.gradients import local
    from parallel.step import NonFinite

    found = []
    for name, where, value in cases:
        config = plan_named(name).config({"steps": 9})
        trainer = make_trainer(config, mesh_of(config.layout))
        trainer.may_skip = 1
        train_on(config, trainer, 0, 2)
        before = [local(p.detach()).clone() for p in trainer.parameters]
        counted, decided = 0, {"skipped": False, "stopped": False}
        for step, key in ((2, "skipped"), (3, "stopped")):
            if trainer.replica.mesh.rank == 1:
                faults.poison(trainer, where, value)
            try:
                train_on(config, trainer, step, step + 1)
                counted = trainer.skipped_in_a_row
                decided[key] = key == "skipped" and counted == 1
            except NonFinite:
                decided[key] = key == "stopped"
        same = all(
            local(p.detach()).equal(b) for p, b in zip(trainer.parameters, before, strict=True)
        )
        found.append({**decided, "unchanged": same})
    return found


# --- saves beside steps


def beside(folder: Path, share: float) -> Iterator[str]:
    """How long a save holds up the step that it follows, at once and in the background."""
    times = few(SAVES, share)
    config = make_config(Layout(dp_replicate=2), WIDE)
    seen = run_ranks(2, hold_up, config, folder, times)
    yield f"{config.model.parameters:,} parameters on two ranks of ddp, the median of {times} saves"
    yield "of the slower rank, in turn. A save in the background is over before the next begins.\n"
    yield "| save | holds the step up |"
    yield "|---|--:|"
    medians = {}
    for kind in seen[0]:
        slower = [max(pair) for pair in zip(*(rank[kind] for rank in seen), strict=True)]
        medians[kind] = statistics.median(slower)
        yield f"| {kind} | {1e3 * medians[kind]:.1f} ms |"
    share_of_it = medians["background"] / medians["at once"]
    yield f"\nIn the background: {share_of_it:.1%} of a save at once."


def hold_up(config: Any, folder: Path, times: int) -> dict[str, list[float]]:
    """On ranks: seconds of each call that saves."""
    import torch
    import torch.distributed as dist

    from experiments.assemble import make_trainer
    from experiments.checkpoints import folder_of, part_of, publish
    from parallel.checkpoint import Writer, state_of

    torch.set_num_threads(1)
    mesh = mesh_of(config.layout)
    trainer = make_trainer(config, mesh)
    train_on(config, trainer, 0, 1)
    writers = {"at once": Writer(mesh, False), "background": Writer(mesh, True)}
    seconds: dict[str, list[float]] = {kind: [] for kind in writers}
    for number in range(1, times + 1):
        for place, (kind, writer) in enumerate(writers.items()):
            step = 2 * number + place
            target = folder_of(folder / "run", step)
            dist.barrier()
            start = time.perf_counter()
            publishing = partial(publish, target, {**NOTHING_ELSE, "step": step}, keep=2)
            writer.write(state_of(trainer), part_of(target), publishing)
            seconds[kind].append(time.perf_counter() - start)
            writer.wait()
    return seconds
