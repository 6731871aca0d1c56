"""Seconds of weights and gradients: who sends them to whom, how often, and what hiding costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parallel.layout import ActivationCheckpointing
from simulator import collectives
from simulator.block_messages import message_kinds
from simulator.collectives import group
from simulator.data_seconds import SLOWED
from simulator.estimate import block_seconds, step_seconds
from simulator.habits import Habits
from simulator.plans import CHECKPOINTING, Plans
from simulator.reached import product_seconds, reached_flops
from simulator.work import Work
from tests.test_estimate import FREE, H100, LLAMA, plans

OPEN = Habits(hides_gathers=False, hides_gradients=False)


def exposed(some: Plans, habits: Habits = OPEN, **changes: Any) -> float:
    work = Work.of(some, habits=habits)
    return float(step_seconds(work, H100.changed(changes))["exposed_communication"][0])


def one_message(collective: str, size: float, ranks: int, stride: int, count: int) -> float:
    """`count` messages of `size` bytes in all."""
    at = group(ranks, stride, H100.node_size)
    return count * float(collectives.seconds(collective, size / count, at, H100))


def test_hsdp_gathers_among_the_shards_and_adds_up_once_among_the_replicas() -> None:
    """Zhao et al. 2023, section 3.2.2: eight shards in a node, eight replicas across nodes."""
    some = plans(dp_replicate=[8], dp_shard=[8], zero_stage=[3], micro_batches=[4])
    P, L = LLAMA.parameters, LLAMA.n_layer
    gathers = 2 * 4 * one_message("all_gather", 2 * P, 8, 1, L)
    scatters = one_message("reduce_scatter", 4 * P, 8, 1, L)
    replicas = one_message("all_reduce", 4 * P / 8, 8, 8, L)
    assert exposed(some) == pytest.approx(gathers + scatters + replicas, rel=1e-3)
    over_all, slow = plans(dp_shard=[64], zero_stage=[3], micro_batches=[4]), 5e9
    hybrid, flat = (exposed(p, **{"between_nodes.bandwidth": slow}) for p in (some, over_all))
    assert hybrid < flat / 2


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_each_micro_batch_that_scatters_pays_for_it(zero_stage: int) -> None:
    given: dict[str, Any] = {"dp_shard": [64], "zero_stage": [zero_stage], "micro_batches": [4]}
    once, each = (exposed(plans(**given, syncs_each=[on])) for on in (False, True))
    calls = LLAMA.n_layer if zero_stage == 3 else 1  # OPEN sends them in one, but zero_stage 3
    scatter = one_message("reduce_scatter", 4 * LLAMA.parameters, 64, 1, calls)
    assert each - once == pytest.approx(3 * scatter)


def test_zero_2_gathers_once_a_micro_batch_and_zero_3_twice() -> None:
    times = [exposed(plans(dp_shard=[64], zero_stage=[z], micro_batches=[4])) for z in (2, 3)]
    gather = one_message("all_gather", 2 * LLAMA.parameters, 64, 1, LLAMA.n_layer)
    scatters = [one_message("reduce_scatter", 4 * LLAMA.parameters, 64, 1, n) for n in (1, 32)]
    assert times == pytest.approx([4 * gather + scatters[0], 8 * gather + scatters[1]])


def test_what_is_hidden_slows_what_hides_it() -> None:
    """Of a message that compute has time for all but a block's is hidden, and takes SLOWED of its
    time from it (Lee et al. 2025)."""
    some = plans(dp_shard=[64], zero_stage=[3], micro_batches=[1], micro_batch_size=[64])
    sent, left = exposed(some), exposed(some, Habits())
    shown = sent / LLAMA.n_layer
    assert left == pytest.approx(shown + SLOWED * (sent - shown))
    assert exposed(some, Habits(), **FREE) == pytest.approx(0)


def test_a_block_that_runs_again_stops_before_its_last_product() -> None:
    """What is spared is `down` (torch.utils.checkpoint.set_checkpoint_early_stop), and the
    all_reduce behind it; under sequence parallelism the reduce_scatter."""
    full = CHECKPOINTING.index(ActivationCheckpointing.full)
    some = plans(tp=[8], checkpointing=[full])
    works = [Work.of(some, habits=Habits(stops_early=on)) for on in (True, False)]
    stops, goes_on = (block_seconds(work, H100)[0] for work in works)
    share = H100.device.efficiency
    peak = reached_flops(works[0].dtype, H100)[0]
    down = product_seconds(4096, LLAMA.ff_dim / 8, LLAMA.d_model, peak, share.half_size)
    assert goes_on - stops == pytest.approx(down)
    tp = [i for i, (*_, axis) in enumerate(message_kinds()) if axis == "tp"]
    sent = [float(work.sent_block[0, tp].sum()) for work in works]
    plain = float(Work.of(plans(tp=[8])).sent_block[0, tp].sum())
    assert [plain, *sent] == [4, 5, 6]
    cut = Work.of(replace(some, sequence_parallel=np.array([True])))
    norms = 2 / cut.micro_batches[0]  # a gradient each, once a step
    assert cut.sent_block[0, tp].sum() == pytest.approx(8 + 3 + norms)
