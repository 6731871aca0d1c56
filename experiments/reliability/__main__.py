"""docs/results/reliability.md: what was done to runs and checkpoints, and what came of it.

./launch.sh python -m experiments.reliability --into docs/results/reliability.md       all of it
./launch.sh python -m experiments.reliability damage --into docs/results/reliability.md    one part
anew
./launch.sh python -m experiments.reliability --share=0.1 kills      a tenth, to the screen
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from experiments.document import heading
from experiments.reliability import kills, runs, state, steps

COMMAND = "./launch.sh python -m experiments.reliability --into docs/results/reliability.md"
NOTE = """
Each part says on which day it was made and how long that took, and how much of the machine other
programs had when it began; `PART...` behind the command makes only those parts anew.
"""
# name -> title, and what yields the part's lines, given a folder to work in and a share of the
# trials that the document has
PARTS: dict[str, tuple[str, Callable[[Path, float], Iterator[str]]]] = {
    "kills": ("Killed at any moment", kills.kills),
    "saves": ("Killed while it saves", kills.saves),
    "damage": ("Damaged checkpoints", state.damage),
    "disk": ("A full disk, and one that is read-only", steps.disk),
    "same": ("The same configuration again", state.same),
    "reshard": ("Written by one layout, read by another", state.reshard),
    "hangs": ("A rank that hangs, stops, errs or calls something else", runs.hangs),
    "restarts": ("Started again by itself", runs.restarts),
    "preemption": ("Stopped by a scheduler", runs.preemption),
    "doubles": ("Two launches at once", runs.doubles),
    "nonfinite": ("NaN and infinity", steps.nonfinite),
    "soak": ("A long run", runs.soak),
    "beside": ("Written beside the steps", steps.beside),
}
LOOK_S = 2.0  # how long to look at what else the machine does


def main(arguments: list[str]) -> int:
    """Print the document, or the parts that are asked for, or put them into a file."""
    parser = argparse.ArgumentParser(prog="python -m experiments.reliability")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of the document")
    parser.add_argument("--into", type=Path, help="a document whose other parts stay as they are")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]}: no such part; there are {', '.join(PARTS)}")
    if not 0 < given.share <= 1:
        parser.error(f"--share={given.share}: must be above 0, at most 1")
    for name in given.parts or PARTS:
        made = section(name, given.share)
        print(made, flush=True)
        if given.into:
            given.into.write_text(with_section(given.into, name, made))
    return 0


def section(name: str, share: float) -> str:
    """One part, by so large a share of its trials."""
    title, part = PARTS[name]
    busy, cores = psutil.cpu_percent(LOOK_S) / 100, psutil.cpu_count() or 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines = [line.rstrip(" ") for line in part(Path(folder).resolve(), share)]
    trials = "" if share == 1 else f", --share={share:g} of its trials"
    made = f"{time.strftime('%Y-%m-%d')}, {time.monotonic() - start:,.0f} s{trials}"
    others = f"other programs had {busy * cores:.1f} of {cores} cores"
    return "\n".join([f"## {title}", "", *lines, "", f"`{name}`: {made}; {others}.", ""])


def with_section(document: Path, name: str, made: str) -> str:
    """The document with one part made anew, in the order of PARTS."""
    text = document.read_text() if document.exists() else ""
    there = {part.partition("\n")[0]: part for part in re.split(r"^(?=## )", text, flags=re.M)}
    there[f"## {PARTS[name][0]}"] = made
    titles = [f"## {title}" for title, _ in PARTS.values()]
    parts = [f"\n{there[title].strip()}\n" for title in titles if title in there]
    return "".join([heading("Reliability", COMMAND), NOTE, *parts])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
