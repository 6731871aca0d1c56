"""Checkpoints as folders of a run: which are there, which are whole, which one a run goes on from.

    RUN/checkpoints/step-000100/    what parallel/checkpoint.py wrote after 100 steps, and
        manifest.json               SHA-256 and size of each file, the run, its configuration
        manifest.sha256             that of the manifest, as sha256sum writes it

A folder is step-000100.START.part while it is written, and gets its name when all of it is on the
disk: one that has the name was whole once, and the hashes say whether it still is. START is another
one at each start of the ranks, so that nothing that an earlier one has left is in the way. What is
not this program's (a link, a file) stays, with a warning. No torch here: the launcher reads this
before any process starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from parallel.damaged import Damaged

FOLDER = "checkpoints"
SCHEMA = "worldsize.checkpoint/1"
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
STEP = re.compile(r"step-(\d+)")
PART = ".part"  # at the end of a name: not whole yet


@dataclass(frozen=True)
class Checkpoint:
    """One that was checked, file by file."""

    folder: Path
    manifest: dict[str, Any]
    skipped: list[str] = field(default_factory=list)  # newer ones, and what is wrong with each

    @property
    def step(self) -> int:
        """Steps that were done when it was written."""
        return self.manifest["step"]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder.parent.parent


def folder_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:06d}"


def part_of(folder: Path, start: str = "") -> Path:
    """Return where a checkpoint lies while it is written; `start` names this start of the ranks."""
    return folder.with_name(f"{folder.name}{start and '.' + start}{PART}")


def steps_of(run: Path) -> list[Path]:
    """Return published checkpoints, the newest first: folders, and links to some."""
    named = [(int(m[1]), p) for p in _children(run / FOLDER) if (m := STEP.fullmatch(p.name))]
    return [path for _, path in sorted(named, reverse=True) if path.is_dir()]


def is_own(path: Path) -> bool:
    """Return whether it is a folder here, which the program may remove: no link and no file."""
    return path.is_dir() and not path.is_symlink()


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


# --- writing


def publish(folder: Path, facts: dict[str, Any], keep: int, start: str = "") -> list[str]:
    """Seal what was written as part_of(folder, start), give it its name, drop all but the newest.

    Each file, then the folder, then its name is on the disk before the next begins, so that there
    is no moment at which a crash leaves a name without its files. Returns warnings, one line each:
    what else had the name already, which is set aside, and what could not be removed.
    """
    part = part_of(folder, start)
    files = {path.name: facts_of(path) for path in sorted(part.iterdir())}
    manifest = json.dumps({"schema": SCHEMA, **facts, "files": files}, indent=1).encode()
    _write(part / MANIFEST, manifest)
    _write(part / SEAL, seal(manifest))
    _sync(part)
    warnings = set_aside([folder], "other") if os.path.lexists(folder) else []
    part.rename(folder)
    _sync(folder.parent)
    run = folder.parent.parent
    own = [path for path in steps_of(run) if is_own(path) or path == folder]
    for old in own[keep:]:
        warnings += _remove(old, part_of(old, start))
    return warnings


def _remove(path: Path, part: Path) -> list[str]:
    """Remove a folder; return one warning if that cannot be done: an open file on NFS, a mount."""
    try:
        # no longer a checkpoint from the first moment of its removal
        shutil.rmtree(path.rename(part) if part != path else path)
    except OSError as error:
        return [f"{path} could not be removed: {error.strerror or error}"]
    return []


def seal(manifest: bytes) -> bytes:
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def facts_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is on the disk afterwards."""
    with open(path, "rb") as file:
        digest = _digest(file)
        os.fsync(file.fileno())
        return {"sha256": digest, "bytes": file.tell()}


