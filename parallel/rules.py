"""Which layouts can train which models: checked before any process starts. No torch.

Every refusal is one line: the equation with its numbers, and the nearest layouts that would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from minigpt.config import FFN, ModelConfig, require
from parallel.impl_rules import check_finetune, check_float8, check_impl
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    PipelineConfig,
)

SHOWN = 3  # alternatives that a refusal names
VOCAB_MULTIPLE = 128
MOST_RANKS = 2**15  # for which other layouts are proposed


def check(model: ModelConfig, layout: Layout, options: Options) -> None:
    """Raise ValueError, one line, where `layout` cannot train `model`. Needs a resolved layout."""
    try:
        check_plainly(model, layout, options)
    except ValueError as error:
        near = nearest(model, layout, options)
        if not near or not str(error).startswith(("layout.", "model.", "seq_len")):
            raise
        raise ValueError(f"{error}; {layout.world_size} ranks could be {', '.join(near)}") from None


def check_plainly(model: ModelConfig, layout: Layout, options: Options) -> None:
    """The same without looking for other layouts, which takes long for many ranks."""
    _check_tensor(model, layout, options)
    _check_context(model, layout, options)
    _check_experts(model, layout, options)
    _check_pipeline(model, layout, options)
    _check_sharding(layout, options)
    _check_gradient_sync(layout, options)
    _check_compile(layout, options)
    check_impl(model, layout, options)
    check_finetune(model, layout, options)
    check_float8(model, layout, options)


def nearest(model: ModelConfig, layout: Layout, options: Options) -> list[str]:
    """The layouts of as many ranks that differ least, as they are written on the command line."""

    def distance(other: Layout) -> tuple[float, Layout]:
        pairs = zip(layout.sizes, other.sizes, strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs), other

    fitting = [other for other in of_size(layout) if fits(model, other, options)]
    best = sorted(map(distance, fitting), key=lambda pair: pair[0])[:SHOWN]
    return [_written(other) for _, other in best]


def fits(model: ModelConfig, layout: Layout, options: Options) -> bool:
    """Whether `check` would let it pass."""
    try:
        check_plainly(model, layout, options)
    except ValueError:
        return False
    return True


def of_size(layout: Layout) -> Iterator[Layout]:
    """All layouts of as many ranks, with the same ep; none of more ranks than MOST_RANKS."""
    ranks = layout.world_size
    if ranks > MOST_RANKS:  # a slip of the pen, whose divisors alone would take hours
        return
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]

    def products(rest: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (rest,)
            return
        for size in (n for n in divisors if rest % n == 0):
            for others in products(rest // size, axes - 1):
                yield (size, *others)

    for sizes in products(ranks, len(MESH_AXES)):
        yield replace(layout, **dict(zip(MESH_AXES, sizes, strict=True)))


def _written(layout: Layout) -> str:
    sizes = zip(MESH_AXES, layout.sizes, strict=True)
    return " ".join(f"{axis}={size}" for axis, size in sizes if size > 1) or "single"


def _divides(key: str, value: int, axis: str, size: int, why: str) -> None:
    if value % size:  # a search asks tens of thousands of times: no text where all is well
        said = f"{key}({value}) % {axis}({size}) = {value % size}"
        raise ValueError(f"layout.{axis}={size}: {said}: {why}")


def padded_vocab(model: ModelConfig, *tensor_parallel: int) -> int:
    """Return the smallest number of rows that each of these sizes of tp divides, and 128 does.

    Multiples of 128 are what Megatron-LM pads to (--make-vocab-size-divisible-by) and what the
    tiles of matmuls want.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, *tensor_parallel)
    return multiple * math.ceil(model.vocab_size / multiple)


