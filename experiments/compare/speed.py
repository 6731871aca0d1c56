"""How long `compare` takes for a thousand runs: ./launch.sh python -m experiments.compare.speed RUN

Makes 1,000 runs of the one that is given, a grid of eight learning rates, five seeds, five batch
sizes and five layouts, with times that differ by a few per cent, and compares them as a user does:
a new process for each format. Prints docs/results/compare.md.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from costs import ledger as ledgers
from experiments.document import heading, rule, table
from parallel.layout import Layout

COMMAND = "./launch.sh python -m experiments.compare.speed RUN > docs/results/compare.md"
BAR_S = 5.0
ROUNDS = 3
LAYOUTS = ({"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2})
GRID = (
    [0.001 * 2**k for k in range(8)],  # optimizer.lr
    range(5),  # seed
    [1, 2, 4, 8, 16],  # micro_batch_size
    LAYOUTS,
)
FORMATS: tuple[list[str], ...] = ([], ["--format=json"], ["--format=csv"], ["--format=markdown"])


def main(run: Path) -> None:
    ledger = ledgers.read(run / "ledger.json")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        runs = make(Path(folder), ledger, lines)
        print(heading("Comparing many runs", COMMAND))
        print(
            f"{runs:,} ledgers of {ledger['layout']['world_size']} ranks, each with a log of ",
            end="",
        )
        print(f"{len(lines)} steps.")
        print(
            f"Seconds of the whole command, the median of {ROUNDS}; the aim is at most {BAR_S:g}."
        )
        print(f"Load of the machine when it began: {os.getloadavg()[0]:.1f}.\n")
        print(table("command", "seconds", "of them of the processor"))
        print(rule(3))
        for more in FORMATS:
            taken = (f"{value:.2f}" for value in seconds(folder, more))
            print(table(f"`{' '.join(['compare DIR', *more])}`", *taken))


def make(folder: Path, ledger: dict[str, Any], lines: list[str]) -> int:
    """Write the runs; returns how many."""
    chance = random.Random(0)
    points = list(itertools.product(*GRID))
    for number, (lr, seed, size, axes) in enumerate(points):
        own = copy.deepcopy(ledger)
        own["config"].update(seed=seed, micro_batch_size=size)
        own["config"]["optimizer"]["lr"] = lr
        layout = Layout(**axes)
        own["config"]["layout"] = layout.by_axis
        own["layout"] = {"world_size": layout.world_size, **layout.by_axis}
        factor = chance.uniform(0.95, 1.05)
        for step in (own["step"], *own["ranks"]):
            step["time_s"] = {part: s and s * factor for part, s in step["time_s"].items()}
            step["tokens_per_s"] /= factor
        path = folder / str(number)
        path.mkdir()
        ledgers.write(path / "ledger.json", own)
        slower = ({**one, "step_s": one["step_s"] * factor} for one in map(json.loads, lines))
        (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in slower))
    return len(points)


def seconds(folder: str, more: list[str]) -> tuple[float, float]:
    """Of one command, start of Python included: on the wall, and of the processor."""
    wall, processor = [], []
    for _ in range(ROUNDS):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "experiments", "compare", folder, *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
        processor.append(spent)
    return statistics.median(wall), statistics.median(processor)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
