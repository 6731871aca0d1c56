"""Mirrors of a run: Weights & Biases, or nothing. The run's own files are the record.

A mirror that fails says so once and stays silent: it never stops training. It never asks for a
login: offline unless logging.mode=online, and online without a key is a failure like any other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from experiments.config import Logger, LoggingConfig, WandbMode

SECRET = re.compile(r"key|token$|secret|password", re.IGNORECASE)


class Tracker(Protocol):
    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def finish(self, ledger: dict[str, Any] | None) -> None: ...


class NoTracker:
    """Nobody mirrors this run."""

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        return None

    def finish(self, ledger: dict[str, Any] | None) -> None:
        return None


class WandbTracker:
    """One W&B run, on rank 0: the config, a row of metrics a step, the ledger's step as summary."""

    def __init__(
        self, config: LoggingConfig, folder: Path, settings: dict, say: Callable[[str], None]
    ) -> None:
        self.say = say
        self.run: Any = None
        self._guard(lambda: self._start(config, folder, settings))

    def _start(self, config: LoggingConfig, folder: Path, settings: dict) -> None:
        online = config.mode == WandbMode.online
        if online and not os.environ.get("WANDB_API_KEY"):
            raise RuntimeError("logging.mode=online needs WANDB_API_KEY")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        import wandb

        self.run = wandb.init(
            project=config.project,
            name=folder.name,
            group=config.group,
            dir=str(folder),
            mode="online" if online else "offline",
            config=without_secrets(settings),
        )
        self.run.define_metric("*", step_metric="step")
        if not online:
            self.say(f"W&B offline: send it with `wandb sync {folder}/wandb/offline-run-*`")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        if self.run:
            self._guard(lambda: self.run.log({"step": step, **metrics}))

    def finish(self, ledger: dict[str, Any] | None) -> None:
        if self.run:
            self._guard(lambda: self._finish(ledger))

    def _finish(self, ledger: dict[str, Any] | None) -> None:
        if ledger:
            self.run.summary.update({"ledger": ledger["step"], "model": ledger["model"]})
            self.run.summary.update({"layout": ledger["layout"], "training": ledger["training"]})
        self.run.finish()

    def _guard(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a mirror does, the run goes on
            self.run = None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.say(f"W&B is off for this run: {reason}")


def without_secrets(settings: Any) -> Any:
    """The same settings without any value whose key looks like a credential."""
    if isinstance(settings, dict):
        kept = {k: v for k, v in settings.items() if not SECRET.search(str(k))}
        return {k: without_secrets(v) for k, v in kept.items()}
    return settings


def make_tracker(
    config: LoggingConfig, folder: Path, settings: dict, say: Callable[[str], None], rank: int
) -> Tracker:
    """The tracker of this rank: only rank 0 mirrors."""
    if rank or config.to == Logger.none:
        return NoTracker()
    return WandbTracker(config, folder, settings, say)
