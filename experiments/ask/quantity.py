"""A number with its tag: where it is from, which run or source holds it, and how it is shown.

A number that is made of others keeps their runs, and is as good as the weakest of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from experiments.console import human_bytes, human_seconds

# the tags, the strongest first
MEASURED, TRACED, PUBLISHED, FORMULA = SOURCES = ("measured", "traced", "published", "formula")
HOUR = 3600.0
TIMES, SHARE, COUNT = "times", "share", ""  # units of what has none
SIGNS: dict[str, Callable[[list[float]], float]] = {
    "+": math.fsum,
    "-": lambda values: values[0] - values[1],
    "/": lambda values: values[0] / values[1],
    "mean": lambda values: math.fsum(values) / len(values),
}


@dataclass(frozen=True)
class Quantity:
    """One number in base units (B, s, FLOP, tokens and what is made of them).

    `run` is the run folder, the command or the publication that holds it, `where` the place in the
    ledger. A number that follows from others has them as `parts`, and `sign` says how.
    """

    label: str
    value: float
    unit: str
    source: str
    run: str
    where: str = ""
    sign: str = ""  # of SIGNS
    parts: tuple[Quantity, ...] = ()

    def __post_init__(self) -> None:
        assert self.source in SOURCES, self.source

    def named(self, label: str) -> Quantity:
        return replace(self, label=label)

    def as_share(self) -> Quantity:
        """A ratio, shown in per cent."""
        assert self.unit == TIMES, self.unit
        return replace(self, unit=SHARE)

    @property
    def tag(self) -> str:
        """[m], [t], [p] or [f]."""
        return f"[{self.source[0]}]"

    @property
    def plain(self) -> str:
        """For a reader, without the tag."""
        return human(self.value, self.unit)

    def __str__(self) -> str:
        return f"{self.plain} {self.tag}"

    def __format__(self, how: str) -> str:
        """{q} with its tag, {q:plain} without."""
        return self.plain if how == "plain" else str(self)

    def __float__(self) -> float:
        return float(self.value)

    def __add__(self, other: Quantity) -> Quantity:
        return combined(f"{self.label} + {other.label}", "+", (self, other), self.unit)

    def __sub__(self, other: Quantity) -> Quantity:
        return combined(f"{self.label} - {other.label}", "-", (self, other), self.unit)

    def apart(self, other: Quantity) -> Quantity:
        """How far the two are from each other."""
        return self - other if self.value >= other.value else other - self

    def __truediv__(self, other: Quantity) -> Quantity:
        """A ratio, or a rate. Raises ZeroDivisionError."""
        unit = TIMES if self.unit == other.unit else f"{self.unit}/{other.unit}".rstrip("/")
        return combined(f"{self.label} / {other.label}", "/", (self, other), unit)

    def said(self) -> dict[str, Any]:
        """For --json."""
        return {
            "label": self.label,
            "value": self.value,
            "unit": self.unit,
            "source": self.source,
            "run": self.run,
            "where": self.where or self.sign,
            **({"parts": [part.said() for part in self.parts]} if self.parts else {}),
        }


def combined(label: str, sign: str, parts: tuple[Quantity, ...], unit: str) -> Quantity:
    """A number that follows from others by one of SIGNS."""
    assert sign == "/" or all(part.unit == unit for part in parts), f"{label}: units differ"
    runs = dict.fromkeys(run for part in parts for run in part.run.split("; "))
    weakest = max((part.source for part in parts), key=SOURCES.index)
    value = SIGNS[sign]([part.value for part in parts])
    return Quantity(label, value, unit, weakest, "; ".join(runs), "", sign, parts)


def total(label: str, parts: list[Quantity]) -> Quantity:
    """Their sum. There must be one at least."""
    return combined(label, "+", tuple(parts), parts[0].unit)


def mean(label: str, parts: list[Quantity]) -> Quantity:
    """Their mean. There must be one at least."""
    return combined(label, "mean", tuple(parts), parts[0].unit)


def formula(label: str, value: float, unit: str, run: str, where: str = "") -> Quantity:
    """A number of a closed form: `run` is the command that prints it, or the formula's source."""
    return Quantity(label, value, unit, FORMULA, run, where)


def published(label: str, value: float, unit: str, citation: str, where: str = "") -> Quantity:
    """A number that somebody else measured."""
    return Quantity(label, value, unit, PUBLISHED, citation, where)


def human(value: float, unit: str) -> str:
    """As a reader wants it: 3.67 MB, 12.3 ms, 41.2 %, 2.31 times, 1,024."""
    if unit == "B":
        return human_bytes(value)
    if unit == "s":
        if value >= 2 * HOUR:
            days, hours = value / HOUR / 24, value / HOUR
            return f"{days:,.1f} days" if days >= 2 else f"{hours:.1f} hours"
        return human_seconds(value)
    if unit == SHARE:
        return f"{100 * value:.1f} %"
    if unit == TIMES:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
        return f"{value:,.{digits}f} times"
    if unit in ("FLOP", "FLOP/s", "B/s", "FLOP/B"):
        return f"{_prefixed(value)}{unit}"
    if unit == "parameters" and value >= 1e6:
        size, word = (1e9, "billion") if value >= 1e9 else (1e6, "million")
        return f"{value / size:.3g} {word} parameters"
    if unit == "nats":
        return f"{value:.4f} nats" if value >= 0.001 else f"{value:.1e} nats"
    if unit == "$":
        return f"$ {value:,.0f}" if value >= 100 else f"$ {value:.3g}"
    text = f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def _prefixed(value: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or prefix == "P":
            return f"{value:.3g} {prefix}"
        value /= 1000
    raise AssertionError
