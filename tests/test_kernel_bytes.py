"""Nothing unaccounted: the ledgers of all ranks against the kernel's counters of the loopback."""

from __future__ import annotations

import pytest

from experiments.figures.kernel_bytes import measure
from experiments.figures.loopback import namespace

FRAMING = 0.02  # headers of TCP, IP and gloo, and acknowledgements: at most, of what is sent


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_kernel_counts_what_the_ledgers_say(world_size: int) -> None:
    try:
        namespace()
    except OSError as reason:
        pytest.skip(str(reason))
    for strategy in measure(world_size):
        assert strategy.total("backend_bytes") > 1e6, f"{strategy.name}: too small to be seen"
        assert 0 < strategy.framing < FRAMING, f"{strategy.name}: {strategy.framing:.4f}"
