"""Memory by category at the peak: states exact, parts that add up, what each remedy saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from costs.ledger import MEMORY_PARTS
from costs.memory import MemoryMeter
from experiments.figures.parity import make_config
from experiments.figures.short_runs import step_costs
from experiments.ranks import run_ranks
from minigpt.config import ModelConfig
from minigpt.model import GPT, token_loss
from parallel import activation_checkpointing
from parallel.activation_checkpointing import apply_activation_checkpointing
from parallel.layout import ActivationCheckpointing, Layout

EVEN = {"model.vocab_size": 96, "clip": 1.0, "steps": 4}


def alone(changes: dict[str, Any] | None = None) -> dict[str, int]:
    return step_costs([make_config(Layout(), {**EVEN, **(changes or {})})])[0]["memory_bytes"]


def test_states_are_exact_and_parts_add_up_on_one_process() -> None:
    memory = alone()
    config = make_config(Layout(), EVEN).model
    P = config.parameters
    tensors = config.n_layer * len(config.block_shapes) + len(config.outer_shapes)
    assert memory["parameters"] == 4 * P
    assert memory["optimizer"] == 2 * 4 * P + 4 * tensors  # AdamW counts its steps in each tensor
    assert memory["communication"] == 0
    assert memory["peak"] == sum(memory[part] for part in MEMORY_PARTS)


def test_checkpointing_keeps_less_and_full_keeps_least() -> None:
    layers = {"model.n_layer": 8}
    modes = (ActivationCheckpointing(m) for m in ("none", "selective", "full"))
    kept = [alone({**layers, "activation_checkpointing": m})["activations"] for m in modes]
    assert kept[0] > 1.3 * kept[1] > 1.3 * 1.3 * kept[2]


@pytest.mark.slow
def test_full_checkpointing_adds_one_block_input_a_layer() -> None:
    """Chen 2016: four layers more are four block inputs more, where those outweigh gradients."""
    long = {"seq_len": 256, "model.context": 256, "data.tokens": 20_000}
    full = {"activation_checkpointing": ActivationCheckpointing.full, **long}
    few, many = (alone({**full, "model.n_layer": n})["activations"] for n in (8, 12))
    block_input = 16 * 256 * 64 * 4  # B T D in fp32
    assert many - few == pytest.approx(4 * block_input, rel=0.1)


def test_offload_copies_block_inputs_to_the_host_and_changes_no_gradient() -> None:
    config = ModelConfig(n_layer=3, d_model=64, vocab_size=96)
    tokens = torch.randint(96, (2, 16))
    gradients, copied = [], []
    for mode in (ActivationCheckpointing.none, ActivationCheckpointing.offload):
        model = GPT(config)
        model.init_weights(0)
        apply_activation_checkpointing(model.blocks, mode, dropout=False)
        with patch.object(activation_checkpointing, "save_on_cpu", spy(copied)):
            token_loss(model(tokens), tokens)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert copied == [False] * config.n_layer, "once a block; unpinned, for there is no GPU"
    for plain, offloaded in zip(*gradients, strict=True):
        assert torch.equal(plain, offloaded)


def spy(copied: list[bool]) -> Callable[..., Any]:
    """torch's save_on_cpu, which notes each use."""

    def noted(pin_memory: bool) -> Any:
        copied.append(pin_memory)
        return torch.autograd.graph.save_on_cpu(pin_memory=pin_memory)

    return noted


def test_accumulation_shrinks_activations_by_the_number_of_micro_batches() -> None:
    whole = alone()["activations"]
    quarter = alone({"gradient_accumulation_steps": 4})["activations"]
    assert quarter == pytest.approx(whole / 4, rel=0.1)


@pytest.mark.slow
def test_sharding_over_four_ranks_keeps_a_quarter_of_each_state() -> None:
    layouts = [Layout(dp_replicate=4), Layout(dp_shard=4), Layout(dp_replicate=2, dp_shard=2)]
    configs = [make_config(layout, EVEN) for layout in layouts]
    P = configs[0].model.parameters
    for rank in run_ranks(4, step_costs, configs):
        ddp, fsdp, hsdp = (step["memory_bytes"] for step in rank)
        assert ddp["parameters"] == ddp["gradients"] == 4 * P
        assert fsdp["parameters"] == 4 * P // 4 and hsdp["parameters"] == 4 * P // 2
        steps = ddp["optimizer"] - 8 * P
        assert 0 < steps < 400
        assert fsdp["optimizer"] == 8 * P // 4 + steps
        assert fsdp["communication"] > 0, "the weights that were gathered"
        for memory in (ddp, fsdp, hsdp):
            assert memory["peak"] == sum(memory[part] for part in MEMORY_PARTS)


def test_a_storage_counts_once_and_only_while_it_lives() -> None:
    model = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters())
    with MemoryMeter(model, optimizer.state) as meter:
        first = torch.ones(1000)
        views = [first[:10], first.view(10, 100), first.t()]
        del first, views
        second = torch.ones(500)
        second.add_(1)
        small = torch.ones(10)
    assert meter.result() == {
        "peak": 400 + 4000,
        "parameters": 400,
        "gradients": 0,
        "optimizer": 0,
        "activations": 0,
        "communication": 0,
        "other": 4000,
    }
    assert math.isclose(small.sum().item() + second.sum().item(), 1010.0)
