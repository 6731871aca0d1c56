"""Every layout trains as a single process does; and the comparison notices when one does not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from experiments.figures import parity
from experiments.figures.parity import VARIANTS, Difference, compare, make_config
from experiments.ranks import run_ranks
from parallel import step
from parallel.layout import Layout, Precision
from parallel.precision import LossScaler
from tests.on_ranks import make, random_numbers, weights_and_validation


def on_one_process(name: str) -> Difference:
    """Accumulation over four micro-batches against none."""
    changes = {**VARIANTS[name], "steps": 6}
    configs = [make_config(Layout(), {**changes, "gradient_accumulation_steps": n}) for n in (4, 1)]
    return compare(*parity.trajectories(configs))


@pytest.mark.parametrize("name", VARIANTS)
def test_accumulation_changes_nothing(name: str) -> None:
    assert on_one_process(name).holds


@pytest.mark.parametrize("clip", [None, 0.05, 1e3])
@pytest.mark.parametrize("name", ["plain", "uneven"])
def test_a_host_that_does_not_wait_changes_nothing(
    name: str, clip: float | None, request: pytest.FixtureRequest
) -> None:
    config = make_config(Layout(), {**VARIANTS[name], "clip": clip})
    reads = parity.trajectory(config)
    request.getfixturevalue("on_device")
    assert compare(parity.trajectory(config), reads).holds


def test_nor_does_it_update_by_a_bad_gradient(on_device: None) -> None:
    trainer, rows = make(make_config(Layout(), {"clip": 1.0}))
    trainer.may_skip = 1
    good = [p.detach().clone() for p in trainer.parameters]
    trainer.step(rows)
    with torch.no_grad():
        trainer.parameters[0][0] = math.inf
    before = [p.detach().clone() for p in trainer.parameters]
    assert not torch.equal(good[1], before[1])
    assert trainer.step(rows).skipped
    with pytest.raises(step.NonFinite, match="2 steps in a row: no update was made"):
        trainer.step(rows)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {1}


def test_a_step_whose_outcome_is_read_late_is_not_followed_by_an_update(on_device: None) -> None:
    trainer, rows = make(make_config(Layout(), {"clip": 1.0}))
    first = trainer.launch(rows)
    with torch.no_grad():
        trainer.parameters[0][0] = math.inf
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.launch(rows)  # nobody has asked yet what it came to
    with torch.no_grad():
        trainer.parameters[0][0] = 0.0
        before[0][0] = 0.0
    with pytest.raises(step.NonFinite, match="no update was made"):
        trainer.launch(rows)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert first.result() is first.result() and math.isfinite(first.result().loss)


def test_steps_under_way_come_to_the_same(on_device: None) -> None:
    config = make_config(Layout(), {"clip": 0.05})
    trainer, rows = make(config)
    late = [trainer.launch(rows) for _ in range(5)]
    other, _ = make(config)
    assert [one.result() for one in late] == [other.step(rows) for _ in range(5)]
    for a, b in zip(trainer.parameters, other.parameters, strict=True):
        assert torch.equal(a, b)


def test_nan_is_never_near() -> None:
    good = parity.Trajectory([1.0], [1.0], {"w": torch.ones(2)})
    bad = parity.Trajectory([math.nan], [1.0], {"w": torch.ones(2)})
    assert not compare(bad, good).holds
    assert not compare(parity.Trajectory([1.0], [1.0], {}), good).holds
    assert compare(good, good).holds


def test_copies_that_part_are_never_near() -> None:
    good = parity.Trajectory([1.0], [1.0], {"w": torch.ones(2)})
    for far in (1e-9, math.nan):
        apart = compare(replace(good, drift=far), good)
        assert not apart.holds and not apart.is_near


@pytest.mark.slow
def test_layouts_begin_with_the_same_weights_and_validate_alike() -> None:
    alone = weights_and_validation([make_config(Layout(), {"model.tied": True})])[0]
    layouts = [Layout(dp_replicate=2), Layout(dp_shard=2)]
    configs = [make_config(layout, {"model.tied": True}) for layout in layouts]
    for weights, loss in run_ranks(2, weights_and_validation, configs)[0]:
        assert weights.keys() == alone[0].keys()
        assert all(torch.equal(weights[name], alone[0][name]) for name in weights)
        assert loss == pytest.approx(alone[1], abs=5e-6)


@pytest.mark.slow
def test_ranks_that_read_different_data_draw_different_dropout() -> None:
    config = make_config(Layout(dp_shard=2), {"model.dropout": 0.1})
    first, second = run_ranks(2, random_numbers, config)
    assert first != second


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_low_precision_stays_near_fp32(precision: Precision) -> None:
    """No exact claim: within 2e-2 nats over 20 steps, in every data layout."""
    reference = parity.trajectory(make_config(Layout(), {}))
    layouts = [Layout(dp_replicate=2), Layout(dp_shard=2)]
    configs = [make_config(layout, {"precision": precision}) for layout in layouts]
    runs = [*run_ranks(2, parity.trajectories, configs)[0]]
    runs.append(parity.trajectory(make_config(Layout(), {"precision": precision})))
    for run in runs:
        far = compare(run, reference)
        assert 1e-6 < far.loss < 2e-2, "near, and not fp32 in disguise"
        assert far.gradient < 0.1


def test_fp16_skips_a_step_that_overflows_and_scales_less() -> None:
    trainer, rows = make(make_config(Layout(), {"precision": Precision.fp16, "clip": 1.0}))
    assert trainer.scaler is not None
    trainer.scaler.scale = 2.0**40
    before = [p.detach().clone() for p in trainer.parameters]
    assert trainer.step(rows).skipped
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert trainer.scaler.scale == 2.0**39 and trainer.scaler.skipped == 1
    while trainer.step(rows).skipped:
        pass
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_the_scale_doubles_after_enough_good_steps() -> None:
    scaler = LossScaler(scale=8.0, growth_interval=2)
    for finite in (True, True, False, True, True):
        scaler.update(finite)
    assert (scaler.scale, scaler.skipped) == (8 * 2 / 2 * 2, 1)


def test_without_a_scaler_a_bad_gradient_stops_before_the_update() -> None:
    trainer, rows = make(make_config(Layout(), {"clip": 1.0}))
    with torch.no_grad():
        trainer.parameters[0][0] = math.inf
    before = [p.detach().clone() for p in trainer.parameters]
    with pytest.raises(step.NonFinite, match="no update was made"):
        trainer.step(rows)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
