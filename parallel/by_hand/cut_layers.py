"""The layers of tensor parallelism: each rank has a part of the weight and computes with that."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from parallel.by_hand.primitives import shard
from parallel.gradients import local

Operator = Callable[[Tensor], Tensor]


class ColumnParallel(nn.Module):
    """Y_i = X A_i: a part of the outputs. In torch's (out, in) layout columns of A are rows."""

    def __init__(self, linear: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = shard(linear.weight, mesh, 0)
        self.bias = None if linear.bias is None else shard(linear.bias, mesh, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight), None if self.bias is None else local(self.bias))


class RowParallel(nn.Module):
    """Y = sum_i X_i B_i: a part of the inputs. `leave` adds up; the bias is added once, after it.

    `of_copy`: what a weight that is a copy on all ranks goes through.
    """

    def __init__(
        self, linear: nn.Linear, mesh: DeviceMesh, leave: Operator, of_copy: Operator
    ) -> None:
        super().__init__()
        self.weight, self.bias = shard(linear.weight, mesh, 1), linear.bias
        self.leave, self.of_copy = leave, of_copy

    def forward(self, x: Tensor) -> Tensor:
        y = self.leave(F.linear(x, local(self.weight)))
        return y if self.bias is None else y + self.of_copy(self.bias)


class VocabularyParallelEmbedding(nn.Module):
    """Each rank looks up the tokens that it has and gives zero for the others; `g` adds up."""

    def __init__(self, embedding: nn.Embedding, mesh: DeviceMesh, g: Operator) -> None:
        super().__init__()
        self.weight, self.g, self.rank = shard(embedding.weight, mesh, 0), g, mesh.get_local_rank()

    def forward(self, tokens: Tensor) -> Tensor:
        weight = local(self.weight)
        place, here = in_own_rows(tokens, len(weight), self.rank)
        return self.g(F.embedding(place, weight) * here[..., None])


def in_own_rows(ids: Tensor, rows: int, rank: int) -> tuple[Tensor, Tensor]:
    """Ids as rows of this rank's part, and whether they are there; row 0 where they are not."""
    place = ids - rank * rows
    here = (place >= 0) & (place < rows)
    return place.where(here, 0), here
