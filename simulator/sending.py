"""Adds up what one rank of each plan sends, by collective, axis, dtype and phase of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.layout import MESH_AXES, Precision
from simulator.plans import PRECISIONS, Array, Plans
from simulator.shapes import Rank

ITEM_BYTES = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp16: 2, Precision.fp8: 2}
LOW_BYTES = np.array([ITEM_BYTES[precision] for precision in PRECISIONS])
DTYPE_NAMES = {
    Precision.fp32: "float32",
    Precision.bf16: "bfloat16",
    Precision.fp16: "float16",
    Precision.fp8: "bfloat16",  # what is sent and kept; products alone are in fp8
}

Key = tuple[str, str, str]  # collective, axis, dtype
PhaseKey = tuple[str, str, str, str]  # the same and the phase (costs.program.PHASES)
# A name, its number (ranks of an axis, bytes of a dtype), and the plans that have it
Choices = Sequence[tuple[str, Any, Any]]


@dataclass
class Sent:
    """Messages of one rank in one optimiser step, one entry a plan."""

    calls: Array
    payload_bytes: Array
    group_size: Array  # 0 where a plan has no such message

    def __add__(self, other: Sent) -> Sent:
        return Sent(
            self.calls + other.calls,
            self.payload_bytes + other.payload_bytes,
            np.maximum(self.group_size, other.group_size),
        )


class Sending:
    """What one rank sends, and the names of axes and dtypes that depend on the plan."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.plans = rank, rank.plans
        self.sent: dict[PhaseKey, Sent] = {}
        plans = rank.plans
        sharded = plans.dp_shard > 1  # parallel.layout.weights_axes
        self.replicas = [
            *joined(plans, ("dp_replicate", "cp"), ~sharded),
            *joined(plans, ("dp_replicate",), sharded),
        ]
        self.shards = joined(plans, ("dp_shard", "cp"), sharded)
        self.low = self._low()
        policy = rank.has_policy
        low = [(name, item, where & policy) for name, item, where in self.low]
        self.between = [*low, ("float32", 4, ~policy)]

    def add(
        self,
        phase: str,
        collective: str,
        axes: Choices,
        dtypes: Choices,
        calls: Array,
        numbers: Array,
    ) -> None:
        """`calls` messages of `numbers` numbers in all, over axes of more than one rank."""
        for axis, size, has_axis in axes:
            for dtype, item, has_dtype in dtypes:
                here = has_axis & has_dtype & (np.asarray(size) > 1) & (calls > 0)
                if not here.any():
                    continue
                parts = (calls, numbers * item, size)
                new = Sent(*(np.where(here, part, 0) for part in parts))
                key = collective, axis, dtype, phase
                self.sent[key] = self.sent[key] + new if key in self.sent else new

    def one(self, axis: str) -> Choices:
        """One axis of the mesh."""
        return [(axis, getattr(self.plans, axis), np.True_)]

    def _low(self) -> Choices:
        """The dtype that matmuls run in."""
        places = np.unique(self.plans.precision).tolist()
        return [
            (DTYPE_NAMES[PRECISIONS[i]], ITEM_BYTES[PRECISIONS[i]], self.plans.precision == i)
            for i in places
        ]

    def kept(self, item: int) -> Choices:
        """The dtype of weights or gradients of which each takes `item` bytes."""
        if item == 4:
            return FLOAT32
        assert item == 2, f"{item} bytes: weights and gradients take 4 or 2"
        return [
            (name if name != "float32" else "bfloat16", 2, where) for name, _, where in self.low
        ]


FLOAT32: Choices = [("float32", 4, np.True_)]


def joined(plans: Plans, axes: Iterable[str], where: Array) -> Choices:
    """Those axes as one, named by those of them that have more than one rank."""
    choices: list[tuple[str, Any, Any]] = [("", np.ones_like(plans.pp), where)]
    for axis in axes:
        size = getattr(plans, axis)
        longer = [
            ("*".join(filter(None, (name, axis))), ranks * size, here & (size > 1))
            for name, ranks, here in choices
        ]
        choices = [(name, ranks, here & (size == 1)) for name, ranks, here in choices] + longer
        choices = [choice for choice in choices if choice[2].any()]
    return [choice for choice in choices if choice[0]]


def all_axes(plans: Plans) -> Choices:
    """The group of all ranks, named by all axes that have more than one."""
    return joined(plans, MESH_AXES, np.ones_like(plans.pp, dtype=bool))
