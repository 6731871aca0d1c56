"""Experts spread over real ranks against a single process: results, gradients and bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.ranks import run_ranks
from parallel.layout import Layout, Options
from simulator.communication import payload_bytes
from tests.experts_on_ranks import (
    CAPACITIES,
    Outcome,
    close,
    expert_parallel,
    inputs,
    make_moe,
    refused,
    train_once,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_on_other_ranks_give_the_single_process_results(world_size: int) -> None:
    batch = 4
    whole = {capacity: train_once(capacity, *inputs(batch)) for capacity in CAPACITIES}
    ranks = run_ranks(world_size, expert_parallel, CAPACITIES, batch)
    for i, capacity in enumerate(CAPACITIES):
        wanted, found = whole[capacity], [rank[i] for rank in ranks]
        close(torch.cat([part.y for part in found]), wanted.y)
        close(torch.cat([part.x_gradient for part in found]), wanted.x_gradient, 1e-5)
        close(sum(part.router for part in found), wanted.router, 1e-5)
        for name, gradient in wanted.experts.items():
            mean = gradient / world_size  # over the ranks whose tokens came
            close(torch.cat([part.experts[name] for part in found]), mean, 1e-5)
        close(torch.cat([part.evaluated for part in found]), wanted.evaluated)
        check_bytes(capacity, found, batch // world_size)


def check_bytes(capacity: float | None, ranks: list[Outcome], batch: int) -> None:
    """To the byte: of each rank under a capacity, else of all ranks together."""
    config = make_moe(capacity_factor=capacity).config
    layout = Layout(dp_replicate=len(ranks), ep=len(ranks))
    options = Options(micro_batch_size=batch, seq_len=16)
    of_step = payload_bytes(replace(config, n_layer=1), layout, options)
    # the norm is added up over ep too, by an all_reduce
    wanted = {dtype: n for (kind, _, dtype), n in of_step.items() if kind == "all_to_all"}
    sent = [part.payload_bytes for part in ranks]
    if capacity is not None:
        assert sent == [wanted] * len(ranks)
        return
    assert [part["int64"] for part in sent] == [wanted["int64"]] * len(ranks)
    assert sum(part["float32"] for part in sent) == len(ranks) * wanted["float32"]


def test_experts_that_do_not_divide_by_the_ranks_are_refused() -> None:
    said = "model.n_expert=3 % layout.ep=2 = 1: the experts must divide by the ranks"
    assert run_ranks(2, refused) == [said, said]
