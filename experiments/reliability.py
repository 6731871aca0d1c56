"""docs/reliability.md: what was done to runs and checkpoints, and what came of it.

./launch.sh python -m experiments.reliability > docs/reliability.md       all, hours on two cores
./launch.sh python -m experiments.reliability damage kills      only those parts, to the screen
./launch.sh python -m experiments.reliability --share=0.1 kills      a tenth of the trials
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments import (
    reliability_kills,
    reliability_runs,
    reliability_state,
    reliability_steps,
)
from experiments.document import heading

COMMAND = "./launch.sh python -m experiments.reliability > docs/reliability.md"
# name -> title, and what yields the part's lines, given a folder to work in and a share of the
# trials that the document has
PARTS: dict[str, tuple[str, Callable[[Path, float], Iterator[str]]]] = {
    "kills": ("Killed at any moment", reliability_kills.kills),
    "saves": ("Killed while it saves", reliability_kills.saves),
    "damage": ("Damaged checkpoints", reliability_state.damage),
    "disk": ("A full disk, and one that is read-only", reliability_steps.disk),
    "same": ("The same configuration again", reliability_state.same),
    "reshard": ("Written by one layout, read by another", reliability_state.reshard),
    "hangs": ("A rank that hangs, stops, errs or calls something else", reliability_runs.hangs),
    "restarts": ("Started again by itself", reliability_runs.restarts),
    "preemption": ("Stopped by a scheduler", reliability_runs.preemption),
    "doubles": ("Two launches at once", reliability_runs.doubles),
    "nonfinite": ("NaN and infinity", reliability_steps.nonfinite),
    "soak": ("A long run", reliability_runs.soak),
    "beside": ("Written beside the steps", reliability_steps.beside),
}


def main(arguments: list[str]) -> int:
    """Print the document, or the parts that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reliability")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of the document")
    given = parser.parse_args(arguments)
    share, names = given.share, given.parts
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    print(heading("Reliability", COMMAND).rstrip())
    for name in names or PARTS:
        title, part = PARTS[name]
        print(f"\n## {title}\n")
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for line in part(Path(folder).resolve(), share):
                print(line.rstrip(" "), flush=True)
        print(f"\n`{name}`: {time.monotonic() - start:,.0f} s.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
