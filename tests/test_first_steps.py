"""Runs of very few steps: torch's caches are cold when the meters look, and little is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from costs.flops import counted
from costs.memory import MemoryMeter
from tests.whole_runs import check_short, settled, whole_run


def propagate(size: int) -> None:
    """Run an operator on fake tensors, as DTensor does with one that it has not met before."""
    with FakeTensorMode():
        x = torch.empty(size, size)
        (x @ x).to(torch.float64).sum()


def test_sharding_propagation_counts_no_flops() -> None:
    a = torch.ones(4, 4)
    with counted() as counter:
        propagate(64)
        a @ a
    assert counter.get_total_flops() == 2 * 4**3


def test_sharding_propagation_takes_no_memory() -> None:
    meter = MemoryMeter(torch.nn.Linear(4, 4, bias=False), {})
    with meter:
        propagate(64)
        kept = torch.ones(2)
    assert meter.result()["peak"] == 4 * 4 * 4 + kept.nbytes


def test_a_traced_step_has_the_memory_of_its_own_fake_tensors() -> None:
    with FakeTensorMode():
        meter = MemoryMeter(torch.nn.Linear(4, 4, bias=False), {})
        with meter:
            propagate(64)
            kept = torch.ones(2)
    assert meter.result()["peak"] == 4 * 4 * 4 + kept.nbytes


@pytest.mark.slow
def test_tensor_parallel_takes_one_step_or_two_or_two_more(tmp_path: Path) -> None:
    ask = ("strategy=tp", "checkpoint.every=2")
    memory = {}
    for name, left, more in (
        ("one", 1, ("steps=1",)),
        ("two", 2, ("steps=2",)),
        ("two more", 2, ("steps=4", f"resume={tmp_path / 'two'}")),
    ):
        ledger = whole_run(tmp_path / name, *ask, *more)
        check_short(settled(*ask, *more), ledger, left)
        memory[name] = ledger["step"]["memory_bytes"]
    assert memory["two"] == memory["two more"]
    same = ("parameters", "gradients", "activations", "communication")
    assert all(memory["one"][part] == memory["two"][part] for part in same), "Adam comes later"
