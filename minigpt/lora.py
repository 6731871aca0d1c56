"""LoRA: projections that are frozen, and beside each a product of two thin matrices that learns.

    y = x W^T + (alpha / r) (x A^T) B^T         A: (r, in), B: (out, r)

B starts at zero, so that a run starts from the model that it was given (Hu et al. 2021, section
4.1). Afterwards W + (alpha / r) B A is one matrix again, and costs nothing more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.finetune import FinetuneConfig

A, B = ".lora_a", ".lora_b"


def is_adapter(name: str) -> bool:
    """Whether a parameter is one, by its name."""
    return name.endswith((A, B))


class LoRALinear(nn.Linear):
    """A frozen projection with its adapter. Its weight keeps its name."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        """Shapes, device and dtype of `base`; the numbers come later, as those of every module."""
        has_bias, like = base.bias is not None, base.weight
        super().__init__(
            base.in_features, base.out_features, has_bias, device=like.device, dtype=like.dtype
        )
        self.scale = scale
        self.lora_a = nn.Parameter(like.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(like.new_empty(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        thin = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return super().forward(x) + self.scale * thin


def apply_lora(model: nn.Module, blocks: nn.ModuleDict, config: FinetuneConfig) -> None:
    """Freeze `model`, which may be a stage and on the meta device, and give its blocks adapters."""
    model.requires_grad_(False)
    for block in blocks.values():
        for path, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and path in config.paths:
                owner, _, name = path.rpartition(".")
                adapted = LoRALinear(module, config.rank, config.scale)
                adapted.weight.requires_grad_(False)
                if adapted.bias is not None:
                    adapted.bias.requires_grad_(False)
                setattr(block.get_submodule(owner), name, adapted)


@torch.no_grad()
def merged(weights: dict[str, Tensor], config: FinetuneConfig) -> dict[str, Tensor]:
    """The weights of a plain model that computes the same: W + (alpha / r) B A for each adapter.

    `weights` are whole and on one device; the result shares those that have no adapter.
    """
    plain = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    for name in (name for name in weights if name.endswith(A)):
        base = name.removesuffix(A)
        product = weights[base + B] @ weights[name]
        plain[f"{base}.weight"] = plain[f"{base}.weight"] + config.scale * product
    return plain
