"""Cross entropy of the next token, from logits: log(sum_j e^z_j) - z_target, in nats.

Shapes: R rows (tokens), V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -1  # a target that does not count


class CrossEntropy(torch.autograd.Function):
    """Logits (R, V) and targets (R,) to the sum of the losses, ().

    The log of a softmax is never taken: e^z underflows, log(0) is -inf. Kept: the logits, and one
    number a row. The probabilities, as large as the logits, are made in backward.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        largest = logits.amax(-1, keepdim=True)
        lse = largest + (logits - largest).exp().sum(-1, keepdim=True).log()  # log-sum-exp
        counts = (targets != IGNORE)[:, None]
        at = targets.clamp(min=0)[:, None]
        ctx.save_for_backward(logits, lse, at, counts)
        return ((lse - logits.gather(1, at)) * counts).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        """dz = softmax(z) - onehot(target): what the model says, less what was so."""
        logits, lse, at, counts = ctx.saved_tensors
        dz = (logits - lse).exp()
        dz.scatter_add_(1, at, dz.new_full(at.shape, -1.0))
        return dz.mul_(counts * dloss), None


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses (fp32) of the targets that count, and how many count.

    Logits (B, T, V), targets (B, T). A sum and a count, never a mean: means of parts with different
    counts must not be averaged.
    """
    flat = targets.flatten()
    return CrossEntropy.apply(logits.flatten(0, 1).float(), flat), (flat != IGNORE).sum()
