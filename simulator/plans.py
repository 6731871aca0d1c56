"""Many plans of one model as arrays: what the closed forms take, a hundred thousand at a time.

A plan is a layout with its options: what `./launch.sh` trains, and what other programs do that this
one does not (weights kept in bf16, attention that keeps its T x T matrix).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.config import ModelConfig
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    PipelineSchedule,
    Precision,
)

# An option in an array is its place here
PRECISIONS = tuple(Precision)
CHECKPOINTING = tuple(ActivationCheckpointing)
SCHEDULES = tuple(PipelineSchedule)
NONE = CHECKPOINTING.index(ActivationCheckpointing.none)
SELECTIVE = CHECKPOINTING.index(ActivationCheckpointing.selective)
Array = NDArray[Any]


@dataclass(frozen=True)
class Numerics:
    """Bytes that one parameter takes where it is kept. The defaults are this program's: all fp32.

    Megatron-LM in bf16: weights 2, gradients 4, optimizer 12 (two moments and a master copy).
    """

    weights: int = 4
    gradients: int = 4
    optimizer: int = 8


@dataclass(frozen=True)
class Plans:
    """One model, one sequence length; all else an array, one entry a plan."""

    model: ModelConfig
    seq_len: int
    pp: Array
    dp_replicate: Array
    dp_shard: Array
    cp: Array
    tp: Array
    ep: Array
    micro_batch_size: Array
    micro_batches: Array  # of one optimiser step (gradient_accumulation_steps)
    zero_stage: Array
    syncs_each: Array  # bool: gradients are scattered after each micro-batch (gradient_sync)
    sequence_parallel: Array  # bool
    precision: Array  # place in PRECISIONS
    checkpointing: Array  # place in CHECKPOINTING
    schedule: Array  # place in SCHEDULES
    local_stages: Array  # stages that a pp rank holds
    numerics: Numerics = Numerics()
    flash: bool = True  # attention never keeps its T x T matrix
    clipped: bool = True  # a gradient norm is taken
    split: tuple[int, ...] | None = None  # blocks of each stage, for all plans; None: balanced
    # zero_stage=1 by reduce_scatter and all_gather, as Megatron-LM does it. Together with pp, tp or
    # ep, where this program has no zero_stage=1, it is always so
    distributed_optimizer: bool = False

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout, options: Options, **changes: Any) -> Plans:
        """One plan. `changes` are fields of this class."""
        single = {
            **layout.by_axis,
            "micro_batch_size": options.micro_batch_size,
            "micro_batches": options.micro_batches,
            "zero_stage": options.zero_stage,
            "syncs_each": options.gradient_sync == GradientSync.micro_batch,
            "sequence_parallel": options.sequence_parallel,
            "precision": PRECISIONS.index(options.precision),
            "checkpointing": CHECKPOINTING.index(options.activation_checkpointing),
            "schedule": SCHEDULES.index(options.pipeline.schedule),
            "local_stages": options.pipeline.local_stages if layout.pp > 1 else 1,
        }
        arrays: dict[str, Any] = {name: np.array([value]) for name, value in single.items()}
        split = options.pipeline.split
        given: dict[str, Any] = {"split": tuple(split) if split and layout.pp > 1 else None}
        return cls(model, options.seq_len, **arrays, **{**given, **changes})

    @classmethod
    def product(
        cls, model: ModelConfig, seq_len: int, choices: dict[str, Iterable[Any]], **changes: Any
    ) -> Plans:
        """Every combination of the values that `choices` gives for each of the array fields."""
        grids = np.meshgrid(*(np.array(list(v)) for v in choices.values()), indexing="ij")
        arrays: dict[str, Any] = {
            name: grid.ravel() for name, grid in zip(choices, grids, strict=True)
        }
        return cls(model, seq_len, **arrays, **changes)

    def __len__(self) -> int:
        return len(self.pp)

    def __getitem__(self, which: Any) -> Plans:
        """The plans of a mask, a slice or a list of places."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen = {n: np.atleast_1d(v[which]) for n, v in values.items() if _is_array(v)}
        return replace(self, **(values | chosen))

    @property
    def world_size(self) -> Array:
        return math.prod(getattr(self, axis) for axis in MESH_AXES)

    @property
    def data_parallel(self) -> Array:
        return self.dp_replicate * self.dp_shard

    @property
    def tokens(self) -> Array:
        """Of one optimiser step, over all ranks."""
        return self.micro_batch_size * self.micro_batches * self.data_parallel * self.seq_len


def distinct(columns: Iterable[Array]) -> tuple[Array, list[Array]]:
    """Of the combinations that columns of whole numbers have: the place of the first of each, and
    all places of each."""
    first, *others = columns
    key, combinations = first.astype(np.int64), int(first.max(initial=0)) + 1
    for column in others:
        size = int(column.max(initial=0)) + 1
        if combinations * size >= 2**62:  # no two may have the same number: counted anew
            key, column = (np.unique(x, return_inverse=True)[1] for x in (key, column))
            combinations, size = (int(x.max()) + 1 for x in (key, column))
        key, combinations = key * size + column, combinations * size
    order = np.argsort(key, kind="stable")
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    return order[starts], np.split(order, starts[1:]) if len(key) else []


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)
