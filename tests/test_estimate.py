"""The time equation: its parts, its limits, and what must never make a step slower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from costs.ledger import TIME_PARTS
from experiments.predict import clusters
from minigpt.config import FFN, ModelConfig
from parallel.layout import Precision
from simulator.block_products import ROUTED_PASSES
from simulator.estimate import block_seconds, head_seconds, step_seconds
from simulator.habits import FUSED_LOGIT, KERNELS, MEGATRON_LOGIT, Habits
from simulator.hardware import Cluster
from simulator.plans import CHECKPOINTING, PRECISIONS, SCHEDULES, Plans
from simulator.search import peak_flops
from simulator.work import Work

H100 = clusters.load("h100")
MODELLED = [part for part in TIME_PARTS if part != "other"]
FREE = {
    f"{level}.{key}": value
    for level in ("in_node", "between_nodes")
    for key, value in (("bandwidth", 1e30), ("latency", 0.0))
}
LLAMA = ModelConfig(n_layer=32, n_head=32, n_kv_head=8, d_model=4096, d_ff=14336, vocab_size=128256)


def plans(model: ModelConfig = LLAMA, seq_len: int = 4096, **changes: list[Any]) -> Plans:
    choices: dict[str, Any] = {
        **{axis: [1] for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")},
        "micro_batch_size": [1],
        "micro_batches": [8],
        "zero_stage": [1],
        "syncs_each": [False],
        "sequence_parallel": [False],
        "precision": [[p.value for p in PRECISIONS].index("bf16")],
        "checkpointing": [[c.value for c in CHECKPOINTING].index("none")],
        "schedule": [[s.value for s in SCHEDULES].index("1f1b")],
        "local_stages": [1],
    }
    return Plans.product(model, seq_len, {**choices, **changes})


def total(some: Plans, cluster: Cluster = H100, habits: Habits = Habits()) -> np.ndarray:  # noqa: B008
    return step_seconds(Work.of(some, habits=habits), cluster)["total"]


MANY = {
    "pp": [1, 2, 8],
    "dp_replicate": [1, 4],
    "dp_shard": [1, 8],
    "tp": [1, 2, 8],
    "cp": [1, 2],
    "zero_stage": [1, 2, 3],
    "syncs_each": [False],
    "sequence_parallel": [False, True],
}


def test_parts_are_the_ledgers_and_add_up() -> None:
    parts = step_seconds(Work.of(plans(**MANY)), H100)
    assert set(parts) == {"total", *MODELLED}
    assert parts["total"] == pytest.approx(sum(parts[name] for name in MODELLED))
    for name in MODELLED:
        assert np.all(np.isfinite(parts[name])) and np.all(parts[name] >= 0), name


def test_many_plans_cost_what_each_costs_alone() -> None:
    some = plans(**MANY)
    together = total(some)
    for i in range(0, len(some), 37):
        assert together[i] == pytest.approx(total(some[[i]])[0])


@pytest.mark.parametrize("micro_batches", [4, 16])
@pytest.mark.parametrize("pp", [2, 4])
def test_1f1b_idles_its_share(pp: int, micro_batches: int) -> None:
    """(p-1)/(m+p-1) with equal stages and free messages (Narayanan et al. 2021, section 2.2)."""
    model = ModelConfig(n_layer=32, n_head=32, d_model=4096, vocab_size=1)
    some = plans(model, pp=[pp], micro_batches=[micro_batches])
    parts = step_seconds(Work.of(some), H100.changed(FREE))
    share = parts["bubble"] / (parts["bubble"] + parts["compute"])
    assert share[0] == pytest.approx((pp - 1) / (micro_batches + pp - 1), rel=0.01)


def test_interleaving_divides_the_bubble() -> None:
    model = ModelConfig(n_layer=32, n_head=32, d_model=4096, vocab_size=1)
    place = [s.value for s in SCHEDULES].index("interleaved_1f1b")
    one = step_seconds(Work.of(plans(model, pp=[4])), H100.changed(FREE))["bubble"]
    looped = plans(model, pp=[4], local_stages=[4], schedule=[place])
    four = step_seconds(Work.of(looped), H100.changed(FREE))["bubble"]
    assert four[0] == pytest.approx(one[0] / 4, rel=0.02)


@pytest.mark.parametrize(
    ("key", "factor"),
    [
        ("in_node.bandwidth", 2),
        ("between_nodes.bandwidth", 2),
        ("between_nodes.latency", 0.5),
        ("device.memory_bandwidth", 2),
        ("device.peak_flops.bf16", 2),
        ("operator_overhead", 0),
    ],
)
def test_better_hardware_never_makes_a_step_slower(key: str, factor: float) -> None:
    node: Any = H100
    for name in key.split("."):
        node = getattr(node, name)
    some = plans(**MANY)
    assert np.all(total(some, H100.changed({key: node * factor})) <= total(some) * (1 + 1e-12))


def test_twice_the_layers_take_twice_the_blocks() -> None:
    twice = ModelConfig(**{**vars(LLAMA), "n_layer": 64})
    head = ModelConfig(**{**vars(LLAMA), "n_layer": 1})
    times = [step_seconds(Work.of(plans(m)), H100)["compute"][0] for m in (head, LLAMA, twice)]
    assert times[2] - times[0] == pytest.approx((times[1] - times[0]) * 63 / 31)


def test_checkpointing_runs_the_forward_again() -> None:
    full = [c.value for c in CHECKPOINTING].index("full")
    before, after = (
        block_seconds(Work.of(p), H100)[0] for p in (plans(), plans(checkpointing=[full]))
    )
    assert 1.25 < after / before < 1.40


def test_small_products_are_slower_and_the_host_bounds_the_smallest() -> None:
    tiny = ModelConfig(n_layer=4, n_head=4, d_model=128, vocab_size=256)
    work = Work.of(plans(tiny, seq_len=128))
    launched = work.operators * 3 * H100.operator_overhead
    assert block_seconds(work, H100)[0] == pytest.approx(launched[0])
    cut = [block_seconds(Work.of(plans(tp=[n])), H100)[0] for n in (1, 8)]
    assert cut[1] > cut[0] / 8


def test_fp8_products_are_faster_and_experts_cost_what_is_active() -> None:
    wide, narrow = (block_seconds(Work.of(plans(), name), H100)[0] for name in ("bf16", "fp8"))
    assert narrow < wide
    eights = plans(precision=[PRECISIONS.index(Precision.fp8)])
    work = Work.of(eights)
    assert block_seconds(work, H100)[0] == narrow, "as a plan's own precision too"
    assert head_seconds(work, H100) == head_seconds(Work.of(plans()), H100), "the head is in bf16"
    peaks = [peak_flops(p.precision, H100)[0] for p in (eights, plans())]
    assert peaks == [H100.device.flops("fp8"), H100.device.flops("bf16")], "each of its own"
    experts = ModelConfig(
        **{**vars(LLAMA), "ffn": FFN.moe, "n_expert": 8, "experts_per_token": 2, "d_ff": 7168}
    )
    once, large = {"micro_batches": [1]}, H100.changed({"device.efficiency.half_size": 0.0})
    work = Work.of(plans(experts, **once))
    moe, dense = block_seconds(work, large)[0], block_seconds(Work.of(plans(**once)), large)[0]
    # and what copies each choice's row, forward and one and a half times as much backward
    rows = 2 * work.tokens[0] * LLAMA.d_model * work.item[0]
    bandwidth = H100.device.memory_bandwidth * H100.device.efficiency.memory
    copies = 2.5 * ROUTED_PASSES * rows / bandwidth
    assert moe - copies == pytest.approx(dense, rel=0.02) and copies > 0.02 * dense


def test_without_a_flash_kernel_the_scores_cost_their_bytes() -> None:
    flash, plain = Work.of(plans()), Work.of(replace(plans(), flash=False))
    assert block_seconds(plain, H100)[0] > 1.2 * block_seconds(flash, H100)[0]


HIDING = ["hides_tensor", "hides_stages", "hides_gradients", "hides_updates"]


@pytest.mark.parametrize("name", HIDING)
def test_what_a_program_hides_never_makes_a_step_slower(name: str) -> None:
    some = plans(**MANY)
    own = Habits(hides_gradients=False)
    open_, hidden = (
        step_seconds(Work.of(some, habits=replace(own, **{name: on})), H100) for on in (0, 1)
    )
    assert all(np.array_equal(open_[part], hidden[part]) for part in ("compute", "optimizer"))
    assert np.all(hidden["bubble"] <= open_["bubble"])
    # in blocks that overlap or at once in the end: many messages pay more latency than one
    slack = H100.between_nodes.latency * 2 * 64 * LLAMA.n_layer if name == "hides_gradients" else 0
    assert np.all(hidden["exposed_communication"] <= open_["exposed_communication"] + slack)
    assert np.any(hidden["exposed_communication"] < open_["exposed_communication"])


def test_newer_kernels_and_fused_operators_are_faster() -> None:
    def block(**habits: Any) -> float:
        return float(total(plans(seq_len=8192)[[0]], H100, Habits(**habits))[0])

    times = [block(kernel=name) for name in KERNELS]
    assert times == sorted(times, reverse=True) and times[0] > 1.02 * times[-1]
    assert block(separate=True) > block()
    assert block(logit_bytes=MEGATRON_LOGIT) > block(logit_bytes=FUSED_LOGIT)


def test_gradients_that_are_sent_last_pay_the_latency_once() -> None:
    """A ring's latency once, not once a block (Megatron-LM's LocalDDP sends one buffer)."""
    free = {**FREE, "between_nodes.latency": 1e-3, "in_node.latency": 1e-3, "overlap": 0.0}
    some = plans(dp_replicate=[64], micro_batches=[1])
    sent = [
        step_seconds(Work.of(some, habits=Habits(hides_gradients=on)), H100.changed(free))
        for on in (True, False)
    ]
    by_block, once = (parts["exposed_communication"][0] for parts in sent)
    assert once == pytest.approx(2 * 63 * 1e-3)
    assert by_block == pytest.approx(LLAMA.n_layer * once)


def test_messages_to_the_next_stage_lengthen_the_bubble() -> None:
    some = plans(pp=[8], micro_batches=[8])
    far = H100.changed({"between_nodes.bandwidth": 1e8, "in_node.bandwidth": 1e8})
    hidden = Habits(hides_stages=True, sends_as_torch=False)
    near, slow = (step_seconds(Work.of(some, habits=hidden), c) for c in (H100, far))
    assert slow["exposed_communication"][0] == near["exposed_communication"][0]
    assert slow["bubble"][0] > near["bubble"][0]


@pytest.mark.parametrize(
    ("zero_stage", "each", "gathers", "scatters"),
    [
        (3, False, 2 * 8, 1),
        (3, True, 2 * 8, 8),
        (2, False, 8, 1),
        (2, True, 8, 8),
        (1, False, 0, 0),
    ],
)
def test_sharded_weights_are_copied_out_of_messages_and_gradients_into_them(
    zero_stage: int, each: bool, gathers: int, scatters: int
) -> None:
    """Each gather is read and written in bf16; gradients are read so and written in fp32."""
    some = plans(dp_shard=[64], zero_stage=[zero_stage], syncs_each=[each])
    without = Work.of(some, habits=Habits(copies_shards=False))
    more = step_seconds(Work.of(some), H100)["compute"] - step_seconds(without, H100)["compute"]
    moved = LLAMA.parameters * (gathers * (2 + 2) + (2 + 4) * scatters)
    rate = H100.device.memory_bandwidth * H100.device.efficiency.memory
    assert more == pytest.approx(moved / rate, rel=1e-6)


def test_a_capacitys_slots_take_time() -> None:
    """Twice the slots, and experts take twice as long; selective checkpointing runs them again."""
    shape = {"n_layer": 4, "n_head": 16, "d_model": 2048, "ffn": FFN.moe, "n_expert": 8}
    models = [ModelConfig(**shape, capacity_factor=factor) for factor in (2.0, 4.0)]
    one, two = (block_seconds(Work.of(plans(model)), H100)[0] for model in models)
    assert 1.5 < two / one < 2
    selective = [c.value for c in CHECKPOINTING].index("selective")
    again = block_seconds(Work.of(plans(models[0], checkpointing=[selective])), H100)[0]
    assert again > 1.2 * one


def test_what_hides_the_ring_hides_no_gathers() -> None:
    """Of the same device a faster host is never slower, however much it lets others hide."""
    some = plans(ModelConfig(n_layer=48, n_head=25, d_model=1600), cp=[2], dp_shard=[4])
    slow, fast = (total(some, H100.changed({"operator_overhead": o})) for o in (3e-5, 1e-5))
    assert np.all(fast <= slow)
