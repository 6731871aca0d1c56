"""Stopped and gone on: to the bit in the same layout, and from exactly the same state in others."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.config import TrainConfig
from experiments.figures.matrix import plan_named
from experiments.figures.parity import LOSS_BOUND, make_config
from experiments.ranks import run_ranks
from experiments.reliability.resuming import load_and_go_on, same_state, stop_and_go_on
from parallel.layout import Layout

TIED = {"model.tied": True, "clip": 0.5}
DROPOUT = {"model.dropout": 0.1}
# 1.2 million weights: DDP's buckets are two, and after the first step they are other ones
WIDE = {"model.d_model": 160, "model.d_ff": 448, "clip": 0.5}
AT_2 = [
    ("ddp2", {**TIED, **DROPOUT}),
    ("zero1 2", TIED),
    ("fsdp2", {**TIED, **DROPOUT}),
    ("tp2 sequence", {**TIED, **DROPOUT}),
    ("pp2 1f1b", TIED),
]
AT_4 = [("ddp4", WIDE), ("fsdp2 x tp2", TIED)]
SAVED, STEPS = 3, 6


def config_of(name: str, changes: dict, steps: int = STEPS) -> TrainConfig:
    return plan_named(name).config({**changes, "steps": steps})


@pytest.mark.slow
@pytest.mark.parametrize("ranks, plans", [(2, AT_2), (4, AT_4)])
def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(
    ranks: int, plans: list[tuple[str, dict]], tmp_path: Path
) -> None:
    configs = [config_of(*plan) for plan in plans]
    losses = run_ranks(ranks, stop_and_go_on, configs, tmp_path, SAVED)[0]
    for number, ((name, _), (whole, resumed)) in enumerate(zip(plans, losses, strict=True)):
        assert whole == resumed, name
        assert same_state(tmp_path / f"{number}-whole", tmp_path / f"{number}-resumed"), name


def test_a_single_process_goes_on_too_and_writes_beside_its_steps(tmp_path: Path) -> None:
    config = make_config(Layout(), {**DROPOUT, "steps": STEPS})
    for number, beside in enumerate((False, True)):
        folder = tmp_path / str(number)
        ((whole, resumed),) = stop_and_go_on([config], folder, SAVED, asynchronous=beside)
        assert whole == resumed
        assert same_state(folder / "0-whole", folder / "0-resumed")


FROM_4 = ["fsdp2 x tp2"]
TO_2 = ["ddp2", "tp2 sequence", "pp2 1f1b", "zero1 2"]


@pytest.mark.slow
def test_any_layout_reads_what_any_other_wrote(tmp_path: Path) -> None:
    configs = [config_of(name, TIED) for name in FROM_4]
    written = run_ranks(4, stop_and_go_on, configs, tmp_path, SAVED)[0]
    pairs = [(source, target) for source in range(len(FROM_4)) for target in TO_2]
    sources = [tmp_path / str(source) for source, _ in pairs]
    copies = [tmp_path / f"copy{number}" for number in range(len(pairs))]
    targets = [config_of(target, TIED) for _, target in pairs]
    losses = run_ranks(2, load_and_go_on, targets, sources, copies, SAVED)[0]
    alone = make_config(Layout(), {**TIED, "steps": STEPS})
    pairs.append((0, "single"))
    copies.append(tmp_path / "copy")
    sources.append(sources[0])
    losses += load_and_go_on([alone], sources[-1:], copies[-1:], SAVED)
    for (source, target), loaded, copy, after in zip(pairs, sources, copies, losses, strict=True):
        said = f"{FROM_4[source]} to {target}"
        assert same_state(loaded, copy), said
        apart = [abs(a - b) for a, b in zip(after, written[source][0], strict=True)]
        assert all(d <= LOSS_BOUND for d in apart), f"{said}: {apart}"
