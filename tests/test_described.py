"""Mixtures of experts as their publishers built them: sizes, products, and what travels."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.predict import clusters
from minigpt.config import FFN, ModelConfig, Norm
from parallel.layout import Layout, Options, Precision
from simulator.block_messages import message_kinds
from simulator.described import Described, described
from simulator.estimate import routed_seconds, step_seconds
from simulator.habits import Habits
from simulator.plans import Plans
from simulator.work import Work

H100 = clusters.load_all()["h100"]


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "kv", "vocab", "parameters"),
    [
        ("DeepSeek-V2", 60, 5120, 128, 128, 102400, 236e9),
        ("deepseekv2-lite", 27, 2048, 16, 16, 102400, 15.7e9),
        ("DeepSeek-V3", 61, 7168, 128, 128, 129280, 671e9),
        ("DeepSeek-R1", 61, 7168, 128, 128, 129280, 671e9),
        ("Kimi K2", 61, 7168, 64, 64, 163840, 1.04e12),
        ("Qwen3_30B_a3B", 48, 2048, 32, 4, 151936, 30.5e9),
        ("Qwen3_235B_a22B", 94, 4096, 64, 4, 151936, 235e9),
        ("GPT OSS 120B", 36, 2880, 64, 8, 201088, 116.8e9),
        ("gpt-oss-20b", 24, 2880, 64, 8, 201088, 20.9e9),
        ("Mixtral-8x7B", 32, 4096, 32, 8, 32000, 46.7e9),
        ("mixtral_8x22b", 56, 6144, 48, 8, 32768, 141e9),
        ("OLMoE-1B-7B", 16, 2048, 16, 16, 50304, 6.9e9),
    ],
)
def test_shapes_have_the_sizes_that_are_published(
    name: str, layers: int, width: int, heads: int, kv: int, vocab: int, parameters: float
) -> None:
    row = {"model_name": name, "n_layer": layers, "d_model": width, "n_head": heads}
    row |= {"n_kv_head": kv, "vocab": vocab}
    model = described({key: str(value) for key, value in row.items()}, 4096)
    assert model.parameters == pytest.approx(parameters, rel=0.015)


def plan_and_work(model: ModelConfig, habits: Habits | None = None, **axes: int) -> Work:
    options = Options(
        precision=Precision.bf16, micro_batch_size=2, micro_batches=4, seq_len=2048, zero_stage=1
    )
    plans = Plans.of(model, Layout(**axes), options, split=(model.n_layer,))
    return Work.of(plans, habits=habits or Habits())


SHAPE = {"n_layer": 4, "n_head": 32, "n_kv_head": 8, "d_model": 4096, "d_ff": 14336}
SHAPE |= {"vocab_size": 32000, "context": 2048, "n_expert": 8, "experts_per_token": 2}


def test_a_plain_mixture_is_that_of_minigpt() -> None:
    """Mixtral, described in either way, has the same products, weights and seconds."""
    own = ModelConfig(**SHAPE, ffn=FFN.moe, norm=Norm.rmsnorm)
    same = Described(**SHAPE, ffn=FFN.moe, norm=Norm.rmsnorm)
    assert same.parameters == own.parameters
    a, b = (plan_and_work(model, dp_shard=8, ep=4) for model in (own, same))
    for name in ("rows", "inner", "columns", "count", "parameters", "experts", "sent_bytes"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert step_seconds(a, H100)["compute"] == pytest.approx(step_seconds(b, H100)["compute"])


def test_latent_attention_and_shared_experts_are_counted() -> None:
    """DeepSeek-V3's 37B of weights that a token is multiplied with (DeepSeek-AI 2024, section 1)
    are its products' over the tokens, with the head, without the embedding."""
    row = {"model_name": "deepseekv3", "n_layer": "61", "d_model": "7168", "n_head": "128"}
    model = described({**row, "vocab": "129280"}, 2048)
    work = plan_and_work(model)
    flops = np.sum(work.count * work.rows * work.inner * work.columns)
    active = model.n_layer * flops / work.tokens[0] + model.d_model * model.vocab_size
    assert active == pytest.approx(37e9, rel=0.02)


def test_experts_are_spread_over_ep_and_shared_by_what_it_leaves() -> None:
    model = Described(**SHAPE, ffn=FFN.moe)
    work = plan_and_work(model, dp_shard=32, ep=8)
    assert work.experts[0] == 4 * 3 * 4096 * 14336
    assert (work.expert_ranks[0], work.expert_shards[0], work.shards[0]) == (4, 4, 32)


def test_tokens_that_travel_once_to_a_node_take_less_between_nodes() -> None:
    """Of 8 choices over 4 nodes a token has 4 (1 - (3/4)^8) = 3.6 nodes: 3.6 rows for 8."""
    shape = {**SHAPE, "n_expert": 128, "experts_per_token": 8, "d_ff": 768}
    model = Described(**shape, ffn=FFN.moe)
    works = [
        plan_and_work(model, Habits(sends_once=on), dp_shard=32, ep=32) for on in (False, True)
    ]
    rows = message_kinds().index(("forward", "all_to_all", "ep"))
    each, once = (routed_seconds(work, H100, work.sent_bytes[:, rows]) for work in works)
    latency = 24 * H100.between_nodes.latency
    assert (once - latency) / (each - latency) == pytest.approx(4 * (1 - 0.75**8) / 8, rel=1e-6)
