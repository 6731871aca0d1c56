"""Which phase of a step a message belongs to, told without asking the strategy that sends it.

The step says when it reads data and when it updates (Marks in parallel/passes.py). What it calls
forward_backward is told apart here:
- what autograd's engine calls is backward: DDP's reducer in C++, gradients, and what activation
  checkpointing computes again
- a pipeline's stages hand over activations, which autograd follows, and gradients, which it does
  not. In one batch of messages there may be both
- all else goes with the pass that began last: forward once the model is called, backward once the
  gradient of what it gave arrives. So gradients that are added up after backward, as a tied head's,
  are backward's
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BOTH = "forward_backward"  # as Marks calls it


class Phases:
    """Where this rank is in its step."""

    def __init__(self) -> None:
        self.said = "other"
        self.passing = "forward"

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Around what Marks calls a phase."""
        before, self.said, self.passing = self.said, name, "forward"
        try:
            yield
        finally:
            self.said = before

    def follow(self, stages: Iterable[nn.Module]) -> None:
        """Notice when one of these is called, and when its gradient comes."""
        for stage in stages:
            # in front of the hooks that gather its weights
            stage.register_forward_pre_hook(self._called, prepend=True)
            stage.register_forward_hook(self._gave)

    def of(self, collective: str, tensors: list[Tensor]) -> str:
        """The phase of a message that is sent now, one of costs.program.PHASES."""
        if self.said != BOTH:
            return self.said
        if torch._C._current_graph_task_id() != -1:  # this thread is inside a backward pass
            return "backward"
        # without grad mode: inside a function of autograd's own, as the ring of context parallelism
        if collective in ("send", "recv") and torch.is_grad_enabled():
            followed = any(tensor.requires_grad for tensor in tensors)
            return "forward" if followed else "backward"
        return self.passing

    def _called(self, *_: object) -> None:
        self.passing = "forward"

    def _gave(self, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._gradient_came)

    def _gradient_came(self, _gradient: Tensor) -> None:
        self.passing = "backward"
