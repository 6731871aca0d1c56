"""Closed forms of what forward keeps for backward: of a block, of a stage, of a pipeline rank.

Letters as in minigpt: B sequences of a micro-batch, T tokens of this cp rank, D width, N heads, K
key-value heads, H head width, F MLP width, V vocabulary, E experts, k experts of a token. Arrays
have one entry a plan; sizes are in bytes.

What a block keeps was read off minigpt's modules; for fp16, GELU and no flash kernel, with dropout,
it is the count of Korthikanti et al. 2022 (eq. 1: 34 B T D + 5 N B T^2).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from minigpt.config import FFN, Positions
from simulator.block_messages import expert_choices
from simulator.data_messages import GPIPE
from simulator.plans import NONE, SELECTIVE, Array
from simulator.sending import LOW_BYTES
from simulator.shapes import Rank, padded, weights_of


class Activations:
    """What forward keeps on one rank of each plan, and what backward makes for a while."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.plans, self.model = rank, rank.plans, rank.plans.model
        self.low = LOW_BYTES[self.plans.precision]
        # of what goes from block to block
        self.between = np.where(rank.has_policy, self.low, 4)

    @cached_property
    def tokens(self) -> Array:
        return self.plans.micro_batch_size * (self.plans.seq_len // self.plans.cp)

    @cached_property
    def cut(self) -> Array:
        """In how many parts sequence parallelism cuts what is between attention and MLP."""
        return np.where(self.plans.sequence_parallel, self.plans.tp, 1)

    @cached_property
    def width(self) -> Array:
        """Bytes of a micro-batch's activations between blocks, B T D."""
        return self.between * self.tokens * self.model.d_model // self.cut

    @cached_property
    def input_of_products(self) -> Array:
        """Bytes of what q, k, v or the MLP take: gathered where sequence parallelism cut it."""
        return self.low * self.tokens * self.model.d_model

    @cached_property
    def wide(self) -> Array:
        """Bytes of a micro-batch in the width of the MLP, or of all choices in an expert's."""
        return self.low * self.choices * self.model.ff_dim // self.plans.tp

    @cached_property
    def choices(self) -> Array:
        """Rows of the MLP."""
        if self.model.ffn != FFN.moe:
            return self.tokens
        return self.plans.micro_batch_size * expert_choices(self.model, self.plans.seq_len)

    @cached_property
    def heads(self) -> tuple[Array, Array]:
        """Bytes of q, and of k or v."""
        model, tp = self.model, self.plans.tp
        of_kv = self.low * self.tokens * model.kv_heads * model.head_dim // tp
        return self.low * self.tokens * model.d_model // tp, of_kv

    @cached_property
    def attention(self) -> Array:
        """Bytes that attention keeps besides q, k, v and its result: a log-sum-exp a query in fp32,
        or T x T weights."""
        heads = self.model.n_head // self.plans.tp
        if self.plans.flash:
            return 4 * self.tokens * heads
        return self.low * self.tokens * heads * self.plans.seq_len

    @cached_property
    def cast_weights(self) -> Array:
        """Copies of a block's weights in two bytes, which autocast makes and backward keeps."""
        return self._cast(self.model.block_shapes)

    @cached_property
    def cast_head(self) -> Array:
        """The same of the head's."""
        return self._cast({"head.weight": (self.model.vocab_rows, self.model.d_model)})

    def _cast(self, shapes: dict[str, tuple[int, ...]]) -> Array:
        autocast = (self.low == 2) & (self.between == 4)
        matrices = weights_of({name: shape for name, shape in shapes.items() if len(shape) > 1})
        return autocast * 2 * padded(matrices, self.plans, np.ones_like(self.plans.tp))

    @cached_property
    def of_block(self) -> Array:
        """All that a block keeps: the inputs of both norms and two numbers a token each, what they
        give, q, k and v, what attention gives, and in the MLP its gate, the activated gate, the
        other half and their product (GELU: two of those)."""
        q, kv = self.heads
        norms = 2 * self.width + 2 * self.input_of_products + 16 * self.tokens // self.cut
        # the ring sends its K and V, so they count as a message's (parallel/context_parallel.py)
        attention = 2 * q + 2 * kv * (self.plans.cp == 1) + self.attention
        return norms + attention + self.mlp + self.cast_weights + self.masks

    @cached_property
    def masks(self) -> Array:
        """Dropout keeps a byte a number, and what it gives where a product reads it."""
        if not self.model.dropout:
            return 0 * self.tokens
        heads, keys = self.model.n_head // self.plans.tp, self.plans.seq_len
        scores = (not self.plans.flash) * (1 + self.low) * self.tokens * heads * keys
        return 2 * self.tokens * self.model.d_model // self.cut + scores

    @cached_property
    def mlp(self) -> Array:
        if self.model.ffn == FFN.gelu:
            return 2 * self.wide
        if self.model.ffn == FFN.swiglu:
            return 4 * self.wide
        # the sorted rows, the results and their copies; router; where each choice goes, in int64
        rows = (3 - self.arrived_waits) * self.rows
        return 4 * self.wide + rows + 4 * self.tokens * self.model.n_expert + 36 * self.choices

    @cached_property
    def rows(self) -> Array:
        """Bytes of the choices' tokens."""
        return self.low * self.choices * self.model.d_model

    @cached_property
    def arrived_waits(self) -> Array:
        """1 where what all_to_all brought waits for backward: under a capacity a rank's only expert
        reads it as it lies, several experts read a copy (parallel/experts.py, _equal)."""
        capped = self.model.capacity_factor is not None
        return capped * (self.plans.ep > 1) * (self.plans.ep == self.model.n_expert)

    @cached_property
    def message_of_block(self) -> Array:
        """Bytes that a block keeps for backward and that count as communication, for a message has
        read or written them: K and V of the ring; rows that all_to_all brought. A checkpointed
        block has them when it is run again."""
        ring = 2 * self.heads[1] * (self.plans.cp > 1)
        if self.model.ffn != FFN.moe:
            return ring
        dropless = (self.plans.ep > 1) & (self.model.capacity_factor is None)
        return ring + self.rows * (dropless | (self.arrived_waits > 0))

    @cached_property
    def kept(self) -> Array:
        """Bytes of a block that wait for its backward: all of them; selective: its input, and what
        products and attention gave; full: its input; offload: that on the host, a CPU's own."""
        q, kv = self.heads
        up = self.wide * (1 if self.model.ffn == FFN.gelu else 2)
        narrow = 2 * self.input_of_products  # what `out` and `down` gave
        selective = self.width + narrow + 2 * q + 2 * kv + up + self.attention * self.plans.flash
        mode = self.plans.checkpointing
        full = (mode != NONE) & (mode != SELECTIVE)
        kept = np.where(mode == SELECTIVE, selective, self.of_block)
        return np.where(full, self.width, kept)

    @cached_property
    def made_again(self) -> Array:
        """What a checkpointed block holds beyond `kept` once it has run again. Selective: what
        products gave goes as it is used again."""
        mode, again = self.plans.checkpointing, self.of_block - self.kept
        # the result of `down` is not asked for again, and stays
        selective = again + self.input_of_products
        chosen = np.where(mode == SELECTIVE, selective, again)
        return np.where(mode == NONE, 0, chosen)

    @cached_property
    def in_mlp(self) -> Array:
        """Gradients in the backward of an MLP: of its result, its product and both its factors (a
        GELU has one); the product itself has gone. A tied head's waits for the embedding's."""
        factors = 1 if self.model.ffn == FFN.gelu else 2
        copy = self.rank.alone * self.model.tied * self.model.vocab_rows * self.model.d_model
        return self.width + factors * self.wide + self.between * copy // self.plans.tp

    @cached_property
    def before_mlp(self) -> Array:
        """Gradients of an MLP's result, of its gate (a GELU's input), and of its input from each of
        its first products, less what the MLP kept."""
        products = 1 if self.model.ffn == FFN.gelu else 2
        return self.width + self.wide + products * self.input_of_products - self.mlp

    @cached_property
    def gradients_of_products(self) -> Array:
        """Bytes that a backward of inputs leaves for that of weights: gradients of what norms and
        products of a block gave (torch/distributed/pipelining/_backward.py)."""
        q, kv = self.heads
        halves = 1 if self.model.ffn == FFN.gelu else 2
        reduced = (self.plans.tp > 1) & ~self.plans.sequence_parallel
        narrow = 2 * self.width * ~reduced + 2 * self.input_of_products // self.cut
        rows = 2 * self.rows if self.model.ffn == FFN.moe else 0
        return narrow + q + 2 * kv + halves * self.wide + rows

    @cached_property
    def gradients_sent(self) -> Array:
        """The same that tp has sent: of `out` and `down`, which all its ranks need whole."""
        return (self.plans.tp > 1) * 2 * self.input_of_products

    @cached_property
    def in_flight(self) -> Array:
        """With one stage a rank, micro-batches that wait for their backward when most do: all in
        GPipe, min(m, ranks - rank) in 1F1B (Narayanan et al. 2021, section 2.2.1)."""
        plans, m = self.plans, self.plans.micro_batches
        warm = np.where(plans.schedule == GPIPE, m, np.minimum(m, plans.pp - self.rank.place))
        return np.where(plans.pp > 1, warm, 1)

    def entering(self, lap: int) -> Array:
        """Whether what enters a stage is a message's: what came from the stage before, or from the
        all_reduce of an embedding that tp has cut."""
        plans, stage = self.plans, self.rank.stage(lap)
        turns = self.rank.v_shaped & (stage % plans.pp == 0)  # the stage before is this rank's too
        looked_up = (stage == 0) & (plans.tp > 1) & ~plans.sequence_parallel
        return (plans.pp > 1) & (stage > 0) & ~turns | looked_up

    @cached_property
    def entered(self) -> Array:
        """Bytes of what entered the stage by a message, which are no activations."""
        return self.width * self.in_flight * self.entering(0)

    @cached_property
    def waiting(self) -> Array:
        """Bytes of all blocks of all micro-batches in flight, at their most."""
        return self.in_flight * self.of_one

    @cached_property
    def of_one(self) -> Array:
        """Bytes of one micro-batch of those."""
        entered = self.entering(0) * self.width
        return self.rank.blocks[0] * self.kept - entered + self.angles

    @cached_property
    def angles(self) -> Array:
        """Cosine and sine of each position, in fp32, which every forward of a stage makes."""
        rotary = self.model.positions == Positions.rotary
        return rotary * 8 * (self.plans.seq_len // self.plans.cp) * self.model.head_dim

    # what is outside of blocks

    @cached_property
    def logits(self) -> Array:
        """Numbers of a micro-batch's logits on this rank."""
        return self.tokens * self.model.vocab_rows // self.plans.tp

    @cached_property
    def head_waits(self) -> Array:
        """Micro-batches that wait for their backward on the last stage."""
        return self.rank.last * self.in_flight

    @cached_property
    def head(self) -> Array:
        """Bytes of a micro-batch that norm, head and loss keep: the norm's input and two numbers a
        token, the head's input and its cast weight, log-probabilities in fp32."""
        norm = self.width + 8 * self.tokens // self.cut
        return norm + self.input_of_products + self.cast_head + 4 * self.logits

    @cached_property
    def outputs(self) -> Array:
        """Logits, which a pipeline holds until their backward is over (torch's fwd_cache)."""
        return (self.plans.pp > 1) * self.low * self.logits

    @cached_property
    def in_loss(self) -> Array:
        """Bytes in the backward of a loss: gradients of log-probabilities and of logits. Over tp
        three of that size, and for each token masks and places (torch's loss_parallel)."""
        plain = 8 * self.logits
        return np.where(self.plans.tp > 1, 12 * self.logits + 33 * self.tokens, plain)

    @cached_property
    def in_ring(self) -> Array:
        """Bytes in the backward of the ring, above what the block kept up to its MLP: gradients of
        the residual, of what attention gave, of q, of the K and V here; and of one round's queries,
        half of them, its keys, those of each key-value head, and both stacked."""
        q, kv = self.heads
        wide = 4 // self.low
        return self.width + q + wide * (q + 2 * kv + q // 2 + 2 * q + 2 * kv + 2 * kv)

    @cached_property
    def after_attention(self) -> Array:
        """Bytes that a block keeps of what comes after its attention, but for the MLP's choices."""
        return self.mlp + self.width + self.input_of_products + 8 * self.tokens // self.cut

    # the batch

    @cached_property
    def batch(self) -> tuple[Array, Array]:
        """Bytes of inputs and targets of a step, in int64, as activations and as other.

        A tensor counts as an activation once forward has viewed it: targets, and inputs that tp
        wraps or cp cuts. cp copies its part, and a pipeline copies all into one tensor.
        """
        plans = self.plans
        each = 8 * plans.micro_batch_size * plans.micro_batches * plans.seq_len
        unseen = np.where(plans.pp > 1, 2 * each, np.where(plans.tp > 1, 0, each))
        unseen = np.where(plans.cp > 1, 0, unseen)
        copies = (plans.cp > 1) * 1 + (plans.pp > 1)
        return 2 * each - unseen + copies * 2 * each // plans.cp, unseen
