"""Measured payloads against the closed form, exactly, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.parity import make_config
from experiments.ranks import run_ranks
from minigpt.config import ModelConfig
from parallel.layout import Layout, Precision
from simulator.formula import padded_size, payload_bytes
from tests.on_ranks import every_collective, payloads

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
LAYOUTS = {
    2: [Layout(dp_replicate=2), Layout(dp_shard=2)],
    4: [Layout(dp_replicate=4), Layout(dp_shard=4), Layout(dp_replicate=2, dp_shard=2)],
}


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_payloads_are_the_closed_form_to_the_byte(world_size: int) -> None:
    configs = [make_config(lay, change) for lay in LAYOUTS[world_size] for change in CHANGES]
    ranks = run_ranks(world_size, payloads, configs)
    for i, config in enumerate(configs):
        wanted = payload_bytes(
            config.model,
            config.layout,
            config.precision,
            config.gradient_accumulation_steps,
            clipped=config.clip is not None,
        )
        for measured in ranks:
            assert measured[i] == wanted, (config.layout.label, CHANGES[i % len(CHANGES)])


def test_ddp_sends_four_bytes_a_parameter() -> None:
    model = ModelConfig()
    sent = payload_bytes(model, Layout(dp_replicate=2))
    assert sent["all_reduce", "dp_replicate", "float32"] == 4 * model.parameters


def test_padding_is_to_a_multiple_of_the_ranks() -> None:
    assert padded_size([(5, 3), (4,)], 2) == 6 * 3 + 4
    assert padded_size([(5, 3), (4,)], 1) == 15 + 4


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
