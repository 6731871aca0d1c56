"""Closed forms of what fills a rank's memory when it is fullest, by category (costs/memory.py).

Arrays have one entry a plan; sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from costs.ledger import MEMORY_PARTS
from minigpt.config import FFN
from simulator.held import Held
from simulator.plans import NONE, Array, Plans
from simulator.several_stages import fullest
from simulator.shapes import Rank


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

    The moments that are looked at: the loss, forward and as its backward begins; the end of the
    backward, in the embedding; the MLP's backward in the last two
    and the first two blocks of a stage, of the first micro-batch and of the last one that has as
    many in flight, when its product's gradients come and when its input's do; the backward of an
    embedding that tp has cut; and the ring's. The optimizer adds nothing: its kernel is fused.

    With several stages a rank all moments of the schedule are (simulator/several_stages.py).

    Not closed: whole tensors that zero_stage=1 hands out (the optimizer's part is an even share);
    rows of experts without a capacity (even shares). With
    selective checkpointing over tp, what `out` and `down` gave counts as activations here and as
    communication where it is measured; so do sums of shards that wait for those of replicas
    (gradient_sync), as gradients. An RMSNorm is taken for a GPU's kernel: in bf16
    on a CPU it keeps three times as much.
    """
    on = Moments(rank or Rank(plans, place))
    first = on.rank.blocks[0] - 1  # how many blocks of its stage come after the first
    behind = (0 * first, first.clip(max=1), (first - 1).clip(0), first)
    moments = [on.at_the_loss(later) for later in (False, True)]
    moments += [on.at_the_end(later) for later in (False, True)]
    if np.any(on.rank.sharded):
        moments += [on.as_it_starts(True)]
        moments += [one for later in (False, True) for one in on.as_the_last_leaves(later)]
    places = [(after, later) for after in behind for later in (False, True)]
    moments += [on.in_block(*place) for place in places]
    if plans.model.ffn != FFN.moe and on.may_be_fuller_before_mlp:
        moments += [on.before_mlp(*place) for place in places]
    if np.any(plans.tp > 1):
        moments += [on.in_embedding(later) for later in (False, True)]
    if np.any(plans.cp > 2):
        moments += [on.in_ring(*place) for place in places]
    parts = [np.stack([moment[i] for moment in moments]) for i in range(3)]
    place_of_most = np.argmax(sum(parts), axis=0)[None]
    gradients, activations, communication = (
        np.take_along_axis(part, place_of_most, axis=0)[0] for part in parts
    )
    several = np.flatnonzero(on.rank.local_stages > 1)
    if len(several):
        walked = Held(Rank(plans[several], on.rank.place[several]))
        for part, found in zip(
            (gradients, activations, communication), fullest(walked), strict=True
        ):
            part[several] = found
    seen, unseen = on.of.batch
    states = on.parameters, gradients, on.optimizer
    return Memory(*states, activations + seen, communication, unseen)


