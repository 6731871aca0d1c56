"""How a replica runs its micro-batches forward and backward, where it holds the whole depth.

The other way is parallel/pipeline.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minigpt.model import IGNORE, token_loss

MicroBatch = tuple[Tensor, Tensor]  # inputs (B, T) and targets (B, T), int64
Context = Callable[[], AbstractContextManager]


class Marks(Protocol):
    """What a meter wants to be told while a step runs."""

    def phase(self, name: str) -> AbstractContextManager: ...

    def backward(self, loss: Tensor) -> AbstractContextManager: ...

    def action(self, kind: str, stage: int, micro_batch: int) -> AbstractContextManager:
        """Around one micro-batch's way through one stage, of those that pp makes: forward, loss,
        backward, or its halves backward_input and backward_weight. send_forward and its like are
        over at once: they say to which micro-batch the next message belongs."""
        ...


class NoMarks:
    """Nobody listens."""

    def phase(self, name: str) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor) -> AbstractContextManager:
        return nullcontext()

    def action(self, kind: str, stage: int, micro_batch: int) -> AbstractContextManager:
        return nullcontext()


class Passes(Protocol):
    """Both return (sum of losses, count of valid tokens) of this rank, (2,) fp64."""

    def train(self, micro_batches: Sequence[MicroBatch], factor: float, marks: Marks) -> Tensor:
        """Add to .grad the gradient of `factor` times the sum of losses, averaged over the ranks
        that hold the same weights and see other tokens."""
        ...

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor: ...


Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_and_count(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """token_loss, as plain tensors: logits that tp cut along the vocabulary give a DTensor."""
    loss, count = token_loss(logits, targets)
    return (loss.full_tensor() if isinstance(loss, DTensor) else loss), count


def valid_tokens(targets: Tensor) -> Tensor:
    """How many targets count."""
    return (targets != IGNORE).sum()


@dataclass(frozen=True)
class OneByOne(Passes):
    """Each micro-batch forward, then backward."""

    call: nn.Module  # what to call in the model's place
    device: torch.device
    sync_gradients: Callable[[bool], None]  # thrown before the forward of each micro-batch
    autocast: Context  # around each forward
    loss_context: Context  # around loss and backward: how the loss is spread over ranks
    loss: Loss = loss_and_count

    def train(self, micro_batches: Sequence[MicroBatch], factor: float, marks: Marks) -> Tensor:
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for i, (inputs, targets) in enumerate(micro_batches):
            self.sync_gradients(i == len(micro_batches) - 1)
            with self.loss_context():
                with marks.action("forward", 0, i), self.autocast():
                    loss, count = self.loss(self.call(inputs), targets)
                totals += torch.stack((loss.detach().double(), count.double()))
                scaled = loss * factor
                with marks.action("backward", 0, i), marks.backward(scaled):
                    scaled.backward()
        return totals

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self.loss_context(), self.autocast():
            loss, count = self.loss(self.call(inputs), targets)
        return torch.stack((loss.double(), count.double()))
