"""docs/results/trials.md can be made part by part: rows that are not run again stay as they are."""

from __future__ import annotations

from pathlib import Path

from tests.soak.__main__ import page, rows_of
from tests.soak.trial import Trial


def holds(_folder: Path) -> str:
    return "exit 0"


def test_rows_of_other_trials_stay(tmp_path: Path) -> None:
    trials = [Trial("One", "a | b", holds), Trial("Two", "c", print)]  # type: ignore[arg-type]
    first, second = (trial.name for trial in trials)
    document = tmp_path / "trials.md"
    rows = {first: f"| `{first}` | a \\| b | exit 0 | 1 | 2026-11-30 |"}
    document.write_text(page(trials, rows))
    assert "Of 2 trials 1 have been run, and 1 of those hold" in document.read_text()
    assert f"| `{second}` | c | not run yet |" in document.read_text()
    assert rows_of(document) == rows
    rows[second] = f"| `{second}` | c | FAILED: no | 1 | 2026-11-30 |"
    document.write_text(page(trials, rows))
    assert "Of 2 trials 2 have been run, and 1 of those hold" in document.read_text()
    assert rows_of(document) == rows
