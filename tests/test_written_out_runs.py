"""Whole models and runs of the pieces of minigpt/by_hand/: the same training, and its costs."""

from __future__ import annotations

import pytest
import torch

from experiments.figures.by_hand import memory_of, slope
from experiments.figures.parity import GLOBAL_BATCH, compare, make_config, trajectories, trajectory
from experiments.figures.short_runs import step_costs
from experiments.ranks import run_ranks
from minigpt.by_hand.cross_entropy import token_loss
from minigpt.config import FFN, ModelConfig, OptimizerName, Pieces
from minigpt.model import GPT
from minigpt.model import token_loss as token_loss_of_torch
from parallel.layout import Impl, Layout, Options, Precision
from parallel.rules import check


@pytest.mark.parametrize("ffn", [FFN.gelu, FFN.swiglu])
@pytest.mark.parametrize("attention", ["by_hand_plain", "by_hand_flash"])
def test_a_whole_model_by_hand_is_the_same_model(ffn: FFN, attention: str) -> None:
    shape = {"n_layer": 2, "d_model": 32, "vocab_size": 40, "context": 16, "ffn": ffn, "bias": True}
    tokens = torch.randint(40, (2, 16))
    results = []
    for extra, loss in (
        ({}, token_loss_of_torch),
        ({"impl": Pieces.by_hand, "attention": attention}, token_loss),
    ):
        model = GPT(ModelConfig(**shape, **extra))
        model.init_weights(0)
        total, _ = loss(model(tokens), tokens.roll(-1, 1))
        total.backward()
        results.append([total, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_memory_grows_linearly_for_flash_and_by_the_square_for_the_scores() -> None:
    lengths = [256, 512, 1024]
    flash = [memory_of("flash attention", T).ours for T in lengths]
    scores = [memory_of("attention", T).ours for T in lengths]
    assert slope(lengths, flash) < 1.1
    assert slope(lengths, scores) > 1.7


@pytest.mark.parametrize(
    "model, layout, options, said",
    [
        (
            {"attention": "by_hand_flash"},
            {"cp": 2},
            {},
            "model.attention=by_hand_flash: layout.cp=2",
        ),
        (
            {"attention": "by_hand_plain"},
            {},
            {"compile": True},
            "model.attention=by_hand_plain: it is",
        ),
        ({"impl": "by_hand"}, {"tp": 2}, {}, "model.impl=by_hand: layout.tp=2 cuts"),
        (
            {"impl": "by_hand"},
            {},
            {"precision": Precision.bf16},
            "model.impl=by_hand: it is written",
        ),
        ({"impl": "by_hand"}, {}, {"impl": Impl.accelerate}, "model.impl=by_hand: impl=accelerate"),
    ],
)
def test_what_it_is_not_written_for_is_refused(
    model: dict, layout: dict, options: dict, said: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        check(ModelConfig(**model), Layout(**layout), Options(seq_len=64, **options))
    assert str(refusal.value).startswith(said)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"attention": "by_hand_flash", "dropout": 0.1}, "model.attention=by_hand_flash"),
        ({"impl": "by_hand", "norm": "rmsnorm"}, "model.impl=by_hand: has"),
        ({"impl": "by_hand", "ffn": "moe"}, "model.impl=by_hand: has"),
    ],
)
def test_a_model_that_it_has_no_piece_for_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelConfig(**changes)


ALL_BY_HAND = {
    "model.impl": Pieces.by_hand,
    "model.attention": "by_hand_flash",
    "optimizer.name": OptimizerName.by_hand_adamw,
}


@pytest.mark.slow
def test_it_trains_as_torchs_pieces_do_on_real_ranks() -> None:
    small = {"model.n_layer": 2, "steps": 6, "clip": 0.5, "gradient_accumulation_steps": 2}
    layouts = [Layout(dp_replicate=2), Layout(dp_shard=2)]
    configs = [make_config(layout, {**small, **ALL_BY_HAND}) for layout in layouts]
    wanted = trajectory(make_config(Layout(), small))
    for run in run_ranks(2, trajectories, configs)[0]:
        assert compare(run, wanted).holds


def test_the_ledger_shows_what_attention_costs() -> None:
    """The scores fill the memory; flash attention goes without, and skips what the mask hides."""
    long = {"model.n_layer": 1, "model.context": 256, "seq_len": 256, "steps": 3}
    kinds = ["sdpa", "by_hand_plain", "by_hand_flash"]
    configs = [make_config(Layout(), {**long, "model.attention": kind}) for kind in kinds]
    torchs, scores, flash = step_costs(configs)
    activations = [c["memory_bytes"]["activations"] for c in (torchs, scores, flash)]
    one_set = 4 * GLOBAL_BATCH * configs[0].model.n_head * 256**2  # fp32 scores of a step
    assert activations[1] > activations[0] + one_set and activations[2] < activations[0] + one_set
    assert flash["flops"]["hardware"] < torchs["flops"]["hardware"]
    assert scores["flops"]["model"] == flash["flops"]["model"]
