"""config=FILE: a run's own configuration as what a new run begins with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.compose import jobs_of
from experiments.config import TrainConfig
from experiments.environment import settle
from experiments.refused import Refused
from experiments.run_folder import read_config
from tests.configs import compose, model_of

TOLD = ("data=generated", "strategy=tp", "model.n_layer=3", "optimizer.name=sgd", "seed=7")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Path:
    """The folder of a run that was prepared and not started."""
    monkeypatch.chdir(tmp_path)
    assert main([*TOLD, "launch=dry", "run.dir=old", "resume=auto"]) == 0
    capsys.readouterr()
    return tmp_path / "old"


def plain(config: TrainConfig) -> TrainConfig:
    return replace(config, run=replace(config.run, dir=None), resume=None)


@pytest.mark.parametrize(
    "words",
    [
        ["config=old/config.yaml"],
        ["--config-path=old", "--config-name=config"],
        ["--config-dir", "old", "-cn", "config.yaml"],
    ],
)
def test_it_is_the_same_run_but_for_its_folder_and_what_stands_beside(
    run: Path, words: list[str]
) -> None:
    again = compose(*words, "steps=10")
    assert again == replace(compose(*TOLD), steps=10)
    assert again.run.dir is None and again.resume is None and again.launch.value == "local"


def test_what_was_settled_is_settled_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["data=generated", "strategy=fsdp", "launch=dry", "run.dir=open"])
    assert read_config(Path("open")).layout.dp_shard == 2
    again = compose("config=open/config.yaml")
    assert settle(again, None, gpus=8).layout.dp_shard == 8
    assert settle(again, None, gpus=8).device.value == "cuda"
    wider = compose("config=open/config.yaml", "model=small")
    assert wider.model == model_of("small")
    assert (wider.optimizer.lr, wider.seq_len) == (
        compose("model=small").optimizer.lr,
        compose("model=small").seq_len,
    )


def test_a_group_replaces_all_that_the_file_says_of_it(run: Path) -> None:
    assert compose("config=old/config.yaml", "strategy=ddp").layout == compose().layout
    data = compose("config=old/config.yaml", "experiment=smoke", "data=random").data
    assert data == compose("data=random").data


def test_a_run_that_began_with_a_file_can_begin_another(run: Path) -> None:
    assert main(["config=old/config.yaml", "seed=8", "launch=dry", "run.dir=new"]) == 0
    said = json.loads(Path("new/launch.json").read_text())["overrides"]
    assert said[0] == "config=old/config.yaml"
    assert compose("config=new/config.yaml", "seed=7") == compose(*TOLD)


def test_a_sweep_may_begin_with_one_or_several(run: Path) -> None:
    jobs = jobs_of(["-m", "config=old/config.yaml", "seed=1,2"])
    assert jobs == [[f"config={run.name}/config.yaml", f"seed={n}"] for n in (1, 2)]
    assert len(jobs_of(["-m", "config=a.yaml,b.yaml", "seed=1,2"]) or []) == 4


def test_hydra_shows_what_it_would_be(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["config=old/config.yaml", "steps=11", "--cfg", "job"]) == 0
    said = capsys.readouterr().out
    assert "steps: 11" in said and "n_layer: 3" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["config=nowhere.yaml"], "config=nowhere.yaml: No such file"),
        (["config="], "config="),
        (["config=old"], "config=old: is a folder; config=old/config.yaml is its file"),
        (["config=old/launch.json"], "config=old/launch.json: no configuration of a run: "),
        (["config=a.yaml", "config=b.yaml"], "config=b.yaml: a run begins with one file"),
        (["--config-path=old"], "--config-path and --config-name belong together"),
        (["--config-name=config"], "--config-path and --config-name belong together"),
        (["--config-dir=old"], "--config-path and --config-name belong together"),
        (["--config-pat=old"], "--config-path and --config-name: write them out"),
        (["--experimental-rerun=x.pickle"], "--experimental-rerun: it runs a pickle"),
        (["--resolve"], "--resolve: goes with --cfg job"),
        (["--package=model"], "--package: goes with --cfg job"),
        (["config=old/config.yaml", "stepz=1"], "stepz=1: no such key; did you mean steps"),
    ],
)
def test_what_cannot_be_taken_is_one_line(run: Path, words: list[str], said: str) -> None:
    with pytest.raises((Refused, ValueError)) as refused:
        compose(*words)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_other_commands_take_no_file(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "config=old/config.yaml", "run=old"]) == 2
    assert capsys.readouterr().err.startswith("launch.sh: config=old/config.yaml: a training run")
