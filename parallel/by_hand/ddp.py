"""DDP by hand: average the gradients of all ranks while backward is still computing others.

Every rank holds the whole model and reads its own share of the batch. The mean of the ranks'
gradients is the gradient of the whole batch, so that all ranks make the same update and their
weights stay equal without ever being sent.

One all_reduce a parameter would pay the network's latency each time, one for all of them could
start only when backward is over. So gradients are put in buckets, in the order in which backward
makes them: the last layer's first (Li et al. 2020, PyTorch Distributed, section 3.2).

Bytes a step, P parameters in fp32: all_reduce 4 P. A ring sends 2 (n-1)/n of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh

BUCKET_BYTES = 25 * 2**20  # Li et al. 2020, section 5.3: where latency and overlap are both good


def apply_ddp(
    model: nn.Module, mesh: DeviceMesh, device: torch.device
) -> tuple[nn.Module, Callable[[bool], None]]:
    """Average `model`'s gradients over a mesh; its weights must be filled, and equal on all ranks.

    Returns the module to call, and a switch that says whether the next backward averages.
    """
    reducer = Reducer(model.parameters(), mesh.get_group())
    return model, reducer.switch


class Bucket:
    """Gradients that lie side by side in one buffer, so that one message takes them all."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), device=parameters[0].device)
        pieces = zip(self.flat.split(sizes), parameters, strict=True)
        self.views = [piece.view_as(parameter) for piece, parameter in pieces]
        self.missing = len(parameters)


class Reducer:
    """Counts the gradients that backward has made, and sends each bucket once it is full."""

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.group, self.ranks, self.on = group, dist.get_world_size(group), True
        self.buckets: list[Bucket] = []
        self.on_the_way: list[dist.Work] = []
        self.finish_is_queued = False
        for filling in in_buckets(parameters, BUCKET_BYTES):
            bucket = Bucket(filling)
            self.buckets.append(bucket)
            for parameter, view in zip(filling, bucket.views, strict=True):
                arrived = partial(self.arrived, bucket, view)
                parameter.register_post_accumulate_grad_hook(arrived)

    def switch(self, on: bool) -> None:
        """Off while micro-batches accumulate: the sum is averaged once, with the last of them."""
        self.on = on

    def arrived(self, bucket: Bucket, view: Tensor, parameter: Tensor) -> None:
        """`parameter.grad` is complete. Autograd calls this in the middle of backward."""
        assert parameter.grad is not None
        if parameter.grad is not view:  # from now on it lives in the bucket, and only there
            view.copy_(parameter.grad)
            parameter.grad = view
        if not self.on:
            return
        if not self.finish_is_queued:
            Variable._execution_engine.queue_callback(self.finish)  # when this backward is over
            self.finish_is_queued = True
        bucket.missing -= 1
        if bucket.missing == 0:
            # All ranks compute the same graph, so buckets fill, and messages go, in one order.
            bucket.flat /= self.ranks
            work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
            assert work is not None
            self.on_the_way.append(work)

    def finish(self) -> None:
        """Wait for what is still on the way: nobody may read a gradient before."""
        for work in self.on_the_way:
            work.wait()
        full = len(self.on_the_way) == len(self.buckets)
        self.on_the_way.clear()
        self.finish_is_queued = False
        for bucket in self.buckets:
            bucket.missing = len(bucket.views)
        if not full:
            raise RuntimeError("a parameter took no part in the loss, so its bucket was never sent")


def in_buckets(parameters: Iterable[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """The parameters in reverse, cut where a bucket of `limit` bytes is full.

    In reverse, for the last layer's gradients are the first that backward makes.
    """
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(list(parameters)):
        size = parameter.numel() * parameter.element_size()
        if size > room or not buckets:
            buckets.append([])
            room = limit
        buckets[-1].append(parameter)
        room -= size
    return buckets
