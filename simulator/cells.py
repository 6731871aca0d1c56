"""Cells of a CSV as numbers and flags. Empty: not stated. A bad one makes its row Unknown."""

from __future__ import annotations

import math

Cells = dict[str, str]
MOST = 10**9  # of anything that is counted
MOST_LAYERS = 10_000


class Unknown(Exception):
    """Why a row has no plan."""


def number(cells: Cells, key: str, default: float | None = None) -> float | None:
    text = cells.get(key, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        raise Unknown(f"{key}={text}: not a number") from None
    if not math.isfinite(value) or value <= 0:
        raise Unknown(f"{key}={text}: must be greater than 0")
    return value


def whole(cells: Cells, key: str, default: int | None = None, most: int = MOST) -> int:
    value = number(cells, key, default)
    if value is None:
        raise Unknown(f"{key} is not stated")
    if value != int(value) or value > most:
        raise Unknown(f"{key}={value:g}: must be whole, at most {most:,}")
    return int(value)


def flag(cells: Cells, key: str, default: bool) -> bool:
    text = cells.get(key, "").lower()
    if text not in ("", "true", "false", "1", "0"):
        raise Unknown(f"{key}={text}: must be True or False")
    return text in ("true", "1") if text else default
