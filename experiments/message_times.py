"""How long gloo's collectives take between ranks of this machine, by size, and the line of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from parallel.by_hand.primitives import all_gather, reduce_scatter
from simulator.collectives import ring
from simulator.hardware import Link

SIZES = (256, 2**14, 2**17, 2**20, 2**22)  # numbers of 4 bytes in the payload
TIMES = 15
Times = dict[str, dict[int, float]]  # seconds by collective and payload


def measure() -> Times:
    """Median seconds of each collective. All ranks call it, and each finds its own times."""
    found: Times = {}
    for size in SIZES:
        for name, call in calls(size).items():
            found.setdefault(name, {})[4 * size] = timed(call)
    return found


def calls(size: int) -> dict[str, Callable[[], Any]]:
    """Each collective on a payload of `size` numbers, by NCCL's convention."""
    n, rank = dist.get_world_size(), dist.get_rank()
    whole, part, other = torch.ones(size), torch.ones(size // n), torch.empty(size)
    peer = rank ^ 1  # ranks send in pairs; of an odd number the last has none

    def send() -> None:
        if peer >= n:
            return
        if rank % 2:
            dist.recv(other, peer)
        else:
            dist.send(whole, peer)

    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: all_gather(whole, part),
        "reduce_scatter": lambda: reduce_scatter(part, whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "send": send,
    }


def timed(call: Callable[[], Any]) -> float:
    """Median seconds; all ranks begin each call together."""
    taken = []
    for _ in range(TIMES):
        dist.barrier()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def fit(times: Times, ranks: int) -> dict[str, Link]:
    """Latency and bandwidth of a ring's steps (simulator/collectives.py), with the least squares of
    relative errors."""
    return {name: _line(name, of_sizes, ranks) for name, of_sizes in times.items()}


def _line(collective: str, of_sizes: dict[int, float], ranks: int) -> Link:
    seconds = np.array(list(of_sizes.values()))
    payloads = np.array(list(of_sizes), dtype=np.float64)
    steps = ring(collective, 0.0 * payloads, ranks, 1.0, 1.0)
    moved = ring(collective, payloads, ranks, 0.0, 1.0)
    matrix = np.stack([steps / seconds, moved / seconds], axis=1)
    size = matrix.max(axis=0)
    latency, per_byte = np.linalg.lstsq(matrix / size, np.ones(len(seconds)), rcond=None)[0] / size
    least = 1e-12  # of a noisy line that would slope down
    return Link(float(f"{1 / max(per_byte, least):.4g}"), float(f"{max(latency, 0.0):.4g}"))
