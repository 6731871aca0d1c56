"""docs/reliability.md: what was done to checkpoints and runs, and what came of it.

./launch.sh python -m experiments.reliability > docs/reliability.md
./launch.sh python -m experiments.reliability damage kills       only those, to the screen
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments import environment
from experiments.checkpoints import Damaged, check, folder_of, newest_whole, part_of, publish
from experiments.config import TrainConfig
from experiments.matrix import PLANS
from experiments.parity import LOSS_BOUND, make_config
from experiments.ranks import run_ranks
from experiments.resuming import load_and_go_on, same_state, stop_and_go_on, train_on
from parallel.layout import Layout

COMMAND = "./launch.sh python -m experiments.reliability > docs/reliability.md"
FAULTS = {"bit flipped": 100, "truncated": 100, "4 KiB zeroed": 50, "file missing": 20}
BLOCK = 4096
KILLS = 40
SAVED, MORE = 5, 10  # steps before the checkpoint, and after it
SOURCES = {"ddp2": 2, "pp2 zbv_zero_bubble": 2, "fsdp4": 4, "fsdp2 x tp2": 4}
TARGETS = {"zero1 2": 2, "tp2 sequence": 2, "hsdp 2 x 2": 4, "pp2 x fsdp2": 4}
REPEATS = 10
CHANGES = {"model.tied": True, "clip": 0.5}


def config_of(name: str, steps: int) -> TrainConfig:
    plan = next(plan for plan in PLANS if plan.name == name)
    return plan.config({**CHANGES, "steps": steps})


@contextmanager
def faulty(whole: Path, fault: str, seed: int, place: Path) -> Iterator[tuple[Path, str]]:
    """A copy of a checkpoint at `place` with one file damaged: the folder, and the file's name."""
    dice = random.Random(f"{fault} {seed}")
    shutil.copytree(whole, place)
    # a block of zeros is no damage to a file that has zeros there, and all have some other byte
    path = dice.choice(sorted(place.iterdir()))
    content = bytearray(path.read_bytes())
    where = dice.randrange(len(content))
    if fault == "bit flipped":
        content[where] ^= 1 << dice.randrange(8)
    elif fault == "truncated":
        del content[where:]
    elif fault == "4 KiB zeroed":
        start = where // BLOCK * BLOCK
        content[start : start + BLOCK] = bytes(len(content[start : start + BLOCK]))
    if fault == "file missing":
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield place, re.escape(path.name)
    finally:
        shutil.rmtree(place)


def damage(folder: Path) -> Iterator[str]:
    """Each fault in a random file of a real checkpoint, at a random place."""
    config = make_config(Layout(), {"steps": 2})
    whole = folder_of(folder / "run", 1)
    _save_one(config, whole)
    size = sum(path.stat().st_size for path in whole.iterdir())
    yield f"A checkpoint of {config.model.parameters:,} parameters, {size / 1e6:.1f} MB in "
    yield f"{len(list(whole.iterdir()))} files. Each time a random file, at a random place.\n"
    yield "| fault | times | noticed before anything is loaded | file named |"
    yield "|---|--:|--:|--:|"
    for fault, times in FAULTS.items():
        said: Counter[str] = Counter()
        for seed in range(times):
            with faulty(whole, fault, seed, folder / "copy") as (copy, name):
                unchanged = all(
                    (copy / p.name).exists() and (copy / p.name).read_bytes() == p.read_bytes()
                    for p in whole.iterdir()
                )
                try:
                    check(copy)
                    said["unchanged"] += unchanged
                except Damaged as error:
                    said["noticed"] += 1
                    said["named"] += bool(re.search(rf"{name}", str(error)))
        note = f" ({said['unchanged']} changed no byte)" if said["unchanged"] else ""
        yield f"| {fault} | {times} | {said['noticed']}{note} | {said['named']} |"


def _save_one(config: TrainConfig, folder: Path) -> None:
    """A published checkpoint of a single process after one step."""
    from experiments.assemble import make_trainer
    from experiments.parity import mesh_of
    from parallel.checkpoint import Writer, state_of

    trainer = make_trainer(config, mesh_of(config.layout))
    train_on(config, trainer, 0, 1)
    facts = {"step": 1}
    writer = Writer(trainer.replica.mesh, asynchronous=False)
    writer.write(state_of(trainer), part_of(folder), lambda: publish(folder, facts, keep=2))


