"""What a step asks of a cluster, plan by plan: arrays of shapes, passes and bytes, no seconds yet.

The time equation (simulator/estimate.py) takes these. They may be joined over models, so that one
call predicts many rows of many models. Everything is of one rank; letters as in minigpt: B T D H F
L V, and tp, cp, ep for the size of an axis.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from parallel.layout import PipelineConfig, Precision
from simulator.block_products import Block
from simulator.block_values import of_attention, of_backward, of_block, of_messages
from simulator.data_messages import block_gathers
from simulator.habits import KERNELS, Habits
from simulator.hardware import DTYPES
from simulator.plans import PRECISIONS, SCHEDULES, Array, Plans
from simulator.sending import LOW_BYTES
from simulator.shapes import Rank, most_blocks, stage_blocks

Values = dict[str, Any]  # fields of Work: arrays, or one for all plans
# places in simulator.hardware.DTYPES: of a block's products, and of all others
OWN = {"fp32": "fp32", "bf16": "bf16", "fp16": "bf16", "fp8": "fp8"}
OWN_DTYPE = np.array([DTYPES.index(OWN[p.value]) for p in PRECISIONS])


def peak_dtype(precision: Precision) -> str:
    """Return the dtype of simulator.hardware.DTYPES that matmuls run in."""
    return OWN[precision.value]


WIDE_DTYPE = np.minimum(OWN_DTYPE, DTYPES.index("bf16"))
SPLITS_BACKWARD = np.array([PipelineConfig(schedule).splits_backward for schedule in SCHEDULES])

# what Work takes from Habits as it is
HIDES = ("hides_tensor", "hides_stages", "hides_gradients", "hides_updates", "hides_gathers")
OF_HABITS = (*HIDES, "sends_once", "blocking", "logit_bytes")


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
    replicas: Array  # of the shards, where ranks share weights or optimizer
    scatters: Array  # of gradients in a step, where ranks share them
    gathers_weights: Array  # 1 where each forward and backward gathers them (zero_stage 3)
    gathers: Array  # of all weights in a step, ahead of the blocks that want them
    sequence_parallel: Array
    order: Array  # place in SCHEDULES of the one that is walked through; -1: an equation says it
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
    repeated: Array  # of these, how many run again in the backward
    dtype: Array  # place in DTYPES of its products
    wide_dtype: Array  # the same of attention and the head
    flash_flops: Array  # of a flash kernel, which skips what the mask hides
    kernel: Array  # place in KERNELS of that
    score_heads: Array  # heads whose T x T matrix is kept; 0 with a flash kernel
    queries: Array
    keys: Array
    head_dim: Array
    # (plans, kinds of simulator.block_messages.message_kinds), one micro-batch
    sent_bytes: Array  # payload of a call over tp, cp or ep
    sent_block: Array  # calls of a block
    sent_first: Array  # calls of the first stage besides
    sent_last: Array  # calls of the last stage besides
    choices: Array  # experts of a token
    sends_once: Array  # 1: a token travels once to a rank, and between nodes once to a node
    whole_bytes: Array  # read and written by element-wise operators on all of D
    cut_bytes: Array  # the same on what tp cuts
    operators: Array
    blocking: Array  # 1: the host waits for each of them
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
    stage_bytes: Array  # of a micro-batch's activations that a rank hands to the next stage
    tied_bytes: Array  # of the gradient that first and last stage of a tied model add up
    messages_a_block: Array  # of weights or gradients over the data axes
    stage_blocks: Array  # (plans, stages): blocks of each stage, where `order` is walked through
    layers: Array  # blocks of the rank that has most
    last_layers: Array  # of the rank that has the head
    mean_layers: Array
    # weights of that rank before data axes cut them, and bytes of each
    parameters: Array  # but for experts
    experts: Array
    expert_ranks: Array  # that have the same experts, or a shard of them
    expert_shards: Array  # ranks that share their optimizer's state
    expert_tp: Array  # in how many parts each expert is cut
    gradient_bytes: Array
    weight_bytes: Array
    state_bytes: Array  # read and written by the optimizer
    update_operators: Array  # launched for it, where they are too many to be nothing

    def __len__(self) -> int:
        return len(self.pp)

    def __getitem__(self, which: Any) -> Work:
        return Work(**{f.name: getattr(self, f.name)[which] for f in fields(self)})

    @classmethod
    def joined(cls, parts: list[Work]) -> Work:
        """All entries of several, in order."""
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        return cls(**{n: np.concatenate(_widened(n, values)) for n, values in columns.items()})

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
        expert_tp: int | None = None,
        habits: Habits = Habits(),  # noqa: B008
    ) -> Work:
        """What `plans` ask for.

        matmul_dtype: of simulator.hardware.DTYPES; None: the plans' precision. recomputed: share
        of a block's forward that runs again, where the plans' checkpointing does not say it.
        gradient_bytes: of one that is sent, where gradients are kept in more. shards: ranks that
        share the optimizer. expert_tp: see simulator.block_products.Block; None: tp.
        """
        cut = plans.tp if expert_tp is None else np.full_like(plans.tp, expert_tp)
        block = Block(plans, _tokens(plans), cut)
        item, own = LOW_BYTES[plans.precision], OWN_DTYPE[plans.precision]
        dtype = own if matmul_dtype is None else np.full_like(own, DTYPES.index(matmul_dtype))
        narrow = dtype >= DTYPES.index("fp8")
        values = {**_layout(plans), **of_block(block, habits, narrow), **of_attention(block)}
        values |= _stages(block)
        values |= _orders(plans, habits)
        if habits.sends_as_torch:
            values["gathers"] = values["gathers"] + _pipeline_gathers(plans)
        values |= {name: getattr(habits, name) for name in OF_HABITS}
        values |= {
            "dtype": dtype,
            "wide_dtype": WIDE_DTYPE[plans.precision],
            "compiled": compiled,
            "kernel": KERNELS.index(habits.kernel),
            "copies_shards": habits.copies_shards & (plans.dp_shard > 1) & (plans.zero_stage > 1),
            "messages_a_block": messages_a_block,
            "item": item,
            "tokens": _tokens(plans),
            "width": plans.model.d_model,
            "vocabulary": plans.model.vocab_rows * block.heads / plans.tp,
        }
        values |= of_backward(block, recomputed, habits.stops_early)
        values |= of_messages(block, recomputed, habits)
        given = {"gradient_bytes": gradient_bytes, "shards": shards}
        values |= {name: value for name, value in given.items() if value is not None}
        copies = habits.copied_tensors * (plans.zero_stage == 1) * (values["shards"] > 1)
        values["update_operators"] = copies * values["layers"] * values["shards"]
        shape = len(plans)
        one_each = {
            name: value if np.ndim(value) == 2 else np.broadcast_to(value, shape)
            for name, value in values.items()
        }
        return cls(**{n: np.array(v, dtype=np.float64) for n, v in one_each.items()})


def _tokens(plans: Plans) -> Array:
    return plans.micro_batch_size * plans.seq_len / plans.cp


def _layout(plans: Plans) -> Values:
    gathers = (plans.dp_shard > 1) & (plans.zero_stage > 1) & (plans.pp == 1)
    return {
        "pp": plans.pp,
        "local_stages": np.where(plans.pp > 1, plans.local_stages, 1),
        "micro_batches": plans.micro_batches,
        "tp": plans.tp,
        "cp": plans.cp,
        "ep": plans.ep,
        "dp": plans.data_parallel,
        "shards": np.where(plans.dp_shard > 1, plans.dp_shard * plans.cp, 1),
        "replicas": np.where(plans.dp_shard > 1, plans.dp_replicate, 1),
        "scatters": np.where(plans.syncs_each, plans.micro_batches, 1),
        # with a pipeline gathered weights stay until the step's end in published programs
        "gathers_weights": gathers * (plans.zero_stage == 3),
        "gathers": gathers * plans.micro_batches * (plans.zero_stage - 1),
        "sequence_parallel": plans.sequence_parallel,
    }


def _pipeline_gathers(plans: Plans) -> Array:
    """How often a step of this program gathers a block's weights in a pipeline (block_gathers): by
    the first pp rank."""
    found = np.zeros(len(plans))
    places = np.flatnonzero((plans.pp > 1) & (plans.dp_shard > 1) & (plans.zero_stage > 1))
    if len(places):
        rank = Rank(plans[places])
        found[places] = sum(block_gathers(rank)) / rank.layers
    return found


def _orders(plans: Plans, habits: Habits) -> Values:
    """The order of each pipeline of this program, and of every schedule that splits its backward.
    Others are predicted by an equation (simulator/estimate.py): the messages of published programs
    do not wait for their turn."""
    walked = SPLITS_BACKWARD[plans.schedule] | habits.sends_as_torch
    walked = walked & (plans.pp > 1)
    places = np.flatnonzero(walked)
    blocks = np.zeros((len(plans), 1))
    if len(places):
        held = stage_blocks(plans[places])
        blocks = np.zeros((len(plans), held.shape[1]))
        blocks[places] = held
    return {"order": np.where(walked, plans.schedule, -1), "stage_blocks": blocks}


def _stages(block: Block) -> Values:
    """Blocks of the fullest pp rank and of that with the head; weights as if the fullest had the
    embedding too, and no block without experts that another rank can have."""
    plans = block.plans
    first, layers = Rank(plans), most_blocks(plans)
    last = Rank(plans, np.where(first.v_shaped, 0, plans.pp - 1))  # has the head
    whole = np.ones_like(plans.pp)
    more, kept = block.more, plans.numerics
    dense = np.where(plans.pp > 1, 0, more.dense_layers) if more else 0 * whole
    further = block.heads - 1
    layers, ended = layers + further / plans.pp, last.layers + further / plans.pp
    mlp = 3 * plans.model.d_model * (more.dense_ff - more.shared_ff) / plans.tp if more else 0
    tokens_of = plans.data_parallel * plans.cp * plans.tp
    same = tokens_of / (plans.ep * block.expert_tp)
    return {
        "layers": layers,
        "last_layers": ended,
        "mean_layers": (plans.model.n_layer + further) / plans.pp,
        "parameters": layers * first.of_dense(whole) + dense * mlp + first.of_outer(whole),
        "experts": (layers - dense) * block.expert_numbers,
        "expert_ranks": same,
        "expert_shards": np.where(plans.dp_shard > 1, same / plans.dp_replicate, 1),
        "gradient_bytes": kept.gradients,
        "weight_bytes": LOW_BYTES[plans.precision],
        "state_bytes": 2 * kept.optimizer + 2 * kept.weights + kept.gradients,
    }


def _widened(name: str, parts: list[Array]) -> list[Array]:
    """Columns up to the most that one part has: products and stages that other models do not have
    are none, and run no time."""
    if parts[0].ndim == 1:
        return parts
    filler = 1.0 if name in ("rows", "inner", "columns") else 0.0
    most = max(part.shape[1] for part in parts)
    missing = [((0, 0), (0, most - part.shape[1])) for part in parts]
    return [np.pad(p, m, constant_values=filler) for p, m in zip(parts, missing, strict=True)]
