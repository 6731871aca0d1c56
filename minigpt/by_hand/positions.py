"""How a token learns where it stands: sinusoids added to it, or its queries and keys turned.

Shapes: T positions, D width, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """(T, D): sines in even columns, cosines in odd ones (Vaswani et al. 2017, section 3.5).

    Wavelengths grow from 2 pi to 10000 x 2 pi. A shift by k is a rotation of each pair, so a linear
    map can find "k places back".
    """
    angles = _angles(positions, width, 10000.0)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (T, H), of the angle of each pair at each position (Su et al. 2021)."""
    angles = _angles(positions, head_dim, theta)
    angles = torch.cat((angles, angles), dim=-1)  # the halves of a head are the pairs, as in Llama
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x (B, N, T, H) by its position's angle.

    q at position m and k at position n meet in q^T R(n - m) k: only their distance counts.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    """(T, width / 2): position times frequency, a geometric row from 1 down to about 1 / base."""
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    return positions.float()[:, None] * base ** (-pairs / width)
