"""What one pipeline rank of each plan holds: its stages, and the sizes of its weights.

Everything is an array with one entry a plan; numbers are int64, and divisions are whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache

import numpy as np

from minigpt.config import ModelConfig
from parallel.layout import PipelineConfig
from parallel.stages import split_layers
from simulator.plans import SCHEDULES, Array, Plans, distinct

FRONT = ("embedding.weight", "positions.weight")  # of the first stage; all else outer is the last's
WHOLE = ("norm", "positions", "router")
V_SHAPED = np.array([PipelineConfig(schedule).is_v_shaped for schedule in SCHEDULES])


@dataclass(frozen=True)
class Weight:
    """One parameter of a block, or of what is in no block."""

    name: str
    shape: tuple[int, ...]

    @property
    def is_cut(self) -> bool:
        """Whether tp cuts it: not norms, positions, the router, the biases of what narrows."""
        whole = any(part in self.name for part in WHOLE)
        return not whole and not self.name.endswith(("out.bias", "down.bias"))

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.name

    def local(self, plans: Plans) -> tuple[Array, Array]:
        """Rows, and numbers in a row, that tp and ep leave: rows of most weights are cut, columns
        of those that narrow and of experts, whose rows are the experts that ep spreads."""
        rows, width = self.shape[0], math.prod(self.shape[1:])
        one = np.ones_like(plans.tp)
        if self.is_expert:
            return rows // plans.ep, width // plans.tp
        if not self.is_cut:
            return rows * one, width * one
        if self.name.endswith(("out.weight", "down.weight")):
            return rows * one, width // plans.tp
        return rows // plans.tp, width * one


def weights_of(shapes: dict[str, tuple[int, ...]]) -> list[Weight]:
    return [Weight(name, shape) for name, shape in shapes.items()]


def padded(weights: Iterable[Weight], plans: Plans, n: Array) -> Array:
    """Numbers in weights once fully_shard has cut them n ways: it cuts the first dimension, and
    pads it to a multiple of n. Experts that are fewer than n are cut across (parallel/fsdp.py)."""
    total = np.zeros_like(plans.tp)
    for weight in weights:
        rows, width = weight.local(plans)
        kept = -(-rows // n) * n
        if weight.is_expert:
            kept = np.where((rows < n) & (weight.shape[1] % n == 0), rows, kept)
        total = total + kept * width
    return total


@lru_cache(maxsize=4096)
def _balanced(model: tuple, stages: int, seq_len: int) -> tuple[int, ...]:
    return tuple(split_layers(ModelConfig(*model), stages, seq_len))


class Rank:
    """The pp rank `place` of each plan (an array, or one for all). Plans must be such as
    parallel.rules lets pass, or as Plans says that other programs run."""

    def __init__(self, plans: Plans, place: Array | int = 0) -> None:
        self.plans = plans
        self.place = np.broadcast_to(np.asarray(place, dtype=np.int64), plans.pp.shape)

    # the stages of this rank

    @cached_property
    def local_stages(self) -> Array:
        return np.where(self.plans.pp > 1, self.plans.local_stages, 1)

    @cached_property
    def stage_count(self) -> Array:
        return self.plans.pp * self.local_stages

    @cached_property
    def v_shaped(self) -> Array:
        return V_SHAPED[self.plans.schedule] & (self.plans.pp > 1)

    def stage(self, lap: int) -> Array:
        """The number of this rank's `lap`-th stage."""
        back = self.v_shaped & bool(lap % 2)
        return lap * self.plans.pp + np.where(back, self.plans.pp - 1 - self.place, self.place)

    @cached_property
    def _splits(self) -> tuple[Array, Array]:
        """Blocks of each stage for every number of stages, and the row of each plan."""
        counts, rows = np.unique(self.stage_count, return_inverse=True)
        table = np.zeros((len(counts), int(counts.max())), dtype=np.int64)
        fields, given = astuple(self.plans.model), self.plans.split
        for row, count in enumerate(counts.tolist()):
            split = given if given else _balanced(fields, count, self.plans.seq_len)
            table[row, :count] = split
        return table, rows

    @cached_property
    def blocks(self) -> list[Array]:
        """Blocks of each of this rank's stages; 0 where a plan has no such stage."""
        table, rows = self._splits
        laps = range(int(self.local_stages.max()))
        held = [lap < self.local_stages for lap in laps]
        return [
            np.where(here, table[rows, np.where(here, self.stage(lap), 0)], 0)
            for lap, here in zip(laps, held, strict=True)
        ]

    @cached_property
    def layers(self) -> Array:
        """Blocks of all its stages."""
        return sum(self.blocks, np.zeros_like(self.plans.pp))

    @cached_property
    def first(self) -> Array:
        """1 where it has the first stage, else 0."""
        return (self.place == 0).astype(np.int64)

    @cached_property
    def last(self) -> Array:
        """1 where it has the last stage: a V-shaped pipeline ends where it began."""
        end = np.where(self.v_shaped, 0, self.plans.pp - 1)
        return (self.place == end).astype(np.int64)

    @cached_property
    def alone(self) -> Array:
        """1 where one stage is all of the model."""
        return (self.stage_count == 1).astype(np.int64)

    @cached_property
    def turn(self) -> Array:
        """1 where two of its stages are neighbours: at the turn of a V, on the last rank."""
        return (self.v_shaped & (self.place == self.plans.pp - 1)).astype(np.int64)

    @cached_property
    def pipelines(self) -> Array:
        """(plans, 5): what decides the order of work (simulator.schedules.order_of)."""
        plans = self.plans
        parts = (plans.schedule, plans.pp, self.local_stages, plans.micro_batches, self.place)
        return np.stack(parts, axis=1)

    # its weights

    @cached_property
    def block_weights(self) -> list[Weight]:
        return weights_of(self.plans.model.block_shapes)

    def of_dense(self, n: Array) -> Array:
        """Numbers of a block cut n ways, without its experts."""
        return padded([w for w in self.block_weights if not w.is_expert], self.plans, n)

    def of_block(self, n: Array) -> Array:
        """Numbers of a block cut n ways, without experts that ep has spread."""
        size = self.of_dense(n)
        if not any(weight.is_expert for weight in self.block_weights):
            return size
        return size + np.where(self.plans.ep == 1, self._experts(n), 0)

    def of_experts(self, n: Array) -> Array:
        """Numbers of a block's experts cut n ways, those that ep has spread; else 0."""
        if not any(weight.is_expert for weight in self.block_weights):
            return np.zeros_like(n)
        return np.where(self.plans.ep > 1, self._experts(n), 0)

    def _experts(self, n: Array) -> Array:
        return padded([w for w in self.block_weights if w.is_expert], self.plans, n)

    def of_outer(self, n: Array) -> Array:
        """Numbers of what this rank has besides blocks. A tied head on another stage than its
        embedding is a weight of its own."""
        return self.outer_of(self.first, self.last, n)

    def outer_of(self, first: Array, last: Array, n: Array) -> Array:
        """Numbers in weights outside blocks: embedding and positions where `first`, norm and head
        where `last`. A tied head apart from its embedding counts as a weight of its own."""
        outer = weights_of(self.plans.model.outer_shapes)
        front = padded([w for w in outer if w.name in FRONT], self.plans, n)
        back = padded([w for w in outer if w.name not in FRONT], self.plans, n)
        size = first * front + last * back
        if self.plans.model.tied:
            copy = padded([w for w in outer if w.name == "embedding.weight"], self.plans, n)
            size = size + last * (1 - self.alone) * copy
        return size

    @cached_property
    def outer_stages(self) -> Array:
        """How many of its stages have weights outside of blocks."""
        return self.first + self.last - self.alone

    # how they are spread

    @cached_property
    def zero1(self) -> Array:
        return (self.plans.dp_shard > 1) & (self.plans.zero_stage == 1)

    @cached_property
    def like_megatron(self) -> Array:
        """zero_stage=1 by reduce_scatter and all_gather."""
        cut = (self.plans.pp > 1) | (self.plans.tp > 1) | (self.plans.ep > 1)
        return self.zero1 & (cut | self.plans.distributed_optimizer)

    @cached_property
    def sharded(self) -> Array:
        """Weights are sharded: zero_stage 2 or 3."""
        return (self.plans.dp_shard > 1) & (self.plans.zero_stage > 1)

    @cached_property
    def scatters(self) -> Array:
        """How often a step scatters gradients, where it does."""
        return np.where(self.plans.syncs_each, self.plans.micro_batches, 1)

    @cached_property
    def replicas(self) -> Array:
        """Ranks on the axis that replicates weights (parallel.layout.weights_axes)."""
        plans = self.plans
        return plans.dp_replicate * np.where(plans.dp_shard > 1, 1, plans.cp)

    @cached_property
    def shards(self) -> Array:
        """Ranks on the axis that shards weights or, with zero_stage=1, the optimizer only."""
        return np.where(self.plans.dp_shard > 1, self.plans.dp_shard * self.plans.cp, 1)

    @cached_property
    def weight_shards(self) -> Array:
        """In how many parts a rank's weights are cut by the data axes."""
        return np.where(self.sharded, self.shards, 1)

    @cached_property
    def expert_rest(self) -> Array:
        """What ep leaves of the innermost data axis."""
        plans = self.plans
        return np.where(plans.dp_shard > 1, plans.dp_shard, plans.dp_replicate) // plans.ep

    @cached_property
    def expert_shards(self) -> Array:
        """In how many parts the experts that ep has spread are cut by what it leaves."""
        return np.where(self.sharded, self.expert_rest, 1)

    @cached_property
    def has_policy(self) -> Array:
        """Weights have a precision policy, and activations are low throughout; else autocast.

        So in this program; weights that are kept in two bytes make all activations low too.
        """
        plans = self.plans
        cut = (plans.pp > 1) | (plans.tp > 1) | (plans.ep > 1)
        policy = self.sharded | ((plans.data_parallel * plans.cp > 1) & cut)
        return policy | (plans.numerics.weights == 2)

    @cached_property
    def activation(self) -> Array:
        """Numbers of a micro-batch's activations on one rank, B T D."""
        plans = self.plans
        return plans.micro_batch_size * plans.seq_len // plans.cp * plans.model.d_model


def stage_blocks(plans: Plans) -> Array:
    """(plans, stages): blocks of each stage of the pipeline, 0 where a plan has no such stage."""
    table, rows = Rank(plans)._splits
    return table[rows]


def most_blocks(plans: Plans) -> Array:
    """Blocks of the pp rank that has most."""
    most = np.zeros_like(plans.pp)
    columns = (plans.pp, plans.local_stages, V_SHAPED[plans.schedule])
    for first, here in zip(*distinct(columns), strict=True):
        one = plans[[first]]
        most[here] = max(int(Rank(one, place).layers[0]) for place in range(int(one.pp[0])))
    return most
