"""What a step asks of a cluster, plan by plan: arrays of shapes, passes and bytes, no seconds yet.

The time equation (simulator/estimate.py) takes these. They may be joined over models, so that one
call predicts many rows of many models. Everything is of one rank; letters as in minigpt: B T D H F
L V, and tp, cp, ep for the size of an axis.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from minigpt.config import FFN
from parallel.layout import PipelineConfig, Precision
from simulator.habits import KERNELS, Habits
from simulator.hardware import DTYPES
from simulator.plans import NONE, PRECISIONS, SCHEDULES, SELECTIVE, Array, Plans
from simulator.sending import LOW_BYTES
from simulator.shapes import Rank, most_blocks

Values = dict[str, Any]  # fields of Work: arrays, or one for all plans
OWN_DTYPE = np.array([DTYPES.index("fp32" if p == Precision.fp32 else "bf16") for p in PRECISIONS])
SPLITS_BACKWARD = np.array([PipelineConfig(schedule).splits_backward for schedule in SCHEDULES])

# Passes over an activation B T D of a block's two residuals: each reads both and writes. Norms and
# rotations in one kernel read and write
RESIDUAL_PASSES = 2 * 3
# Bytes of a number that a norm moves in fp32, operator by operator: cast (6), squared (8), mean
# (4), scaled (8), cast (6), multiplied by its weight (4); of one that is rotated: cast (6), turned
# (8), cast (6)
SEPARATE_NORM, SEPARATE_ROTATION = 36, 20
OPERATORS = 20  # launched by the forward of a block: products, norms, rotations, residuals
SCORE_OPERATORS = 10  # more where attention is not one kernel: scale, mask, softmax, dropout


@dataclass(frozen=True)
class Work:
    """One entry a plan; the products of a block are (plans, products)."""

    # layout
    pp: Array
    local_stages: Array
    micro_batches: Array
    tp: Array
    cp: Array
    ep: Array
    dp: Array
    shards: Array  # ranks that share the optimizer's state; 1: each has all
    gathers_weights: Array  # 1 where each forward and backward gathers them (zero_stage 3)
    sequence_parallel: Array
    splits_backward: Array
    hides_tensor: Array  # 1 where they do, as the others: see simulator.habits.Habits
    hides_stages: Array
    hides_gradients: Array
    hides_updates: Array
    hides_gathers: Array
    copies_shards: Array
    # a block and one micro-batch, forward
    rows: Array
    inner: Array
    columns: Array
    count: Array
    dtype: Array  # place in DTYPES of its products
    wide_dtype: Array  # the same of attention and the head
    flash_flops: Array  # of a flash kernel, which skips what the mask hides
    kernel: Array  # place in KERNELS of that
    score_heads: Array  # heads whose T x T matrix is kept; 0 with a flash kernel
    queries: Array
    keys: Array
    head_dim: Array
    kv_bytes: Array  # keys and values of this rank's tokens
    routed_bytes: Array  # slots of tokens that travel to experts
    whole_bytes: Array  # read and written by element-wise operators on all of D
    cut_bytes: Array  # the same on what tp cuts
    operators: Array
    recomputed: Array  # share of the forward that runs again in the backward
    selective: Array  # 1: only element-wise operators and kept scores run again
    compiled: Array
    # the head, and what goes from stage to stage
    tokens: Array
    width: Array
    vocabulary: Array  # what tp leaves of V
    logit_bytes: Array  # moved for each logit
    item: Array  # bytes of an activation's number
    # stages
    messages_a_block: Array  # of weights or gradients over the data axes
    layers: Array  # blocks of the rank that has most
    last_layers: Array
    mean_layers: Array
    # weights of that rank before data axes cut them, and bytes of each
    parameters: Array
    gradient_bytes: Array
    weight_bytes: Array
    state_bytes: Array  # read and written by the optimizer

    def __len__(self) -> int:
        return len(self.pp)

    def __getitem__(self, which: Any) -> Work:
        return Work(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    @classmethod
    def joined(cls, parts: list[Work]) -> Work:
        """All entries of several, in order."""
        names = [f.name for f in fields(cls)]
        return cls(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})

    @classmethod
    def of(
        cls,
        plans: Plans,
        matmul_dtype: str | None = None,
        compiled: bool = False,
        recomputed: float | None = None,
        messages_a_block: int = 1,
        gradient_bytes: float | None = None,
        shards: int | None = None,
        habits: Habits = Habits(),  # noqa: B008
    ) -> Work:
        """What `plans` ask for.

        matmul_dtype: of simulator.hardware.DTYPES; None: the plans' precision. recomputed: share
        of a block's forward that runs again, where the plans' checkpointing does not say it.
        gradient_bytes: of one that is sent, where gradients are kept in more. shards: ranks that
        share the optimizer.
        """
        values = {**_layout(plans), **_block(plans, habits), **_attention(plans)}
        values |= _stages(plans)
        item = LOW_BYTES[plans.precision]
        own = OWN_DTYPE[plans.precision]
        values |= {
            "dtype": own if matmul_dtype is None else DTYPES.index(matmul_dtype),
            "wide_dtype": own,
            "compiled": compiled,
            "kernel": KERNELS.index(habits.kernel),
            "logit_bytes": habits.logit_bytes,
            "hides_tensor": habits.hides_tensor,
            "hides_stages": habits.hides_stages,
            "hides_gradients": habits.hides_gradients,
            "hides_updates": habits.hides_updates,
            "hides_gathers": habits.hides_gathers,
            "copies_shards": habits.copies_shards & (plans.dp_shard > 1) & (plans.zero_stage > 1),
            "messages_a_block": messages_a_block,
            "item": item,
            "tokens": _tokens(plans),
            "width": plans.model.d_model,
            "vocabulary": plans.model.vocab_size / plans.tp,
            "recomputed": (plans.checkpointing != NONE) & (plans.checkpointing != SELECTIVE),
            "selective": plans.checkpointing == SELECTIVE,
        }
        given = {"gradient_bytes": gradient_bytes, "shards": shards}
        values |= {name: value for name, value in given.items() if value is not None}
        if recomputed is not None:
            values |= {"recomputed": recomputed, "selective": 0}
        shape = len(plans)
        one_each = {
            name: value if np.ndim(value) == 2 else np.broadcast_to(value, shape)
            for name, value in values.items()
        }
        return cls(**{n: np.array(v, dtype=np.float64) for n, v in one_each.items()})


def _tokens(plans: Plans) -> Array:
    return plans.micro_batch_size * plans.seq_len / plans.cp


def _layout(plans: Plans) -> Values:
    return {
        "pp": plans.pp,
        "local_stages": np.where(plans.pp > 1, plans.local_stages, 1),
        "micro_batches": plans.micro_batches,
        "tp": plans.tp,
        "cp": plans.cp,
        "ep": plans.ep,
        "dp": plans.data_parallel,
        "shards": np.where(plans.dp_shard > 1, plans.dp_shard * plans.cp, 1),
        # with a pipeline, gathered weights stay until the step's end in all programs scored here
        "gathers_weights": (plans.dp_shard > 1) & (plans.zero_stage == 3) & (plans.pp == 1),
        "sequence_parallel": plans.sequence_parallel,
        "splits_backward": SPLITS_BACKWARD[plans.schedule] & (plans.pp > 1),
    }


def _block(plans: Plans, habits: Habits) -> Values:
    """Products and element-wise bytes of a block's forward (Shoeybi et al. 2019, section 3)."""
    model, tp, tokens = plans.model, plans.tp, _tokens(plans)
    d, f, kv = model.d_model, model.ff_dim, model.kv_heads * model.head_dim
    moe, matrices = model.ffn == FFN.moe, 1 if model.ffn == FFN.gelu else 2
    active = model.experts_per_token if moe else 1
    held = model.n_expert / plans.ep if moe else 1
    routed = tokens * active / held
    products = [  # rows, inner, columns, how many: q, k and v, out, up, down, router
        (tokens, d, d / tp, 1),
        (tokens, d, 2 * kv / tp, 1),
        (tokens, d / tp, d, 1),
        (routed, d, matrices * f / tp, held),
        (routed, f / tp, d, held),
        (tokens, d, model.n_expert if moe else 1, int(moe)),
    ]
    shape = np.shape(plans.tp)
    sides = [
        np.stack([np.broadcast_to(v, shape) for v in side], 1)
        for side in zip(*products, strict=True)
    ]
    item = LOW_BYTES[plans.precision]
    # q, k, v rotated: read and write; the activation function reads what up (and gate) wrote
    mlp = (matrices + 1) * f * active
    norm, turn = (SEPARATE_NORM, SEPARATE_ROTATION) if habits.separate else (2 * item, 2 * item)
    return {
        **dict(zip(("rows", "inner", "columns", "count"), sides, strict=True)),
        "whole_bytes": tokens * d * (2 * norm + RESIDUAL_PASSES * item),
        "cut_bytes": tokens / tp * (turn * (d + 2 * kv) + item * mlp),
        "operators": OPERATORS + 2 * matrices + (0 if plans.flash else SCORE_OPERATORS),
        "kv_bytes": 2 * tokens * kv / tp * item,
        "routed_bytes": int(moe) * (plans.ep > 1) * tokens * active * d * item,
    }


