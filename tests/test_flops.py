"""Counted flops against the closed form, operator by operator and for whole steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from costs.flops import counted, measure_peak_flops
from experiments.figures.parity import make_config
from experiments.metering import flops_per_token, utilisation
from minigpt.attention import sdpa
from minigpt.config import FFN, Attention, ModelConfig
from parallel.layout import ActivationCheckpointing, Layout, Options
from parallel.mesh import build_mesh
from parallel.parallelize import parallelize
from parallel.passes import NoMarks
from simulator.flops import hardware_flops, model_flops_per_token
from simulator.plans import Plans

B, T = 2, 16


def step_flops(config: ModelConfig, options: Options) -> int:
    """Counted in one forward and backward of B x T tokens."""
    replica = parallelize(config, build_mesh(Layout(), torch.device("cpu")), options, 0)
    tokens = torch.randint(config.vocab_size, (B, T))
    with counted() as counter:
        replica.passes.train([(tokens, tokens)], 1.0, NoMarks())
    return counter.get_total_flops()


@pytest.mark.parametrize("ffn", FFN)
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_a_step_is_the_closed_form_and_what_flash_recomputes(
    ffn: FFN, kv_heads: int | None
) -> None:
    """6 N + 12 L D T, and 2 L D T more: the kernel's backward makes the scores again."""
    config = ModelConfig(n_layer=3, d_model=64, n_kv_head=kv_heads, vocab_size=96, ffn=ffn)
    changes = {
        "model.n_layer": 3,
        "model.n_kv_head": kv_heads,
        "model.ffn": ffn,
        "seq_len": T,
        "model.context": 128,
    }
    closed = flops_per_token(make_config(Layout(), changes))
    recomputed = 2 * config.n_layer * config.d_model * T
    assert step_flops(config, Options()) == B * T * (closed + recomputed)


def test_full_checkpointing_runs_the_blocks_forward_again() -> None:
    """But for the last projection: torch stops when backward has all that it needs."""
    config = ModelConfig(n_layer=3, d_model=64, vocab_size=96)
    plain = step_flops(config, Options())
    full = step_flops(config, Options(activation_checkpointing=ActivationCheckpointing.full))
    matrices = [s for name, s in config.block_shapes.items() if len(s) == 2 and "down" not in name]
    forward_of_blocks = 2 * sum(rows * columns for rows, columns in matrices)
    attention = 4 * config.d_model * T
    assert full - plain == config.n_layer * B * T * (forward_of_blocks + attention)


def test_selective_checkpointing_runs_no_projection_again() -> None:
    config = ModelConfig(n_layer=3, d_model=64, vocab_size=96)
    selective = Options(activation_checkpointing=ActivationCheckpointing.selective)
    assert step_flops(config, selective) == step_flops(config, Options())


def test_torch_counts_the_cpu_attention_kernel() -> None:
    """q k^T and weights v, 2 flops a multiply-add, the mask not taken off."""
    q, k, v = (torch.randn(2, 4, 32, 8, requires_grad=True) for _ in range(3))
    with counted() as counter:
        y = sdpa(q, k, v)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * (2 * 2 * 4 * 32 * 32 * 8)
    assert counter.get_total_flops() == forward * 7 // 2


def test_what_is_counted_is_computed_as_ever() -> None:
    """A run that goes on counts in another step than the run that was not stopped."""
    products = []
    for look in (nullcontext, counted):
        x = torch.linspace(-3, 3, 1000).requires_grad_()
        with look():
            torch.nn.functional.silu(x).square().sum().backward()
        products.append(x.grad)
    assert torch.equal(*products)


def test_a_dense_models_flops_are_six_a_weight_and_attention() -> None:
    """PaLM, appendix B, with all weights but the embedding's and the norms': 6 N + 12 L D T."""
    config = ModelConfig(n_layer=32, d_model=4096, n_head=32, n_kv_head=8, d_ff=14336)
    weights = config.parameters - config.vocab_size * 4096 - 65 * 4096
    assert model_flops_per_token(config, 8192) == 6 * weights + 12 * 32 * 4096 * 8192


@pytest.mark.parametrize("mode", ActivationCheckpointing)
@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_head": 2},
        {"ffn": FFN.gelu, "bias": True},
        {"ffn": FFN.moe, "n_expert": 4},
        {"ffn": FFN.moe, "n_expert": 4, "capacity_factor": 1.0},
        {"attention": Attention.plain},
    ],
)
def test_hardware_flops_are_what_is_counted(
    mode: ActivationCheckpointing, changes: dict[str, Any]
) -> None:
    config = ModelConfig(n_layer=3, d_model=64, vocab_size=96, **changes)
    options = Options(activation_checkpointing=mode, micro_batch_size=B, seq_len=T)
    flash = config.attention != Attention.plain
    plan = Plans.of(config, Layout(), options, flash=flash)
    assert hardware_flops(plan).tolist() == [step_flops(config, options)]


def test_the_peak_is_measured_and_utilisation_needs_it() -> None:
    peak = measure_peak_flops(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < peak < 1e14
    assert utilisation(1e9, 0.5, 4e9) == 0.5
    assert utilisation(None, 0.5, 4e9) is utilisation(1e9, None, 4e9) is None
    assert utilisation(1e9, 0.5, None) is None
