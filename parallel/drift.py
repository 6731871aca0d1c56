"""Do ranks that hold copies of a weight still hold the same? By checksums, every few steps.

A copy that learns alone shows on no rank's loss (nanotron compares its copies before and after each
step for that reason).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.gradients import axes_that_cut, local
from parallel.replica import Replica

AT_ONCE = 2**20  # elements: the sum needs sixteen bytes for each
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Drifted(RuntimeError):
    """Weights that should be copies of one another are not; the message names them."""


class Piece(NamedTuple):
    """A part of a weight, which several ranks may hold."""

    name: str
    place: tuple[int, ...]  # on each axis that cuts it


def pieces(replica: Replica) -> Iterator[tuple[Piece, Tensor]]:
    """What this rank holds of each weight. A tied head on another stage is its embedding."""
    for name, parameter in replica.named_parameters():
        yield Piece(replica.stored_name(name), _place(parameter)), local(parameter.detach())


def _place(parameter: Tensor) -> tuple[int, ...]:
    if not isinstance(parameter, DTensor):
        return ()
    return tuple(parameter.device_mesh.get_local_rank(i) for i in axes_that_cut(parameter))


def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 that another tensor has by chance only: once in 2^64.

    The sum of all elements' bits, each times an odd number of its own, modulo 2^64: no change of a
    single element leaves it as it was.
    """
    bits = tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), AT_ONCE):
        part = bits[start : start + AT_ONCE].to(torch.int64)
        odd = torch.arange(start, start + len(part), device=tensor.device) * 2 + 1
        total += (part * odd).sum()
    return total


@torch.no_grad()
def check_copies(replica: Replica) -> None:
    """Raise Drifted, alike on all ranks, unless all copies of each weight are equal to the bit.

    Every rank must call it.
    """
    if replica.mesh.axes_mesh is None:
        return
    held = list(pieces(replica))
    sums = torch.stack([checksum(tensor) for _, tensor in held]).tolist()
    mine = [(*piece, number) for (piece, _), number in zip(held, sums, strict=True)]
    ranks: dict[Piece, dict[int, list[int]]] = {}
    for rank, theirs in enumerate(replica.mesh.from_all(mine)):
        for name, place, number in theirs:
            ranks.setdefault(Piece(name, place), {}).setdefault(number, []).append(rank)
    apart = {piece: list(holders.values()) for piece, holders in ranks.items() if len(holders) > 1}
    if apart:
        raise Drifted(_said(apart))


def _said(apart: dict[Piece, list[list[int]]]) -> str:
    """The first weight that differs, and which ranks are alone with their copy of it."""
    piece, holders = next(iter(apart.items()))
    fewest, *_, most = sorted(holders, key=lambda ranks: (len(ranks), -ranks[0]))
    more = f", and {len(apart) - 1} more" if len(apart) > 1 else ""
    return (
        f"rank {', '.join(map(str, fewest))} has another {piece.name} than rank "
        f"{', '.join(map(str, most))}{more}: the copies have drifted apart"
    )
