"""Closed forms of the flops of a step: which matrix products a rank runs, and how large they are.

Letters as in minigpt: B sequences of a micro-batch, T tokens, D width, N heads, K key-value heads,
H head width, F MLP width, V vocabulary, E experts, k experts of a token. Arrays have one entry a
plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minigpt.config import FFN, ModelConfig
from simulator.block_messages import expert_choices
from simulator.plans import NONE, SELECTIVE, Array, Plans
from simulator.shapes import Rank


@dataclass
class Product:
    """One kind of matrix product of a rank, (rows, inner) x (inner, columns), `batch` of them.

    `count` is how often it runs forward in a step. A backward runs two of the same flops: for the
    gradient of the input (rows x columns x inner) and of the weight (inner x rows x columns).
    """

    rows: Array
    inner: Array
    columns: Array
    batch: Array
    count: Array
    again: Array  # how often it runs forward once more in backward
    backward: float = 2.0  # flops of its backward, in those of its forward

    @property
    def of_one(self) -> Array:
        """Flops of one forward, 2 a multiply-add: whole numbers in float64, because those of a step
        may be more than 2^63."""
        return np.float64(2) * self.batch * self.rows * self.inner * self.columns

    @property
    def flops(self) -> Array:
        """Of a step, forward and backward, what is recomputed included: what runs."""
        return self.of_one * (self.count + self.again) + self.backward_flops

    @property
    def backward_flops(self) -> Array:
        return np.floor(self.backward * self.of_one) * self.count


def products(plans: Plans, place: Array | int = 0, rank: Rank | None = None) -> dict[str, Product]:
    """The matrix products of pp rank `place`: in the blocks q, k, v, scores, values, out, and
    gate, up, down (of the experts where there are some, and router); head.

    Attention's two products are counted in full although the mask hides half of them, as in PaLM
    (Chowdhery et al. 2022, appendix B). A fused kernel runs the first of them again in its backward
    (Dao et al. 2022, section 3.1), which is so counted by torch.utils.flop_counter.

    Checkpointed blocks run again but for their last product, `down`: torch stops when backward has
    what it needs. Selective checkpointing keeps what products give, and runs none again; under
    tensor parallelism too. Where the T x T matrix is kept (`flash` false), selective checkpointing
    is the one that recomputes it (Korthikanti et al. 2022, section 5).
    """
    rank, model = rank or Rank(plans, place), plans.model
    D, H, one = model.d_model, model.head_dim, np.ones_like(plans.pp)
    rows = plans.micro_batch_size * (plans.seq_len // plans.cp)
    heads, kv = model.n_head // plans.tp, model.kv_heads // plans.tp
    count = plans.micro_batches * rank.layers
    again = count * ((plans.checkpointing != NONE) & (plans.checkpointing != SELECTIVE))
    scores_again = again
    if not plans.flash:
        scores_again = count * (plans.checkpointing != NONE)

    def block(columns: Array, inner: Array, repeated: Array = again) -> Product:
        return Product(rows, inner, columns, one, count, repeated)

    attention = (plans.micro_batch_size * heads, rows // plans.micro_batch_size)
    # a ring skips half of the pairs with other ranks' keys (parallel/context_parallel.py)
    keys = plans.seq_len * (plans.cp + 1) // (2 * plans.cp)
    # a kernel that keeps no scores makes them again: 2.5 for both products together
    made_again = 3.0 if plans.flash else 2.0
    found = {
        "q": block(heads * H, D * one),
        "k": block(kv * H, D * one),
        "v": block(kv * H, D * one),
        "scores": Product(
            attention[1],
            H * one,
            keys,
            attention[0],
            count,
            scores_again,
            made_again,
        ),
        "values": Product(attention[1], keys, H * one, attention[0], count, scores_again),
        "out": block(D * one, heads * H),
    }
    head_count = plans.micro_batches * rank.last
    head = Product(rows, D * one, model.vocab_rows // plans.tp, one, head_count, 0 * head_count)
    return {**found, **_feed_forward(rank, rows, count, again), "head": head}


def _feed_forward(rank: Rank, rows: Array, count: Array, again: Array) -> dict[str, Product]:
    plans, model, one = rank.plans, rank.plans.model, np.ones_like(rank.plans.pp)
    D, F, none = model.d_model * one, model.ff_dim // plans.tp, 0 * count
    if model.ffn != FFN.moe:
        names = ("gate", "up") if model.ffn == FFN.swiglu else ("up",)
        wide = {name: Product(rows, D, F, one, count, again) for name in names}
        return {**wide, "down": Product(rows, F, D, one, count, none)}
    # every rank of ep gives and takes as many choices, on the average
    choices = plans.micro_batch_size * expert_choices(model, plans.seq_len)
    here = model.n_expert // plans.ep
    each = choices * plans.ep // model.n_expert
    # a capacity makes batched products, which selective checkpointing does not keep
    selective = (plans.checkpointing == SELECTIVE) & (model.capacity_factor is not None)
    repeated = again + count * selective
    wide = {n: Product(each, D, F, here, count, repeated) for n in ("gate", "up")}
    # collecting the results reads them for the router's gradient, so that `down` runs again too
    down = Product(each, F, D, here, count, repeated)
    router = Product(rows, D, model.n_expert * one, one, count, again)
    return {"router": router, **wide, "down": down}


def hardware_flops(plans: Plans, place: Array | int = 0, rank: Rank | None = None) -> Array:
    """Return the flops of pipeline rank `place` in one step, recomputation included, in float64."""
    found = products(plans, place, rank).values()
    return sum((product.flops for product in found), np.zeros(len(plans)))


def model_flops(plans: Plans) -> Array:
    """What the mathematics asks for in one optimiser step, of all ranks together: 6 N + 12 L D T a
    token (Chowdhery et al. 2022, PaLM, appendix B), N the weights that a token is multiplied with;
    rows that pad a vocabulary do not count.
    """
    return plans.tokens * model_flops_per_token(plans.model, plans.seq_len)


def model_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """6 N + 12 L D T; see `model_flops`."""
    D, kv = model.d_model, model.kv_heads * model.head_dim
    matrices = 2 if model.ffn == FFN.gelu else 3
    experts, router = 1, 0
    if model.ffn == FFN.moe:
        experts, router = model.experts_per_token, model.n_expert * D
    block = 2 * D * D + 2 * D * kv + experts * matrices * D * model.ff_dim + router
    return 6 * (model.n_layer * block + model.vocab_size * D) + 12 * model.n_layer * D * seq_len


def parameters(plans: Plans, place: Array | int = 0, rank: Rank | None = None) -> Array:
    """Weights that pp rank `place` holds, on its first data rank: of padded shards (see
    simulator.shapes.padded)."""
    rank = rank or Rank(plans, place)
    n, rest = rank.weight_shards, rank.expert_shards
    dense = (rank.of_outer(n) + rank.layers * rank.of_block(n)) // n
    return dense + rank.layers * rank.of_experts(rest) // rest
