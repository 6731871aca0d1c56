"""What a pipeline rank holds of the messages between stages (torch.distributed.pipelining)."""

from __future__ import annotations

from simulator.activations import Activations
from simulator.plans import Array


def stage_ends(of: Activations, later: Array | bool, flying: Array) -> Array:
    """Bytes, with so many micro-batches `flying`, of one stage a rank: a buffer for each
    micro-batch's activations that come; gradients that came, which stay; outputs of those in flight
    and, once two are done, of one more (as measured); the last gradient that was sent. `later`: the
    last moment at which that many fly, or the first backward."""
    rank, plans = of.rank, of.plans
    done = later * (plans.micro_batches - flying)
    comes, goes = rank.place > 0, rank.place < plans.pp - 1
    ends = comes * (plans.micro_batches + (done > 0)) + goes * (done + 1 + flying + (done > 1))
    return (plans.pp > 1) * ends * of.width
