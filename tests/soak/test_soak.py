"""The trials as tests: ./launch.sh test -m soak"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.registry import all_trials
from tests.soak.trial import Trial


@pytest.mark.soak
@pytest.mark.parametrize("trial", all_trials(), ids=lambda trial: trial.name)
def test_trial(trial: Trial, tmp_path: Path) -> None:
    assert trial.run(tmp_path)
