"""ZeRO stage 1: DDP, but each rank updates only its part of the weights and keeps its moments only.

Bytes a step: DDP's all_reduce of the gradients, and a broadcast of each updated weight from the
rank that owns it: 4 P more (Rajbhandari et al. 2020, ZeRO, section 5.1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from minigpt.config import OptimizerConfig
from minigpt.optimizer import recipe

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer


def sharded_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    group: dist.ProcessGroup,
) -> ZeroRedundancyOptimizer:
    """minigpt's optimizer, its state spread over `group` by whole tensors."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # half a second, for this alone

    kind, groups, settings = recipe(named_parameters, config)
    return ZeroRedundancyOptimizer(groups, optimizer_class=kind, process_group=group, **settings)
