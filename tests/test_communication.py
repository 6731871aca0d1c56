"""Measured payloads against the closed form, exactly, on real ranks."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from experiments.config import TrainConfig
from experiments.figures.matrix import PLANS
from experiments.ranks import run_ranks
from minigpt.config import ModelConfig
from parallel.layout import ActivationCheckpointing, Layout, Options, Precision
from simulator.communication import exact, messages, payload_bytes
from simulator.plans import Plans
from simulator.shapes import padded, weights_of
from tests import on_ranks
from tests.on_ranks import every_collective

pytestmark = pytest.mark.slow

CHANGES: list[dict[str, Any]] = [
    {},
    {"clip": 1.0},
    {"gradient_accumulation_steps": 4},
    {"model.tied": True, "model.bias": True, "model.positions": "learned", "clip": 1.0},
    {"precision": Precision.bf16},
    {"model.d_ff": 50, "model.vocab_size": 97},  # divides by neither 2 nor 4: fully_shard pads
    {"model.ffn": "moe", "model.n_expert": 5},
]
DATA = [plan for plan in PLANS if plan.layout.data_parallel == plan.layout.world_size]
# what the other axes send may depend on these
OTHERS: list[dict[str, Any]] = [
    {"clip": 0.5, "model.tied": True, "model.bias": True, "model.norm": "layernorm"},
    {"activation_checkpointing": ActivationCheckpointing.full},
    {"precision": Precision.bf16, "clip": 0.5, "gradient_accumulation_steps": 8},
    {"model.n_kv_head": 2, "activation_checkpointing": ActivationCheckpointing.selective},
]
WORLD_SIZES = (2, 4, 8)


def plans_of(config: TrainConfig) -> Plans:
    clipped = config.clip is not None
    return Plans.of(config.model, config.layout, config.options, clipped=clipped)


def closed_form(config: TrainConfig, place: int) -> dict[on_ranks.Key, tuple[int, int]]:
    """Calls and payload bytes of one plan."""
    sent = messages(plans_of(config), place)
    return {key: (int(of.calls[0]), int(of.payload_bytes[0])) for key, of in sent.items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_messages_are_the_closed_form_to_the_byte(world_size: int) -> None:
    """Every plan of docs/results/parity.md, on every rank: how many messages, and their
    payloads."""
    configs = []
    plans = [p for p in PLANS if p.layout.world_size == world_size and "impl" not in p.changes]
    for i, plan in enumerate(plans):
        # of an axis alone everything; what products depend on takes turns
        turns = [OTHERS[i % len(OTHERS)], CHANGES[i % len(CHANGES)]][: 8 // world_size]
        others = OTHERS if world_size == 2 else turns
        for change in CHANGES if plan in DATA else others:
            with suppress(ValueError):  # what the rules refuse
                configs.append(plan.config(change))
    configs = [config for config in configs if exact(plans_of(config)).all()]
    assert len(configs) >= 2
    for rank, measured in enumerate(
        run_ranks(world_size, on_ranks.messages, configs, timeout_s=900)
    ):
        for config, sent in zip(configs, measured, strict=True):
            place = rank // (world_size // config.layout.pp)
            assert sent == closed_form(config, place), (rank, config)


def test_ddp_sends_four_bytes_a_parameter() -> None:
    model = ModelConfig()
    sent = payload_bytes(model, Layout(dp_replicate=2), Options())
    assert sent["all_reduce", "dp_replicate", "float32"] == 4 * model.parameters


def test_padding_is_to_a_multiple_of_the_ranks() -> None:
    plan = Plans.of(ModelConfig(), Layout(), Options())
    weights = weights_of({"a.weight": (5, 3), "a.bias": (4,)})
    for n, numbers in ((2, 6 * 3 + 4), (1, 15 + 4)):
        assert padded(weights, plan, np.array([n])).tolist() == [numbers]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_collective_is_seen_with_its_payload(world_size: int) -> None:
    numbers = 64
    size = 4 * numbers
    calls = {
        "all_reduce": 2,
        "broadcast": 1,
        "reduce": 1,
        "all_gather": 2,
        "reduce_scatter": 2,
        "all_to_all": 1,
        "gather": 1,
        "scatter": 1,
    }
    for rank, rows in enumerate(run_ranks(world_size, every_collective, numbers)):
        seen = {row["collective"]: row for row in rows}
        wanted = {**calls, "send" if rank % 2 == 0 else "recv": 1}
        assert {name: row["calls"] for name, row in seen.items()} == wanted
        for name, row in seen.items():
            assert row["payload_bytes"] == size * wanted[name], name
            assert (row["axis"], row["dtype"]) == ("world", "float32")
            assert row["time_s"] is not None and 0 < row["time_s"] < 60
        assert seen["all_reduce"]["wire_bytes"] == 2 * size * 2 * (world_size - 1) // world_size
