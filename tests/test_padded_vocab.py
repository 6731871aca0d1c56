"""model.pad_vocab_to: rows that only make a vocabulary divide change no loss and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.figures import parity
from experiments.figures.agreement import agreements
from experiments.figures.parity import VARIANTS, Plan, Trajectory, compare, make_config
from experiments.ranks import run_ranks
from minigpt.config import ModelConfig
from minigpt.model import GPT
from parallel.layout import Impl, Layout, Options, Precision
from parallel.rules import check, padded_vocab

ODD: dict[str, Any] = {"model.vocab_size": 97, "data.vocab_size": 97}
PADDED: dict[str, Any] = {**ODD, "model.pad_vocab_to": 128}
PLANS = [
    Plan("tp 2", Layout(tp=2), {}),
    Plan("tp 2, sequence parallel", Layout(tp=2), {"sequence_parallel": True}),
    Plan("tp 2, by hand", Layout(tp=2), {"impl": Impl.by_hand}),
    Plan("fsdp 2", Layout(dp_shard=2), {}),
    Plan("pp 2", Layout(pp=2), {"gradient_accumulation_steps": 4}),
]


def trimmed(run: Trajectory) -> Trajectory:
    """The trajectory without its padding rows, whose gradients must be 0."""
    whole = dict(run.gradients)
    for name in {"embedding.weight", "head.weight"} & whole.keys():
        assert whole[name].shape[0] == 128 and not whole[name][97:].any(), name
        whole[name] = whole[name][:97]
    return Trajectory(run.losses, run.norms, whole, run.drift)


@pytest.mark.parametrize("name", ["plain", "tied", "gpt2", "uneven"])
@pytest.mark.parametrize("impl", ["torch", "by_hand"])
def test_padding_changes_nothing_on_one_process(name: str, impl: str) -> None:
    variant = {**VARIANTS[name], "model.impl": impl, "steps": 6}
    if impl == "by_hand":
        variant |= {"model.norm": "layernorm", "model.ffn": "gelu"}
    plain, padded = parity.trajectories(
        [make_config(Layout(), {**variant, **changes}) for changes in (ODD, PADDED)]
    )
    assert compare(trimmed(padded), plain).holds


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "gpt2"])
def test_padding_changes_nothing_on_two_ranks(name: str) -> None:
    variant = {**VARIANTS[name], "steps": 6}
    alone = parity.trajectory(make_config(Layout(), {**variant, **ODD}))
    configs = [plan.config({**variant, **PADDED}) for plan in PLANS]
    for plan, run in zip(PLANS, run_ranks(2, parity.trajectories, configs)[0], strict=True):
        assert compare(trimmed(run), alone).holds, plan.name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model.tied": True, "precision": Precision.bf16}])
def test_a_padded_vocabulary_costs_what_is_traced_and_what_the_formulas_say(
    changes: dict[str, Any],
) -> None:
    plans = [plan for plan in PLANS if plan.name != "tp 2, by hand"]
    for one in agreements(2, plans, {**PADDED, **changes}):
        measured, traced = one.calls
        assert traced == measured, one.plan.name
        _, sent, formula = one.payloads
        assert formula in (None, sent), one.plan.name
        assert one.traced.flops == one.measured["flops"]["hardware"], one.plan.name
        peak, traced_peak, formula_peak = one.peaks
        assert traced_peak == pytest.approx(peak, rel=0.03), one.plan.name
        assert formula_peak == pytest.approx(peak, rel=0.03), one.plan.name


def test_real_rows_start_as_without_padding_and_padding_is_never_sampled() -> None:
    shape: dict[str, Any] = {"n_layer": 1, "n_head": 2, "d_model": 20, "vocab_size": 97}
    plain, padded = (GPT(ModelConfig(**shape, pad_vocab_to=rows)) for rows in (None, 128))
    for model in (plain, padded):
        model.init_weights(3)
    own, other = plain.state_dict(), padded.state_dict()
    assert all(torch.equal(value, other[name][: len(value)]) for name, value in own.items())
    tokens = torch.arange(10)[None]
    logits = padded(tokens)
    assert torch.equal(logits[..., :97], plain(tokens))
    assert not logits.softmax(-1)[..., 97:].any()


def test_a_vocabulary_that_does_not_divide_is_refused_with_the_key_that_pads_it() -> None:
    model = ModelConfig(vocab_size=50257)
    with pytest.raises(ValueError, match=r"vocab_size\(50257\) % tp\(4\) = 1: .*=50304 pads them"):
        check(model, Layout(tp=4), Options())
    check(ModelConfig(vocab_size=50257, pad_vocab_to=50304), Layout(tp=4), Options())
    with pytest.raises(ValueError, match=r"pad_vocab_to\(50258\) % tp\(4\) = 2"):
        check(ModelConfig(vocab_size=50257, pad_vocab_to=50258), Layout(tp=4), Options())
    with pytest.raises(ValueError, match=r"model.pad_vocab_to=96: must be at least"):
        ModelConfig(vocab_size=97, pad_vocab_to=96)
    assert padded_vocab(model, 4, 3) == 50304 and padded_vocab(model, 5) == 50560
    assert padded_vocab(ModelConfig(vocab_size=32000), 8) == 32000
