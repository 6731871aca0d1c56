"""Layouts: what is left over, what does not multiply, and what a rank reads."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import LEFT_OVER, MESH_AXES, Layout

sizes = st.lists(st.integers(1, 6), min_size=5, max_size=5)


@given(sizes, st.sampled_from(MESH_AXES))
def test_what_is_left_over_is_found(numbers: list[int], open_axis: str) -> None:
    layout = Layout(**dict(zip(MESH_AXES, numbers, strict=True)))
    world_size = math.prod(numbers)
    assert layout.world_size == world_size
    settings = dict(zip(MESH_AXES, numbers, strict=True)) | {open_axis: LEFT_OVER}
    assert Layout(**settings).open_axis == open_axis
    assert Layout(**settings).resolve(world_size) == layout
    assert layout.resolve(world_size) == layout


@given(sizes, st.integers(1, 200), st.sampled_from(MESH_AXES))
def test_a_product_that_does_not_fit_is_an_equation(
    numbers: list[int], world_size: int, open_axis: str
) -> None:
    settings = dict(zip(MESH_AXES, numbers, strict=True))
    if math.prod(numbers) != world_size:
        with pytest.raises(ValueError, match=rf"pp\({numbers[0]}\).* = .* != {world_size} ranks"):
            Layout(**settings).resolve(world_size)
    left_over = Layout(**settings | {open_axis: LEFT_OVER})
    if world_size % (math.prod(numbers) // settings[open_axis]):
        with pytest.raises(ValueError, match=rf"layout.{open_axis}=-1: {world_size} ranks / \("):
            left_over.resolve(world_size)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"tp": 0}, r"layout.tp=0: must be at least 1, or -1"),
        ({"pp": -2}, r"layout.pp=-2"),
        ({"pp": -1, "tp": -1}, r"layout.pp=-1 and layout.tp=-1: only one"),
        ({"ep": -1}, r"layout.ep=-1"),
    ],
)
def test_bad_axes_are_refused_by_name(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Layout(**settings)


def test_names_are_outermost_first() -> None:
    assert Layout().label == "single"
    assert Layout(tp=2, pp=4, dp_shard=8).label == "pp4-dp_shard8-tp2"
    assert Layout(dp_replicate=2, dp_shard=4, tp=3).data_parallel == 8
