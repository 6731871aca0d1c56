"""docs/results/trials.md: what outside trials did to worldsize, and what happens now.

./launch.sh python -m tests.soak > docs/results/trials.md       every trial
./launch.sh python -m tests.soak starts kills.launcher          those whose names begin so

Exit status: 0 all hold, 1 a trial failed (its row says why), 2 no trial has such a name.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from experiments.document import heading
from tests.soak.registry import all_trials
from tests.soak.trial import Trial

COMMAND = "./launch.sh python -m tests.soak > docs/results/trials.md"


def main(names: list[str]) -> int:
    """Run the trials that `names` select, print them as Markdown tables; return the exit status."""
    trials = all_trials()
    chosen = [t for t in trials if not names or t.name.startswith(tuple(names))]
    if not chosen:
        print(f"no trial's name begins with {' or '.join(names)}", file=sys.stderr)
        return 2
    print(heading("What happens now: trials from outside", COMMAND, ""))
    print("Each row was tried on the day above. `tests/soak/` has the code of each.\n")
    failed, group = 0, ""
    for trial in chosen:
        if trial.group != group:
            group = trial.group
            print(f"\n## {group}\n\n| case | what happens now | seconds |\n|---|---|--:|")
        start = time.monotonic()
        seen, held = outcome(trial)
        failed += not held
        cells = [text.replace("|", "\\|").replace("\n", " ") for text in (trial.case, seen)]
        print(f"| {cells[0]} | {cells[1]} | {time.monotonic() - start:.0f} |", flush=True)
    print(f"\n{len(chosen) - failed} of {len(chosen)} hold.")
    return 1 if failed else 0


def outcome(trial: Trial) -> tuple[str, bool]:
    """Run one trial in a folder of its own; return what it saw and whether that is right."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return trial.run(Path(folder).resolve()), True
        except Exception as error:  # a trial may fail in any way; the others go on
            return f"**FAILED**: {type(error).__name__}: {error}", False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
