"""metrics.jsonl read back: lines that were cut off, steps that do not count, quartiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from costs.outside import MOST_BYTES
from experiments.step_log import (
    followed_steps,
    half_spread,
    kernels_step,
    read_metrics,
    read_seconds,
    untimed_steps,
)


def test_a_log_that_was_cut_off_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 3.0, "step_s": 0.5}\n{"step_s": 2.5e-05, "loss": 1}\n{"loss": 2')
    assert read_seconds(path) == [0.5, 2.5e-05]
    path.write_text("")
    assert read_seconds(path) == []


@pytest.mark.parametrize("line", ['{"loss": 3.0}', '{"step_s": null}', '{"step_s": "1"}', "x", ""])
def test_a_line_without_seconds_is_no_line_of_a_log(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step_s": 0.5}}\n{line}\n{{"step_s": 1}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: not a log of steps: 3 lines, 2 with"):
        read_seconds(path)


def test_what_a_run_writes_is_read_back(tmp_path: Path) -> None:
    seconds = [0.1, 1.0, 3.3e-07, 12345.678, 1e22]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": 0, "step_s": s}) + "\n" for s in seconds))
    assert read_seconds(path) == seconds


def test_kernels_are_recorded_in_a_step_that_counts_for_nothing_else() -> None:
    assert kernels_step(300) == 4 and kernels_step(300, first=100) == 104
    for steps in range(1, 40):
        found = kernels_step(steps)
        if found is None:
            assert steps < 8, "a run of eight steps has one to spare"
            continue
        assert found in untimed_steps(steps, compiled=True)
        assert found not in followed_steps(steps)


def test_warm_up_and_followed_steps_are_not_timed() -> None:
    assert followed_steps(300) == (1, 2) and followed_steps(1) == (-1, 0)
    assert untimed_steps(8, compiled=False) == {0, 1, 2, 3}
    assert untimed_steps(4, compiled=False) == {0, 1, 2}
    assert untimed_steps(4, compiled=True) == {0, 1}


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_step_is_never_timed_however_few_are_left(first: int, compiled: bool) -> None:
    for left in range(1, 5):
        assert first in untimed_steps(first + left, compiled, first)


def test_quartiles_are_numpys() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    low, high = np.percentile(values, (25, 75))
    assert half_spread(values) == pytest.approx((high - low) / 2, rel=1e-12)
    assert half_spread(values[:3]) is None


def test_a_step_that_is_no_number_and_a_log_beyond_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps: list[object] = [0, "1", [2], None, True, 3]
    path.write_text(
        "".join(f"{json.dumps({'step': s, 'loss': 1.0, 'skipped': 0})}\n" for s in steps)
    )
    assert [line["step"] for line in read_metrics(path)] == [0, 3]
    with open(path, "r+b") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"^\S+: has more than 256 MiB, which is the most"):
        read_metrics(path)
