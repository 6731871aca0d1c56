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

    The moments that are looked at: the loss begins its backward; the MLP's backward in the last two
    and the first two blocks of a stage. The optimizer adds nothing: its kernel is fused.
    """
    on = Held(rank or Rank(plans, place))
    first = on.rank.blocks[0] - 1  # how many blocks of its stage come after the first
    behind = (0 * first, first.clip(max=1), (first - 1).clip(0), first)
    moments = [on.at_the_loss(), *(on.in_block(after) for after in behind)]
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
        return self.gradients(0 * self.outer), activations, self.gathered(1) + self.reduced

    def in_block(self, after: Array) -> tuple[Array, Array, Array]:
        """In the backward of the MLP of the block that has `after` blocks of its stage behind it:
        what those kept has gone, and their gradients are there."""
        gone, blocks = after * self.of.kept, after * self.block
        activations = self.of.waiting - gone + self.of.made_again + self.of.in_mlp
        # fully_shard and replicate hand over gradients a block at a time, and the last ones at the
        # end: until then they are a message's, as is the block's before, on its way in fp32
        pending = self.modular * self.low * (self._back + self._down)
        n, rest = self.rank.weight_shards, self.rank.expert_shards
        block = self.rank.of_block(n) + self.rank.of_experts(rest)
        sent = self.modular * (after > 0) * self.plans.numerics.gradients * block
        left = self.rank.layers - after
        ahead = np.where(left > 1, 2, 1)  # the block itself, and the next one fetched ahead
        kept = np.where(self.gives_up, ahead, left)
        gradients = self.gradients(blocks + ~self.modular * (self._back + self._down))
        return gradients, activations, self.gathered(kept) + self.reduced + pending + sent

    @cached_property
    def modular(self) -> Array:
        """Gradients are handed over by fully_shard or replicate."""
        ours = self.plans.numerics.weights == 4
        return self.rank.sharded | (self.rank.has_policy & (self.rank.replicas > 1) & ours)

    @cached_property
    def gives_up(self) -> Array:
        """Gathered weights go after each forward; replicate keeps a copy of all, as zero 2 does."""
        return self.rank.sharded & (self.plans.zero_stage == 3)

    @cached_property
    def _back(self) -> Array:
        """Weights of norm and head, whose gradients come first, before they are cut."""
        shapes = self.model.outer_shapes
        numbers = self._whole([name for name in shapes if name.startswith(("norm", "head"))])
        if self.model.tied:
            numbers = numbers + (1 - self.rank.alone) * self._whole(["embedding.weight"])
        return self.rank.last * numbers

    @cached_property
    def _down(self) -> Array:
        """Weights of `down`, whose gradient is there when the rest of the MLP's comes."""
        return self._whole([name for name in self.model.block_shapes if ".down" in name])

    def _whole(self, names: list[str]) -> Array:
        shapes = {**self.model.block_shapes, **self.model.outer_shapes}
        one = np.ones_like(self.plans.tp)
        return padded(weights_of({name: shapes[name] for name in names}), self.plans, one)

    # communication

    def gathered(self, blocks: Array | int) -> Array:
        """Weights that are whole for a while: those outside of blocks, and so many blocks'; all of
        them with zero_stage=2, or in a pipeline (Zhao et al. 2023, PyTorch FSDP, section 3.2)."""
        rank, plans = self.rank, self.plans
        n, rest = rank.weight_shards, rank.expert_shards
        block = rank.of_block(n) + rank.of_experts(rest)
        if isinstance(blocks, int):
            blocks = np.where(self.gives_up, blocks, rank.layers)
        blocks = np.where(plans.pp > 1, rank.layers, blocks)
        return self.modular * self.low * (rank.of_outer(n) + blocks * block)

    @property
    def reduced(self) -> Array:
        """Activations before and after an all_reduce over tp."""
        plain = (self.plans.tp > 1) & ~self.plans.sequence_parallel
        return plain * 2 * self.of.width