class Moments(Held):
    """What is there at each moment: (gradients, activations, communication)."""

    def at_the_loss(self, later: Array | bool) -> tuple[Array, Array, Array]:
        later = self.may_be(later)
        fewer = self.landed(later)
        heads = (self.of.head_waits - fewer).clip(0) * (self.of.head + self.of.outputs)
        activations = self.of.waiting - fewer * self.of.of_one + self.untidy(later)
        fuller = np.maximum(self.of.in_loss, self.before_loss)
        activations = activations + heads + self.rank.last * fuller
        weights = self.gathered(np.where(self.gives_up, 0, self.rank.layers), later)
        messages = weights + self.unsent(0 * self.outer, later) + self.held(0, later, again=0)
        return self.gradients(0 * self.outer, later), activations, messages

    @property
    def before_loss(self) -> Array:
        """Bytes in the forward of a loss under autocast: logits, low and in fp32; and the weights
        that were cast for blocks which will run again, until autocast ends."""
        of, again = self.of, self.plans.checkpointing != NONE
        cast = again * self.rank.layers * of.cast_weights
        return (of.cast_head > 0) * ((self.low + 4) * of.logits + cast)

    def at_the_end(self, later: Array | bool) -> tuple[Array, Array, Array]:
        """In the embedding's backward, the last: of one device's weights all gradients are there,
        and where embedding and head share one both of it, beside their sum. Elsewhere other
        moments are fuller (as_the_last_leaves, in_embedding, or what the data axes hold)."""
        later, size = self.may_be(later), self.plans.numerics.gradients
        shared = size * self.of_embedding * self.model.tied * (2 + (later != self.wrapped))
        activations = self.of.width + self.of.angles + shared + self.untidy(later)
        here = self.alone & ~self.modular
        return here * self.gradients(self.numbers, later), here * activations, 0 * self.outer

    def as_the_last_leaves(self, later: Array | bool) -> list[tuple[Array, Array, Array]]:
        """fully_shard's last message, of what is in no block, is of fp32. In the embedding's
        backward its weights are there still, and the message before; then what goes into it, beside
        gradients of embedding and head (or of both in one); then what comes out of it, beside the
        head's."""
        later, size, tied = self.may_be(later), self.plans.numerics.gradients, self.model.tied
        each, here = self.low * self.of_embedding, self.alone & self.rank.sharded
        here = here & ~self.whole(later)
        before = self.low * self.whole_outer + size * (self.whole_block + self.whole_experts)
        went, came = size * self.whole_outer, size * self.outer * (later & self.plans.syncs_each)
        blocks = self.gradients(self.numbers - self.outer, later)
        moments = [
            (blocks, tied * 2 * each, before + (1 if tied else 2) * each),
            (blocks, 0 * each, went + (1 if tied else 2) * each),
            (self.gradients(self.numbers, later), 0 * each, went + came + (not tied) * each),
        ]
        return [tuple(here * part for part in moment) for moment in moments]  # type: ignore[misc]

    def as_it_starts(self, later: Array | bool) -> tuple[Array, Array, Array]:
        """In the forward that gathers what is in no block and then the first one: fully_shard's
        messages are there still, beside the weights that were copied out of them."""
        later = self.may_be(later)
        here, none = self.rank.sharded & (self.plans.pp == 1), 0 * self.outer
        messages = 2 * self.gathered(none + 1, later) + self.unsent(none, later)
        return here * self.gradients(none, later), none, here * messages

    @property
    def alone(self) -> Array:
        """Nothing but the data axes cuts weights."""
        return (self.plans.pp == 1) & (self.plans.tp == 1)

    def in_block(self, after: Array, later: Array | bool) -> tuple[Array, Array, Array]:
        """In the backward of the MLP of the block that has `after` blocks of its stage behind it:
        what those kept has gone, and their gradients are there."""
        later = self.may_be(later)
        gradients, activations, messages = self.behind(after, later, self._down)
        return gradients, activations + self.of.in_mlp - self.came(after), messages

    def before_mlp(self, after: Array, later: Array | bool) -> tuple[Array, Array, Array]:
        """At the end of the MLP's backward: what it kept has gone; the gradients of its weights are
        there, and that of its input once for each of its first products."""
        later = self.may_be(later)
        gradients, activations, messages = self.behind(after, later, self._down + self._up)
        return gradients, activations + self.of.before_mlp - self.came(after), messages

    @property
    def may_be_fuller_before_mlp(self) -> bool:
        """Whether any plan may be fuller then than in_block, by the most that gradients can add."""
        each = np.maximum(self.plans.numerics.gradients, self.low)
        return bool(np.any(self.of.before_mlp + each * self._up > self.of.in_mlp))

    def in_embedding(self, later: Array | bool) -> tuple[Array, Array, Array]:
        """When all blocks of the first stage have gone backward: the embedding's gradient is as
        large as if tp had not cut it, and so is the sum in fp32 of those that wait."""
        later = self.may_be(later)
        gradients, activations, messages = self.behind(self.rank.layers, later, 0 * self.outer)
        sums = self.plans.numerics.gradients * (self.unsynchronised & ~later)
        whole = (self.of.between + sums) * self.embedding * self.plans.tp
        here = (self.plans.tp > 1) & (self.rank.first > 0)
        return gradients, here * (activations - self.of.made_again + whole), messages

    def came(self, after: Array) -> Array:
        """Bytes of the gradient that enters a stage from the next one, which is a message's."""
        return (after == 0) * (self.plans.pp > 1) * (self.rank.last == 0) * self.of.width

    def in_ring(self, after: Array, later: Array | bool) -> tuple[Array, Array, Array]:
        """In the ring's backward of that block, when its last round but one has been computed."""
        later = self.may_be(later)
        gradients, activations, messages = self.behind(after, later, self._down)
        ring = self.plans.cp > 2
        activations = activations + self.of.in_ring - self.of.after_attention
        return gradients, ring * activations, ring * (messages + self.ring_blocks)

    def may_be(self, later: Array | bool) -> Array:
        return later & (self.plans.micro_batches > 1)

    def behind(self, after: Array, later: Array, there: Array) -> tuple[Array, Array, Array]:
        """Gradients, activations and messages, in bytes, when `after` blocks of a stage have gone
        backward and the next one has made the gradients of so many weights as are `there`."""
        of = self.of
        fewer, gone = self.landed(later), after * of.kept
        heads = (of.head_waits - fewer).clip(0)
        kept_heads = (heads - 1).clip(0) * of.head + heads * of.outputs
        activations = of.waiting - fewer * of.of_one - gone + of.made_again + kept_heads
        # fully_shard and replicate hand over gradients a block at a time, and the last ones at the
        # end: until then they are a message's, as is the block's before, on its way in fp32
        pending = self.low * (self._back + there)
        block = self.whole_block + self.whole_experts
        sent = (after > 0) * self.plans.numerics.gradients * block
        sent = np.where(self.unsynchronised | self.whole(later), 0, pending + sent)
        unsent = self.unsent(after * block + self._back + there, later)
        left = self.rank.layers - after
        ahead = np.minimum(left, 2)  # the block itself, and the next one fetched ahead
        # a pipeline keeps those that backward has gathered (parallel/pipeline.py)
        kept = np.where(self.gives_up, ahead + after * (self.plans.pp > 1), left)
        done = np.where(self.unsynchronised, 0, after * self.block)
        gradients = self.gradients(done + ~self.modular * (self._back + there), later)
        weights = self.gathered(kept, later)
        messages = weights + self.modular * sent + unsent + self.held(after, later)
        return gradients, activations + self.untidy(later), messages