def _digest(file: BinaryIO) -> str:
    sha256 = hashlib.sha256()
    while block := file.read(2**20):
        sha256.update(block)
    return sha256.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """The names in a folder, on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def parts_in(run: Path) -> list[Path]:
    """What a save that is at work is writing, or one that was cut short has left."""
    return [path for path in _children(run / FOLDER) if path.name.endswith(PART)]


def clean(run: Path) -> list[str]:
    """Remove what saves that were cut short have left; return warnings of what stays, and why."""
    warnings = []
    for path in _children(run / FOLDER):
        is_part = path.name.endswith(PART)
        step, _, rest = path.name.partition(".")
        if not STEP.fullmatch(step) or (rest and not is_part):
            continue
        if is_part and is_own(path):
            warnings += _remove(path, path)
        elif not is_own(path):
            kind = "a link" if path.is_symlink() else "a file"
            warnings.append(f"{path} is {kind} and no folder of this run: it is left alone")
    return warnings


def set_aside(paths: list[Path], why: str = "damaged") -> list[str]:
    """Rename what is in the way of checkpoints to come; nothing of it is removed.

    Returns a warning, one line, for each: its new name, or why it could not get one.
    """
    warnings = []
    for path in paths:
        number = 1
        while os.path.lexists(aside := path.with_name(f"{path.name}.{why}-{number}")):
            number += 1
        try:
            path.rename(aside)
            warnings.append(f"{path} is now {aside.name}: a checkpoint needs its name")
        except OSError as error:
            warnings.append(f"{path} could not be renamed: {error.strerror}")
    return warnings


# --- reading


def check(folder: Path) -> Checkpoint:
    """Read every byte. Raises Damaged, one line with the file, unless all is as it was written."""
    manifest = read_manifest(folder)
    named = STEP.fullmatch(folder.name)
    if named and int(named[1]) != manifest["step"]:
        raise Damaged(f"{folder}: its manifest is of step {manifest['step']}")
    for name, facts in manifest["files"].items():
        check_file(folder / name, facts)
    return Checkpoint(folder, manifest)


def check_file(path: Path, facts: dict[str, Any]) -> None:
    """Raise Damaged, one line, unless the file has the size and SHA-256 of `facts`."""
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise Damaged(f"{path}: is damaged: it has {size} bytes, and had {facts['bytes']}")
        with open(path, "rb") as file:
            digest = _digest(file)
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing") from None
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from error
    if digest != facts["sha256"]:
        raise Damaged(f"{path}: is damaged: its SHA-256 is not what was written")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is what was sealed. Raises Damaged."""
    content = {}
    for name in (MANIFEST, SEAL):
        try:
            content[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            raise Damaged(f"{folder / name}: is missing") from None
        except OSError as error:
            raise Damaged(f"{folder / name}: {error.strerror}") from error
    if content[SEAL] != seal(content[MANIFEST]):
        raise Damaged(f"{folder / MANIFEST}: is damaged, or {SEAL} beside it is")
    try:
        manifest = json.loads(content[MANIFEST])
        schema = manifest["schema"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"{folder / MANIFEST}: is no manifest") from error
    if schema != SCHEMA:
        raise Damaged(f"{folder / MANIFEST}: schema {schema!r} is not {SCHEMA!r}")
    # sealed as it is, it was not written by this program
    wrong = next((key for key, fits in FIELDS.items() if not fits(manifest.get(key))), None)
    if wrong:
        raise Damaged(f"{folder / MANIFEST}: {wrong} is missing or is none")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def are_files(value: Any) -> bool:
    """Plain names of this folder, each with its size and its SHA-256."""
    return isinstance(value, dict) and all(
        Path(name).name == name
        and isinstance(facts, dict)
        and _is_count(facts.get("bytes"))
        and isinstance(facts.get("sha256"), str)
        for name, facts in value.items()
    )


# what a manifest must have, and how it is known; experiments/saving.py says what it means
FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "files": are_files,
    "batch_size": _is_count,
    "config": lambda value: isinstance(value, dict),
    "corpus": lambda value: isinstance(value, str),
    "tokenizer": lambda value: value is None or isinstance(value, str),  # older ones have none
    "scaler": lambda value: value is None or isinstance(value, dict),
}


def newest_whole(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one."""
    skipped: list[str] = []
    for folder in steps_of(run):
        try:
            return check(folder), skipped
        except Damaged as error:
            skipped.append(str(error))
    return None, skipped
