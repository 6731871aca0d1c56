"""What a device reaches of its peaks: large products, small ones, heads of several widths."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator.hardware import DTYPES, NARROW, WIDE, Cluster, Efficiency
from simulator.plans import Array


def reached_flops(dtype: Array, cluster: Cluster) -> Array:
    """FLOP/s that large products reach, plan by plan, by the place of their dtype in DTYPES."""
    device, share = cluster.device, cluster.device.efficiency
    narrow = share.matmul if share.matmul_fp8 is None else share.matmul_fp8
    shares = {"fp8": narrow, "fp4": narrow}
    rates = [device.flops(name) * shares.get(name, share.matmul) for name in DTYPES]
    return np.choose(dtype.astype(int), [np.broadcast_to(r, dtype.shape) for r in rates])


def product_seconds(m: Array, k: Array, n: Array, peak: Array, half_size: Array | float) -> Array:
    """2 m k n flops at a rate that falls where a dimension is small (hardware.Efficiency)."""
    fill = 1 + half_size * (1 / m + 1 / k + 1 / n)
    return 2 * m * k * n / peak * fill


def narrower(share: Efficiency, width: Any) -> Array:
    """Attention's share for heads of `width`, over that for heads of WIDE. What a score takes grows
    by a line: its products with the width, and its exponential not at all."""
    given = np.nan if share.attention_narrow is None else share.attention_narrow
    narrow, wide = NARROW / given, WIDE / share.attention
    score = narrow + (wide - narrow) * (width - NARROW) / (WIDE - NARROW)
    return np.where(np.isnan(given), 1.0, width / score / share.attention)
