"""What a user may set about what is trained: every weight, or adapters beside frozen ones.

Standard library only, as minigpt/config.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from minigpt.checks import above, at_least, require
from minigpt.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

# what `finetune.targets` may name -> the projections of a block that get an adapter
TARGETS = {
    "q": ("attention.q",),
    "k": ("attention.k",),
    "v": ("attention.v",),
    "out": ("attention.out",),
    "mlp": ("mlp.gate", "mlp.up", "mlp.down"),
}


class Method(str, Enum):
    none = "none"
    lora = "lora"


@dataclass
class FinetuneConfig:
    """LoRA (Hu et al. 2021): a projection W gets (alpha / rank) B A beside it, and only A, of
    `rank` rows, and B, of `rank` columns, are trained."""

    method: Method = Method.none
    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out"])

    def __post_init__(self) -> None:
        at_least("finetune.rank", self.rank, 1)
        above("finetune.alpha", self.alpha, 0)
        unknown = [name for name in self.targets if name not in TARGETS]
        require(
            bool(self.targets) and not unknown,
            f"finetune.targets=[{','.join(self.targets)}]: must be some of {', '.join(TARGETS)}",
        )

    @property
    def on(self) -> bool:
        return self.method == Method.lora

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank

    @property
    def paths(self) -> list[str]:
        """The projections that have an adapter, by their names within a block."""
        return [path for target in self.targets for path in TARGETS[target]]

    def shapes(self, model: ModelConfig) -> Shapes:
        """Shape of each adapter of one block, under its name within the block; none without LoRA.

        A projection of (out, in) gets A (rank, in) and B (out, rank).
        """
        shapes: Shapes = {}
        if not self.on:
            return shapes
        for name in self.paths:
            weight = model.block_shapes.get(f"{name}.weight")
            if weight:  # `gate` is not in every MLP
                shapes[f"{name}.lora_a"] = (self.rank, weight[1])
                shapes[f"{name}.lora_b"] = (weight[0], self.rank)
        return shapes

    def adapters(self, model: ModelConfig) -> int:
        """Numbers in all adapters: r (in + out) a projection."""
        return model.n_layer * sum(map(math.prod, self.shapes(model).values()))

    def trainable(self, model: ModelConfig) -> int:
        """Numbers that the optimizer sees."""
        return self.adapters(model) if self.on else model.parameters
