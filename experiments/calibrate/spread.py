"""One thing measured several times: the median, and between what the middle half of the times lies.

A Point is such a thing beside what the profile's curve says of it: what `./launch.sh calibrate`
draws and writes as a table.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median, and the first and third quartile."""

    middle: float
    low: float
    high: float

    def over(self, divisor: float) -> Spread:
        return Spread(self.middle / divisor, self.low / divisor, self.high / divisor)

    def rate(self, work: float) -> Spread:
        """Of work that took these seconds, per second: the quartiles change places."""
        return Spread(work / self.middle, work / self.high, work / self.low)

    def __str__(self) -> str:
        return f"{self.middle:.4g}, the middle half from {self.low:.3g} to {self.high:.3g}"


def spread_of(values: Sequence[float]) -> Spread:
    """Of one value or more; quartiles as numpy has them (statistics: inclusive)."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


@dataclass(frozen=True)
class Point:
    """One thing of one size, as measured and as the curve has it. Seconds."""

    kind: str  # product, memory, attention, message, operator
    name: str  # dtype, copy, level and collective, torch's operator
    ranks: int  # that took part
    size: float  # of a product the harmonic mean of its sides, else bytes
    work: float  # FLOPs or bytes
    seconds: Spread
    fitted: float

    @property
    def error(self) -> float:
        """Of the curve, signed."""
        return self.fitted / self.seconds.middle - 1
