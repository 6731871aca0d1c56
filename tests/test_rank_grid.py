"""Groups of ranks as grids: what they hold, and that no world is too big for a step's timeline."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costs import trace as traces
from costs.program import Message
from costs.rank_grid import LISTED, RankGrid, ranks_from_json
from costs.trace import Trace
from minigpt.config import ModelConfig
from parallel.layout import MESH_AXES, Layout, Options
from simulator.plan_programs import Writer

SIZES = st.lists(st.sampled_from((1, 2, 3, 4)), min_size=5, max_size=5)


@settings(max_examples=200)
@given(SIZES, st.sets(st.integers(0, 4)), st.integers(0, 50), st.integers(1, 40))
def test_a_grid_is_the_slice_of_the_mesh(
    sizes: list[int], joined: set[int], first: int, stride: int
) -> None:
    mesh = np.arange(prod(sizes)).reshape(sizes) + first
    listed = mesh[tuple(slice(None) if i in joined else 0 for i in range(5))].ravel().tolist()
    strides = [prod(sizes[i + 1 :]) for i in range(5)]
    grid = RankGrid(first, tuple((sizes[i], strides[i]) for i in sorted(joined)))
    assert list(grid) == listed and len(grid) == len(listed)
    assert [grid[i] for i in range(-len(grid), len(grid))] == [*listed, *listed]
    assert grid[1:3] == tuple(listed[1:3])
    around = range(first - 5, first + prod(sizes) + 5)
    assert [rank in grid for rank in around] == [rank in listed for rank in around]
    assert grid.images(lambda rank: rank // stride * stride) == {
        r // stride * stride for r in listed
    }
    read = ranks_from_json(grid.to_json())
    assert list(read) == listed
    with pytest.raises(IndexError):
        grid[len(grid)]


@settings(max_examples=60)
@given(st.lists(st.sampled_from((1, 2, 4)), min_size=5, max_size=5), st.sampled_from((1, 2)))
def test_a_plans_groups_are_those_of_its_mesh(sizes: list[int], ep: int) -> None:
    axes = dict(zip(MESH_AXES, sizes, strict=True))
    data = "dp_shard" if axes["dp_shard"] > 1 else "dp_replicate"
    ep = ep if axes[data] % ep == 0 else 1
    layout = Layout(**axes, ep=ep)
    mesh = np.arange(layout.world_size).reshape(layout.sizes)
    model = ModelConfig(n_layer=4 * layout.pp)
    for place in range(layout.pp):
        writer = Writer(model, layout, Options(), True, place)
        for joined in (("dp_replicate",), ("dp_shard", "cp"), ("pp", "dp_shard", "tp"), MESH_AXES):
            of = tuple(slice(None) if a in joined else place if a == "pp" else 0 for a in MESH_AXES)
            assert list(writer.group("*".join(joined))) == mesh[of].ravel().tolist()
        of = tuple(slice(None) if a == data else place if a == "pp" else 0 for a in MESH_AXES)
        line = mesh[of].ravel().tolist()
        assert list(writer.group("ep")) == line[:ep]
        assert list(writer.group(f"{data}/ep")) == line[::ep]


def test_a_large_group_is_written_as_a_grid_and_read_back(tmp_path: Path) -> None:
    small, large = RankGrid(0, ((LISTED, 4),)), RankGrid(8, ((32, 1 << 22), (LISTED, 4)))
    program = [
        Message(number, "all_reduce", "dp_shard", ranks, "float32", 4, "optimizer")
        for number, ranks in enumerate((small, large))
    ]
    traces.write(tmp_path / "trace.json.gz", Trace([], {0: program}))  # type: ignore[dict-item]
    read = [event.ranks for event in traces.read(tmp_path / "trace.json.gz").programs[0]]  # type: ignore[union-attr]
    assert read == [tuple(small), large]
