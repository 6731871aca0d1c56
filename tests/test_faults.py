"""Ranks that hang, stop, err, drift or meet NaN: the run ends or goes on, and says which it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from experiments.config import TrainConfig
from experiments.figures.matrix import plan_named
from experiments.figures.parity import make_config, mesh_of
from experiments.ranks import run_ranks
from experiments.reliability.faults import FAULTS
from experiments.reliability.runs import with_fault
from experiments.reliability.steps import meet_nonfinite
from experiments.step_log import read_metrics
from experiments.verdict import path_of
from parallel.drift import AT_ONCE, Drifted, check_copies, checksum
from parallel.layout import Layout

SOON = ("steps=200", "timeout_s=10")
AT = 3  # the step before which a fault comes; the rank is in the one before still


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, rank, strategy, said",
    [
        ("hang", 1, "ddp", r"rank 1 stands still in step 2: it never came to \w+ .*, where rank 0"),
        ("stop", 0, "fsdp", r"rank 0 is stopped in step 2: .* \(its stacks: .*rank-0.stacks.txt\)"),
        ("other-collective", 1, "tp", r"rank.* 1 called broadcast .* at the same time"),
        (
            "raise",
            1,
            "pp",
            r"rank 1: LookupError: on purpose at experiments/\w+/faults.py:\d+ \(",
        ),
    ],
)
def test_the_rank_that_failed_is_named(
    fault: str, rank: int, strategy: str, said: str, tmp_path: Path
) -> None:
    asked = [f"strategy={strategy}", *SOON]
    outcome = with_fault(tmp_path / "run", asked, fault, rank, AT)
    assert outcome.status == 1 and re.match(said, outcome.said), outcome.said
    assert outcome.stacks
    if fault == "hang":  # one that was stopped is woken first, and may be elsewhere by then
        stacks = path_of(tmp_path / "run", rank, "stacks.txt").read_text()
        assert f"in {FAULTS[fault].__name__}" in stacks


@pytest.mark.slow
def test_a_run_starts_again_by_itself_and_loses_nothing(tmp_path: Path) -> None:
    asked = ["strategy=fsdp", "steps=8", "checkpoint.every=2"]
    outcome = with_fault(tmp_path / "run", asked, "kill", 1, 5, "--max-restarts=1")
    assert outcome.status == 0, outcome.said
    said = (tmp_path / "run" / "logs" / "torchrun.log").read_text()
    # torchrun may see first that the other rank lost its connection
    assert re.search(r"start 2 of this run: rank (1 was ended by SIGKILL|0: RuntimeError: )", said)
    assert re.search(r"going on from .*step-000004, after 4 steps", said)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(8))


@pytest.mark.slow
def test_all_ranks_decide_alike_what_is_not_finite() -> None:
    cases = [
        (plan, where, value)
        for plan in ("ddp2", "fsdp2", "pp2 1f1b")
        for where, value in (("loss", torch.nan), ("gradient", torch.inf), ("shard", torch.nan))
    ]
    everything = {"skipped": True, "stopped": True, "unchanged": True}
    for rank in run_ranks(2, meet_nonfinite, cases):
        assert rank == [everything] * len(cases)


def test_a_checksum_sees_any_bit_and_any_exchange() -> None:
    values = torch.randn(3000)
    for change in ("bit", "exchange", "sign"):
        other = values.clone()
        if change == "bit":
            other.view(torch.int32)[1234] ^= 1
        elif change == "exchange":
            other[[5, 7]] = values[[7, 5]]
        else:
            other = -values
        assert checksum(other) != checksum(values), change
    assert checksum(values.clone()) == checksum(values)
    assert checksum(torch.ones(0)) == 0 == checksum(torch.zeros(9, dtype=torch.bfloat16))


def drift_of(configs: list[TrainConfig]) -> list[tuple[str, str]]:
    """On ranks: what is said after one rank's last weight, or what its optimizer keeps for it,
    has changed, and nothing before."""
    from experiments.assemble import make_trainer
    from experiments.reliability.resuming import train_on
    from parallel.gradients import local
    from parallel.moments import moments_of

    said = []
    for config in configs:
        trainer = make_trainer(config, mesh_of(config.layout))
        train_on(config, trainer, 0, 1)
        check_copies(trainer.replica, trainer.optimizer)
        weight = trainer.parameters[-1]
        moment = moments_of(trainer.optimizer).get(weight, {}).get("exp_avg")
        seen = []
        for changed in (moment, weight):
            if trainer.replica.mesh.rank == 1 and changed is not None:
                local(changed.detach()).view(-1)[:1] += 1
            try:
                check_copies(trainer.replica, trainer.optimizer)
                seen.append("")
            except Drifted as error:
                seen.append(str(error))
        said.append((seen[0], seen[1]))
    return said


COPIES = ("ddp2", "zero1 2", "tp2", "tp2 by hand", "cp2", "fsdp2", "pp2 1f1b")


@pytest.mark.slow
def test_copies_that_differ_are_told_alike_on_all_ranks_and_shards_are_no_copies() -> None:
    configs = [plan_named(name).config({"steps": 2}) for name in COPIES]
    first, second = run_ranks(2, drift_of, configs)
    assert first == second
    said = dict(zip(COPIES, first, strict=True))
    apart = r"rank 1 has another \S+{} than rank 0{}: the copies have drifted apart"
    for name in ("ddp2", "zero1 2", "cp2"):
        moment, weight = said[name]
        more = "" if name == "zero1 2" else ", and 1 more"
        assert re.fullmatch(apart.format("", more), weight), weight
        if name == "zero1 2":
            assert moment == "", "its moments are on one rank alone"
        else:
            assert re.fullmatch(apart.format(r" \(exp_avg\)", ""), moment), moment
    alone = ("", "")
    assert said["fsdp2"] == said["pp2 1f1b"] == alone, "each weight is on one rank alone"
    assert said["tp2"] == said["tp2 by hand"] == alone, "the last weight, the head, is cut"


def test_a_single_process_has_no_copies() -> None:
    from experiments.assemble import make_trainer

    config = make_config(Layout(), {"steps": 1})
    check_copies(make_trainer(config, mesh_of(config.layout)).replica)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_a_checksum_is_that_of_the_values_wherever_they_lie(dtype: torch.dtype) -> None:
    values = torch.arange(2 * AT_ONCE + 13, dtype=torch.float64).sin().mul(100).abs().to(dtype)
    for numel in (0, 1, 3, 8, len(values)):
        mine, seen = values[:numel].clone(), set()
        moved = torch.cat([values[:1], mine])[1:]  # begins within a word
        assert checksum(mine) == checksum(moved)
        places = {0, numel // 2, numel - 1} - {-1} if numel else set()
        for place in places:
            changed = mine.clone()
            changed[place] += 1
            seen.add(int(checksum(changed)))
        assert len(seen | {int(checksum(mine))}) == len(places) + 1
