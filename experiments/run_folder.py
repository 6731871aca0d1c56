"""The one folder of a run: who makes it, what is frozen in it, how a failure is read from it.

config.yaml      the resolved configuration; ranks read it and never compose
launch.json      overrides, corpus, when the command began
logs/            torchrun's messages, the other ranks' output, a small file for each failed rank
metrics.jsonl, ledger.json, model.pt, tokenizer.json   written while and after it trains
trace.json.gz, timeline.png, memory.png (and .svg)     with trace=true
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import TrainConfig
from parallel.layout import Layout


@dataclass(frozen=True)
class Launched:
    """What the ranks must know besides their configuration."""

    overrides: list[str]
    corpus: str  # folder
    started: float  # time.time() when the user's command began


def make_folder(folder: Path | None, layout: Layout, shared: bool = False) -> Path:
    """Make the folder; None picks runs/DATE-TIME-LAYOUT. One that already holds a run is refused,
    unless another node made it (`shared`)."""
    if folder is not None:
        if (folder / "config.yaml").exists() and not shared:
            raise ValueError(f"run.dir={folder}: already holds a run")
        return _make(folder)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):  # two launches in one second must not share a folder
        suffix = f"-{attempt}" if attempt else ""
        folder = Path("runs") / f"{stamp}-{layout.label}{suffix}"
        try:
            return _make(folder, exist_ok=False)
        except FileExistsError:
            continue
    raise ValueError(f"run.dir: could not make a folder like {folder}")


def sweep_folder() -> Path:
    """Where the jobs of a sweep leave their run folders."""
    return Path("runs") / time.strftime("sweep-%Y%m%d-%H%M%S")


def _make(folder: Path, exist_ok: bool = True) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        (folder / "logs").mkdir(exist_ok=True)
    except FileExistsError:
        if exist_ok:  # something that is no folder has the name
            raise ValueError(f"run.dir={folder}: is not a folder") from None
        raise
    except OSError as error:
        raise ValueError(f"run.dir={folder}: cannot be made: {error.strerror}") from error
    return folder


def write_config(folder: Path, config: TrainConfig, launched: Launched) -> None:
    """Freeze what the ranks will read."""
    try:
        (folder / "launch.json").write_text(json.dumps(asdict(launched), indent=1))
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    except OSError as error:
        raise ValueError(f"run.dir={folder}: cannot be written: {error.strerror}") from error


def read_config(folder: Path) -> TrainConfig:
    """The frozen configuration. Raises ValueError, one line, where it is missing or damaged."""
    path = folder / "config.yaml"
    try:
        schema = OmegaConf.structured(TrainConfig)
        config = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(path)))
    except OSError as error:
        raise ValueError(f"run={folder}: config.yaml: {error.strerror}") from error
    except (OmegaConfBaseException, ValueError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"run={folder}: config.yaml is damaged: {said}") from error
    assert isinstance(config, TrainConfig)
    return config


def read_launched(folder: Path) -> Launched:
    """What write_config wrote down. Raises ValueError, one line."""
    try:
        return Launched(**json.loads((folder / "launch.json").read_text()))
    except OSError as error:
        raise ValueError(f"run={folder}: launch.json: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"run={folder}: launch.json is damaged: {error}") from error


def write_error(folder: Path, rank: int, error: BaseException) -> None:
    """Leave a rank's error where `failure` finds it, its traceback in a file of its own."""
    lines = str(error).strip().splitlines() or ["no message"]
    path = folder / "logs" / f"rank-{rank}.traceback.txt"
    said = {
        "rank": rank,
        "time": time.time(),
        "error": f"{type(error).__name__}: {lines[0]}",
        "traceback": str(path),
    }
    try:
        path.write_text(traceback.format_exc())
        (folder / "logs" / f"rank-{rank}.error.json").write_text(json.dumps(said))
    except OSError:  # a full disk: the message still reaches torchrun.log
        print(said["error"], file=sys.stderr)


def failure(folder: Path, log: Path) -> str:
    """One line for a run that failed: the first rank that did, and where its traceback is."""
    reports = []
    for path in (folder / "logs").glob("rank-*.error.json"):
        try:
            reports.append(json.loads(path.read_text()))
        except (OSError, ValueError):  # the disk was full: half a file says nothing
            continue
    if not reports:
        return f"a rank died without a word; see {log}"
    first = min(reports, key=lambda report: report["time"])
    return f"rank {first['rank']}: {first['error']} (traceback: {first['traceback']})"
