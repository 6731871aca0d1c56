"""Compares the copies of a weight on several ranks, by checksums, every few steps.

A copy that learns alone shows on no rank's loss (nanotron compares its copies before and after each
step for that reason). Before a checkpoint is written what the optimizer keeps is compared too: a
checkpoint holds one copy of each, and a run that goes on gives that one to all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.gradients import axes_that_cut, local
from parallel.moments import moments_of
from parallel.replica import Replica

AT_ONCE = 2**17  # words: their products fit into a cache
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


def moment_pieces(
    replica: Replica, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[Piece, Tensor]]:
    """Yield what this rank's optimizer keeps for each weight. All ranks call it."""
    moments = moments_of(optimizer)
    for name, parameter in replica.named_parameters():
        if name not in replica.copies:
            for key, value in moments.get(parameter, {}).items():
                yield Piece(f"{name} ({key})", _place(value)), local(value.detach())


def _place(parameter: Tensor) -> tuple[int, ...]:
    if not isinstance(parameter, DTensor):
        return ()
    return tuple(parameter.device_mesh.get_local_rank(i) for i in axes_that_cut(parameter))


def checksum(tensor: Tensor) -> Tensor:
    """A 0-d int64 that another tensor has by chance only: once in 2^64.

    The sum of all words of eight bytes, each times an odd number of its own, modulo 2^64: no change
    of a single word leaves it as it was. Elements that fill no word are words of their own.
    """
    flat = tensor.contiguous().view(-1)
    in_a_word = 8 // flat.element_size()
    if flat.storage_offset() % in_a_word:  # torch views whole words only where one may begin
        flat = flat.clone()
    rest = len(flat) % in_a_word
    words = flat[: len(flat) - rest].view(torch.int64)
    loose = flat[len(flat) - rest :].view(INTEGERS[flat.element_size()]).to(torch.int64)
    odd = torch.arange(AT_ONCE, device=flat.device) * 2 + 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part, first in ((words, 0), (loose, len(words))):
        for start in range(0, len(part), AT_ONCE):
            block = part[start : start + AT_ONCE]
            # the odd number of place i is 2 i + 1
            total += (block * odd[: len(block)]).sum() + block.sum() * (2 * (first + start))
    return total


@torch.no_grad()
def check_copies(replica: Replica, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise Drifted, alike on all ranks, unless all copies of each weight are equal to the bit.

    With `optimizer` what it keeps for each weight must be equal too. Every rank must call it.
    """
    if replica.mesh.axes_mesh is None:
        return
    held = list(pieces(replica))
    if optimizer is not None:
        held += moment_pieces(replica, optimizer)
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
