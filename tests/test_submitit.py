"""Hydra's submitit launcher, with its local executor: each job of a sweep is another process's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from costs import ledger as ledgers
from tests.launching import SMALL, launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("submitit") is None, reason="submitit is not installed"
    ),
]
SWEEP = ("-m", "hydra/launcher=submitit_local", "strategy=single", *SMALL)


def test_each_job_is_a_run(tmp_path: Path) -> None:
    done = launch(*SWEEP, "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ends = [ledgers.read(run / "ledger.json") for run in (tmp_path / "runs").iterdir()]
    assert sorted(ledger["config"]["seed"] for ledger in ends) == [0, 1]


@pytest.mark.parametrize(
    ("override", "status", "said"),
    [
        ("init=nowhere.safetensors", 2, "init=nowhere.safetensors"),
        ("optimizer.lr=1e30", 1, "no update was made"),
    ],
)
def test_a_job_that_does_not_end_well_is_told_of(
    override: str, status: int, said: str, tmp_path: Path
) -> None:
    done = launch(*SWEEP, override, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("launch.sh: ") and said in last, done.stderr
