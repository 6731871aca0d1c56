"""One cache and one home for the whole suite, so that no test reads or fills the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from parallel.step import Trainer

torch.set_num_threads(1)
# The suite draws the same examples every time: who changes one thing is not told of another.
# --hypothesis-profile=search draws new ones and many more. An example may take as long as a busy
# machine makes it take; hypothesis would fail it at 200 ms.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, max_examples=3000)
settings.load_profile("suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the soak trials out unless `-m` or a path asks for them: they take an hour."""
    if "soak" in config.option.markexpr or any("soak" in argument for argument in config.args):
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=soak)
    items[:] = [item for item in items if item not in soak]


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    saved = {name: os.environ.get(name) for name in ("HOME", "WANDB_API_KEY", "WANDB_MODE")}
    os.environ["HOME"] = str(folder)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    yield folder
    for name, value in saved.items():
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers update without the host reading what decides it, as on a GPU."""

    def make(self: Trainer) -> None:
        made(self)
        self.decides_on_device = True

    made = Trainer.__post_init__
    monkeypatch.setattr(Trainer, "__post_init__", make)
