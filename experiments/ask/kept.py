"""What answers keep in runs/ask, so that a question that was asked is answered in seconds."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

KEPT = Path("runs") / "ask"
ROOT = Path(__file__).resolve().parents[2]
# what a search and its plans are computed by; what it was asked for is in its configuration
SIMULATOR = (
    *("costs", "minigpt", "parallel", "simulator"),
    *(
        f"experiments/predict/{name}.py"
        for name in ("clusters", "models", "plan_command", "plan_config", "scale", "search")
    ),
    # what simulate assumes decides which keys a plan's command needs
    *("experiments/config.py", "configs/simulate.yaml"),
)


def digest(value: Any) -> str:
    """Of what JSON can say, ten letters."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


@cache
def code_of(*places: str) -> str:
    """A digest of source files, and of all of a folder's: another version has another."""
    found = hashlib.sha256()
    for place in places:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:10]


def computed(name: str, asked: Any, again: bool, compute: Callable[[], Any]) -> Any:
    """What `compute` gives for what was `asked`, kept until the simulator's code changes."""
    path, code = KEPT / f"{name}-{digest(asked)}.json", code_of(*SIMULATOR)
    try:
        kept = json.loads(path.read_text())
        if kept["code"] == code and not again:
            return kept["found"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or half of it
        pass
    with alone():
        text = json.dumps({"code": code, "found": compute()})
        part = path.with_suffix(".part")
        part.write_text(text)
        part.rename(path)
    return json.loads(text)["found"]  # as the next one reads it


@contextmanager
def alone() -> Iterator[None]:
    """One that measures at a time: two would take each other's time, and folders."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
