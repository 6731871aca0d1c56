"""Random plans at four ranks train as a single process does.

New ones every time: the table of docs/parity.md is what holds every time, and this looks beside it.
A failure names its plan in full, so that no seed is needed to see it again.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from experiments.parity import Plan, differences
from experiments.ranks import RankFailed
from tests.random_plans import plans

COUNT = 8
VARIANT = {"six steps": {"steps": 6}}


def failures(drawn: list[Plan]) -> dict[str, str]:
    """By plan, how far it is from a single process, where that is too far."""
    cells = differences(drawn, VARIANT)
    return {
        name: str(cell)
        for (name, _), cell in cells.items()
        if isinstance(cell, str) or not cell.holds
    }


def failures_one_by_one(drawn: list[Plan]) -> dict[str, str]:
    """The same where some plan stops its ranks, and the rest with them."""
    found: dict[str, str] = {}
    for plan in drawn:
        try:
            found |= failures([plan])
        except RankFailed as failed:
            found[plan.name] = str(failed)
    return found


@pytest.mark.slow
# One example, for it is a list. unique: hypothesis begins with the simplest list, the same each
# time, which is eight equal plans and so not taken. Not shrunk: every try would start ranks again.
@settings(
    max_examples=1,
    phases=[Phase.generate],
    deadline=None,
    derandomize=False,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(plans(), min_size=COUNT, max_size=COUNT, unique_by=lambda plan: plan.name))
def test_random_plans_train_as_a_single_process_does(drawn: list[Plan]) -> None:
    for plan in drawn:
        note(plan.name)
    try:
        found = failures(drawn)
    except RankFailed:
        found = failures_one_by_one(drawn)
        assert found, "ranks failed with all of these plans together, and with none alone"
    assert not found, "\n".join(f"{name}: {why}" for name, why in found.items())
