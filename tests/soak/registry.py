"""All trials: importing the modules of this folder registers them."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from tests.soak.trial import TRIALS, Trial

NO_TRIALS = {"__main__", "registry", "trial", "test_soak"}


def all_trials() -> list[Trial]:
    """Return every registered trial, those of a group together, in the order of the modules."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in NO_TRIALS:
            importlib.import_module(f"tests.soak.{module.name}")
    groups = list(dict.fromkeys(trial.group for trial in TRIALS))
    return sorted(TRIALS, key=lambda trial: groups.index(trial.group))
