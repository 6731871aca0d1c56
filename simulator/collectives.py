"""Seconds of a collective under the alpha-beta model: a message of s bytes costs alpha + s / rate.

All arguments may be numpy arrays. `payload` follows NCCL's convention (costs/ledger.py), n is the
group's size, alpha a message's latency in seconds, rate bytes/s that a rank sends.

ring          Thakur, Rabenseifner, Gropp 2005, Optimization of Collective Communication
              Operations in MPICH, sections 4.1 to 4.4
tree          Chan et al. 2007, Collective communication: theory, practice, and experience, section
              5.1; pipelined, so that the payload passes once (Sanders et al. 2009, Two-tree
              algorithms for full bandwidth broadcast, reduction and scan)
hierarchical  reduce_scatter in the node, all_reduce between nodes, all_gather in the node
              (Jia et al. 2018, Highly Scalable Deep Learning Training System, section 3.3)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from simulator.hardware import Cluster

Number = Any  # a float or an array of them
TREES = ("all_reduce", "broadcast", "reduce")  # what a tree serves


class Group(NamedTuple):
    """Ranks of a collective: `size` of them, of which `in_node` share a node with each other."""

    size: Number
    in_node: Number


def group(size: Number, stride: Number, node_size: Number) -> Group:
    """How a group of `size` ranks, each `stride` ranks from the next, lies in nodes.

    Ranks are numbered with tp innermost and pp outermost (parallel.layout.MESH_AXES), so the
    stride of an axis is the product of the axes inside it.
    """
    return Group(size, np.minimum(size, np.maximum(1, node_size // stride)))


def ring(collective: str, payload: Number, n: Number, alpha: Number, rate: Number) -> Number:
    """n-1 steps of payload/n each; an all_reduce is a reduce_scatter and an all_gather; a send is
    one step. Raises ValueError for other names."""
    if collective == "all_reduce":
        half = ring("reduce_scatter", payload, n, alpha, rate)
        return half + ring("all_gather", payload, n, alpha, rate)
    if collective in ("all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce"):
        return (n - 1) * (alpha + payload / n / rate)
    if collective in ("send", "recv"):
        return np.where(np.asarray(n) > 1, alpha + payload / rate, 0.0)
    raise ValueError(f"{collective}: no such collective")


def tree(collective: str, payload: Number, n: Number, alpha: Number, rate: Number) -> Number:
    """log2 n messages of latency down a tree, the payload once; an all_reduce goes up and down.

    Raises ValueError where no tree serves: all_gather, reduce_scatter, all_to_all.
    """
    if collective == "all_reduce":
        return 2 * tree("broadcast", payload, n, alpha, rate)
    if collective in ("broadcast", "reduce"):
        return np.ceil(np.log2(n)) * alpha + np.where(np.asarray(n) > 1, payload / rate, 0.0)
    raise ValueError(f"{collective}: no tree algorithm")


def hierarchical(collective: str, payload: Number, ranks: Group, cluster: Cluster) -> Number:
    """First in each node, then its k-th part between the nodes: by the better of ring and tree."""
    k, inner, outer = np.asarray(ranks.in_node), cluster.in_node, cluster.between_nodes
    nodes = np.ceil(ranks.size / k)
    across = ring(collective, payload / k, nodes, outer.latency, outer.rate)
    if collective in TREES:
        by_tree = tree(collective, payload / k, nodes, outer.latency, outer.rate)
        across = np.minimum(across, by_tree)
    return ring(collective, payload, k, inner.latency, inner.rate) + across


def flat_ring(collective: str, payload: Number, ranks: Group, cluster: Cluster) -> Number:
    """One ring through all ranks, node by node, that leaves each node once a lap.

    k such rings run at a time, each through another of the node's k ports: a port carries a k-th
    of the payload, and the slower of ports and node sets the pace (NCCL's channels).
    """
    n, k, inner, outer = (
        ranks.size,
        np.asarray(ranks.in_node),
        cluster.in_node,
        cluster.between_nodes,
    )
    nodes = np.ceil(n / k)
    crossings = np.where(nodes > 1, nodes, 0)
    hops = np.maximum(n - 1, 1)
    inside = np.maximum(n - 1 - crossings, 0) * inner.latency
    outside = np.minimum(crossings, n - 1) * outer.latency
    pace = np.where(k > 1, 1 / inner.rate, 0.0)
    pace = np.where(nodes > 1, np.maximum(pace, 1 / (k * outer.rate)), pace)
    rate = 1 / np.where(pace > 0, pace, 1.0)
    return np.where(n > 1, ring(collective, payload, n, (inside + outside) / hops, rate), 0.0)


def seconds(collective: str, payload: Number, ranks: Group, cluster: Cluster) -> Number:
    """Seconds of one call, by the best algorithm for it. A group of one takes none.

    all_gather and reduce_scatter go round a ring; those of TREES may go by a tree between nodes;
    the rest goes from rank to rank.
    """
    cluster = cluster.of(collective)
    if collective == "all_to_all":
        return all_to_all(payload, ranks, cluster)
    if collective in ("send", "recv"):
        ends = ((level.latency, level.rate) for level in (cluster.in_node, cluster.between_nodes))
        inside, across = (ring(collective, payload, ranks.size, a, r) for a, r in ends)
        return np.where(np.asarray(ranks.in_node) > 1, inside, across)
    flat = flat_ring(collective, payload, ranks, cluster)
    if collective in TREES:
        return np.minimum(flat, hierarchical(collective, payload, ranks, cluster))
    return flat


def all_to_all(
    payload: Number, ranks: Group, cluster: Cluster, across: Number | None = None
) -> Number:
    """Each rank sends payload/n to each other: what stays in the node over its network, the rest
    over the other, at the same time (NCCL sends point to point). `across`: the payload of those in
    other nodes, where it is another one."""
    further = payload if across is None else across
    n, k, inner, outer = (
        ranks.size,
        np.asarray(ranks.in_node),
        cluster.in_node,
        cluster.between_nodes,
    )
    inside = (k - 1) * (inner.latency + payload / n / inner.rate)
    outside = (n - k) * (outer.latency + further / n / outer.rate)
    return np.maximum(inside, outside)
