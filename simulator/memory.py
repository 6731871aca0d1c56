"""Closed forms of what fills a rank's memory when it is fullest, by category (costs/memory.py).

Arrays have one entry a plan; sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from simulator.activations import LOW_BYTES, Activations
from simulator.plans import Array, Plans
from simulator.shapes import Rank, padded, weights_of


@dataclass
class Memory:
    """Bytes of a rank when it is fullest. The parts add up to the peak."""

    parameters: Array
    gradients: Array
    optimizer: Array
    activations: Array
    communication: Array

    @property
    def peak(self) -> Array:
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.communication


def memory(plans: Plans, place: Array | int = 0, rank: Rank | None = None) -> Memory:
    """The fullest moment of pp rank `place` in one optimiser step, on its first data rank.

    Three moments are looked at: the loss begins its backward, and the MLP's backward of the rank's
    last and of its first block. The optimizer's step adds nothing: its kernel is fused.
    """
    on = Held(rank or Rank(plans, place))
    moments = (on.at_the_loss(), on.in_last_block(), on.in_first_block())
    parameters, optimizer = on.parameters, on.optimizer
    parts = [np.stack([moment[i] for moment in moments]) for i in range(3)]
    fullest = np.argmax(sum(parts), axis=0)[None]
    gradients, activations, communication = (
        np.take_along_axis(part, fullest, axis=0)[0] for part in parts
    )
    return Memory(parameters, gradients, optimizer, activations, communication)


class Held:
    """What one rank holds, and what it holds for a while."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.plans, self.model = rank, rank.plans, rank.plans.model
        self.low = LOW_BYTES[self.plans.precision]
        self.of = Activations(rank)

    # states

    @cached_property
    def numbers(self) -> Array:
        """Weights of this rank, of padded shards."""
        return self.outer + self.rank.layers * self.block

    @cached_property
    def outer(self) -> Array:
        return self.rank.of_outer(self.rank.weight_shards) // self.rank.weight_shards

    @cached_property
    def block(self) -> Array:
        n, rest = self.rank.weight_shards, self.rank.expert_shards
        return self.rank.of_block(n) // n + self.rank.of_experts(rest) // rest

    @property
    def parameters(self) -> Array:
        return self.plans.numerics.weights * self.numbers

    @property
    def optimizer(self) -> Array:
        """AdamW's moments, and its count of steps in each tensor (4 bytes). zero_stage=1 divides
        them: evenly, as Megatron-LM does; ZeroRedundancyOptimizer hands out whole tensors, so that
        some ranks have more (an approximation)."""
        rank, model = self.rank, self.model
        outer = len(model.outer_shapes) * rank.alone + (1 - rank.alone) * self._outer_tensors
        tensors = rank.layers * len(model.block_shapes) + outer
        n = np.where(rank.zero1, rank.shards, 1)
        return self.plans.numerics.optimizer * -(-self.numbers // n) + 4 * -(-tensors // n)

    @property
    def _outer_tensors(self) -> Array:
        names = list(self.model.outer_shapes)
        front = sum(name.startswith(("embedding", "positions")) for name in names)
        return self.rank.first * front + self.rank.last * (len(names) - front + self.model.tied)

    def gradients(self, numbers: Array) -> Array:
        """Of so many weights; of all of them where an earlier micro-batch has left its own, and
        where they are views of buckets, which stay (parallel/ddp.py)."""
        rank, plans = self.rank, self.plans
        wrapper = ~rank.has_policy & (rank.replicas * rank.shards > 1)
        always = (plans.micro_batches > 1) | wrapper
        return plans.numerics.gradients * np.where(always, self.numbers, numbers)

    # moments: (gradients, activations, communication)

    def at_the_loss(self) -> tuple[Array, Array, Array]:
        """Log-probabilities, and gradients of them and of the logits, all in fp32: 3 V a token."""
        logits = 12 * self.of.tokens * self.model.vocab_size // self.plans.tp
        activations = self.of.waiting + self.of.head + self.rank.last * logits
        return self.gradients(0 * self.outer), activations, self.gathered

    def in_last_block(self) -> tuple[Array, Array, Array]:
        activations = self.of.waiting + self.of.made_again + self.of.in_mlp
        return self.gradients(self._back + self._down), activations, self.gathered_in_backward

    def in_first_block(self) -> tuple[Array, Array, Array]:
        """All blocks but this one of this micro-batch have gone."""
        gone = (self.rank.blocks[0] - 1).clip(0) * self.of.kept
        activations = self.of.waiting - gone + self.of.made_again + self.of.in_mlp
        later = self._back + (self.rank.layers - 1) * self.block + self._down
        return self.gradients(later), activations, self.gathered_in_backward

    @cached_property
    def _back(self) -> Array:
        """Weights of norm and head, whose gradients come first."""
        rank, shapes = self.rank, self.model.outer_shapes
        names = [name for name in shapes if name.startswith(("norm", "head"))]
        n = rank.weight_shards
        numbers = padded(weights_of({x: shapes[x] for x in names}), self.plans, n) // n
        if self.model.tied:
            copy = {"embedding.weight": shapes["embedding.weight"]}
            numbers = numbers + (1 - rank.alone) * padded(weights_of(copy), self.plans, n) // n
        return rank.last * numbers

    @cached_property
    def _down(self) -> Array:
        """Weights of `down`, whose gradient is there when the rest of the MLP's comes; fully_shard
        and replicate hand over a block's gradients when all are there."""
        shapes = self.model.block_shapes
        down = {name: shapes[name] for name in shapes if ".down" in name}
        at_once = self.rank.has_policy | self.rank.sharded
        return ~at_once * padded(weights_of(down), self.plans, np.ones_like(self.plans.tp))

    # communication

    @property
    def gathered(self) -> Array:
        """Weights that are whole for a while: those outside of blocks, and a block's, or with
        zero_stage=2 all of them (Zhao et al. 2023, PyTorch FSDP, section 3.2)."""
        rank = self.rank
        n, rest = rank.weight_shards, rank.expert_shards
        outer = rank.of_outer(n)
        block = rank.of_block(n) + rank.of_experts(rest)
        held = np.where((self.plans.zero_stage == 2) | (self.plans.pp > 1), rank.layers, 1)
        return rank.sharded * self.low * (outer + held * block)

    @property
    def gathered_in_backward(self) -> Array:
        """The same, one block fetched ahead, and a block's gradients on their way in fp32."""
        rank = self.rank
        block = rank.of_block(rank.weight_shards) + rank.of_experts(rank.expert_shards)
        ahead = self.low * block * ((self.plans.zero_stage == 3) & (self.plans.pp == 1))
        return self.gathered + rank.sharded * (ahead + self.plans.numerics.gradients * block)
