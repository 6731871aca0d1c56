"""The lab of broken runs: faults are named from evidence alone, and sound runs are left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from experiments.config import TrainConfig
from experiments.debug import command as command_module
from experiments.debug.diagnose import diagnose
from experiments.debug.faults import FAULTS, NONE, fault_of
from experiments.debug.figures import ELSEWHERE, SOUND, run, run_all
from experiments.refused import Refused
from minigpt import model
from tests.configs import compose
from tests.launching import ROOT, launch, only_run
from tests.test_house import imports_of

SHORT = "steps=12 data.tokens=20000"  # enough for all but those that need a course of losses


def settled(fault: str, *overrides: str) -> TrainConfig:
    return compose(*fault_of(fault).overrides(list(overrides)))


@pytest.mark.parametrize("file", ["diagnose", "observe", "probes"])
def test_the_diagnosis_knows_nothing_of_faults(file: str) -> None:
    names = imports_of(ROOT / "experiments" / "debug" / f"{file}.py")
    assert not {name for name in names if name.startswith("experiments.debug.")} - {
        "experiments.debug.observe",
        "experiments.debug.probes",
    }
    text = (ROOT / "experiments" / "debug" / f"{file}.py").read_text()
    assert "debug.faults" not in text and "debug.patches" not in text


class Own:
    """A program with a bug of this test's own making, which the catalogue does not have."""

    def __init__(self, config: TrainConfig, bug: Any) -> None:
        self.config, self.bug = config, bug

    def on_ranks(self, function: Callable, *args: Any) -> Any:
        with self.bug:
            return function(*args)

    alone = on_ranks


def heads_reversed(y: Tensor) -> Tensor:
    """Each head's results in the place of another one's."""
    return y.flip(1).transpose(1, 2).flatten(2)


def test_a_bug_that_nobody_catalogued_is_named_by_what_it_does() -> None:
    config = settled("none", "strategy=single", *SHORT.split())
    own = Own(config, patch.object(model, "merge_heads", heads_reversed))
    assert diagnose(own).found == "heads-merged-wrongly"
    assert diagnose(Own(config, nullcontext())).found is None


@pytest.mark.parametrize(
    "name, given",
    [
        ("missing-causal-mask", SHORT),
        ("exploding-gradients", SHORT),
        ("validation-in-train-mode", SHORT),
        ("mean-of-means", SHORT),
        pytest.param("no-warm-up", "", marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_one_process_is_named(name: str, given: str) -> None:
    case = run(fault_of(name), given, seed=5)
    assert case.right, case.diagnosis.evidence


@pytest.mark.slow
def test_faults_of_ranks_are_named_and_sound_runs_left_alone() -> None:
    broken = ["rank-with-another-seed", "data-overlap", "tied-head-lost"]
    planned = [(fault_of(name), SHORT, 5, "") for name in broken]
    elsewhere = ["rank-with-another-seed", "mean-of-means", "exploding-gradients"]
    planned += [(fault_of(name), f"{ELSEWHERE[name]} {SHORT}", 5, "") for name in elsewhere]
    sound = ["ddp, accumulation, uneven token counts", "tp, tied head", "pp, tied head"]
    planned += [(NONE, f"{SOUND[name]} {SHORT}", 5, name) for name in sound]
    for case in run_all(planned):
        assert case.right, (case.fault, case.where, case.diagnosis.evidence)
        if case.fault == NONE.name:
            assert all(finding.holds for finding in case.diagnosis.evidence)


def test_what_is_said_as_json_has_no_nan() -> None:
    found = run(fault_of("nan-after-3"), "", seed=1).diagnosis
    assert found.found == "nan-after-3"
    said = json.loads(json.dumps(found.said("nan-after-3"), allow_nan=False))
    assert (said["fault"], said["found"]) == ("nan-after-3", "nan-after-3")
    failing = [one for one in said["evidence"] if not one["holds"]]
    assert {"check", "value", "bound", "says", "names"} <= set(failing[0])


def test_the_list_has_ten(capsys: pytest.CaptureFixture) -> None:
    assert command_module.command(["--json"]) == 0
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert len({fault["name"] for fault in faults}) == len(FAULTS) == 10
    assert all(fault["says"] for fault in faults)
    assert {fault.name for fault in FAULTS} >= set(ELSEWHERE) - {"nan-after-30"}
    assert len(SOUND) == 10


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["mean-of-mean"], "no such fault; there are mean-of-means"),
        (["data-overlap", "strategy=single"], "it needs layout.dp_replicate or layout.dp_shard"),
        (["tied-head-lost", "model.tied=false"], "it needs layout.tp above 1 and model.tied=true"),
        (["none", "--diagnose", "finetune=lora"], "a diagnosis is of a run from its first weights"),
        (["validation-in-train-mode", "model.dropout=0"], "it needs model.dropout above 0"),
    ],
)
def test_what_has_no_effect_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(Refused, match=said):
        command_module.command(arguments)


def test_a_strategy_that_is_given_brings_its_own_layout() -> None:
    overrides = fault_of("data-overlap").overrides(["strategy=ddp", "layout.dp_replicate=2"])
    assert [o for o in overrides if o.startswith(("strategy", "layout"))] == [
        "strategy=ddp",
        "layout.dp_replicate=2",
    ]


@pytest.mark.slow
def test_debug_trains_with_the_fault_and_says_so(tmp_path: Path) -> None:
    done = launch("debug", "nan-after-3", "model.n_layer=2", cwd=tmp_path)
    assert done.returncode == 1 and "broken on purpose: nan-after-3" in done.stderr
    assert "the loss is not finite" in done.stderr
    folder = only_run(tmp_path)
    assert json.loads((folder / "launch.json").read_text())["fault"] == "nan-after-3"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["loss"] for line in lines)


@pytest.mark.slow
def test_explain_leaves_a_table_and_a_picture(tmp_path: Path) -> None:
    done = launch("debug", "heads-merged-wrongly", "--explain", *SHORT.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "found: heads-merged-wrongly" in done.stdout and "FAILS" in done.stdout
    picture = (only_run(tmp_path) / "evidence.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
