"""Memory in closed form against every rank of real runs: one launch a world size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from costs.ledger import MEMORY_PARTS
from experiments.config import TrainConfig
from experiments.figures.matrix import PLANS
from experiments.figures.parity import Plan, make_config
from experiments.ranks import run_ranks
from parallel.layout import ActivationCheckpointing, Impl, Layout
from tests.on_ranks import memory_bytes
from tests.test_memory_formula import closed_form

# Long enough for activations to be most of the memory
SIZE: dict[str, Any] = {"clip": 1.0, "steps": 3, "seq_len": 128, "model.context": 128}
SIZE["data.tokens"] = 30_000
FULL = {"activation_checkpointing": ActivationCheckpointing.full}


def changed(name: str, changes: dict[str, Any], called: str) -> Plan:
    (plan,) = (plan for plan in PLANS if plan.name == name)
    return Plan(f"{name}, {called}", plan.layout, {**plan.changes, **changes})


EXTRA = [
    changed("fsdp2", FULL, "full"),
    changed("tp2", FULL, "full"),
    changed("pp2 1f1b", FULL, "full"),
    changed("pp2 1f1b", {"gradient_accumulation_steps": 8}, "8 micro-batches"),
]
MAIN_OF_FOUR = (
    "zero1 4",
    "tp4 sequence",
    "pp4 1f1b",
    "cp4",
    "ep4 of fsdp4, capacity",
    "hsdp 2 x 2",
    "hsdp 2 x 2, each scatters",
    "fsdp2 x tp2 sequence, each scatters",
    "fsdp2 x tp2",
    "pp2 x ddp2",
    "pp2 x tp2 sequence",
    "cp2 x fsdp2",
)


def of(world_size: int) -> list[Plan]:
    every = [p for p in PLANS if world_size == 2 or p.name in MAIN_OF_FOUR] + EXTRA
    ours = [p for p in every if p.changes.get("impl", Impl.torch) == Impl.torch]
    return [p for p in ours if p.layout.world_size == world_size]


@lru_cache
def measured(world_size: int) -> list[list[dict[str, int]]]:
    """`memory_bytes` of each rank of each plan."""
    ranks = run_ranks(world_size, memory_bytes, [config_of(plan) for plan in of(world_size)])
    return [[rank[i] for rank in ranks] for i in range(len(of(world_size)))]


def config_of(plan: Plan) -> TrainConfig:
    return make_config(plan.layout, {**SIZE, **plan.changes})


Pair = tuple[dict[str, int], dict[str, int]]


def pairs(plan: Plan) -> Iterator[Pair]:
    """(closed form, measured) of each rank."""
    config, layout = config_of(plan), plan.layout
    found = measured(layout.world_size)[of(layout.world_size).index(plan)]
    for rank, real in enumerate(found):
        wanted = closed_form(config, rank // (layout.world_size // layout.pp))
        parts = {part: int(getattr(wanted, part)[0]) for part in MEMORY_PARTS}
        yield {**parts, "peak": int(wanted.peak[0])}, real


def skip_what_is_open(plan: Plan, part: str) -> None:
    """What simulator/memory.py says that it does not close."""
    options, layout = config_of(plan).options, plan.layout
    if part == "optimizer" and options.zero_stage == 1:
        pytest.skip("ZeroRedundancyOptimizer hands out whole tensors: some ranks have more")
    splits = layout.pp > 1 and options.pipeline.splits_backward
    if part == "gradients" and splits:
        pytest.skip("whether a W's first gradient is there at the peak, or what it frees, is open")
    if part == "gradients" and options.gradient_sync == "micro_batch" and layout.dp_replicate > 1:
        pytest.skip("sums of shards that wait for those of replicas are what a message wrote")
    dropless = layout.ep > 1 and config_of(plan).model.capacity_factor is None
    if part in ("activations", "peak") and dropless:
        pytest.skip("experts without a capacity get as many rows as their router says")
    if part == "activations" and layout.cp > 2:
        pytest.skip("whether the ring or an MLP is the fullest moment depends on the rank")


EVERY = pytest.mark.parametrize("plan", [*of(2), *of(4)], ids=lambda plan: plan.name)


def errors_of(plan: Plan, part: str) -> list[float]:
    """By rank, how far the closed form is off, relative to what was measured."""
    return [abs(wanted[part] - real[part]) / max(real[part], 1) for wanted, real in pairs(plan)]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["parameters", "gradients", "optimizer"])
@EVERY
def test_states_are_exact_on_every_rank(plan: Plan, part: str) -> None:
    skip_what_is_open(plan, part)
    assert max(errors_of(plan, part)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("part", "bound"), [("activations", 0.03), ("peak", 0.05)])
@EVERY
def test_activations_and_peak_are_near(plan: Plan, part: str, bound: float) -> None:
    skip_what_is_open(plan, part)
    assert max(errors_of(plan, part)) <= bound


@pytest.mark.slow
@EVERY
def test_parts_of_the_closed_form_add_up_to_its_peak(plan: Plan) -> None:
    for wanted, _ in pairs(plan):
        assert sum(wanted[part] for part in MEMORY_PARTS) == wanted["peak"]


@pytest.mark.slow
def test_a_buffer_that_gloo_gives_up_when_it_likes_is_nobodys() -> None:
    """Of a reduce_scatter: it was in the peak of every second run (costs/communication.py)."""
    short = {**SIZE, "model.d_model": 256, "seq_len": 16, "model.context": 16}
    config = make_config(Layout(dp_shard=2), short)
    first, *others = run_ranks(2, memory_bytes, [config] * 8)[0]
    assert all(again == first for again in others)
