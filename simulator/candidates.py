"""How a published row may have been run: its plan, or several where it leaves something open.

Who publishes a number has tuned it, so of several the fastest that fits is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from minigpt.config import FFN, ModelConfig, Norm, Positions
from parallel.layout import (
    ONE_F_ONE_B,
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)
from simulator.cells import MOST_LAYERS, Cells, Unknown, flag, number, whole
from simulator.described import Described, described
from simulator.footprint import MemoryHabits, peak_bytes
from simulator.habits import habits_of, program_of
from simulator.plans import Plans
from simulator.row_memory import memory_of, numerics_of
from simulator.work import Work

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the blocks, tried likewise
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)  # tried where a row leaves it open
INTERLEAVED = PipelineSchedule("interleaved_1f1b")
ZERO = {"ddp": 1, "zero1": 1, "zero2": 2, "fsdp": 3, "zero3": 3}


@dataclass(frozen=True)
class Candidate:
    """One way in which a row may have been run: a plan, and what Work.of takes besides."""

    plan: Plans
    others: dict[str, Any]
    memory_habits: MemoryHabits

    @cached_property
    def work(self) -> Work:
        return Work.of(self.plan, **self.others)

    @cached_property
    def memory_bytes(self) -> float:
        return float(peak_bytes(self.plan, self.work, self.memory_habits)[0])


def model_of(cells: Cells, seq_len: int) -> ModelConfig:
    kind = cells.get("ffn_kind", "")
    if kind == "moe":
        return described(cells, seq_len)
    if kind not in ("gelu", "swiglu"):
        raise Unknown(f"ffn_kind={kind or 'empty'}: must be gelu, swiglu or moe")
    gated = kind == "swiglu"
    heads = whole(cells, "n_head")
    return ModelConfig(
        n_layer=whole(cells, "n_layer", most=MOST_LAYERS),
        n_head=heads,
        n_kv_head=whole(cells, "n_kv_head", heads),
        d_model=whole(cells, "d_model"),
        d_ff=whole(cells, "d_ff") if cells.get("d_ff") else None,
        vocab_size=whole(cells, "vocab"),
        context=seq_len,
        norm=Norm.rmsnorm if gated else Norm.layernorm,
        positions=Positions.rotary if gated else Positions.learned,
        ffn=FFN(kind),
        bias=not gated and not cells["id"].startswith("mpt"),
        tied=not gated,
    )


def _precision(cells: Cells) -> tuple[Precision, str]:
    """What weights and activations are in, and what products run in. Not stated: bf16, or what the
    program does by itself (fp32 in Megatron-DeepSpeed; vTrain's authors trained in fp16)."""
    text = cells.get("dtype", "").lower()
    if not text and program_of(cells) == "megatron-deepspeed":
        text = "fp16" if cells["id"].startswith("vt") else "fp32"
    wide = Precision.fp16 if text.startswith("fp16") else Precision.bf16
    if text.startswith("fp32"):
        return Precision.fp32, "fp32"
    if "fp4" in text:
        return wide, "fp4"
    return wide, "fp8" if "fp8" in text else "bf16"


def _bytes_of_a_sent_gradient(cells: Cells, precision: Precision) -> int:
    """Two where all is fp16; in Composer's PURE mode (composer/trainer/mosaic_fsdp_utils.py:
    get_mixed_precision); and in fms-fsdp (fms_fsdp/policies/mixed_precision.py). Others: fp32."""
    pure = "pure" in cells.get("dtype", "") or "fms-fsdp" in cells.get("source", "")
    return 2 if pure or precision == Precision.fp16 else 4


def _layout(cells: Cells, kind: str) -> Layout:
    """dp is what the other axes leave of the ranks; a row that says otherwise contradicts itself.

    zero1, zero2 and fsdp shard over the whole of it; ddp replicates.
    """
    ranks, tp, pp, cp = (whole(cells, key, 1) for key in ("n_gpus", "tp", "pp", "cp"))
    ep = whole(cells, "ep", 1) if cells.get("ffn_kind") == "moe" else 1
    dp = whole(cells, "dp", max(1, ranks // (tp * pp * cp)))
    if dp * tp * pp * cp != ranks:
        raise Unknown(f"dp({dp}) * tp({tp}) * pp({pp}) * cp({cp}) != {ranks} ranks")
    replicate, shard = (dp, 1) if kind == "ddp" else (1, dp)
    if dp * tp * cp % ep:
        raise Unknown(f"dp({dp}) * tp({tp}) * cp({cp}) does not divide by ep({ep})")
    return Layout(pp=pp, dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp, ep=ep)


def candidates_of(cells: Cells, model: ModelConfig) -> list[Candidate]:
    """Every way in which the row may have been run: what it says, and what it leaves open."""
    kind = cells.get("dp_kind", "") or "zero1"
    if kind not in ZERO:
        raise Unknown(f"dp_kind={kind}: must be one of {', '.join(ZERO)}")
    layout, batch = _layout(cells, kind), whole(cells, "global_batch_seqs")
    program, (precision, dtype) = program_of(cells), _precision(cells)
    flash = flag(cells, "flash_attn", program != "megatron-deepspeed")
    compiled = flag(cells, "compile", False)
    others = {
        "matmul_dtype": dtype,
        "compiled": compiled,
        "messages_a_block": len(model.block_shapes) if program == "deepspeed" else 1,
        "gradient_bytes": _bytes_of_a_sent_gradient(cells, precision),
        "shards": None if kind == "ddp" else layout.dp_shard * layout.cp,
        "expert_tp": 1,
        "habits": habits_of(cells, flash, compiled),
    }
    memory = memory_of(cells, flash)
    found = []
    for size, (checkpointing, share), local in product(
        _micro_batch_sizes(cells, batch, layout),
        _checkpointing(cells, flash),
        _local_stages(cells, model, layout.pp),
    ):
        if model.n_layer < layout.pp * local:
            raise Unknown(f"n_layer({model.n_layer}) is less than pp({layout.pp}) * vpp({local})")
        micro_batches = max(1, round(batch / (size * layout.data_parallel)))
        interleaved = schedule_of(cells, local) == INTERLEAVED
        if interleaved and micro_batches % layout.pp:
            continue  # it cannot
        options = Options(
            precision=precision,
            activation_checkpointing=checkpointing,
            zero_stage=ZERO[kind],
            gradient_sync=_gradient_sync(kind, layout),
            sequence_parallel=flag(cells, "sp", layout.tp > 1 and flash),
            pipeline=PipelineConfig(schedule_of(cells, local), local if local > 1 else None),
            micro_batch_size=size,
            seq_len=model.context,
            micro_batches=micro_batches,
        )
        numerics = numerics_of(kind, program, precision)
        split = None if program == "nanotron" else even(model, layout.pp, local)
        if split is None and isinstance(model, Described):
            split = level(model.n_layer, layout.pp * local)
        plan = Plans.of(model, layout, options, numerics=numerics, flash=flash, split=split)
        kept = replace(memory, recomputed_blocks=share or 0.0)
        found.append(Candidate(plan, {**others, "recomputed": share}, kept))
    if not found:
        raise Unknown(f"vpp={cells.get('vpp')}: micro-batches do not divide by pp({layout.pp})")
    return found


def even(model: ModelConfig, pp: int, local: int) -> tuple[int, ...] | None:
    """Blocks of each stage as most programs cut them; None: balanced.

    As many on each, where they divide (Narayanan et al. 2021, section 2.2). Where they do with two
    more, the first and the last stage have one less, for embedding and head (Llama team 2024,
    section 3.3.2; BigScience's type:transformer|embedding).
    """
    stages = pp * local
    each = -(-model.n_layer // stages)
    short = each * stages - model.n_layer
    if pp == 1 or short not in (0, 2):
        return None
    ends = each - short // 2
    return (ends, *(each,) * (stages - 2), ends)


def level(layers: int, stages: int) -> tuple[int, ...]:
    """As even as whole blocks are, the first stages with one more."""
    return tuple(layers // stages + (i < layers % stages) for i in range(stages))


def _gradient_sync(kind: str, layout: Layout) -> GradientSync:
    """Programs that shard gradients scatter each micro-batch's: Composer and torchtitan turn
    fully_shard's reduction off for none, ZeRO's stages 2 and 3 keep no whole gradients. Pipelines
    hold theirs."""
    each = ZERO[kind] > 1 and layout.pp == 1
    return GradientSync.micro_batch if each else GradientSync.step


def _published_share(cells: Cells) -> float | None:
    """Share of the blocks that recompute, from the published HFU and MFU: the forward is a third
    of the model's flops."""
    hfu = re.search(r"HFU (\d+\.?\d*)", cells.get("source_verbatim_note", ""))
    mfu = number(cells, "mfu_pct")
    return min(1.0, max(0.0, 3 * (float(hfu[1]) / mfu - 1))) if hfu and mfu else None


SCHEDULES = {re.sub("_", "", name.value): name for name in PipelineSchedule} | {
    "afab": PipelineSchedule("gpipe"),
    "interleaved": INTERLEAVED,
    "zbv": PipelineSchedule("zbv_zero_bubble"),
    "dualpipe": PipelineSchedule("dualpipev"),
}


def schedule_of(cells: Cells, local: int) -> PipelineSchedule:
    """What the row says, in any spelling; else 1F1B, interleaved where a rank has several stages.

    Raises Unknown for a name that no schedule has.
    """
    text = cells.get("pp_schedule", "")
    name = SCHEDULES.get(re.sub(r"[^a-z0-9]", "", text.lower()))
    if text and name is None:
        raise Unknown(f"pp_schedule={text}: must be one of {', '.join(SCHEDULES)}")
    if name is None or (name == ONE_F_ONE_B and local > 1):
        return INTERLEAVED if local > 1 else ONE_F_ONE_B
    return name


ONE_STAGE = ("megatron-deepspeed", "megatron-bridge")  # programs, where a row has no number


def _local_stages(cells: Cells, model: ModelConfig, pp: int) -> list[int]:
    """What the row says; interleaved without a number, or neither: what divides the layers."""
    program, text = program_of(cells), cells.get("pp_schedule", "")
    how = PipelineConfig(schedule_of(cells, 1))
    one = pp == 1 or (text and how.one_stage_a_rank) or program in ONE_STAGE
    if cells.get("vpp") or one:
        return [whole(cells, "vpp", 1)]
    if program == "torchtitan" or how.is_v_shaped:
        return [2]
    least = 2 if text else 1
    held = {n: -(-model.n_layer // (pp * n)) * pp * n for n in range(1, 13)}
    most = 1.05 * model.n_layer
    near = [n for n, layers in held.items() if layers <= most and pp * n <= model.n_layer]
    return [n for n in near if n >= least] or [least]


def _micro_batch_sizes(cells: Cells, batch: int, layout: Layout) -> list[int]:
    """What the row says, or all powers of two that divide what a rank does in a step."""
    if cells.get("micro_batch_seqs"):
        return [whole(cells, "micro_batch_seqs")]
    ranks = layout.data_parallel
    if batch % ranks:
        raise Unknown(f"global_batch_seqs({batch}) does not divide by dp({ranks})")
    if layout.pp > 1 and program_of(cells) == "torchtitan":
        return [max(1, batch // ranks // layout.pp)]
    return [size for size in MICRO_BATCHES if batch // ranks % size == 0]


def _checkpointing(cells: Cells, flash: bool) -> list[tuple[ActivationCheckpointing, float | None]]:
    """What the row says, and the share of the forward that runs again where that does not say it.

    `selective` where attention keeps no T x T matrix anyway: the share of blocks that the published
    HFU tells, else half of the products (torchtitan's per-operator choice keeps every second one).
    Where a row says nothing: some share of the blocks.
    """
    text, none = cells.get("recompute", ""), ActivationCheckpointing.none
    if not text:
        megatron = program_of(cells) == "megatron-deepspeed"
        return [(none, share) for share in ((0.0,) if megatron else SHARES)]
    try:
        kind = ActivationCheckpointing(text)
    except ValueError:
        raise Unknown(f"recompute={text}: must be none, selective or full") from None
    if kind != ActivationCheckpointing.selective or not flash:
        return [(kind, None)]
    share = _published_share(cells)
    return [(kind, 0.5)] if share is None else [(none, share)]