def _check_tensor(model: ModelConfig, layout: Layout, options: Options) -> None:
    tp = layout.tp
    if tp == 1:
        wanted = options.sequence_parallel
        require(not wanted, "sequence_parallel=true: it cuts along layout.tp, which is 1")
        return
    _divides("model.n_head", model.n_head, "tp", tp, "each rank takes whole heads")
    _divides("model.n_kv_head", model.kv_heads, "tp", tp, "each rank takes whole key-value heads")
    _divides("model.d_ff", model.ff_dim, "tp", tp, "the MLP is cut along its width")
    rows, key = model.vocab_rows, "pad_vocab_to" if model.pad_vocab_to else "vocab_size"
    if rows % tp:
        why = "embedding and head are cut by rows"
        why += f"; model.pad_vocab_to={padded_vocab(model, tp)} pads them"
        _divides(f"model.{key}", rows, "tp", tp, why)
    if options.sequence_parallel:
        part = options.seq_len // layout.cp
        _divides("seq_len / cp", part, "tp", tp, "sequence_parallel cuts the sequence")


def _check_context(model: ModelConfig, layout: Layout, options: Options) -> None:
    cp = layout.cp
    if cp == 1:
        return
    require(
        options.seq_len % (2 * cp) == 0,
        f"layout.cp={cp}: seq_len({options.seq_len}) % (2 * cp({cp})) = "
        f"{options.seq_len % (2 * cp)}: each rank takes an early and a late chunk",
    )
    require(
        model.dropout == 0,
        f"model.dropout={model.dropout}: ring attention (layout.cp={cp}) has no dropout; use 0",
    )
    require(
        model.ffn != FFN.moe,
        f"layout.cp={cp}: model.ffn=moe balances its experts over whole sequences, so cp must be 1",
    )


def _check_experts(model: ModelConfig, layout: Layout, options: Options) -> None:
    ep, has_experts = layout.ep, model.ffn == FFN.moe
    require(
        not has_experts or layout.tp == 1,
        f"layout.tp={layout.tp}: model.ffn=moe spreads its experts over ep, and tp must be 1",
    )
    if ep == 1:
        return
    require(has_experts, f"layout.ep={ep}: model.ffn={FFN(model.ffn).value} has no experts")
    _divides("model.n_expert", model.n_expert, "ep", ep, "each rank takes whole experts")
    axis = "dp_shard" if layout.dp_shard > 1 else "dp_replicate"
    _divides(f"layout.{axis}", getattr(layout, axis), "ep", ep, "ep is carved out of it")
    selective = options.activation_checkpointing == ActivationCheckpointing.selective
    require(
        not selective or ep == layout.data_parallel,
        f"activation_checkpointing=selective: with layout.ep={ep} of {layout.data_parallel} data "
        "ranks experts are sharded inside the block, which torch's selective policy cannot repeat; "
        "none and full work",
    )


def _check_pipeline(model: ModelConfig, layout: Layout, options: Options) -> None:
    pipeline, pp = options.pipeline, layout.pp
    name = pipeline.schedule.value
    if pp == 1:
        require(pipeline.split is None, "pipeline.split: there is one stage, for layout.pp=1")
        return
    local = pipeline.local_stages
    require(
        local == 1 if pipeline.one_stage_a_rank else local >= 2,
        f"pipeline.stages_per_rank={local}: {name} takes "
        f"{'one' if pipeline.one_stage_a_rank else 'two or more'} a rank",
    )
    require(
        not pipeline.is_v_shaped or local == 2,
        f"pipeline.stages_per_rank={local}: {name} takes two a rank",
    )
    stages = pp * local
    require(
        stages <= model.n_layer,
        f"layout.pp={pp}: pp({pp}) * stages_per_rank({local}) = {stages} stages > "
        f"model.n_layer({model.n_layer})",
    )
    if pipeline.split is not None:
        _check_split(pipeline.split, stages, model.n_layer)
    _check_micro_batches(pipeline, pp, options.micro_batches)
    require(
        not pipeline.splits_backward or options.zero_stage != 3 or layout.dp_shard == 1,
        f"zero_stage=3: {name} computes gradients of weights later than torch's fully_shard can "
        f"keep them gathered; zero_stage=2 works (layout.dp_shard={layout.dp_shard})",
    )
    selective = options.activation_checkpointing == ActivationCheckpointing.selective
    require(
        not (pipeline.splits_backward and selective),
        f"activation_checkpointing=selective: {name} runs backward in two parts, and torch's "
        "selective policy allows one; none and full work",
    )


