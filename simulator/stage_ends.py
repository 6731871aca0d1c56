"""What a pipeline rank holds of the messages between stages (torch.distributed.pipelining)."""

from __future__ import annotations

import numpy as np

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
    ends = np.where(rank.local_stages > 1, _of_several(of, later), ends)
    return (plans.pp > 1) * ends * of.width


def _of_several(of: Activations, later: Array | bool) -> Array:
    """The same where a rank has several stages: as if all gradients had come by then, and each
    stage had sent one. Near for looped_bfs, whose fullest moment is before any has."""
    rank, m = of.rank, of.plans.micro_batches
    ends = np.zeros_like(m)
    for lap, flights in enumerate(of.flights):
        stage, here = rank.stage(lap), lap < rank.local_stages
        came = np.where(later, m, lap == rank.local_stages - 1)
        ends = ends + (here & (stage > 0)) * (m + later)
        ends = ends + (here & (stage < rank.stage_count - 1)) * (flights + came)
    return ends
