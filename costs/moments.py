"""Moments of a step on a device: the host's own clock, or events on a GPU's stream.

A GPU runs behind the host. To wait for it at each moment would keep the host from running ahead,
and so change what is measured: events are handed over instead, and read when the next step is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

TOGETHER = 100  # steps from one reading of both clocks to the next


def wait_for(device: torch.device) -> None:
    """Until it has done what it was told: a GPU runs behind the host, a core never does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Reader = Callable[[Any], float]  # a moment in seconds, those of time.perf_counter


class HostMoments:
    """A core does what it is told at once: now is now."""

    lags = False

    def begin(self) -> None: ...

    def now(self) -> float:
        return time.perf_counter()

    def reader(self) -> Reader:
        return float


class EventMoments:
    """When a GPU reaches a place in its stream, on the host's clock."""

    lags = True  # moments can be read once the device has come to them

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, 0

    def begin(self) -> None:
        """Of a step. Now and then the device must have nothing to do, so that both clocks are read
        at once; at every step that would keep the host from preparing the next one."""
        if self.steps % TOGETHER == 0:
            wait_for(self.device)
            self.first, self.zero = self.now(), time.perf_counter()
        self.steps += 1

    def now(self) -> Any:
        """An event behind all that was launched so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def reader(self) -> Reader:
        """For moments of this step, which it waits for."""
        first, zero = self.first, self.zero

        def seconds(moment: Any) -> float:
            moment.synchronize()
            return zero + first.elapsed_time(moment) / 1e3  # from ms

        return seconds


def moments_of(device: torch.device) -> HostMoments | EventMoments:
    return EventMoments(device) if device.type == "cuda" else HostMoments()
