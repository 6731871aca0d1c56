"""Contestants take turns; the documents that are made of it are made by commands that run."""

from __future__ import annotations

import pytest

from experiments.figures.contest import KINDS, METERS, OFF, TURN, hold
from experiments.figures.yardstick import Shape
from experiments.ranks import RankFailed

pytestmark = pytest.mark.slow

TINY = Shape(n_layer=1, n_head=2, d_model=16, seq_len=16, batch=4)


def test_every_way_of_metering_takes_its_turn() -> None:
    kinds = [f"fp32 meters {name}" if name else "fp32" for name in METERS]
    assert any(kind.endswith(OFF) for kind in kinds)
    times = hold(kinds, 1, TINY, 2)
    assert list(times) == kinds
    assert all(len(own) == 2 * TURN and min(own) > 0 for own in times.values())


def test_one_that_fails_ends_the_contest() -> None:
    assert "fp33" not in KINDS
    with pytest.raises(RankFailed, match="fp33"):
        hold(["fp32", "fp33"], 1, TINY, 1)
