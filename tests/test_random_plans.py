"""Random plans at four ranks train as a single process does.

The same ones every time, or others: PLANS_SEED=7 ./launch.sh test tests/test_random_plans.py. Plain
random numbers, for hypothesis begins with its simplest case, and makes what follows like what came
before; and to shrink a failure it would start ranks again for every try. A failure names its plan
in full. Plans with experts may fail for a reason that is none: a token whose experts are equal to
rounding takes another one, and the loss of that step jumps by 1e-5 or so.
"""

from __future__ import annotations

import os
from random import Random

import pytest

from experiments.figures.parity import Plan, differences
from experiments.ranks import RankFailed
from tests.random_plans import random_plan

COUNT = 8
VARIANT = {"six steps": {"steps": 6}}


def failures(plans: list[Plan]) -> dict[str, str]:
    """By plan, how far it is from a single process, where that is too far."""
    cells = differences(plans, VARIANT)
    return {
        name: str(cell)
        for (name, _), cell in cells.items()
        if isinstance(cell, str) or not cell.holds
    }


def failures_one_by_one(plans: list[Plan]) -> dict[str, str]:
    """The same where some plan stops its ranks, and the rest with them."""
    found: dict[str, str] = {}
    for plan in plans:
        try:
            found |= failures([plan])
        except RankFailed as failed:
            found[plan.name] = str(failed)
    return found


@pytest.mark.slow
def test_random_plans_train_as_a_single_process_does() -> None:
    random = Random(int(os.environ.get("PLANS_SEED", "0")))
    plans = [random_plan(random) for _ in range(COUNT)]
    try:
        found = failures(plans)
    except RankFailed:
        found = failures_one_by_one(plans)
        assert found, f"none fails alone, but together: {[plan.name for plan in plans]}"
    assert not found, "\n".join(f"{name}: {why}" for name, why in found.items())
