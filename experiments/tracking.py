"""Mirrors of a run: Weights & Biases, TensorBoard, or nothing. The run's own files are the record.

A mirror that fails says so once and stays silent: it never stops training. It never asks for a
login: offline unless logging.mode=online or WANDB_MODE says otherwise, and online without a key is
a failure like any other.
It ends with the tables and pictures of `./launch.sh compare`: a run's own, and a sweep's in a
record of its own beside its runs.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from experiments.config import Logger, LoggingConfig
from experiments.sheets import Sheet

SECRET = re.compile(r"key|token$|secret|password", re.IGNORECASE)
TRACE_PICTURES = ("timeline.png", "memory.png")  # of a run with trace=true
Ledger = dict[str, Any]


class Tracker(Protocol):
    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def finish(self, ledger: Ledger | None) -> None:
        """The end of a run, or without a ledger of a sweep: what its folder has to show."""


class NoTracker:
    """Nobody mirrors this run."""

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        return None

    def finish(self, ledger: Ledger | None) -> None:
        return None


class Mirror:
    """What mirrors share: whatever one of them does, the run goes on."""

    name = ""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.on = True

    def guard(self, act: Callable[[], None]) -> None:
        """Do it, unless something failed before."""
        if not self.on:
            return
        try:
            act()
        except Exception as error:
            self.on = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.say(f"{self.name} is off for this run: {reason}")


class WandbTracker(Mirror):
    """One W&B run, on rank 0: the config, a row of metrics a step, the ledger's step as summary."""

    name = "W&B"

    def __init__(
        self, config: LoggingConfig, folder: Path, settings: dict, say: Callable[[str], None]
    ) -> None:
        super().__init__(folder, say)
        self.guard(lambda: self._start(config, settings))

    def _start(self, config: LoggingConfig, settings: dict) -> None:
        mode = wandb_mode(config)
        if mode == "disabled":
            self.on = False
            self.say("W&B is off for this run: WANDB_MODE=disabled")
            return
        online = mode == "online"
        if online and not has_login():
            raise RuntimeError("online needs WANDB_API_KEY, or a key that `wandb login` has saved")
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CONSOLE", "off")
        import wandb

        self.run = wandb.init(
            project=config.project,
            name=self.folder.name,
            group=config.group,
            job_type="run" if settings else "comparison",
            dir=str(self.folder),
            mode=mode,
            config=without_secrets(settings),
        )
        self.run.define_metric("*", step_metric="step")
        if not online:
            self.say(f"W&B offline: send it with `wandb sync {self.folder}/wandb/offline-run-*`")

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.guard(lambda: self.run.log({"step": step, **metrics}))

    def finish(self, ledger: Ledger | None) -> None:
        self.guard(lambda: self._finish(ledger))

    def _finish(self, ledger: Ledger | None) -> None:
        import wandb

        if ledger:
            self.run.summary.update({"ledger": ledger["step"], "model": ledger["model"]})
            self.run.summary.update({"layout": ledger["layout"], "training": ledger["training"]})
        sheets, pictures = shown_of(self.folder)
        tables = {
            f"tables/{sheet.title}": wandb.Table(list(sheet.columns), values_of(sheet))
            for sheet in sheets
        }
        images = {f"pictures/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
        self.run.log({**tables, **images})
        self.run.finish()


def wandb_mode(
    config: LoggingConfig, environ: Mapping[str, str] = os.environ
) -> Literal["online", "offline", "disabled"]:
    """Return what WANDB_MODE says, W&B's own variable, else logging.mode. Raises ValueError."""
    given = environ.get("WANDB_MODE") or config.mode.value
    modes: dict[str, Literal["online", "offline", "disabled"]] = {
        "online": "online",
        "run": "online",  # W&B's older names
        "offline": "offline",
        "dryrun": "offline",
        "disabled": "disabled",
    }
    if given not in modes:
        raise ValueError(f"WANDB_MODE={given}: must be online, offline or disabled")
    return modes[given]


def has_login(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether W&B finds a key without asking: in a variable, or where `wandb login` has
    saved it (.netrc)."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    path = Path(environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).hosts.get(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return found is not None and bool(found[2])


def shown_of(folder: Path) -> tuple[list[Sheet], dict[str, Path]]:
    """The tables and the pictures, by name, of a run's folder or a sweep's."""
    from experiments.compare.command import shown
    from experiments.compare.comparison import compared
    from experiments.compare.pictures import draw  # matplotlib takes a second

    comparison = compared([str(folder)])
    drawn = {path.stem: path for path in draw(comparison, folder / "pictures")}
    traced = [folder / name for name in TRACE_PICTURES if (folder / name).is_file()]
    return shown(comparison), {**drawn, **{f"one step, {p.stem}": p for p in traced}}


def values_of(sheet: Sheet) -> list[list[Any]]:
    """A sheet's numbers as numbers, null where there is none; its words as words."""
    return [
        [
            cell.text if name in sheet.words else cell.value
            for name, cell in zip(sheet.columns, row, strict=True)
        ]
        for row in sheet.rows
    ]


def without_secrets(settings: Any) -> Any:
    """The same settings without any value whose key looks like a credential."""
    if isinstance(settings, dict):
        kept = {k: v for k, v in settings.items() if not SECRET.search(str(k))}
        return {k: without_secrets(v) for k, v in kept.items()}
    return settings


def make_tracker(
    config: LoggingConfig, folder: Path, settings: dict, say: Callable[[str], None], rank: int
) -> Tracker:
    """The tracker of this rank: only rank 0 mirrors. Without settings: that of a sweep."""
    if rank or config.to == Logger.none:
        return NoTracker()
    if config.to == Logger.tensorboard:
        from experiments.tensorboard_tracker import TensorBoardTracker

        return TensorBoardTracker(folder, settings, say)
    return WandbTracker(config, folder, settings, say)
