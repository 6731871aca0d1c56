"""The training loop where the host does not wait for its device, as on a GPU: what it writes is
what a loop writes that reads each step at once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from costs import ledger as ledgers
from experiments import train as loop
from experiments.environment import Rank
from experiments.run_folder import Launched
from minigpt.corpus import prepare
from parallel import step
from tests.configs import compose
from tests.launching import SMALL

LOOP = (
    *SMALL,
    "strategy=single",
    "steps=9",
    "validation.every=4",
    "checkpoint.every=3",
    "run.save=false",
)
TIMES = ("step_s", "tokens_per_s")  # of a line, which no two runs have alike


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A run listens to signals; what listened before does so again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(folder: Path, *overrides: str) -> int:
    config = compose(*LOOP, *overrides)
    config = replace(config, run=replace(config.run, dir=str(folder)))
    launched = Launched([], str(prepare(config.data).folder), time.time())
    return loop.train(config, launched, None, Rank(0, 0, 1))


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


def test_it_writes_the_same(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert run(tmp_path / "waits") == 0
    request.getfixturevalue("on_device")
    assert run(tmp_path / "ahead") == 0
    wanted, found = lines(tmp_path / "waits"), lines(tmp_path / "ahead")
    assert [line["step"] for line in found] == list(range(9))
    assert [line["validation_loss"] is not None for line in found] == [
        step in (3, 7, 8) for step in range(9)
    ]
    for line, other in zip(found, wanted, strict=True):
        assert line == {k: pytest.approx(v, abs=1e-6) for k, v in other.items()}
    checkpoints = [
        sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir())
        for name in ("waits", "ahead")
    ]
    assert checkpoints[0] == checkpoints[1] and checkpoints[0]
    training = ledgers.read(tmp_path / "ahead" / "ledger.json")["training"]
    assert training["losses"] == [line["loss"] for line in found]


def test_it_stops_after_the_step_that_was_under_way(
    tmp_path: Path, on_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in step 4, whose sum carries it; step 5 is launched by when that is read."""
    train_step = loop.train_step

    def asked(number: int, *others: Any) -> Any:
        if number == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(number, *others)

    monkeypatch.setattr(loop, "train_step", asked)
    assert run(tmp_path / "run") == signal.SIGUSR1
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(6))
    manifests = list((tmp_path / "run" / "checkpoints").glob("*/manifest.json"))
    assert max(json.loads(path.read_text())["step"] for path in manifests) == 6


def test_a_bad_number_ends_it_before_the_next_update(
    tmp_path: Path, on_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = loop.train_step

    def spoilt(number: int, config: Any, trainer: step.Trainer, *others: Any) -> Any:
        if number == 4:
            trainer.parameters[-1].data.fill_(float("nan"))
        return train_step(number, config, trainer, *others)

    monkeypatch.setattr(loop, "train_step", spoilt)
    with pytest.raises(step.NonFinite, match="no update was made"):
        run(tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(4))


def test_validation_reads_the_same_windows_however_a_batch_is_cut(tmp_path: Path) -> None:
    losses = []
    for cut in ("micro_batch_size=4", "micro_batch_size=1 gradient_accumulation_steps=4"):
        folder = tmp_path / str(len(losses))
        assert run(folder, *cut.split(), "steps=1", "checkpoint.every=0") == 0
        losses.append(lines(folder)[-1]["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_weights_that_have_diverged_are_told(tmp_path: Path) -> None:
    far = ("steps=1", "optimizer.lr=1e30", "optimizer.warmup_steps=0", "checkpoint.every=0")
    with pytest.raises(step.NonFinite, match="the validation loss after step 1 is nan"):
        run(tmp_path / "stops", *far)
    assert run(tmp_path / "goes_on", *far, "nonfinite=skip") == 0
    training = ledgers.read(tmp_path / "goes_on" / "ledger.json")["training"]
    assert training["validation_loss"] is None
