"""What one pipeline rank of each plan holds, and what it holds for a while: states and messages.

Arrays have one entry a plan; sizes are in bytes. simulator/memory.py puts it together.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from simulator.activations import Activations
from simulator.data_messages import GPIPE
from simulator.plans import NONE, Array
from simulator.sending import LOW_BYTES
from simulator.shapes import Rank, padded, weights_of
from simulator.stage_ends import stage_ends


class Held:
    """Of one rank. `later`: earlier micro-batches have left their gradients."""

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

    # weights once the shards of all ranks are gathered, with what pads them

    @cached_property
    def whole_outer(self) -> Array:
        return self.rank.of_outer(self.rank.weight_shards)

    @cached_property
    def whole_block(self) -> Array:
        return self.rank.of_block(self.rank.weight_shards)

    @cached_property
    def whole_experts(self) -> Array:
        return self.rank.of_experts(self.rank.expert_shards)

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
        earlier = later & (~self.modular | self.plans.syncs_each)
        unlike = (earlier & ~self.modular) * self.unlike
        left = np.where(self.wrapped | earlier, self.numbers - unlike, numbers)
        return self.plans.numerics.gradients * left

    @cached_property
    def wrapped(self) -> Array:
        """The DDP wrapper averages gradients."""
        return ~self.rank.has_policy & (self.rank.replicas * self.rank.shards > 1)

    @cached_property
    def unlike(self) -> Array:
        """Weights whose gradients come in another layout than their own, until align_gradients
        replaces them at the end of the step (parallel/gradients.py)."""
        return (self.plans.tp > 1) * self.embedding + self.norms

    @cached_property
    def embedding(self) -> Array:
        """Weights of the embedding, where it is here."""
        return self.rank.first * self.of_embedding

    @cached_property
    def of_embedding(self) -> Array:
        return self._whole(["embedding.weight"])

    @cached_property
    def norms(self) -> Array:
        """Norms' weights under sequence parallelism: their gradients are sums over a part of the
        sequence, which an all_reduce will replace."""
        return self.norms_of(self.rank.layers, self.rank.last)

    def norms_of(self, blocks: Array, last: Array) -> Array:
        """The same of so many blocks, and of the last stage's end."""
        cut = self.plans.sequence_parallel & (self.plans.tp > 1)
        block = self._whole([name for name in self.model.block_shapes if "norm" in name])
        outer = self._whole([name for name in self.model.outer_shapes if "norm" in name])
        return cut * (blocks * block + last * outer)

    def landed(self, later: Array | bool) -> Array:
        """How many micro-batches fewer than the most are in flight: at the later moment one, where
        all go forward before the first goes backward (GPipe), else none."""
        gone = self.of.in_flight == self.plans.micro_batches
        return later * (gone & (self.plans.pp > 1))

    def untidy(self, later: Array | bool) -> Array:
        """Bytes of gradients that are replaced before the step ends: the whole one of an embedding
        that tp cuts; those that micro-batches without an all_reduce make beside DDP's buckets."""
        cut = (self.plans.tp > 1) & self.whole(later)
        # among gradients that wait (unsent) the embedding's is counted as if it were cut
        whole = cut * self.embedding * (self.plans.tp - self.modular)
        return self.plans.numerics.gradients * (whole + (self.wrapped & later) * self.numbers)

    @cached_property
    def unsynchronised(self) -> Array:
        """Gradients of all micro-batches wait whole for the last one, and are a message's then."""
        return self.modular & (self.plans.pp > 1)

    def whole(self, later: Array | bool) -> Array:
        """Whether what earlier micro-batches have left was not scattered after each."""
        return later & ~self.plans.syncs_each

    def unsent(self, numbers: Array, later: Array | bool) -> Array:
        """Gradients that wait whole, of so many weights; of all where there was a micro-batch."""
        everything = self.whole_outer + self.rank.layers * (self.whole_block + self.whole_experts)
        waits = self.unsynchronised | (self.modular & self.whole(later))
        return self.plans.numerics.gradients * waits * np.where(later, everything, numbers)

    def held(self, after: Array | int, later: Array | bool, again: int = 1) -> Array:
        """Bytes of activations that count as communication, for a message has read or written them:
        of blocks that wait, or of so many that a checkpoint has run `again`; of the stages' ends;
        of norms."""
        of, plans = self.of, self.plans
        blocks = (of.in_flight - self.landed(later)) * self.rank.blocks[0] - after
        blocks = np.where(plans.checkpointing == NONE, blocks, again)
        entered = (plans.pp == 1) * of.entered  # a pipeline's are among its buffers
        looked_up = (plans.pp > 1) * (self.rank.first > 0) * of.entered
        norms = (later & ~self.modular) * plans.numerics.gradients * self.norms
        ends = stage_ends(of, later, of.in_flight - self.landed(later))
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
        return self.back_of(self.rank.last)

    def back_of(self, last: Array) -> Array:
        """Weights of norm and head, whose gradients come first, before they are cut."""
        shapes = self.model.outer_shapes
        numbers = self._whole([name for name in shapes if name.startswith(("norm", "head"))])
        if self.model.tied:
            numbers = numbers + (1 - self.rank.alone) * self.of_embedding
        return last * numbers

    @cached_property
    def ring_blocks(self) -> Array:
        """Messages of the ring's backward in its last round but one: K and V here and those that
        arrive, their gradients here, sent before, and arriving."""
        return np.where(self.plans.cp > 3, 5, 4) * 2 * self.of.heads[1]

    @property
    def made_for_weights(self) -> Array:
        """Bytes of a checkpointed block in a W: the gradient of each of its weights runs it again,
        and of each run stays what later ones have to run over, half of it on average (near: up to
        15 % of the peak in traces)."""
        each = sum(name.endswith("weight") for name in self.model.block_shapes) / 2
        return each * self.of.made_again

    @cached_property
    def _down(self) -> Array:
        """Weights of `down`, whose gradient is there when the rest of the MLP's comes."""
        return self._whole([name for name in self.model.block_shapes if ".down" in name])

    @cached_property
    def _up(self) -> Array:
        """Weights of the MLP's first products."""
        names = self.model.block_shapes
        return self._whole([name for name in names if ".up" in name or ".gate" in name])

    def _whole(self, names: list[str]) -> Array:
        """Numbers of these weights, of one block or outside, before the data axes cut them."""
        shapes = {**self.model.block_shapes, **self.model.outer_shapes}
        one = np.ones_like(self.plans.tp)
        return padded(weights_of({name: shapes[name] for name in names}), self.plans, one)

    # communication

    def gathered(self, blocks: Array, later: Array) -> Array:
        """Weights that are whole for a while: those outside of blocks, and so many blocks' (Zhao et
        al. 2023, PyTorch FSDP, section 3.2). A pipeline keeps all with zero_stage=2; with 3 what a
        backward has gathered until the stage's next forward gives it up, which comes between two
        backwards in 1F1B. Experts of whom ep has left no copy are whole as they are
        (parallel/experts.py)."""
        rank, plans = self.rank, self.plans
        copies = rank.expert_rest * np.where(plans.dp_shard > 1, plans.dp_replicate, 1) > 1
        block = self.whole_block + copies * self.whole_experts
        turns = (rank.local_stages == 1) & ~(later & (plans.schedule == GPIPE))
        given = (plans.pp == 1) | (self.gives_up & turns)
        blocks = np.where(given, blocks, rank.layers)
        return self.modular * self.low * (self.whole_outer + blocks * block)
