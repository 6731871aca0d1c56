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

from minigpt.config import FFN
from parallel.layout import ActivationCheckpointing
from simulator.communication import expert_choices
from simulator.data_messages import GPIPE
from simulator.plans import CHECKPOINTING, PRECISIONS, SCHEDULES, Array
from simulator.schedules import in_flight
from simulator.sending import ITEM_BYTES
from simulator.shapes import Rank, padded, weights_of

MODES = {mode: CHECKPOINTING.index(mode) for mode in ActivationCheckpointing}
LOW_BYTES = np.array([ITEM_BYTES[precision] for precision in PRECISIONS])


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
        autocast = (self.low == 2) & (self.between == 4)
        one = np.ones_like(self.plans.tp)
        matrices = weights_of({n: s for n, s in self.model.block_shapes.items() if len(s) > 1})
        return autocast * 2 * padded(matrices, self.plans, one)

    @cached_property
    def of_block(self) -> Array:
        """All that a block keeps: the inputs of both norms and two numbers a token each, what they
        give, q, k and v, what attention gives, and in the MLP its gate, the activated gate, the
        other half and their product (GELU: two of those)."""
        q, kv = self.heads
        norms = 2 * self.width + 2 * self.input_of_products + 16 * self.tokens // self.cut
        attention = 2 * q + 2 * kv + self.attention
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
        rows = 3 * self.low * self.choices * self.model.d_model
        return 4 * self.wide + rows + 4 * self.tokens * self.model.n_expert + 36 * self.choices

    @cached_property
    def kept(self) -> Array:
        """What waits for backward of a block: all of it; its input; or that and what products and
        attention gave; or nothing but the input on the host, which for a CPU is the same place."""
        q, kv = self.heads
        up = self.wide * (1 if self.model.ffn == FFN.gelu else 2)
        narrow = 2 * self.input_of_products // self.cut  # what `out` and `down` gave
        selective = self.width + narrow + 2 * q + 2 * kv + up + self.attention * self.plans.flash
        mode = self.plans.checkpointing
        full = (mode == MODES[ActivationCheckpointing.full]) | (
            mode == MODES[ActivationCheckpointing.offload]
        )
        kept = np.where(mode == MODES[ActivationCheckpointing.selective], selective, self.of_block)
        return np.where(full, self.width, kept)

    @cached_property
    def made_again(self) -> Array:
        """What a checkpointed block holds beyond `kept` once it has run again. Selective: what
        products gave goes as it is used again."""
        mode, again = self.plans.checkpointing, self.of_block - self.kept
        # the result of `down` is not asked for again, and stays
        selective = again + self.input_of_products // self.cut
        chosen = np.where(mode == MODES[ActivationCheckpointing.selective], selective, again)
        return np.where(mode == MODES[ActivationCheckpointing.none], 0, chosen)

    @cached_property
    def in_mlp(self) -> Array:
        """Gradients in the backward of an MLP: of its result, its product and both its factors (a
        GELU has one); the product itself has gone. A tied head's waits for the embedding's."""
        factors = 1 if self.model.ffn == FFN.gelu else 2
        copy = self.rank.alone * self.model.tied * 4 * self.model.vocab_size * self.model.d_model
        return self.width + factors * self.wide + copy // self.plans.tp

    @cached_property
    def waiting(self) -> Array:
        """Bytes of all blocks of all micro-batches in flight, at their most."""
        plans, rank = self.plans, self.rank
        m = plans.micro_batches
        warm = np.where(plans.schedule == GPIPE, m, np.minimum(m, plans.pp - rank.place))
        blocks = np.where(plans.pp > 1, warm, 1) * rank.layers
        several = np.flatnonzero(rank.local_stages > 1)
        if len(several):
            blocks = blocks.copy()
            blocks[several] = _blocks_in_flight(rank, several)
        return blocks * self.kept

    @cached_property
    def head(self) -> Array:
        """What norm and head keep on the last stage: the norm's input and two numbers a token, and
        the head's input."""
        norm = self.width + 8 * self.tokens // self.cut
        return self.rank.last * (norm + self.input_of_products)


def _blocks_in_flight(rank: Rank, plans: Array) -> Array:
    """Blocks times micro-batches in flight, where a rank has several stages."""
    total = np.zeros(len(plans), dtype=np.int64)
    kinds, inverse = np.unique(rank.pipelines[plans], axis=0, return_inverse=True)
    for number, kind in enumerate(kinds.tolist()):
        here = inverse == number
        for lap, waiting in enumerate(in_flight(SCHEDULES[kind[0]], *kind[1:])):
            total[here] += waiting * rank.blocks[lap][plans[here]]
    return total
