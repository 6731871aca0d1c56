"""fp8: the matrix products of the blocks in 8 bits, by torchao; all else is as in bf16.

Each product scales its two operands so that the largest number of either is fp8's largest
(Micikevicius et al. 2022, FP8 Formats for Deep Learning: e4m3 forward, e5m2 for gradients).
Weights, gradients and optimizer stay as they are, and so do embedding, norms, attention and head.
Needs the package torchao, and units for it; experiments/environment.py refuses what lacks them.
"""

from __future__ import annotations

from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training


def apply_float8(blocks: nn.ModuleDict, emulate: bool = False) -> None:
    """Put an fp8 layer in the place of every projection, in place; the blocks may be on the meta
    device, and parameters keep their names. `emulate`: round to fp8 and compute wide, as a device
    without units for it can."""
    convert_to_float8_training(blocks, config=Float8LinearConfig(emulate=emulate))
