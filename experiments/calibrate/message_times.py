"""How long collectives take between ranks, by size and number of ranks, and the line of it.

gloo's between processes of this machine, NCCL's between GPUs; in a node, and between nodes where
there are several. All groups of a size work at the same time, as they do in training.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from costs.moments import wait_for
from experiments.calibrate.spread import Point, Spread, spread_of
from parallel.by_hand.primitives import all_gather, reduce_scatter
from simulator.collectives import ring
from simulator.hardware import Link

# numbers of 4 bytes in the payload
SIZES = {
    "cpu": (256, 2**14, 2**17, 2**20, 2**22),
    "cuda": (256, 2**14, 2**17, 2**20, 2**23, 2**26),
}
TIMES = 15
IN_NODE, BETWEEN = "in_node", "between_nodes"  # levels of simulator.hardware.Cluster
Groups = list[list[int]]  # ranks of groups that work at the same time


@dataclass(frozen=True)
class Timed:
    """One collective of one payload, as rank 0 found it."""

    level: str
    collective: str
    ranks: int
    payload: int  # bytes
    seconds: Spread


def groups(world: int, node_size: int) -> list[tuple[str, Groups]]:
    """Who is measured together: 2, 4, 8 and so on up to all ranks of a node, and then one rank of
    each node with its like on 2, 4 and so on up to all nodes."""
    nodes = world // node_size
    found = []
    for size in sizes_up_to(node_size):
        first = range(0, node_size - size + 1, size)
        found.append((IN_NODE, [[i + j for j in range(size)] for i in first]))
    for size in sizes_up_to(nodes):
        like = [[node * node_size + i for node in range(size)] for i in range(node_size)]
        found.append((BETWEEN, like))
    return found


def sizes_up_to(most: int) -> list[int]:
    """2, 4, 8 and so on, and `most` itself; none where there is but one."""
    sizes = [2**n for n in range(1, most.bit_length()) if 2**n < most]
    return [*sizes, most] if most > 1 else []


def measure(device: torch.device, node_size: int) -> list[Timed]:
    """Every collective in every group. All ranks call it, and each finds its own times."""
    found = []
    for level, together in groups(dist.get_world_size(), node_size):
        made = [(ranks, dist.new_group(ranks)) for ranks in together]  # all ranks make all of them
        mine = next(((r, group) for r, group in made if dist.get_rank() in r), None)
        for size in SIZES[device.type]:
            found += measure_group(level, *mine, size, device) if mine else []
        dist.barrier()  # the next groups begin together
    return found


def measure_group(
    level: str, ranks: list[int], group: Any, size: int, device: torch.device
) -> list[Timed]:
    size -= size % len(ranks)  # which must divide it
    return [
        Timed(level, name, len(ranks), 4 * size, timed(call, group, device))
        for name, call in calls(size, ranks, group, device).items()
    ]


def calls(
    size: int, ranks: list[int], group: Any, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Each collective on a payload of `size` numbers, by NCCL's convention."""
    n, place = len(ranks), ranks.index(dist.get_rank())
    whole, other = torch.ones(size, device=device), torch.empty(size, device=device)
    part = torch.ones(size // n, device=device)
    other_end = place ^ 1  # ranks send in pairs; of an odd number the last has none

    def send() -> None:
        if other_end >= n:
            return
        if place % 2:
            dist.recv(other, ranks[other_end], group)
        else:
            dist.send(whole, ranks[other_end], group)

    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: all_gather(whole, part, group=group),
        "reduce_scatter": lambda: reduce_scatter(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, ranks[0], group=group),
        "send": send,
    }


def timed(call: Callable[[], Any], group: Any, device: torch.device) -> Spread:
    """Seconds; all ranks begin each call together."""
    taken = []
    for _ in range(TIMES):
        dist.barrier(group)
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        taken.append(time.perf_counter() - start)
    return spread_of(taken[1:])


def fit(found: list[Timed]) -> dict[str, dict[str, Link]]:
    """By level and collective: latency and bandwidth of a ring's steps (simulator/collectives.py)
    over all sizes and numbers of ranks, with the least squares of relative errors."""
    lines: dict[str, dict[str, list[Timed]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        lines[one.level][one.collective].append(one)
    return {
        level: {name: _line(name, same) for name, same in by_name.items()}
        for level, by_name in lines.items()
    }


def _line(collective: str, found: list[Timed]) -> Link:
    seconds = np.array([one.seconds.middle for one in found])
    payloads = np.array([one.payload for one in found], dtype=np.float64)
    ranks = np.array([one.ranks for one in found])
    steps = ring(collective, 0.0 * payloads, ranks, 1.0, 1.0)
    moved = ring(collective, payloads, ranks, 0.0, 1.0)
    matrix = np.stack([steps / seconds, moved / seconds], axis=1)
    size = matrix.max(axis=0)
    latency, per_byte = np.linalg.lstsq(matrix / size, np.ones(len(seconds)), rcond=None)[0] / size
    least = 1e-12  # of a noisy line that would slope down
    return Link(float(f"{1 / max(per_byte, least):.4g}"), float(f"{max(latency, 0.0):.4g}"))


def points(found: list[Timed], links: dict[str, dict[str, Link]]) -> list[Point]:
    """Each measured message beside its line."""

    def fitted(one: Timed) -> float:
        link = links[one.level][one.collective]
        return float(ring(one.collective, one.payload, one.ranks, link.latency, link.bandwidth))

    return [
        Point(
            "message",
            f"{one.level} {one.collective}",
            one.ranks,
            one.payload,
            one.payload,
            one.seconds,
            fitted(one),
        )
        for one in found
    ]
