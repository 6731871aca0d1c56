"""Checks of numbers that a user may set. A ValueError names the key, its value, what is allowed."""

from __future__ import annotations

import math

# marks of text fields (dataclasses.field's metadata), which experiments/free_text.py reads
PATH = {"text": "path"}
PROSE = {"text": "prose"}


def require(holds: bool, message: str) -> None:
    """Raise a ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)


def at_least(key: str, value: float | None, low: float) -> None:
    """A number that is set must be finite and not below `low`."""
    if value is not None:
        require(math.isfinite(value) and value >= low, f"{key}={value}: must be at least {low}")


def above(key: str, value: float | None, low: float) -> None:
    """A number that is set must be finite and above `low`."""
    if value is not None:
        require(math.isfinite(value) and value > low, f"{key}={value}: must be greater than {low}")


def fraction(key: str, value: float) -> None:
    """A number in [0, 1)."""
    require(0.0 <= value < 1.0, f"{key}={value}: must be at least 0 and below 1")


def share_of_all(key: str, value: float | None) -> None:
    """A number that is set must be in (0, 1]."""
    if value is not None:
        require(0.0 < value <= 1.0, f"{key}={value}: must be above 0 and at most 1")
