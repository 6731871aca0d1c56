"""Runs by what a user writes: a folder, a ledger, a sweep's folder, a pattern. No torch."""

from __future__ import annotations

import glob
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costs import ledger as ledgers
from experiments.step_log import read_seconds

LEDGER = "ledger.json"
# one of these makes a folder that of a run, finished or not
MARKS = (LEDGER, "launch.json", "metrics.jsonl")
Ledger = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run or simulation."""

    number: int  # from 1, in the order in which they were given
    name: str
    path: Path  # of its ledger
    ledger: Ledger
    seconds: list[float] | None  # of each step; None where nobody knows

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def source(self) -> str:
        return self.ledger["source"]

    @property
    def losses(self) -> list[float | None]:
        return self.ledger.get("training", {}).get("losses", [])


def find_runs(words: list[str]) -> tuple[list[Run], list[str]]:
    """All runs that the words name, each once, and a line for each ledger that cannot be read."""
    paths, problems = ledger_paths(words)
    found: list[tuple[Path, Ledger, list[float] | None]] = []
    for path in paths:
        try:
            ledger = ledgers.read(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            measured = ledger["source"] == "measured"
            seconds = read_seconds(path.parent / "metrics.jsonl") if measured else None
        except ValueError as error:  # its costs are known, their noise is not
            problems.append(str(error))
            seconds = None
        found.append((path, ledger, seconds))
    names = short_names([path for path, _, _ in found])
    runs = [Run(i + 1, names[i], *parts) for i, parts in enumerate(found)]
    return runs, problems


def unread(words: list[str], runs: list[Run]) -> list[str]:
    """The words of which no run came: nothing of that name, no run in it, or a damaged ledger."""
    read = {run.path.resolve() for run in runs}
    return [w for w in words if read.isdisjoint(path.resolve() for path in ledger_paths([w])[0])]


def ledger_paths(words: list[str]) -> tuple[list[Path], list[str]]:
    """Where the ledgers should be, and a line for each word that names nothing."""
    paths: dict[Path, Path] = {}  # by what they resolve to: a run given twice is one
    problems = []
    for word in words:
        given = [Path(word)]
        if not given[0].exists() and glob.has_magic(word):
            given = sorted(map(Path, glob.glob(word)), key=natural)
        inside = [path for one in given for path in _ledgers_in(one)]
        if not inside:
            there = any(path.exists() for path in given)
            problems.append(f"{word}: {'no run is in it' if there else 'no such file or folder'}")
        paths.update({path.resolve(): path for path in inside if path.resolve() not in paths})
    return list(paths.values()), problems


def _ledgers_in(path: Path) -> list[Path]:
    """The ledger of a run's folder, or those of all runs below it."""
    if path.is_file():
        return [path]
    if any((path / mark).exists() for mark in MARKS):
        return [path / LEDGER]
    if not path.is_dir():
        return []
    below = (child for child in path.iterdir() if child.is_dir() and not child.is_symlink())
    return [ledger for child in sorted(below, key=natural) for ledger in _ledgers_in(child)]


def natural(path: Path) -> list[Any]:
    """Sorts 2 before 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", str(path))]


def short_names(paths: list[Path]) -> list[str]:
    """Of each run the shortest end of its path that no other run has."""
    parts = [path.parent.parts if path.name == LEDGER else path.parts for path in paths]
    names = ["/".join(p[-1:]) for p in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        times = Counter(names)
        names = [
            "/".join(p[-length:]) if times[name] > 1 else name
            for p, name in zip(parts, names, strict=True)
        ]
    return [name or str(path) for name, path in zip(names, paths, strict=True)]
