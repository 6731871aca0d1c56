"""ZeRO stage 1 by hand: the optimizer's state, and the work of the update, are shared out.

AdamW keeps two numbers for each weight: twice the memory of the weights, the same on all ranks of
DDP. Here each rank updates 1/n of the weights only, keeps the state of those only, and hands the
others what it made (Rajbhandari et al. 2020, ZeRO, section 5.1).

AdamW and SGD treat each number alone, so it does not matter where one tensor ends and the next
begins: the weights are laid end to end in one flat tensor and cut in n even shares.

Bytes a step: DDP's all_reduce of the gradients, 4 P, and an all_gather of the updated weights, 4 P
padded to a multiple of n (once for those that decay, once for the others). The all_reduce gives a
rank more than it needs: a reduce_scatter would do, and DDP's 4 P be halved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minigpt.config import OptimizerConfig
from minigpt.optimizer import recipe
from parallel.by_hand.primitives import all_gather


def sharded_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    group: dist.ProcessGroup,
) -> torch.optim.Optimizer:
    """minigpt's optimizer over this rank's share of the weights, which become views of flat ones.

    The gradients must be averaged over `group` already.
    """
    kind, groups, settings = recipe(named_parameters, config)
    flats = [Flat(of_group["params"], group) for of_group in groups]
    # "flat" is for parallel/moments.py: optimizers keep what they do not know in a group
    shares = [{**g, "params": [f.share], "flat": f} for g, f in zip(groups, flats, strict=True)]
    optimizer = kind(shares, **settings)

    def before(*_: object) -> None:
        for flat in flats:
            flat.take_gradient()

    def after(*_: object) -> None:
        for flat in flats:
            flat.publish()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


class Flat:
    """Weights laid end to end, and the share of them that this rank updates."""

    def __init__(self, weights: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.weights, self.group = weights, group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        total = sum(weight.numel() for weight in weights)
        size = -(-total // ranks)  # of a share; the last one is padded
        self.whole = weights[0].new_zeros(ranks * size)
        offset = 0
        self.mine: list[tuple[nn.Parameter, slice]] = []  # the parts of weights in this share
        for weight in weights:
            place = self.whole[offset : offset + weight.numel()].view_as(weight)
            place.copy_(weight.data)
            weight.data = place  # the model reads the flat tensor from now on
            start = max(0, rank * size - offset)
            end = min(weight.numel(), (rank + 1) * size - offset)
            if start < end:
                self.mine.append((weight, slice(start, end)))
            offset += weight.numel()
        # a view: what the optimizer writes is in the whole at once
        self.share = nn.Parameter(self.whole[rank * size : (rank + 1) * size])

    @torch.no_grad()
    def take_gradient(self) -> None:
        """Before the update: this share's piece of the gradients."""
        gradient = torch.zeros_like(self.share)
        offset = 0
        for weight, part in self.mine:
            size = part.stop - part.start
            if weight.grad is not None:
                gradient[offset : offset + size] = weight.grad.flatten()[part]
            offset += size
        self.share.grad = gradient

    @torch.no_grad()
    def publish(self) -> None:
        """After the update: everyone's share to everyone, in place."""
        self.share.grad = None
        all_gather(self.whole, self.share.data, group=self.group)

    def apart(self, kept: dict[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """What the optimizer keeps for the shares, whole and by weight; all ranks call it."""
        moments: dict[Tensor, dict[str, Tensor]] = {weight: {} for weight in self.weights}
        for key, value in kept.items():
            whole = value
            if value.ndim:
                whole = torch.empty_like(self.whole)
                all_gather(whole, value, group=self.group)
            offset = 0
            for weight in self.weights:
                part = (
                    whole[offset : offset + weight.numel()].view_as(weight) if value.ndim else whole
                )
                moments[weight][key] = part
                offset += weight.numel()
        return moments

    def joined(self, moments: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The way back: this rank's share of them."""
        kept: dict[str, Tensor] = {}
        for key, value in moments[self.weights[0]].items():
            if value.ndim == 0:
                kept[key] = value.clone()
                continue
            kept[key], offset = torch.zeros_like(self.share), 0
            for weight, part in self.mine:
                size = part.stop - part.start
                kept[key][offset : offset + size] = moments[weight][key].flatten()[part]
                offset += size
        return kept
