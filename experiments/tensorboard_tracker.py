"""TensorBoard as the mirror of a run: event files in its folder.

`tensorboard --logdir runs/sweep-...` shows the runs of a sweep side by side, grouped by folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from experiments.tracking import Ledger, Mirror, shown_of, without_secrets

EVENTS = "tensorboard"  # the folder, in the run's own


class TensorBoardTracker(Mirror):
    """Scalars a step; at the end the ledger's numbers, the tables as Markdown, the pictures."""

    name = "TensorBoard"

    def __init__(self, folder: Path, settings: dict, say: Callable[[str], None]) -> None:
        super().__init__(folder, say)
        self.steps = 0
        self.guard(lambda: self._start(settings))

    def _start(self, settings: dict) -> None:
        from torch.utils.tensorboard import SummaryWriter  # it needs the package tensorboard

        self.writer = SummaryWriter(str(self.folder / EVENTS))
        if settings:
            text = yaml.safe_dump(without_secrets(settings), sort_keys=False)
            self.writer.add_text("config", _as_code(text))
        self.say(f"TensorBoard: tensorboard --logdir {self.folder}")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.guard(lambda: self._log(step, metrics))

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        self.steps = step + 1
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, step)

    def finish(self, ledger: Ledger | None) -> None:
        self.guard(lambda: self._finish(ledger))

    def _finish(self, ledger: Ledger | None) -> None:
        from matplotlib.image import imread

        for name, value in _numbers_of(ledger["step"] if ledger else {}):
            self.writer.add_scalar(f"ledger/{name}", value, self.steps)
        sheets, pictures = shown_of(self.folder)
        for sheet in sheets:
            self.writer.add_text(f"tables/{sheet.title}", sheet.to_markdown(), self.steps)
        for name, path in pictures.items():
            image = imread(path)
            self.writer.add_image(f"pictures/{name}", image, self.steps, dataformats="HWC")
        self.writer.close()


def _as_code(text: str) -> str:
    """Markdown shows lines that begin with four spaces as they are."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _numbers_of(step: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """A step's numbers by name; its rows of messages are in the tables."""
    found: list[tuple[str, float]] = []
    for key, value in step.items():
        if isinstance(value, dict):
            found += _numbers_of(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((prefix + key, value))
    return found
