"""Which next tokens may be drawn: the k likeliest, or the fewest that hold a share p.

Both give logits (V,) with -inf, probability 0, for the rest, so that they can follow each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k likeliest of V, equals of the k-th too (Fan et al. 2018)."""
    if k >= logits.numel():
        return logits
    least = logits.topk(k).values[-1]
    return logits.masked_fill(logits < least, -math.inf)


def keep_nucleus(logits: Tensor, p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probabilities reach p (Holtzman et al. 2020).

    Few where the model is sure, many where it is not: a fixed k is too large there or too small.
    """
    ordered, places = logits.sort(descending=True, stable=True)
    share = ordered.softmax(-1)
    before = share.cumsum(-1) - share  # what the likelier ones hold already
    kept = (before < p).scatter(0, places, before < p)
    kept[places[0]] = True  # one at least, whatever rounding says
    return logits.masked_fill(~kept, -math.inf)


def draw(logits: Tensor, stream: torch.Generator) -> int:
    """One id by its probability: where a uniform number falls among the cumulated ones."""
    cumulated = logits.softmax(-1).double().cumsum(-1)
    u = torch.rand((), generator=stream, device=logits.device, dtype=torch.float64)
    # right: an id of probability 0 ends where the one before it ends, and is never hit
    at = torch.searchsorted(cumulated, (u * cumulated[-1])[None], right=True)
    return int(at)