def kills(folder: Path) -> Iterator[str]:
    """A process that saves over and over, two kept, is killed at a random moment."""
    dice, counts, inside = random.Random(0), Counter[str](), 0
    for number in range(KILLS):
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
        inside += any(p.name.endswith(".part") for p in (run / "checkpoints").iterdir())
        found, skipped = newest_whole(run)
        counts["loaded"] += found is not None and not skipped
        counts["lost"] += found is None or found.step < published
        shutil.rmtree(run)
    yield f"{KILLS} SIGKILLs of a process that saves all the time, each at a random moment; "
    yield f"{inside} of them left a folder half-written.\n"
    yield "| newest one whole | a published one lost or damaged |"
    yield "|--:|--:|"
    yield f"| {counts['loaded']} of {KILLS} | {counts['lost']} |"


def _save_until_killed(run: Path, writing: int) -> None:
    import torch

    from parallel.checkpoint import Writer
    from parallel.mesh import Mesh

    writer = Writer(Mesh(Layout(), torch.device("cpu"), None, None), asynchronous=False)
    state = {f"model/{i}": torch.randn(2**16) for i in range(16)}
    for step in itertools.count(1):
        folder = folder_of(run, step)

        def seal(folder: Path = folder, step: int = step) -> None:
            publish(folder, {"step": step}, keep=2)

        writer.write(state, part_of(folder), seal)
        os.write(writing, b".")


def reshard(folder: Path) -> Iterator[str]:
    """Every target goes on from every source."""
    steps = SAVED + MORE
    undisturbed: dict[str, list[float]] = {}
    written: dict[str, Path] = {}
    for ranks in (2, 4):
        names = [name for name, size in SOURCES.items() if size == ranks]
        place = folder / f"from{ranks}"
        done = run_ranks(ranks, stop_and_go_on, [config_of(n, steps) for n in names], place, SAVED)
        for number, name in enumerate(names):
            undisturbed[name], resumed = done[0][number]
            assert undisturbed[name] == resumed, name
            written[name] = place / str(number)
    yield f"Saved after {SAVED} steps; the next {MORE} losses against those of the run that went "
    yield f"on. The bound is {LOSS_BOUND:g} nats. A tied head, clipping.\n"
    yield "| from | to | weights and optimizer equal to the bit | largest difference of a loss |"
    yield "|---|---|---|--:|"
    for ranks in (2, 4):
        pairs = [(s, t) for s in SOURCES for t, size in TARGETS.items() if size == ranks]
        copies = [folder / f"copy{ranks}-{number}" for number in range(len(pairs))]
        targets = [config_of(target, steps) for _, target in pairs]
        sources = [written[source] for source, _ in pairs]
        losses = run_ranks(ranks, load_and_go_on, targets, sources, copies, SAVED)[0]
        for (source, target), copy, after in zip(pairs, copies, losses, strict=True):
            equal = "yes" if same_state(written[source], copy) else "**NO**"
            apart = max(abs(a - b) for a, b in zip(after, undisturbed[source], strict=True))
            mark = "" if apart <= LOSS_BOUND else " **NO**"
            yield f"| {source} | {target} | {equal} | {apart:.1e}{mark} |"


def same(folder: Path) -> Iterator[str]:
    """One configuration, several times, each in processes of its own."""
    config = config_of("fsdp2", SAVED)
    runs = [run_ranks(2, stop_and_go_on, [config], folder / str(i), 2)[0] for i in range(REPEATS)]
    equal = sum(run == runs[0] for run in runs)
    whole = sum(
        same_state(folder / "0" / "0-whole", folder / str(i) / "0-whole") for i in range(REPEATS)
    )
    yield f"fsdp2, {SAVED} steps, {REPEATS} launches: losses equal to the bit in {equal} of "
    yield f"{REPEATS}, weights and optimizer at the end in {whole} of {REPEATS}."


SECTIONS: dict[str, tuple[str, Callable[[Path], Iterator[str]]]] = {
    "damage": ("Damaged checkpoints", damage),
    "kills": ("Killed while it saves", kills),
    "reshard": ("Written by one layout, read by another", reshard),
    "same": ("The same configuration again", same),
}


def main(names: list[str]) -> None:
    """Print the document, or the sections that are asked for."""
    facts = environment.facts()
    print(f"# Reliability\n\nMade by `{COMMAND}` on {time.strftime('%Y-%m-%d')}")
    print(f"({facts['processor']}, {facts['cores']} cores; torch {facts['torch']}, gloo).")
    for name, (title, section) in SECTIONS.items():
        if names and name not in names:
            continue
        print(f"\n## {title}\n")
        with tempfile.TemporaryDirectory() as folder:
            for line in section(Path(folder)):
                print(line.rstrip(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
