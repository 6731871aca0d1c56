"""What the written-out and the borrowed implementations can do. No torch; see parallel/rules.py."""

from __future__ import annotations

from minigpt.config import FFN, Attention, ModelConfig, Pieces, require
from parallel.layout import (
    MESH_AXES,
    ONE_F_ONE_B,
    GradientSync,
    Impl,
    Layout,
    Options,
    Precision,
)

FLOAT8_TILE = 16  # numbers; torch._scaled_mm takes no other sides
BY_HAND = ("dp_replicate", "dp_shard", "tp", "pp")  # axes that parallel/by_hand/ has


def check_impl(model: ModelConfig, layout: Layout, options: Options) -> None:
    """Raise ValueError, one line, where an implementation cannot do what is asked."""
    _check_pieces(model, layout, options)
    if options.impl == Impl.torch:
        return
    require(
        options.gradient_sync == GradientSync.step,
        f"impl={options.impl.value}: gradient_sync=micro_batch is for impl=torch",
    )
    axes = [axis for axis in (*MESH_AXES, "ep") if getattr(layout, axis) > 1]
    if options.impl == Impl.by_hand:
        require(
            len(axes) <= 1 and set(axes) <= set(BY_HAND),
            f"impl=by_hand: {layout.label} has {', '.join(axes)}; it shows one of "
            f"{', '.join(BY_HAND)} at a time",
        )
        plain = options.precision == Precision.fp32 and not options.compile
        require(plain, "impl=by_hand: it is written for precision=fp32 and compile=false")
        require(
            layout.pp == 1 or options.pipeline.schedule == ONE_F_ONE_B,
            f"pipeline.schedule={options.pipeline.schedule.value}: impl=by_hand shows 1f1b",
        )
    if options.impl == Impl.accelerate:
        require(
            set(axes) <= {"dp_replicate", "dp_shard"},
            f"impl=accelerate: {layout.label}; it takes dp_replicate, and dp_shard on GPUs",
        )
        require(
            options.precision != Precision.fp16,
            "impl=accelerate: precision=fp16 would scale the loss twice on a GPU (Accelerate has a "
            "scaler of its own) and run in fp32 on a CPU; bf16 and fp32 work",
        )
        require(
            options.zero_stage != 1 or layout.dp_shard == 1,
            "impl=accelerate: zero_stage=1 is none of its ways to shard; 2 and 3 are",
        )


def check_float8(model: ModelConfig, layout: Layout, options: Options) -> None:
    """Raise ValueError, one line, where torchao's fp8 products cannot take a layer's place."""
    if options.precision != Precision.fp8:
        return
    said = "precision=fp8:"
    cut = [f"layout.{axis}={size}" for axis in ("tp", "ep") if (size := getattr(layout, axis)) > 1]
    require(not cut, f"{said} {', '.join(cut)} cuts a product that is scaled whole; bf16 works")
    plain = options.impl == Impl.torch and model.impl == Pieces.torch and not options.finetune.on
    require(plain, f"{said} it is for impl=torch, model.impl=torch and finetune=none; bf16 works")
    require(model.ffn != FFN.moe, f"{said} model.ffn=moe has products of its own; bf16 works")
    sizes = {
        "model.d_model": model.d_model,
        "model.d_ff": model.ff_dim,
        "model.n_kv_head * head width": model.kv_heads * model.head_dim,
        "micro_batch_size * seq_len / cp": options.micro_batch_size * options.seq_len // layout.cp,
    }
    for key, value in sizes.items():
        require(
            value % FLOAT8_TILE == 0,
            f"{said} {key}({value}) % {FLOAT8_TILE} = {value % FLOAT8_TILE}: fp8 units take whole "
            "tiles; bf16 works",
        )


def check_finetune(model: ModelConfig, layout: Layout, options: Options) -> None:
    """Raise ValueError, one line, where LoRA's adapters cannot be put beside what is there."""
    if not options.finetune.on:
        return
    said = "finetune=lora:"
    cut = [f"layout.{axis}={size}" for axis in ("tp", "ep") if (size := getattr(layout, axis)) > 1]
    require(
        not cut, f"{said} {', '.join(cut)} cuts what an adapter takes whole; dp, pp and cp work"
    )
    require(
        options.impl == Impl.torch,
        f"{said} impl={options.impl.value} has a gradient of every weight; impl=torch works",
    )
    require(
        layout.pp == 1 or not options.pipeline.splits_backward,
        f"{said} pipeline.schedule={options.pipeline.schedule.value} computes gradients of weights "
        "apart, frozen ones too; 1f1b, gpipe and interleaved_1f1b work",
    )
    in_mlp = "mlp" in options.finetune.targets
    require(
        not in_mlp or (model.ffn != FFN.moe and model.impl == Pieces.torch),
        f"finetune.targets has mlp: model.ffn={FFN(model.ffn).value} with model.impl="
        f"{Pieces(model.impl).value} has no projections there that take an adapter",
    )


def _check_pieces(model: ModelConfig, layout: Layout, options: Options) -> None:
    """What minigpt/by_hand/ is written for."""
    if model.attention in (Attention.by_hand_plain, Attention.by_hand_flash):
        said = f"model.attention={Attention(model.attention).value}"
        require(layout.cp == 1, f"{said}: layout.cp={layout.cp} has ring attention in its place")
        require(not options.compile, f"{said}: it is written for compile=false")
    if model.impl != Pieces.by_hand:
        return
    cut = [f"layout.{axis}={size}" for axis in ("pp", "tp") if (size := getattr(layout, axis)) > 1]
    require(
        not cut,
        f"model.impl=by_hand: {', '.join(cut)} cuts what it takes whole; the data axes work",
    )
    plain = options.precision == Precision.fp32 and not options.compile
    require(plain, "model.impl=by_hand: it is written for precision=fp32 and compile=false")
    require(
        options.impl != Impl.accelerate,
        "model.impl=by_hand: impl=accelerate has torch's loss; impl=torch and by_hand work",
    )
