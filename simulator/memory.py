"""Closed forms of what fills a rank's memory when it is fullest, by category (costs/memory.py).

Arrays have one entry a plan; sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from costs.ledger import MEMORY_PARTS
from parallel.layout import PipelineSchedule
from simulator.activations import Activations
from simulator.plans import NONE, SCHEDULES, Array, Plans
from simulator.sending import LOW_BYTES
from simulator.shapes import Rank, padded, weights_of
from simulator.stage_ends import stage_ends

LOOPED_BFS = SCHEDULES.index(PipelineSchedule.looped_bfs)


@dataclass
class Memory:
    """Bytes of a rank when it is fullest, by the ledger's MEMORY_PARTS. They add up to the peak."""

    parameters: Array
    gradients: Array
    optimizer: Array
    activations: Array
    communication: Array
    other: Array

    @property
    def peak(self) -> Array:
        return sum((getattr(self, part) for part in MEMORY_PARTS), 0 * self.parameters)


def memory(plans: Plans, place: Array | int = 0, rank: Rank | None = None) -> Memory:
    """The fullest moment of pp rank `place` in one optimiser step, on its first data rank.

    The moments that are looked at: the loss begins its backward; the MLP's backward in the last two
    and the first two blocks of a stage, of the first micro-batch and of the last one that has as
    many in flight; and the ring's backward. The optimizer adds nothing: its kernel is fused.

    Not closed: whole tensors that zero_stage=1 hands out (the optimizer's part is an even share);
    rows of experts without a capacity (even shares); what several stages a rank hold of messages,
    and what backwards that are split keep, which depend on the order of torch's schedules. With
    selective checkpointing over tp, what `out` and `down` gave counts as activations here and as
    communication where it is measured.
    """
    on = Held(rank or Rank(plans, place))
    first = on.rank.blocks[0] - 1  # how many blocks of its stage come after the first
    behind = (0 * first, first.clip(max=1), (first - 1).clip(0), first)
    moments = [on.at_the_loss(later) for later in (False, True)]
    moments += [on.in_block(after, later) for after in behind for later in (False, True)]
    if np.any(plans.cp > 2):
        moments += [on.in_ring(after, later) for after in behind for later in (False, True)]
    parts = [np.stack([moment[i] for moment in moments]) for i in range(3)]
    fullest = np.argmax(sum(parts), axis=0)[None]
    gradients, activations, communication = (
        np.take_along_axis(part, fullest, axis=0)[0] for part in parts
    )
    seen, unseen = on.of.batch
    states = on.parameters, gradients, on.optimizer
    return Memory(*states, activations + seen, communication, unseen)


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

    def gradients(self, numbers: Array, later: Array | bool) -> Array:
        """Of so many weights; of all of them where an earlier micro-batch has left its own, and
        where they are views of buckets, which stay (parallel/ddp.py)."""
        earlier = later & ~self.modular
        left = np.where(self.wrapped | earlier, self.numbers - earlier * self.unlike, numbers)
        return self.plans.numerics.gradients * left

    @cached_property
    def wrapped(self) -> Array:
        """The DDP wrapper averages gradients."""
        return ~self.rank.has_policy & (self.rank.replicas * self.rank.shards > 1)

    @cached_property
    def unlike(self) -> Array:
        """Weights whose gradients lie otherwise than they until the end of the step, when others
        take their place (parallel/gradients.py, align_gradients)."""
        embedding = (self.plans.tp > 1) * self.rank.first * self._whole(["embedding.weight"])
        return embedding + self.norms

    @cached_property
    def norms(self) -> Array:
        """Norms' weights under sequence parallelism: their gradients are sums over a part of the
        sequence, which an all_reduce will replace."""
        cut = self.plans.sequence_parallel & (self.plans.tp > 1)
        block = self._whole([name for name in self.model.block_shapes if "norm" in name])
        outer = self._whole([name for name in self.model.outer_shapes if "norm" in name])
        return cut * (self.rank.layers * block + self.rank.last * outer)

    # moments: (gradients, activations, communication). `later`: earlier micro-batches have left
    # their gradients

    def landed(self, later: Array | bool) -> Array:
        """Micro-batches fewer in flight than at most: none but where the first backward begins
        when all have gone forward."""
        all_first = (self.rank.local_stages == 1) | (self.plans.schedule == LOOPED_BFS)
        gone = self.of.flights[0] == self.plans.micro_batches
        return later * (all_first & gone & (self.plans.pp > 1))

    def at_the_loss(self, later: Array | bool) -> tuple[Array, Array, Array]:
        later = self.may_be(later)
        fewer = self.landed(later)
        heads = (self.of.head_waits - fewer).clip(0) * (self.of.head + self.of.outputs)
        activations = self.of.waiting - fewer * self.of.of_one + self.untidy(later)
        activations = activations + heads + self.rank.last * self.of.in_loss
        messages = (
            self.gathered(0) + self.unsent(0 * self.outer, later) + self.held(0, later, again=0)
        )
        return self.gradients(0 * self.outer, later), activations, messages

    def in_block(self, after: Array, later: Array | bool) -> tuple[Array, Array, Array]:
        """In the backward of the MLP of the block that has `after` blocks of its stage behind it:
        what those kept has gone, and their gradients are there."""
        later = self.may_be(later)
        gradients, activations, messages = self.behind(after, later)
        # the gradient that enters a stage from the next one is a message's
        came = (after == 0) & (self.plans.pp > 1) & (self.rank.last == 0)
        return gradients, activations + self.of.in_mlp - came * self.of.width, messages

    def in_ring(self, after: Array, later: Array | bool) -> tuple[Array, Array, Array]:
        """In the ring's backward of that block, when its last round but one has been computed:
        K and V here and those that arrive, their gradients here, sent before, and arriving."""
        later = self.may_be(later)
        gradients, activations, messages = self.behind(after, later)
        ring = self.plans.cp > 2
        blocks = np.where(self.plans.cp > 3, 5, 4) * 2 * self.of.heads[1]
        activations = activations + self.of.in_ring - self.of.after_attention
        return gradients, ring * activations, ring * (messages + blocks)

    def may_be(self, later: Array | bool) -> Array:
        return later & (self.plans.micro_batches > 1)

    def behind(self, after: Array, later: Array | bool) -> tuple[Array, Array, Array]:
        """What is there when `after` blocks of a stage have gone backward."""
        of = self.of
        fewer, gone = self.landed(later), after * of.kept
        heads = (of.head_waits - fewer).clip(0)
        kept_heads = (heads - 1).clip(0) * of.head + heads * of.outputs
        activations = of.waiting - fewer * of.of_one - gone + of.made_again + kept_heads
        # fully_shard and replicate hand over gradients a block at a time, and the last ones at the
        # end: until then they are a message's, as is the block's before, on its way in fp32
        pending = self.low * (self._back + self._down)
        n, rest = self.rank.weight_shards, self.rank.expert_shards
        block = self.rank.of_block(n) + self.rank.of_experts(rest)
        sent = (after > 0) * self.plans.numerics.gradients * block
        sent = np.where(self.unsynchronised | later, 0, pending + sent)
        unsent = self.unsent(after * block + self._back + self._down, later)
        left = self.rank.layers - after
        ahead = np.where(left > 1, 2, 1)  # the block itself, and the next one fetched ahead
        kept = np.where(self.gives_up, ahead, left)
        done = np.where(self.unsynchronised, 0, after * self.block)
        gradients = self.gradients(done + ~self.modular * (self._back + self._down), later)
        messages = self.gathered(kept) + self.modular * sent + unsent + self.held(after, later)
        return gradients, activations + self.untidy(later), messages

    def untidy(self, later: Array | bool) -> Array:
        """Gradients that are none of the step's in the end: the whole one of an embedding that tp
        has cut; those that micro-batches without an all_reduce make beside DDP's buckets."""
        cut = (self.plans.tp > 1) & later & ~self.modular
        whole = cut * self.rank.first * self._whole(["embedding.weight"]) * self.plans.tp
        return self.plans.numerics.gradients * (whole + (self.wrapped & later) * self.numbers)

    @cached_property
    def unsynchronised(self) -> Array:
        """Gradients of all micro-batches wait whole for the last one, and are a message's then."""
        return self.modular & (self.plans.pp > 1)

    def unsent(self, numbers: Array, later: Array | bool) -> Array:
        """Gradients that wait whole, of so many weights; of all where there was a micro-batch."""
        n, rest = self.rank.weight_shards, self.rank.expert_shards
        block = self.rank.of_block(n) + self.rank.of_experts(rest)
        everything = self.rank.of_outer(n) + self.rank.layers * block
        waits = self.unsynchronised | (self.modular & later)
        return self.plans.numerics.gradients * waits * np.where(later, everything, numbers)

    def held(self, after: Array | int, later: Array | bool, again: int = 1) -> Array:
        """What messages of activations keep: of blocks that wait, or of so many that a checkpoint
        has run `again`; of the stages' ends; of norms."""
        of, plans = self.of, self.plans
        blocks = of.blocks_in_flight - after - self.landed(later) * self.rank.blocks[0]
        blocks = np.where(plans.checkpointing == NONE, blocks, again)
        entered = (plans.pp == 1) * of.entered  # a pipeline's are among its buffers
        looked_up = (plans.pp > 1) * (self.rank.first > 0) * of.entered
        norms = (later & ~self.modular) * plans.numerics.gradients * self.norms
        ends = stage_ends(of, later, of.flights[0] - self.landed(later))
        return blocks * of.message_of_block + entered + looked_up + ends + norms

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
        """Numbers of these weights, of one block or outside, before the data axes cut them."""
        shapes = {**self.model.block_shapes, **self.model.outer_shapes}
        one = np.ones_like(self.plans.tp)
        return padded(weights_of({name: shapes[name] for name in names}), self.plans, one)

    # communication

    def gathered(self, blocks: Array | int) -> Array:
        """Weights that are whole for a while: those outside of blocks, and so many blocks'; all of
        them with zero_stage=2, or in a pipeline (Zhao et al. 2023, PyTorch FSDP, section 3.2).
        Experts of whom ep has left no copy are whole as they are (parallel/experts.py)."""
        rank, plans = self.rank, self.plans
        n, rest = rank.weight_shards, rank.expert_shards
        copies = rank.expert_rest * np.where(plans.dp_shard > 1, plans.dp_replicate, 1) > 1
        block = rank.of_block(n) + copies * rank.of_experts(rest)
        if isinstance(blocks, int):
            blocks = np.where(self.gives_up, blocks, rank.layers)
        blocks = np.where(plans.pp > 1, rank.layers, blocks)
        return self.modular * self.low * (rank.of_outer(n) + blocks * block)