def _attention(plans: Plans) -> Values:
    """4 B T T D flops forward (Narayanan et al. 2021, appendix A), halved by the causal mask where
    a flash kernel skips what it hides (Dao 2023, FlashAttention-2, section 3.1.1)."""
    model = plans.model
    heads = plans.micro_batch_size * model.n_head / plans.tp
    queries, keys = plans.seq_len / plans.cp, plans.seq_len
    flops = 4 * heads * queries * keys * model.head_dim
    return {
        "flash_flops": flops / 2 if plans.flash else 0,
        "score_heads": 0 if plans.flash else heads,
        "queries": queries,
        "keys": keys,
        "head_dim": model.head_dim,
    }


def _stages(plans: Plans) -> Values:
    """Blocks of the fullest and of the last pp rank; weights as if the fullest had the embedding
    too."""
    first, last, layers = Rank(plans), Rank(plans, plans.pp - 1), most_blocks(plans)
    whole = np.ones_like(plans.pp)
    block = first.of_block(whole) + first.of_experts(whole)
    kept = plans.numerics
    return {
        "layers": layers,
        "last_layers": last.layers,
        "mean_layers": plans.model.n_layer / plans.pp,
        "parameters": layers * block + first.of_outer(whole),
        "gradient_bytes": kept.gradients,
        "weight_bytes": LOW_BYTES[plans.precision],
        "state_bytes": 2 * kept.optimizer + 2 * kept.weights + kept.gradients,
    }
