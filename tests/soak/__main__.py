"""docs/results/trials.md: what outside trials did to worldsize, and what happens now.

./launch.sh python -m tests.soak > docs/results/trials.md       every trial
./launch.sh python -m tests.soak starts ends.launcher           those whose names begin so

Each trial is a process of its own, and two run side by side. Exit status: 0 all hold, 1 a trial
failed (its row says why), 2 no trial has such a name.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.document import heading, table
from experiments.outside_text import markdown_cell
from tests.soak.registry import all_trials
from tests.soak.trial import Trial

COMMAND = "./launch.sh python -m tests.soak > docs/results/trials.md"


ONE = "--one"  # what this module asks of itself: run the trial of that name, print its row as JSON
SIDE_BY_SIDE = 2  # trials


def main(arguments: list[str]) -> int:
    """Run the trials that `arguments` name, print them as Markdown tables; return the status."""
    if arguments[:1] == [ONE]:
        (chosen,) = (trial for trial in all_trials() if trial.name == arguments[1])
        print(json.dumps(outcome(chosen)))
        return 0
    trials = all_trials()
    chosen = [t for t in trials if not arguments or t.name.startswith(tuple(arguments))]
    if not chosen:
        print(f"no trial's name begins with {' or '.join(arguments)}", file=sys.stderr)
        return 2
    print(heading("What happens now: trials from outside", COMMAND))
    print("Each row was tried on the day above. `tests/soak/` has the code of each.")
    failed, group = 0, ""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for trial, (seen, held, seconds) in zip(chosen, pool.map(tried, chosen), strict=True):
            if trial.group != group:
                group = trial.group
                print(f"\n## {group}\n\n| case | what happens now | seconds |\n|---|---|--:|")
            failed += not held
            row = (markdown_cell(trial.case), markdown_cell(seen), f"{seconds:.0f}")
            print(table(*row), flush=True)
    print(f"\n{len(chosen) - failed} of {len(chosen)} hold.")
    return 1 if failed else 0


def tried(trial: Trial) -> tuple[str, bool, float]:
    """Run one trial in a process of its own; return what it saw, if that is right, and seconds."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.soak", ONE, trial.name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return f"FAILED: the trial's process ended with {done.returncode}", False, 0.0
    seen, held = json.loads(lines[-1])
    return seen, held, time.monotonic() - start


def outcome(trial: Trial) -> tuple[str, bool]:
    """Run one trial in a folder of its own; return what it saw and whether that is right."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return trial.run(Path(folder).resolve()), True
        except Exception as error:  # a trial may fail in any way; the others go on
            return f"FAILED: {type(error).__name__}: {error}", False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
