"""A ledger's steps from the closed forms: one rank of each pipeline place, on a cluster."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from costs.ledger import MEMORY_PARTS, TIME_PARTS, wire_bytes
from minigpt.config import ModelConfig
from parallel.layout import MESH_AXES, Layout, Options
from simulator.collectives import group, seconds
from simulator.communication import messages_by_phase
from simulator.flops import hardware_flops
from simulator.hardware import Cluster
from simulator.memory import memory
from simulator.plans import Plans
from simulator.search import predict
from simulator.shapes import Rank

Step = dict[str, Any]


def formula_steps(
    model: ModelConfig,
    layout: Layout,
    options: Options,
    cluster: Cluster,
    clipped: bool = True,
    places: Sequence[int] | None = None,
) -> list[Step]:
    """`step` of a ledger for the first rank of each pp place, or of some `places`. Times are those
    of the whole plan.

    The plan must be one that parallel.rules lets pass.
    """
    plans = Plans.of(model, layout, options, clipped=clipped)
    predicted = predict(plans, cluster)
    time_s: dict[str, Any] = {key: float(value[0]) for key, value in predicted.time_s.items()}
    time_s |= {part: None for part in TIME_PARTS if part not in time_s}
    model_flops, peak = float(predicted.model_flops[0]), float(predicted.peak_flops[0])
    steps = []
    for place in range(layout.pp) if places is None else places:
        rank = Rank(plans, place)
        held = memory(plans, place, rank)
        parts = {part: int(getattr(held, part)[0]) for part in MEMORY_PARTS}
        hardware = int(hardware_flops(plans, place, rank)[0])
        tokens = int(plans.tokens[0])
        steps.append(
            {
                "tokens": tokens,
                "time_s": time_s,
                "memory_bytes": {"peak": sum(parts.values()), **parts},
                "communication": rows(rank, layout, cluster),
                "flops": {"model": model_flops, "hardware": hardware},
                "tokens_per_s": tokens / time_s["total"],
                "mfu": model_flops / peak / time_s["total"],
                "hfu": hardware / peak / time_s["total"],
            }
        )
    return steps


def rows(rank: Rank, layout: Layout, cluster: Cluster) -> list[dict[str, Any]]:
    """A ledger's `communication` of one rank; time_s is that of its messages one by one."""
    made = []
    for (collective, axis, dtype, phase), sent in messages_by_phase(rank).items():
        calls, payload, size = (
            int(a[0]) for a in (sent.calls, sent.payload_bytes, sent.group_size)
        )
        if not calls:
            continue
        ranks = group(size, stride(axis, layout), cluster.node_size)
        each = float(seconds(collective, payload / calls, ranks, cluster))
        made.append(
            {
                "collective": collective,
                "axis": axis,
                "group_size": size,
                "dtype": dtype,
                "phase": phase,
                "calls": calls,
                "payload_bytes": payload,
                "wire_bytes": wire_bytes(collective, payload, size),
                "time_s": calls * each,
            }
        )
    return made


def stride(axis: str, layout: Layout) -> int:
    """How many ranks apart neighbours of an axis are: the product of the axes inside it.

    `axis` as a ledger's rows name it: one, several joined by "*", or what "/ep" leaves of one. ep
    is the inner part of the data axis that it is carved out of.
    """
    names = [name for name in re.split(r"[*/]", axis) if name in MESH_AXES]
    inner = names[-1] if names else "dp_shard" if layout.dp_shard > 1 else "dp_replicate"
    after = MESH_AXES[MESH_AXES.index(inner) + 1 :]
    apart = math.prod(getattr(layout, name) for name in after)
    return apart * layout.ep if axis.endswith("/ep") else apart
