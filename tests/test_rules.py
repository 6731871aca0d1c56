"""Which layouts are refused, with which words; and that the rest satisfies the equations."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.config import FFN, ModelConfig
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
from parallel.rules import check, fits, nearest, takes
from parallel.stages import flops_of_block, split_layers
from tests.mistakes import MISTAKES, MODEL, OPTIONS


@pytest.mark.parametrize("model, layout, changes, said", MISTAKES, ids=[m[-1] for m in MISTAKES])
def test_a_mistake_is_refused_by_name(
    model: ModelConfig, layout: Layout, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as refused:
        check(model, layout, replace(OPTIONS, **changes))
    assert str(refused.value).startswith(said)
    assert len(str(refused.value).splitlines()) == 1


def test_a_refusal_names_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"; 4 ranks could be cp=2 tp=2, dp_shard=2 tp=2, dp_rep"):
        check(replace(MODEL, n_kv_head=2), Layout(tp=4), OPTIONS)


# ---- any model, any layout, any options

sizes = st.sampled_from([1, 1, 2, 3, 4])


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv_heads, group = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 4]))
    return ModelConfig(
        n_layer=draw(st.integers(1, 12)),
        n_head=kv_heads * group,
        n_kv_head=draw(st.sampled_from([None, kv_heads])),
        d_model=kv_heads * group * 2 * draw(st.integers(1, 3)),
        d_ff=draw(st.sampled_from([None, 12, 64, 66])),
        vocab_size=draw(st.sampled_from([48, 60, 97])),
        ffn=draw(st.sampled_from(FFN)),
        n_expert=draw(st.sampled_from([2, 4, 6])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.1])),
    )


layouts = st.builds(Layout, sizes, sizes, sizes, sizes, sizes, sizes)
pipelines = st.builds(
    PipelineConfig,
    st.sampled_from(PipelineSchedule),
    st.sampled_from([None, None, None, 1, 2, 3, -1]),
    st.none() | st.none() | st.lists(st.integers(-1, 4), max_size=5),
)
options = st.builds(
    Options,
    precision=st.sampled_from(Precision),
    activation_checkpointing=st.sampled_from(ActivationCheckpointing),
    compile=st.booleans(),
    impl=st.sampled_from([Impl.torch, Impl.torch, *Impl]),
    zero_stage=st.sampled_from([1, 2, 3, 3, 4]),
    gradient_sync=st.sampled_from(GradientSync),
    sequence_parallel=st.booleans(),
    pipeline=pipelines,
    seq_len=st.sampled_from([16, 24, 48, 50]),
    micro_batches=st.integers(1, 12),
)


def equations(model: ModelConfig, layout: Layout, options: Options) -> dict[str, bool]:
    """What must be whole for the program to work, by what it would otherwise cut in pieces."""
    pp, stages = layout.pp, layout.pp * options.pipeline.local_stages
    cut = layout.tp if options.sequence_parallel else 1
    axis = layout.dp_shard if layout.dp_shard > 1 else layout.dp_replicate
    split = options.pipeline.split
    return {
        "heads": model.n_head % layout.tp == 0,
        "key-value heads": model.kv_heads % layout.tp == 0,
        "width": model.ff_dim % layout.tp == 0,
        "vocabulary": model.vocab_size % layout.tp == 0,
        "chunks": layout.cp == 1 or options.seq_len % (2 * layout.cp) == 0,
        "sequence": options.seq_len % (layout.cp * cut) == 0,
        "experts": layout.ep == 1 or model.n_expert % layout.ep == 0,
        "data ranks": axis % layout.ep == 0,
        "blocks": pp == 1 or stages <= model.n_layer,
        "split": split is None or (len(split) == stages and sum(split) == model.n_layer),
        "shards of gradients": options.gradient_sync == GradientSync.step
        or (layout.dp_shard > 1 and options.zero_stage > 1 and pp == 1),
        "micro-batches": pp == 1 or takes(options.pipeline, pp, options.micro_batches),
    }


@settings(max_examples=500)
@given(models(), layouts, options)
def test_a_check_passes_what_divides_or_says_one_line(
    model: ModelConfig, layout: Layout, options: Options
) -> None:
    try:
        check(model, layout, options)
    except ValueError as refused:
        said = str(refused)
        assert len(said.splitlines()) == 1
        assert re.match(r"[a-z_.]+(=|: )", said), "it begins with a key"
        assert not fits(model, layout, options)
    else:
        broken = [name for name, holds in equations(model, layout, options).items() if not holds]
        assert not broken


@given(models(), layouts, options)
def test_the_nearest_layouts_fit_and_have_as_many_ranks(
    model: ModelConfig, layout: Layout, options: Options
) -> None:
    for written in nearest(model, layout, options):
        axes = dict(part.split("=") for part in written.split() if written != "single")
        other = Layout(**{axis: int(size) for axis, size in axes.items()}, ep=layout.ep)
        assert other.world_size == layout.world_size
        assert fits(model, other, options)


# ---- stages


def costs(
    model: ModelConfig, split: tuple[int, ...] | list[int], seq_len: int
) -> tuple[float, float]:
    """Flops of a token in the costliest stage, and by how far stages are from even."""
    block = flops_of_block(model, seq_len)
    of_stage = [count * block for count in split]
    of_stage[0] += model.d_model
    of_stage[-1] += 2 * model.vocab_size * model.d_model
    mean = sum(of_stage) / len(of_stage)
    return max(of_stage), sum((cost - mean) ** 2 for cost in of_stage) / mean**2


@given(
    st.data(), st.integers(1, 10), st.sampled_from([16, 4096]), st.sampled_from([8, 512, 50_000])
)
def test_the_costliest_stage_is_as_cheap_as_can_be_and_no_stages_are_more_even(
    data: st.DataObject, layers: int, seq_len: int, vocabulary: int
) -> None:
    stages = data.draw(st.integers(1, min(layers, 5)))
    model = ModelConfig(n_layer=layers, vocab_size=vocabulary)
    split = split_layers(model, stages, seq_len)
    assert len(split) == stages and sum(split) == layers and min(split) >= 1
    every = itertools.product(range(1, layers + 1), repeat=stages - 1)
    each = [(*front, layers - sum(front)) for front in every if sum(front) < layers]
    best = [min(of) for of in zip(*(costs(model, one, seq_len) for one in each), strict=True)]
    assert costs(model, split, seq_len) == pytest.approx(best, rel=1e-6, abs=1e-9)
