"""docs/results/reliability.md, of checkpoints: damaged, or read by other layouts; the same run
again."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.checkpoints import check, folder_of, part_of, publish
from experiments.config import TrainConfig
from experiments.figures.matrix import plan_named
from experiments.figures.parity import LOSS_BOUND, make_config
from experiments.ranks import run_ranks
from experiments.reliability.resuming import load_and_go_on, same_state, stop_and_go_on, train_on
from experiments.reliability.trials import NOTHING_ELSE, few
from parallel.damaged import Damaged
from parallel.layout import Layout

DAMAGE = {"bit flipped": 100, "truncated": 100, "4 KiB zeroed": 50, "file missing": 20}
BLOCK = 4096
SAVED, MORE = 5, 10  # steps before the checkpoint, and after it
SOURCES = {"ddp2": 2, "pp2 zbv_zero_bubble": 2, "fsdp4": 4, "fsdp2 x tp2": 4}
TARGETS = {"zero1 2": 2, "tp2 sequence": 2, "hsdp 2 x 2": 4, "pp2 x fsdp2": 4}
REPEATS = 10
CHANGES = {"model.tied": True, "clip": 0.5}


def config_of(name: str, steps: int) -> TrainConfig:
    return plan_named(name).config({**CHANGES, "steps": steps})


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
        yield place, path.name
    finally:
        shutil.rmtree(place)


def damage(folder: Path, share: float) -> Iterator[str]:
    """Each fault in a random file of a real checkpoint, at a random place."""
    config = make_config(Layout(), {"steps": 2})
    whole = folder_of(folder / "run", 1)
    _save_one(config, whole)
    size = sum(path.stat().st_size for path in whole.iterdir())
    yield f"A checkpoint of {config.model.parameters:,} parameters, {size / 1e6:.1f} MB in"
    yield f"{len(list(whole.iterdir()))} files. Each time a random file, at a random place.\n"
    yield "| fault | times | noticed before anything is loaded | file named |"
    yield "|---|--:|--:|--:|"
    for fault, full in DAMAGE.items():
        times = few(full, share)
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
                    said["named"] += name in str(error)
        note = f" ({said['unchanged']} changed no byte)" if said["unchanged"] else ""
        yield f"| {fault} | {times} | {said['noticed']}{note} | {said['named']} |"


def _save_one(config: TrainConfig, folder: Path) -> None:
    """A published checkpoint of a single process after one step."""
    from experiments.assemble import make_trainer
    from experiments.figures.parity import mesh_of
    from parallel.checkpoint import Writer, state_of

    trainer = make_trainer(config, mesh_of(config.layout))
    train_on(config, trainer, 0, 1)
    facts = {**NOTHING_ELSE, "step": 1}
    writer = Writer(trainer.replica.mesh, asynchronous=False)
    writer.write(state_of(trainer), part_of(folder), lambda: publish(folder, facts, keep=2))


def reshard(folder: Path, _share: float) -> Iterator[str]:
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
    yield f"Saved after {SAVED} steps; the next {MORE} losses against those of the run that went"
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


def same(folder: Path, share: float) -> Iterator[str]:
    """One configuration, several times, each in processes of its own."""
    config, times = config_of("fsdp2", SAVED), few(REPEATS, share)
    runs = [run_ranks(2, stop_and_go_on, [config], folder / str(i), 2)[0] for i in range(times)]
    equal = sum(run == runs[0] for run in runs)
    whole = sum(
        same_state(folder / "0" / "0-whole", folder / str(i) / "0-whole") for i in range(times)
    )
    yield f"fsdp2, {SAVED} steps, {times} launches: losses equal to the bit in {equal} of"
    yield f"{times}, weights and optimizer at the end in {whole} of {times}."
