"""A pipeline's stage that tells a meter what its schedule does with it, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from parallel.passes import Marks


class MarkedStage(PipelineStage):
    """torch's, whose schedules call these methods once a micro-batch. `marks` gives who listens."""

    def __init__(self, marks: Callable[[], Marks], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marks = marks

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.marks().action("forward", self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> Any:
        kind = "backward" if full_backward else "backward_input"
        with self.marks().action(kind, self.stage_index, bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.marks().action("backward_weight", self.stage_index, bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        messages = _of_activations(super().get_fwd_recv_ops(fwd_chunk_id))
        return self._named("recv_forward", fwd_chunk_id, messages)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        messages = _of_activations(super().get_fwd_send_ops(fwd_chunk_id))
        return self._named("send_forward", fwd_chunk_id, messages)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named("recv_backward", bwd_chunk_id, super().get_bwd_recv_ops(bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named("send_backward", bwd_chunk_id, super().get_bwd_send_ops(bwd_chunk_id))

    def _named(self, kind: str, micro_batch: int, messages: list[dist.P2POp]) -> list[dist.P2POp]:
        """Schedules issue sends, and recvs, in the order in which they ask for them."""
        for _ in messages:
            with self.marks().action(kind, self.stage_index, micro_batch):
                pass
        return messages


def _of_activations(messages: list[dist.P2POp]) -> list[dist.P2POp]:
    """Activations that travel require a gradient, both when they go and when they come: that is how
    a meter tells them from gradients (costs/phases.py)."""
    for message in messages:
        message.tensor.requires_grad_()
    return messages
