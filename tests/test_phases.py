"""The phase of each message and the flops of a step, of every strategy, on two real ranks."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from costs.messages import Call, Row, control_of, rows_of
from costs.phases import Phases
from experiments.config import TrainConfig
from experiments.explain import hardware_flops_of
from experiments.figures.matrix import PLANS
from experiments.figures.parity import make_config
from experiments.figures.short_runs import step_costs
from experiments.ranks import run_ranks
from minigpt.config import Attention
from parallel.layout import ActivationCheckpointing, Layout, Precision
from tests.on_ranks import control_traffic, rows_and_flops

FULL = {"activation_checkpointing": ActivationCheckpointing.full}
TIED = {"clip": 0.5, "model.tied": True}
Sent = dict[tuple[str, str], int]  # (collective, phase): payload bytes
Measured = list[tuple[list[Row], list[Row], int]]  # by rank: rows of two steps, flops


def the_configs() -> dict[str, TrainConfig]:
    """Each plan of two ranks: with a tied head and clipping, or with blocks that run again."""
    found = {}
    for plan in (p for p in PLANS if p.layout.world_size == 2):
        for name, change in (("", TIED), (", full", FULL)):
            # a schedule that splits backward runs checkpointed blocks once a piece
            if name and ("pp2" in plan.name or "impl" in plan.changes):
                continue
            with suppress(ValueError):  # what the rules refuse
                found[plan.name + name] = plan.config(change)
    return found


CONFIGS = the_configs()


@lru_cache
def measured() -> dict[str, Measured]:
    ranks = run_ranks(2, rows_and_flops, list(CONFIGS.values()))
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(CONFIGS)}


def summed(rows: list[Row]) -> Sent:
    """What the strategy sent, without the sums of losses and squares."""
    sent: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row["phase"] != "optimizer" or row["payload_bytes"] > 16:
            sent[row["collective"], row["phase"]] += row["payload_bytes"]
    return dict(sent)


def expected(config: TrainConfig, rank: int) -> Sent | None:
    """By phase, fp32. None: not here (experts)."""
    model, layout, m = config.model, config.layout, config.gradient_accumulation_steps
    again, hand = config.activation_checkpointing != "none", config.impl.value == "by_hand"
    whole, layers = 4 * model.parameters, model.n_layer
    blocks = whole - 4 * sum(torch.Size(s).numel() for s in model.outer_shapes.values())
    x = 4 * config.micro_batch_size * config.seq_len * model.d_model // layout.cp  # B T D
    loss = 3 * x // model.d_model
    if layout.ep > 1:
        return None
    if layout.dp_replicate > 1:
        return {("all_reduce", "backward"): whole}
    if layout.dp_shard > 1 and config.zero_stage == 1:
        update = "all_gather" if hand else "broadcast"
        return {("all_reduce", "backward"): whole, (update, "optimizer"): whole}
    if layout.dp_shard > 1:
        scattered = m * whole if config.gradient_sync == "micro_batch" else whole
        sent = {("all_gather", "forward"): m * whole, ("reduce_scatter", "backward"): scattered}
        return sent | ({("all_gather", "backward"): m * blocks} if config.zero_stage == 3 else {})
    if layout.tp > 1 and not config.sequence_parallel:
        return {
            ("all_reduce", "forward"): (2 * layers + 1) * x + loss,
            ("all_reduce", "backward"): (2 * layers + 1 + again * layers) * x,
        }
    if layout.tp > 1:
        return {
            ("all_reduce", "forward"): x + loss,
            ("all_reduce", "backward"): 4 * (2 * layers + 1) * model.d_model,
            ("all_gather", "forward"): (2 * layers + 1) * x,
            ("reduce_scatter", "forward"): 2 * layers * x,
            ("reduce_scatter", "backward"): (2 * layers + 1 + again * layers) * x,
            ("all_gather", "backward"): (2 * layers + 1 + again * 2 * layers) * x,
        }
    if layout.cp > 1:
        ring = 2 * layers * x  # K and V of one other rank
        sent = {("all_reduce", "backward"): whole}
        for way in ("send", "recv"):
            sent |= {(way, "forward"): ring, (way, "backward"): (2 + again) * ring}
        return sent
    return expected_of_pipeline(config, rank, m * x)


def expected_of_pipeline(config: TrainConfig, rank: int, x: int) -> Sent:
    """An edge is crossed where two stages that follow each other are on different ranks."""
    pipeline, model = config.pipeline, config.model
    places = [pipeline.rank_of(stage, 2) for stage in range(2 * pipeline.local_stages)]
    sent: Counter[tuple[str, str]] = Counter()
    for here, there in pairwise(places):
        if here != there:
            sent["send" if here == rank else "recv", "forward"] += x
            sent["recv" if here == rank else "send", "backward"] += x
    if model.tied and places[0] != places[-1]:
        sent["all_reduce", "backward"] += 4 * model.vocab_size * model.d_model
    return dict(sent)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_message_knows_its_phase(name: str) -> None:
    """From the first step on."""
    config = CONFIGS[name]
    for rank, (first, third, _) in enumerate(measured()[name]):
        wanted = expected(config, rank)
        if wanted is None:  # experts: there and back, and again where blocks run again
            sent = {k: size for k, size in summed(third).items() if k[0] == "all_to_all"}
            times = 2 if config.activation_checkpointing == "full" else 1
            rows = [r for r in third if r["dtype"] == "float32" and r["collective"] == "all_to_all"]
            by_phase = {row["phase"]: row["payload_bytes"] for row in rows}
            assert by_phase["backward"] == times * by_phase["forward"]
            assert set(sent) == {("all_to_all", "forward"), ("all_to_all", "backward")}
            continue
        assert summed(third) == wanted, (name, rank)
        if config.layout.pp > 1:
            assert summed(first) == wanted, (name, rank)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_ranks_together_run_the_closed_forms_flops(name: str) -> None:
    config = CONFIGS[name]
    counted = sum(hardware for *_, hardware in measured()[name])
    assert counted == hardware_flops_of(config)


@pytest.mark.slow
def test_barriers_and_objects_are_control() -> None:
    for said, rows in run_ranks(2, control_traffic):
        assert said["barrier"] == (1, 0)
        calls, size = said["objects"]
        assert calls == 4 and size > 300, "two objects, each behind its length"
        assert [row["collective"] for row in rows] == ["all_reduce"]


def a_call(collective: str, dtype: str, payload_bytes: int) -> Call:
    return Call(collective, frozenset({0, 1}), "tp", dtype, payload_bytes, 0.0, 1.0)


def test_control_is_no_row_and_counts_of_tokens_are_no_control() -> None:
    mathematics = [a_call("all_to_all", "int64", 16), a_call("all_reduce", "float32", 4)]
    control = [a_call("barrier", "none", 0), a_call("broadcast", "uint8", 900)]
    control += [a_call("all_gather", "int64", 16), a_call("send", "int32", 4)]
    assert len(rows_of(mathematics, {})) == 2 and rows_of(control, {}) == []
    said = control_of(mathematics + control)
    assert (said.calls, said.payload_bytes) == (4, 920)


def test_forward_and_backward_are_told_apart_without_the_model_knowing() -> None:
    """Outside the engine too: what follows a backward goes with it, until the next forward."""
    phases, seen, model = Phases(), Counter[str](), nn.Linear(4, 4)
    phases.follow([model])

    def send(*_: Any) -> None:
        seen[phases.of("all_reduce", [])] += 1

    assert phases.of("all_reduce", []) == "other"
    with phases.during("forward_backward"):
        for _ in range(2):
            x = torch.ones(1, 4, requires_grad=True)
            y = model(x)
            send()
            x.register_hook(send)
            y.sum().backward()
            send()
        assert seen == {"forward": 2, "backward": 4}
        assert phases.of("send", [y]) == "forward", "an activation"
        assert phases.of("send", [x.detach()]) == "backward", "a gradient"
        with torch.no_grad():
            model(x)
            assert phases.of("send", [x.detach()]) == "forward", "keys of a ring"
    with phases.during("optimizer"):
        assert phases.of("all_reduce", []) == "optimizer"


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": Precision.bf16},
        {
            "precision": Precision.bf16,
            "activation_checkpointing": ActivationCheckpointing.selective,
        },
        {"model.attention": Attention.plain},
        {"model.dropout": 0.1},
    ],
)
def test_flops_are_closed_where_attention_keeps_its_scores(changes: dict[str, Any]) -> None:
    config = make_config(Layout(), {**changes, "steps": 2})
    (costs,) = step_costs([config])
    assert costs["flops"]["hardware"] == hardware_flops_of(config)
