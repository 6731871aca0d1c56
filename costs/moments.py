"""Moments of a step on a device: the host's own clock, or events on a GPU's stream.

A GPU runs behind the host. To wait for it at each moment would keep the host from running ahead,
and so change what is measured: events are handed over instead, and read when the step is over.
"""

from __future__ import annotations

import time
from typing import Any

import torch


def wait_for(device: torch.device) -> None:
    """Until it has done what it was told: a GPU runs behind the host, a core never does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HostMoments:
    """A core does what it is told at once: now is now. Seconds are those of time.perf_counter."""

    def begin(self) -> None: ...

    def now(self) -> float:
        return time.perf_counter()

    def end(self) -> None: ...

    def seconds(self, moment: float) -> float:
        return moment


class EventMoments:
    """When a GPU reaches a place in its stream, on the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self) -> None:
        """Of a step. The device has nothing to do then, so that both clocks are read at once."""
        wait_for(self.device)
        self.first, self.zero = self.now(), time.perf_counter()

    def now(self) -> Any:
        """An event behind all that was launched so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def end(self) -> None:
        """Wait for all of them: `seconds` may be asked for afterwards."""
        wait_for(self.device)

    def seconds(self, moment: Any) -> float:
        return self.zero + self.first.elapsed_time(moment) / 1e3  # from ms


def moments_of(device: torch.device) -> HostMoments | EventMoments:
    return EventMoments(device) if device.type == "cuda" else HostMoments()
