"""What modules need to know of mixed precision: which dtype their matrix products will run in."""

from __future__ import annotations

import torch
from torch import Tensor


def cast_once(x: Tensor) -> Tensor:
    """x in autocast's dtype, where that is on.

    Each projection that reads x would cast it again, and keep a copy of its own for backward.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
