"""What tests of traces run on real ranks."""

from __future__ import annotations

import time
from unittest.mock import patch

import torch.distributed as dist

from costs import clock


def offset_of_a_clock_that_is_ahead(seconds: float) -> float:
    """What rank 1 finds of its distance to rank 0, were they on two machines."""
    right = time.perf_counter
    if dist.get_rank() == 0:
        clock.answer(1)
        return 0.0
    with patch.object(clock.time, "perf_counter", lambda: right() + seconds):
        return clock.ask_first()
