"""Pipeline parallelism by hand: the depth is cut into stages, one a rank, in the order 1F1B.

Rank r of p runs p-1-r micro-batches forward to fill the pipeline, then one forward and one backward
in turn, then the backwards that are left (Narayanan et al. 2021, Megatron-LM, section 2.2). With
p = 3 and m = 4 micro-batches 0 1 2 3, whose backwards a b c d take twice as long:

    rank 0   0 1 2 . . . . a a 3 b b . c c . d d
    rank 1   . 0 1 . . a a 2 b b 3 c c . d d . .
    rank 2   . . 0 a a 1 b b 2 c c 3 d d . . . .

All forwards first (GPipe) waits as long, (p-1)/(m+p-1) of the time, but keeps the activations of m
micro-batches; 1F1B keeps those of p-r at most, for each backward frees one before the next forward.

Bytes a step, at each boundary between stages: m activations of B T D numbers forward, m gradients
of as many back. A tied head is there twice: an all_reduce of V D adds both gradients up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from minigpt.model import GPT
from parallel.layout import Options
from parallel.mesh import Mesh
from parallel.passes import Context, Marks, MicroBatch, Passes, loss_and_count
from parallel.pipeline import TiedHead


class Pipeline(Passes):
    """This rank's stage, and what it does when."""

    def __init__(
        self,
        stages: dict[int, GPT],
        mesh: Mesh,
        options: Options,
        activation: tuple[torch.dtype, tuple[int, ...]],
        autocast: Context,
        loss_context: Context,
    ) -> None:
        """`activation`: dtype and shape of what one stage sends to the next."""
        ((self.rank, self.stage),) = stages.items()
        self.ranks, self.group = mesh.layout.pp, mesh.group("pp")
        (self.dtype, self.shape), self.device = activation, mesh.device
        self.first, self.last = self.rank == 0, self.rank == self.ranks - 1
        self.tied = TiedHead(stages, mesh, last_rank=self.ranks - 1)
        # inputs and outputs of micro-batches that went forward and not yet back, oldest first
        self.in_flight: deque[tuple[Tensor, Tensor]] = deque()

    def train(self, micro_batches: Sequence[MicroBatch], factor: float, marks: Marks) -> Tensor:
        waiting = deque(micro_batches)
        totals = torch.zeros(2, dtype=torch.float64, device=waiting[0][0].device)
        before, after = self.rank - 1, self.rank + 1

        ahead, back = count(), count()  # numbers of micro-batches

        def forward(x: Tensor | None) -> Tensor:
            with marks.action("forward", self.rank, next(ahead)):
                return self.forward(x, *waiting.popleft(), factor, totals)

        def backward(gradient: Tensor | None) -> Tensor | None:
            with marks.action("backward", self.rank, next(back)):
                return self.backward(gradient)

        warm_up = min(self.ranks - 1 - self.rank, len(micro_batches))
        for _ in range(warm_up):
            x = self.swap(before, take=True)
            self.swap(after, give=forward(x))

        steady = len(micro_batches) - warm_up
        x = self.swap(before, take=True) if steady else None
        for i in range(steady):
            y = forward(x)
            gradient = self.swap(after, give=y, take=True)
            x = self.swap(before, give=backward(gradient), take=i < steady - 1)

        for _ in range(warm_up):
            gradient = self.swap(after, take=True)
            self.swap(before, give=backward(gradient))

        self.tied.add_gradients()
        return totals

    def forward(
        self, x: Tensor | None, inputs: Tensor, targets: Tensor, factor: float, totals: Tensor
    ) -> Tensor:
        """One micro-batch through this stage: activations, or the loss behind the last one."""
        x = inputs if x is None else x
        y = self.stage(x)
        if self.last:
            loss, tokens = loss_and_count(y, targets)
            totals += torch.stack((loss.detach().double(), tokens.double()))
            y = loss * factor
        self.in_flight.append((x, y))
        return y

    def backward(self, gradient: Tensor | None) -> Tensor | None:
        """The oldest micro-batch back through this stage: from the gradient of what it gave to the
        gradient of what it took."""
        x, y = self.in_flight.popleft()
        torch.autograd.backward(y, gradient)
        return x.grad

    def swap(self, peer: int, give: Tensor | None = None, take: bool = False) -> Tensor | None:
        """Give a neighbour a tensor, take one from it, or both; nothing beyond the ends.

        Both at once, for while this rank sends forward the neighbour sends back: were each to wait
        until the other has taken what it sends, both would wait for ever.
        """
        if not 0 <= peer < self.ranks:
            return None
        taken, messages = None, []
        if give is not None:
            tensor = give.contiguous()
            messages.append(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer))
        if take:
            taken = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            # with an activation autograd's graph begins anew: the rest of it is on other ranks
            taken.requires_grad_(peer < self.rank and torch.is_grad_enabled())
            messages.append(dist.P2POp(dist.irecv, taken, group=self.group, group_peer=peer))
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        return taken

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One micro-batch through all stages, forward only."""
        totals = torch.zeros(2, dtype=torch.float64, device=inputs.device)
        x = self.swap(self.rank - 1, take=True)
        self.swap(self.rank + 1, give=self.forward(x, inputs, targets, 1.0, totals))
        self.in_flight.clear()
        return totals
