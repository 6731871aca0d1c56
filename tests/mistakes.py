"""Layouts that cannot train a model, and how each refusal begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minigpt.config import FFN, ModelConfig
from minigpt.finetune import FinetuneConfig, Method
from parallel.layout import (
    ActivationCheckpointing,
    GradientSync,
    Impl,
    Layout,
    Options,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)

MODEL = ModelConfig(n_layer=8, n_head=8, d_model=64, d_ff=64, vocab_size=64, context=64)
MOE = replace(MODEL, ffn=FFN.moe, n_expert=8)
OPTIONS = Options(seq_len=64, micro_batches=8)


def schedule(name: str, **settings: Any) -> dict[str, Any]:
    return {"pipeline": PipelineConfig(PipelineSchedule(name), **settings)}


SELECTIVE = {"activation_checkpointing": ActivationCheckpointing.selective}
BY_HAND: dict[str, Any] = {"impl": Impl.by_hand}
LORA: dict[str, Any] = {"finetune": FinetuneConfig(Method.lora)}
EACH: dict[str, Any] = {"gradient_sync": GradientSync.micro_batch}
ACCELERATE: dict[str, Any] = {"impl": Impl.accelerate}
FLOAT8: dict[str, Any] = {"precision": Precision.fp8}

MISTAKES: list[tuple[ModelConfig, Layout, dict[str, Any], str]] = [
    # tensor parallelism
    (
        replace(MODEL, n_head=6, d_model=48),
        Layout(tp=4),
        {},
        "layout.tp=4: model.n_head(6) % tp(4) = 2: each rank takes whole heads",
    ),
    (
        replace(MODEL, n_kv_head=2),
        Layout(tp=4),
        {},
        "layout.tp=4: model.n_kv_head(2) % tp(4) = 2: each rank takes whole key-value heads",
    ),
    (
        replace(MODEL, d_ff=66),
        Layout(tp=4),
        {},
        "layout.tp=4: model.d_ff(66) % tp(4) = 2: the MLP is cut along its width",
    ),
    (
        replace(MODEL, vocab_size=65),
        Layout(tp=4),
        {},
        "layout.tp=4: model.vocab_size(65) % tp(4) = 1: embedding and head are cut by rows",
    ),
    (
        MODEL,
        Layout(tp=4),
        {"sequence_parallel": True, "seq_len": 62},
        "layout.tp=4: seq_len / cp(62) % tp(4) = 2: sequence_parallel cuts the sequence",
    ),
    (
        MODEL,
        Layout(tp=4, cp=2),
        {"sequence_parallel": True, "seq_len": 60},
        "layout.tp=4: seq_len / cp(30) % tp(4) = 2",
    ),
    (
        MODEL,
        Layout(),
        {"sequence_parallel": True},
        "sequence_parallel=true: it cuts along layout.tp",
    ),
    # adapters
    (
        MODEL,
        Layout(dp_replicate=2, tp=2),
        LORA,
        "finetune=lora: layout.tp=2 cuts what an adapter takes whole",
    ),
    (MODEL, Layout(dp_shard=2), {**LORA, **BY_HAND}, "finetune=lora: impl=by_hand has a gradient"),
    (
        MODEL,
        Layout(pp=2),
        {**LORA, **schedule("zbv_zero_bubble")},
        "finetune=lora: pipeline.schedule=zbv_zero_bubble computes gradients of weights apart",
    ),
    (
        MOE,
        Layout(dp_shard=2),
        {"finetune": FinetuneConfig(Method.lora, targets=["q", "mlp"])},
        "finetune.targets has mlp: model.ffn=moe",
    ),
    # context parallelism
    (
        MODEL,
        Layout(cp=2),
        {"seq_len": 62},
        "layout.cp=2: seq_len(62) % (2 * cp(2)) = 2: each rank takes an early and a late chunk",
    ),
    (
        replace(MODEL, dropout=0.1),
        Layout(cp=2),
        {},
        "model.dropout=0.1: ring attention (layout.cp=2) has no dropout",
    ),
    (MOE, Layout(cp=2), {}, "layout.cp=2: model.ffn=moe balances its experts over whole"),
    # experts
    (MOE, Layout(tp=2), {}, "layout.tp=2: model.ffn=moe spreads its experts over ep"),
    (MODEL, Layout(dp_shard=2, ep=2), {}, "layout.ep=2: model.ffn=swiglu has no experts"),
    (
        replace(MOE, n_expert=6),
        Layout(dp_shard=4, ep=4),
        {},
        "layout.ep=4: model.n_expert(6) % ep(4) = 2: each rank takes whole experts",
    ),
    (
        MOE,
        Layout(dp_shard=6, ep=4),
        {},
        "layout.ep=4: layout.dp_shard(6) % ep(4) = 2: ep is carved out of it",
    ),
    (
        MOE,
        Layout(dp_replicate=6, ep=4),
        {},
        "layout.ep=4: layout.dp_replicate(6) % ep(4) = 2: ep is carved out of it",
    ),
    (
        MOE,
        Layout(dp_shard=4, ep=2),
        SELECTIVE,
        "activation_checkpointing=selective: with layout.ep",
    ),
    # pipelines
    (
        MODEL,
        Layout(pp=16),
        {"micro_batches": 16},
        "layout.pp=16: pp(16) * stages_per_rank(1) = 16 stages > model.n_layer(8)",
    ),
    (
        MODEL,
        Layout(pp=8),
        {**schedule("looped_bfs"), "micro_batches": 16},
        "layout.pp=8: pp(8) * stages_per_rank(2) = 16 stages > model.n_layer(8)",
    ),
    (MODEL, Layout(), schedule("1f1b", split=[8]), "pipeline.split: there is one stage"),
    (
        MODEL,
        Layout(pp=2),
        schedule("1f1b", split=[2, 2, 4]),
        "pipeline.split=[2, 2, 4]: 3 numbers for 2 stages",
    ),
    (
        MODEL,
        Layout(pp=2),
        schedule("1f1b", split=[4, 5]),
        "pipeline.split=[4, 5]: sum 9 != model.n_layer(8)",
    ),
    (
        MODEL,
        Layout(pp=2),
        schedule("1f1b", split=[0, 8]),
        "pipeline.split=[0, 8]: each stage needs at least one block",
    ),
    (
        MODEL,
        Layout(pp=2),
        schedule("1f1b", stages_per_rank=2),
        "pipeline.stages_per_rank=2: 1f1b takes one a rank",
    ),
    (
        MODEL,
        Layout(pp=2),
        schedule("looped_bfs", stages_per_rank=1),
        "pipeline.stages_per_rank=1: looped_bfs takes two or more a rank",
    ),
    (
        MODEL,
        Layout(pp=2),
        schedule("dualpipev", stages_per_rank=3),
        "pipeline.stages_per_rank=3: dualpipev takes two a rank",
    ),
    (
        MODEL,
        Layout(pp=4),
        {"micro_batches": 2},
        "gradient_accumulation_steps=2: 1f1b with layout.pp=4 takes other numbers of "
        "micro-batches; the nearest: 4, 5, 6, 7",
    ),
    (
        MODEL,
        Layout(pp=2),
        {**schedule("interleaved_1f1b"), "micro_batches": 7},
        "gradient_accumulation_steps=7: interleaved_1f1b with layout.pp=2 takes other numbers of "
        "micro-batches; the nearest: 4, 6, 8, 10",
    ),
    (
        MODEL,
        Layout(pp=2),
        {**schedule("interleaved_zero_bubble"), "micro_batches": 5},
        "gradient_accumulation_steps=5: interleaved_zero_bubble with layout.pp=2 takes other "
        "numbers of micro-batches; the nearest: 2, 3, 4, 6",
    ),
    (
        MODEL,
        Layout(pp=2),
        {**schedule("dualpipev"), "micro_batches": 3},
        "gradient_accumulation_steps=3: dualpipev with layout.pp=2 takes other numbers of "
        "micro-batches; the nearest: 4, 5, 6, 7",
    ),
    *[
        (
            MODEL,
            Layout(pp=2, dp_shard=2),
            schedule(name),
            f"zero_stage=3: {name} computes gradients",
        )
        for name in ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")
    ],
    *[
        (
            MODEL,
            Layout(pp=2),
            {**schedule(name), **SELECTIVE},
            f"activation_checkpointing=selective: {name} runs backward in two parts",
        )
        for name in ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")
    ],
    # sharding
    (MODEL, Layout(dp_shard=2), {"zero_stage": 4}, "zero_stage=4: must be 1, 2 or 3"),
    (
        MODEL,
        Layout(dp_replicate=2, dp_shard=2),
        {"zero_stage": 1},
        "zero_stage=1: weights are copies on all of layout.dp_shard, so layout.dp_replicate=2",
    ),
    (MODEL, Layout(dp_replicate=2), EACH, "gradient_sync=micro_batch: it keeps gradients sharded"),
    (
        MODEL,
        Layout(dp_shard=2),
        {**EACH, "zero_stage": 1},
        "gradient_sync=micro_batch: zero_stage=1 keeps whole gradients",
    ),
    (
        MODEL,
        Layout(pp=2, dp_shard=2),
        {**EACH, "zero_stage": 2},
        "gradient_sync=micro_batch: torch's pipelines (layout.pp=2)",
    ),
    (MODEL, Layout(dp_shard=2), {**EACH, **BY_HAND}, "impl=by_hand: gradient_sync=micro_batch is"),
    *[
        (
            MOE if axis == "ep" else MODEL,
            Layout(dp_shard=2, **{axis: 2}),
            {"zero_stage": 1},
            "zero_stage=1: torch's ZeroRedundancyOptimizer takes whole plain weights, and "
            f"layout.{axis} cuts them",
        )
        for axis in ("pp", "tp", "ep")
    ],
    # implementations
    (
        MODEL,
        Layout(dp_shard=2, tp=2),
        BY_HAND,
        "impl=by_hand: dp_shard2-tp2 has dp_shard, tp; it shows one of",
    ),
    (MODEL, Layout(cp=2), BY_HAND, "impl=by_hand: cp2 has cp; it shows one of"),
    (MODEL, Layout(tp=2), {**BY_HAND, "precision": Precision.bf16}, "impl=by_hand: it is written"),
    (
        MODEL,
        Layout(pp=2),
        {**BY_HAND, **schedule("gpipe")},
        "pipeline.schedule=gpipe: impl=by_hand shows 1f1b",
    ),
    (MODEL, Layout(tp=2), ACCELERATE, "impl=accelerate: tp2; it takes dp_replicate"),
    (
        MODEL,
        Layout(dp_replicate=2),
        {**ACCELERATE, "precision": Precision.fp16},
        "impl=accelerate: precision=fp16 would scale the loss twice",
    ),
    (MODEL, Layout(dp_shard=2), {**ACCELERATE, "zero_stage": 1}, "impl=accelerate: zero_stage=1"),
    (MODEL, Layout(tp=2), FLOAT8, "precision=fp8: layout.tp=2 cuts a product"),
    (MODEL, Layout(), {**FLOAT8, **ACCELERATE}, "precision=fp8: it is for impl=torch"),
    (MODEL, Layout(), {**FLOAT8, "seq_len": 15}, "precision=fp8: micro_batch_size * seq"),
]
