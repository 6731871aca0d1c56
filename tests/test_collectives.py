"""Alpha-beta costs of collectives: identities, limits, and how a group lies in nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.collectives import Group, flat_ring, group, hierarchical, ring, seconds, tree
from simulator.hardware import Cluster, Device, Level

NODES = Cluster(
    device=Device(memory_bytes=1.0, memory_bandwidth=1.0),
    node_size=8,
    in_node=Level(300e9, 5e-6),
    between_nodes=Level(25e9, 1e-5, efficiency=0.8),
)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
sizes = st.sampled_from([1, 2, 3, 8, 64, 1024])
payloads = st.floats(1, 1e10)


@given(payloads, sizes)
def test_a_rings_all_reduce_is_a_reduce_scatter_and_an_all_gather(payload: float, n: int) -> None:
    halves = [ring(name, payload, n, 1e-5, 1e10) for name in ("reduce_scatter", "all_gather")]
    assert ring("all_reduce", payload, n, 1e-5, 1e10) == pytest.approx(sum(halves))
    ranks = group(n, 1, 8)
    whole = flat_ring("all_reduce", payload, ranks, NODES)
    parts = [flat_ring(name, payload, ranks, NODES) for name in ("reduce_scatter", "all_gather")]
    assert whole == pytest.approx(sum(parts))


def test_a_ring_sends_what_the_ledger_says() -> None:
    from costs.ledger import wire_bytes

    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"):
        assert ring(name, 6e6, 3, 0.0, 1.0) == pytest.approx(wire_bytes(name, 6_000_000, 3))


def test_a_tree_needs_fewer_messages_and_a_ring_fewer_bytes() -> None:
    many = 1024
    assert tree("all_reduce", 8, many, 1e-5, 1e10) < ring("all_reduce", 8, many, 1e-5, 1e10)
    big = 1e9
    assert ring("broadcast", big, 4, 0.0, 1e10) < tree("broadcast", big, 4, 0.0, 1e10)
    assert tree("broadcast", 0, 8, 1.0, 1.0) == 3


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_group_of_one_sends_nothing(collective: str) -> None:
    assert seconds(collective, 1e9, group(1, 1, 8), NODES) == 0


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_group_in_a_node_does_not_use_the_network_between(collective: str) -> None:
    slow = NODES.changed({"between_nodes.bandwidth": 1.0})
    inside, across = group(8, 1, 8), group(16, 1, 8)
    assert seconds(collective, 1e6, inside, slow) == seconds(collective, 1e6, inside, NODES)
    if collective != "send":  # its two ranks are neighbours
        assert seconds(collective, 1e6, across, slow) > seconds(collective, 1e6, across, NODES)


@given(payloads, sizes, st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from(COLLECTIVES))
def test_a_faster_network_never_makes_it_slower(
    payload: float, n: int, stride: int, collective: str
) -> None:
    ranks, faster = group(n, stride, 8), NODES.changed({"between_nodes.bandwidth": 50e9})
    assert seconds(collective, payload, ranks, faster) <= seconds(collective, payload, ranks, NODES)


def test_where_an_axis_lies_follows_from_its_stride() -> None:
    """tp=4 is in a node; with it outside, dp has two ranks a node; pp outermost has one."""
    assert group(4, 1, 8) == Group(4, 4)
    assert group(16, 4, 8) == Group(16, 2)
    assert group(2, 64, 8) == Group(2, 1)


def test_a_ring_leaves_its_nodes_through_all_their_ports() -> None:
    """8 ranks a node, 16 nodes: each port carries an eighth of what one ring would carry."""
    free = NODES.changed({"in_node.latency": 0.0, "between_nodes.latency": 0.0})
    alone = flat_ring("all_gather", 1e9, group(16, 8, 8), free)
    together = flat_ring("all_gather", 1e9, group(128, 1, 8), free)
    assert alone == pytest.approx(15 / 16 * 1e9 / 20e9)
    assert together == pytest.approx(127 / 128 * 1e9 / 8 / 20e9)


def test_a_hierarchy_moves_a_share_between_nodes() -> None:
    free = NODES.changed({"in_node.latency": 0.0, "between_nodes.latency": 0.0})
    inside = 2 * 7 / 8 * 8e8 / 300e9
    across = 2 * 15 / 16 * 1e8 / 20e9
    assert hierarchical("all_reduce", 8e8, group(128, 1, 8), free) == pytest.approx(inside + across)


def test_arrays_are_taken_as_single_numbers_are() -> None:
    n = np.array([1, 2, 8, 64])
    many = seconds("all_reduce", 1e8, group(n, np.array([1, 2, 1, 4]), 8), NODES)
    one = [
        seconds("all_reduce", 1e8, group(a, b, 8), NODES)
        for a, b in zip([1, 2, 8, 64], [1, 2, 1, 4], strict=True)
    ]
    assert many == pytest.approx(np.array(one))


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(ValueError, match="all_scatter: no such collective"):
        ring("all_scatter", 1, 2, 0.0, 1.0)
    with pytest.raises(ValueError, match="all_gather: no tree algorithm"):
        tree("all_gather", 1, 2, 0.0, 1.0)
