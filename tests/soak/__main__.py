"""docs/results/trials.md: what outside trials did to worldsize, and what happens now.

./launch.sh python -m tests.soak --into docs/results/trials.md       every trial
./launch.sh python -m tests.soak starts ends.launcher                those whose names begin so
./launch.sh python -m tests.soak starts --into docs/results/trials.md    their rows anew, the
                                                                     others stay as they are

Each trial is a process of its own, and two run side by side. Exit status: 0 all hold, 1 a trial
failed (its row says why), 2 no trial has such a name.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.document import heading, rule, table
from experiments.outside_text import markdown_cell
from tests.soak.registry import all_trials
from tests.soak.trial import Trial

COMMAND = "./launch.sh python -m tests.soak --into docs/results/trials.md"
ONE = "--one"  # what this module asks of itself: run the trial of that name, print it as JSON
SIDE_BY_SIDE = 2  # trials
COLUMNS = ("trial", "what is done", "what happens now", "seconds", "day")
FAILED = "FAILED: "


def main(arguments: list[str]) -> int:
    """Run the trials that `arguments` name and print their rows; return the exit status."""
    if arguments[:1] == [ONE]:
        (only,) = (trial for trial in all_trials() if trial.name == arguments[1])
        print(json.dumps(outcome(only)))
        return 0
    parser = argparse.ArgumentParser(prog="./launch.sh python -m tests.soak")
    parser.add_argument("names", nargs="*", metavar="NAME", help="how the names of trials begin")
    parser.add_argument("--into", type=Path, help="the page whose rows are made anew")
    given = parser.parse_args(arguments)
    trials = all_trials()
    chosen = [t for t in trials if not given.names or t.name.startswith(tuple(given.names))]
    if not chosen:
        parser.error(f"no trial's name begins with {' or '.join(given.names)}")
    rows = rows_of(given.into) if given.into and given.into.exists() else {}
    failed = 0
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for trial, row in zip(chosen, pool.map(row_of, chosen), strict=True):
            failed += FAILED in row
            rows[trial.name] = row
            print(row, flush=True)
            if given.into:  # after each, so that a run that is ended has left what it did
                given.into.write_text(page(trials, rows))
    return 1 if failed else 0


def page(trials: list[Trial], rows: dict[str, str]) -> str:
    """Return the document: a table for each group, with the row of each trial that was run."""
    tried = [rows[trial.name] for trial in trials if trial.name in rows]
    failed = sum(FAILED in row for row in tried)
    lines = [
        heading("What happens now: trials from outside", COMMAND),
        f"`tests/soak/` has the code of each trial. Of {len(trials)} trials {len(tried)} have been "
        f"run, and {len(tried) - failed} of those hold. Seconds are those of a machine that did "
        "other things too.",
    ]
    for group in dict.fromkeys(trial.group for trial in trials):
        lines += ["", f"## {group}", "", table(*COLUMNS), rule(len(COLUMNS))]
        of_group = [trial for trial in trials if trial.group == group]
        not_run = "not run yet"
        lines += [
            rows.get(t.name, table(f"`{t.name}`", markdown_cell(t.case), not_run, "", ""))
            for t in of_group
        ]
    return "\n".join([*lines, ""])


def rows_of(document: Path) -> dict[str, str]:
    """Return the rows of a page by the names of their trials, without those that were not run."""
    found = re.findall(r"^\| `([\w.]+)` \|.*$", document.read_text(), re.M)
    lines = [line for line in document.read_text().splitlines() if line.startswith("| `")]
    return {
        name: line for name, line in zip(found, lines, strict=True) if "| not run yet |" not in line
    }


def row_of(trial: Trial) -> str:
    """Run one trial in a process of its own and return its row of the table."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.soak", ONE, trial.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        seen = f"{FAILED}the trial's process ended with {done.returncode}"
    else:
        seen = json.loads(lines[-1])
    seconds = f"{time.monotonic() - start:.0f}"
    cells = (markdown_cell(trial.case), markdown_cell(seen))
    return table(f"`{trial.name}`", *cells, seconds, time.strftime("%Y-%m-%d"))


def outcome(trial: Trial) -> str:
    """Run one trial in a folder of its own; return what it saw, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return trial.run(Path(folder).resolve())
        except Exception as error:  # a trial may fail in any way; the others go on
            return f"{FAILED}{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
