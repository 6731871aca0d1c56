"""What a pipeline rank holds of the messages between stages (torch.distributed.pipelining)."""

from __future__ import annotations

from simulator.activations import Activations
from simulator.plans import Array


def stage_ends(of: Activations, later: Array | bool, flying: Array) -> Array:
    """Bytes that a rank with one stage keeps for messages while so many micro-batches are `flying`.

    A buffer for the activations of each micro-batch that come; every gradient that came; the
    outputs of those in flight and, once two are done, of one more (as measured); the gradient sent
    last. `later`: the last moment at which that many fly, else the first backward.
    """
    rank, plans = of.rank, of.plans
    done = later * (plans.micro_batches - flying)
    comes, goes = rank.place > 0, rank.place < plans.pp - 1
    ends = comes * (plans.micro_batches + (done > 0)) + goes * (done + 1 + flying + (done > 1))
    return (plans.pp > 1) * ends * of.width
