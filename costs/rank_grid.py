"""A group of ranks by its shape in the mesh, so that four million of them are a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

MOST_RANKS = 2**32  # of a group that is read
LISTED = 64  # ranks of a group that a file lists one by one; a larger group is written as its grid


@dataclass(frozen=True)
class RankGrid(Sequence[int]):
    """The ranks `first + sum(i * stride)` for all `i` below each axis' size, in ascending order.

    `axes` holds (size, stride) of each mesh axis, outermost first; axes of size 1 are dropped and
    contiguous ones are joined, so that equal groups are equal objects. Nothing is enumerated
    unless the grid is iterated.
    """

    first: int
    axes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        joined: list[tuple[int, int]] = []
        for size, stride in self.axes:
            if size == 1:
                continue
            if joined and joined[-1][1] == size * stride:
                joined[-1] = (joined[-1][0] * size, stride)
            else:
                joined.append((size, stride))
        object.__setattr__(self, "axes", tuple(joined))

    def __len__(self) -> int:
        return prod(size for size, _ in self.axes)

    def __getitem__(self, index: Any) -> Any:
        """Return the rank at `index`, or a tuple of ranks for a slice. Raises IndexError."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        place = range(len(self))[index]
        rank = self.first
        for size, stride in reversed(self.axes):
            place, i = divmod(place, size)
            rank += i * stride
        return rank

    def __contains__(self, rank: object) -> bool:
        if not isinstance(rank, int):
            return False
        left = rank - self.first
        for size, stride in self.axes:
            left -= min(max(left // stride, 0), size - 1) * stride
        return left == 0

    def __iter__(self) -> Iterator[int]:
        return _ranks(self.first, self.axes)

    def images(self, of: Callable[[int], int]) -> set[int]:
        """Return the values of a non-decreasing function at these ranks. It is asked only where
        it can change: alike at both ends of a stretch means alike in between."""
        return _images(of, self.first, self.axes)

    def to_json(self) -> Any:
        """Return what a file holds: the ranks of a small group, the grid of a large one."""
        if len(self) <= LISTED:
            return list(self)
        return {"first": self.first, "axes": [list(axis) for axis in self.axes]}


def ranks_from_json(value: Any) -> Sequence[int]:
    """Return the ranks that `to_json` wrote. Raises ValueError, TypeError or KeyError."""
    if isinstance(value, dict):
        axes = tuple((size, stride) for size, stride in value["axes"])
        numbers = [value["first"], *(number for axis in axes for number in axis)]
        right = all(type(number) is int and number >= 0 for number in numbers)
        if not right or prod(size for size, _ in axes) > MOST_RANKS:
            raise ValueError(f"ranks: no group of at most {MOST_RANKS:,}")
        return RankGrid(value["first"], axes)
    return tuple(value)


def _ranks(first: int, axes: tuple[tuple[int, int], ...]) -> Iterator[int]:
    if not axes:
        yield first
        return
    size, stride = axes[0]
    if len(axes) == 1:
        yield from range(first, first + size * stride, stride)
        return
    for i in range(size):
        yield from _ranks(first + i * stride, axes[1:])


def _images(of: Callable[[int], int], first: int, axes: tuple[tuple[int, int], ...]) -> set[int]:
    low = of(first)
    if of(first + sum((size - 1) * stride for size, stride in axes)) == low:
        return {low}
    size, stride = axes[0]
    return set().union(*(_images(of, first + i * stride, axes[1:]) for i in range(size)))
