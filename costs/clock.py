"""One clock for all ranks: how far each rank's time.perf_counter is from rank 0's.

perf_counter is CLOCK_MONOTONIC on Linux, which all processes of one machine share. Across machines
the offset is taken from the fastest of a few round trips (Cristian 1989): rank 0's reading lies in
the middle of it, give or take half of what it took.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch
import torch.distributed as dist

ROUND_TRIPS = 20


def machine() -> str:
    """What tells this machine's clock from another's."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def offset_to_first() -> float:
    """Seconds to add to this rank's times to have rank 0's. All ranks must call it, once."""
    machines: list = [None] * dist.get_world_size()
    dist.all_gather_object(machines, machine())
    own = 0.0
    for rank, other in enumerate(machines):
        if other == machines[0]:
            continue
        if dist.get_rank() == rank:
            own = ask_first()
        elif dist.get_rank() == 0:
            answer(rank)
    return own


def ask_first() -> float:
    """Offset to rank 0, which must answer() meanwhile."""
    reading = torch.zeros(1, dtype=torch.float64)
    found = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        dist.send(reading, 0)
        dist.recv(reading, 0)
        end = time.perf_counter()
        found.append((end - start, reading.item() - (start + end) / 2))
    return min(found)[1]


def answer(rank: int) -> None:
    """Tell `rank` this rank's time, as often as it asks."""
    reading = torch.zeros(1, dtype=torch.float64)
    for _ in range(ROUND_TRIPS):
        dist.recv(reading, rank)
        reading[0] = time.perf_counter()
        dist.send(reading, rank)
