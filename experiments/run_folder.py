"""The one folder of a run: who makes it, and what is frozen in it.

config.yaml      the resolved configuration; ranks read it and never compose
launch.json      overrides, corpus, tokenizer, when the command began
tokenizer.json   the corpus's tokenizer, if it has a file
logs/            torchrun's messages, the other ranks' output, and see experiments/verdict.py
metrics.jsonl, ledger.json, model.pt   written while and after it trains
trace.json.gz, timeline.png, memory.png (and .svg)     with trace=true
checkpoints/     see experiments/checkpoints.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from costs.outside import read_json
from experiments import verdict
from experiments.config import TrainConfig
from experiments.outside_yaml import load_yaml
from experiments.resume import RUNS, dotted
from minigpt.tokenizer import BPE_FILE
from parallel.layout import Layout


@dataclass(frozen=True)
class Launched:
    """What the ranks must know besides their configuration."""

    overrides: list[str]
    corpus: str  # folder
    started: float  # time.time() when the user's command began
    run: str = field(default_factory=lambda: uuid.uuid4().hex)  # no other run has this name
    fault: str | None = None  # of `debug`: what the ranks are to do wrongly
    # keys that the run settled for itself, as they were before: -1, auto, null, ${...}
    settled: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None  # Corpus.vocabulary: what tells it from others


def make_folder(
    folder: Path | None, layout: Layout, shared: bool = False, again: bool = False
) -> Path:
    """Make the folder; None picks runs/DATE-TIME-LAYOUT. One that already holds a run is refused,
    unless another node made it (`shared`) or that run is to go on (`again`)."""
    if folder is not None:
        if (folder / "config.yaml").exists() and not (shared or again):
            raise ValueError(f"run.dir={folder}: already holds a run; resume=auto goes on with it")
        _make(folder)
        if not shared:
            hold(folder)
        if again:
            verdict.clear(folder)
        return folder
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):  # two launches in one second must not share a folder
        suffix = f"-{attempt}" if attempt else ""
        folder = RUNS / f"{stamp}-{layout.label}{suffix}"
        try:
            _make(folder, exist_ok=False)
        except FileExistsError:
            continue
        hold(folder)
        return folder
    raise ValueError(f"run.dir: could not make a folder like {folder}")


def hold(folder: Path) -> None:
    """Keep a run folder for this process until it ends, however it ends. Raises ValueError where
    another launch is at work in it: two would write over each other's files."""
    number = os.open(folder / "logs" / "launch.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        raise ValueError(f"run.dir={folder}: another launch is at work in it") from None
    except OSError:  # a file system without locks: nothing is known of others
        os.close(number)


def _make(folder: Path, exist_ok: bool = True) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
        (folder / "logs").mkdir(exist_ok=True)
    except FileExistsError:
        if exist_ok:  # something that is no folder has the name
            raise ValueError(f"run.dir={folder}: is not a folder") from None
        raise
    except OSError as error:
        raise ValueError(f"run.dir={folder}: cannot be made: {error.strerror}") from error


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values, which JSON takes."""
    settings: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return settings


def settled_keys(asked: DictConfig, config: TrainConfig) -> dict[str, Any]:
    """Return what was composed (`asked`, interpolations as they are) for each key that is another
    value in the settled configuration."""
    before: Any = OmegaConf.to_container(asked, enum_to_str=True)
    after = dotted(settings_of(config))
    return {key: value for key, value in dotted(before).items() if after.get(key, value) != value}


def write_config(folder: Path, config: TrainConfig, launched: Launched) -> None:
    """Freeze what the ranks will read, and keep the corpus's tokenizer, if it has a file."""
    tokenizer = Path(launched.corpus) / BPE_FILE
    try:
        if launched.corpus and tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / BPE_FILE)
        (folder / "launch.json").write_text(json.dumps(asdict(launched), indent=1))
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    except OSError as error:
        raise ValueError(f"run.dir={folder}: cannot be written: {error.strerror}") from error


def read_config(folder: Path) -> TrainConfig:
    """The frozen configuration. Raises ValueError, one line, where it is missing or damaged."""
    path = folder / "config.yaml"
    try:
        schema = OmegaConf.structured(TrainConfig)
        config = OmegaConf.to_object(OmegaConf.merge(schema, load_yaml(path)))
    except OSError as error:
        raise ValueError(f"run={folder}: config.yaml: {error.strerror}") from error
    except Exception as error:  # YAML, OmegaConf and the checks of the schema raise many kinds
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"run={folder}: config.yaml is damaged: {said}") from error
    assert isinstance(config, TrainConfig)
    return config


def read_launched(folder: Path) -> Launched:
    """What write_config wrote down. Raises ValueError, one line."""
    try:
        return Launched(**read_json(folder / "launch.json"))
    except OSError as error:
        raise ValueError(f"run={folder}: launch.json: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"run={folder}: launch.json is damaged: {error}") from error