def _check_split(split: list[int], stages: int, layers: int) -> None:
    said = f"pipeline.split={split}"
    require(len(split) == stages, f"{said}: {len(split)} numbers for {stages} stages")
    require(min(split) >= 1, f"{said}: each stage needs at least one block")
    require(sum(split) == layers, f"{said}: sum {sum(split)} != model.n_layer({layers})")


def takes(pipeline: PipelineConfig, pp: int, micro_batches: int) -> bool:
    """Whether a schedule can run so many micro-batches (what torch's schedule objects check)."""
    name = pipeline.schedule.value
    if name == "1f1b":
        return micro_batches >= pp
    if name in ("interleaved_1f1b", "interleaved_zero_bubble"):
        return micro_batches % max(1, micro_batches // pp) == 0
    if name == "dualpipev":
        return micro_batches >= 2 * pp
    return True


def _check_micro_batches(pipeline: PipelineConfig, pp: int, micro_batches: int) -> None:
    if takes(pipeline, pp, micro_batches):
        return
    can = [n for n in range(1, 4 * pp + micro_batches) if takes(pipeline, pp, n)]
    near = sorted(sorted(can, key=lambda n: abs(n - micro_batches))[:4])
    raise ValueError(
        f"gradient_accumulation_steps={micro_batches}: {pipeline.schedule.value} with "
        f"layout.pp={pp} takes other numbers of micro-batches; the nearest: "
        f"{', '.join(map(str, near))}"
    )


def _check_sharding(layout: Layout, options: Options) -> None:
    stage = options.zero_stage
    require(stage in (1, 2, 3), f"zero_stage={stage}: must be 1, 2 or 3")
    if stage == 1 and layout.dp_shard > 1:
        require(
            layout.dp_replicate == 1,
            f"zero_stage=1: weights are copies on all of layout.dp_shard, so "
            f"layout.dp_replicate={layout.dp_replicate} must be 1 and dp_shard take its ranks",
        )
        axes = [axis for axis in ("pp", "tp", "ep") if getattr(layout, axis) > 1]
        require(
            not axes,
            f"zero_stage=1: torch's ZeroRedundancyOptimizer takes whole plain weights, and "
            f"layout.{'/'.join(axes)} cuts them; zero_stage=2 shards the optimizer too",
        )


def _check_gradient_sync(layout: Layout, options: Options) -> None:
    if options.gradient_sync == GradientSync.step:
        return
    said = "gradient_sync=micro_batch:"
    require(
        layout.dp_shard > 1,
        f"{said} it keeps gradients sharded from one micro-batch to the next, and layout.dp_shard "
        "is 1",
    )
    require(
        options.zero_stage > 1,
        f"{said} zero_stage=1 keeps whole gradients; 2 and 3 shard them",
    )
    require(
        layout.pp == 1,
        f"{said} torch's pipelines (layout.pp={layout.pp}) reduce gradients once a step",
    )


def _check_compile(layout: Layout, options: Options) -> None:
    if not options.compile:
        return
    require(
        layout.tp == 1,
        f"compile=true: torch.compile hands tensor parallelism (layout.tp={layout.tp}) plain "
        "gradients where it needs its own kind; compile=false works",
    )
    require(
        layout.ep == 1,
        f"compile=true: with layout.ep={layout.ep} the number of tokens that come to an expert "
        "changes at every step, and each is compiled anew; compile=false works",
    )
    name = options.pipeline.schedule.value
    require(
        layout.pp == 1 or not options.pipeline.splits_backward,
        f"compile=true: {name} runs backward in two parts, of which a compiled block's second "
        "gives wrong gradients without a word (torch 2.13); compile=false, or 1f1b, works",
    )
