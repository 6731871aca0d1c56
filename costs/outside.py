"""Reads files that another run, or another person, wrote: bounded, and refused in one line.

A file may be damaged or made to harm: a gzip of a megabyte that unpacks to gigabytes, JSON nested a
thousand deep, integers of a thousand digits, a pipe that never ends. The standard library alone.
"""

from __future__ import annotations

import gzip
import json
import math
import stat
import zlib
from pathlib import Path
from typing import Any

MIB = 2**20
MOST_BYTES = 256 * MIB  # of a file, unpacked; the largest that a run of this program left is 60 MB
MOST_VALUES = 16 * MIB  # of a JSON file; each takes some 60 bytes of memory
MOST_DEPTH = 32  # of nesting; ours have 8
MOST_DIGITS = 40  # of an integer; a step's flops have 25


def read_bytes(path: Path, most: int = MOST_BYTES, packed: bool = False) -> bytes:
    """Return a file's bytes, unpacked by gzip where it is `packed`. Raises ValueError, one line
    without the file's name, for one that is too large, damaged or no regular file, and OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("is no regular file")
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            content: bytes = file.read(most + 1)
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"is no gzip file, or damaged: {error}") from error
    if len(content) > most:
        unpacked = "unpacks to" if packed else "has"
        raise ValueError(f"{unpacked} more than {most // MIB} MiB, which is the most that is read")
    return content


def read_json(path: Path, packed: bool = False) -> Any:
    """Return the value of a JSON file. Raises ValueError, one line without the file's name, and
    OSError: what is no JSON (RFC 8259), NaN and Infinity included, or beyond the bounds above."""
    content = read_bytes(path, packed=packed)
    # before anything is made of it: "[[],[],[]..." takes twenty times its size in memory
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"has more than {MOST_VALUES:,} values, which is the most that is read")
    try:
        value = json.loads(
            content.decode(), parse_constant=_constant, parse_int=_integer, parse_float=_decimal
        )
    except RecursionError:
        raise ValueError(_DEEP) from None
    _check_depth(value)
    return value


_DEEP = f"is nested more than {MOST_DEPTH} deep, which is the most that is read"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(_DEEP)


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits: {MOST_DIGITS} are the most")
    return int(digits)


def _decimal(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:MOST_DIGITS]} is not a finite number")
    return value
