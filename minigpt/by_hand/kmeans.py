"""k-means: k centres such that points lie near theirs (Lloyd 1982).

Two steps in turn, neither of which can make the sum of squared distances larger: each point goes to
the nearest centre, each centre to the mean of its points. When no point moves, it is done; how good
that is depends on the start, so the first centres are drawn far apart (Arthur 2007, k-means++).

Shapes: P points, D dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Clusters(NamedTuple):
    centres: Tensor  # (k, D)
    nearest: Tensor  # (P,) int64: each point's centre
    costs: list[float]  # sum of squared distances after each round


def kmeans(points: Tensor, k: int, seed: int = 0, rounds: int = 100) -> Clusters:
    """Cluster points (P, D) around k centres, in `rounds` rounds at most."""
    centres, costs = spread_out(points, k, seed), []
    nearest = torch.full((len(points),), -1)
    for _ in range(rounds):
        before = nearest
        distances, nearest = squared_distances(points, centres).min(1)
        costs.append(float(distances.sum()))
        if torch.equal(nearest, before):
            break
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = nearest.bincount(minlength=k)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)  # empty ones stay
    return Clusters(centres, nearest, costs)


def spread_out(points: Tensor, k: int, seed: int) -> Tensor:
    """k of the points, each drawn by its squared distance to the nearest one drawn before."""
    stream = torch.Generator().manual_seed(seed)
    drawn = [int(torch.randint(len(points), (), generator=stream))]
    while len(drawn) < k:
        chances = squared_distances(points, points[drawn]).amin(1)
        if not chances.any():  # fewer different points than centres
            chances = torch.ones_like(chances)
        drawn.append(int(torch.multinomial(chances, 1, generator=stream)))
    return points[drawn]


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """(P, k)."""
    return (points[:, None] - centres[None]).square().sum(-1)
