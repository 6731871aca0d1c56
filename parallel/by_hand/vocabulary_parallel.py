"""The loss of logits that are cut along the vocabulary: rank i has V/n of them for each token.

Whole logits would be the largest tensor of a step, B T V numbers. But cross entropy needs three
numbers a token from each rank: its highest logit, its sum of exponentials, and the target's logit
where it is here (Shoeybi et al. 2019, Megatron-LM, section 3).

Bytes of a micro-batch, forward, in fp32: all_reduce 4 * 3 B T. Backward sends nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minigpt.model import IGNORE
from parallel.by_hand.cut_layers import in_own_rows


def vocabulary_parallel_loss(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """minigpt's token_loss of logits (B, T, V/n): the same sum and count on all ranks."""
    return CrossEntropy.apply(logits, targets, group), (targets != IGNORE).sum()


class CrossEntropy(torch.autograd.Function):
    """log(sum_v e^z_v) - z_target, summed over the targets that count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        place, here = in_own_rows(targets, logits.shape[-1], dist.get_rank(group))
        highest = logits.amax(-1)  # subtracted, so that no exponential overflows
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        logits = logits - highest[..., None]
        at_target = logits.gather(-1, place[..., None])[..., 0] * here
        probabilities = logits.exp_()
        totals = torch.stack((probabilities.sum(-1), at_target))
        dist.all_reduce(totals, group=group)
        probabilities /= totals[0][..., None]
        counts = targets != IGNORE
        ctx.save_for_backward(probabilities, place, here, counts)
        return ((totals[0].log() - totals[1]) * counts).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Probability, less one at the target. Each rank has its own part: nothing is sent."""
        probabilities, place, here, counts = ctx.saved_tensors
        grad = probabilities * (gradient * counts)[..., None]
        grad.scatter_add_(-1, place[..., None], -(gradient * here)[..., None])
        return grad, None, None
