"""What one rank of a layout holds in one optimiser step: its stages, the shapes of its weights.

No torch: shapes come from minigpt.config, and which rank has which from parallel.layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from minigpt.config import ModelConfig
from parallel.layout import Layout, Options, Precision
from parallel.stages import split_layers

ITEM_BYTES = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp16: 2}
DTYPE_NAMES = {
    Precision.fp32: "float32",
    Precision.bf16: "bfloat16",
    Precision.fp16: "float16",
}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """One optimiser step of one rank. Must be a plan that parallel.rules lets pass."""

    model: ModelConfig
    layout: Layout
    options: Options
    clipped: bool = True  # a gradient norm is taken
    pp_rank: int = 0

    @property
    def stages(self) -> list[int]:
        """The stages of this rank."""
        pipeline = self.options.pipeline
        return pipeline.stages_of(self.pp_rank, self.layout.pp) if self.layout.pp > 1 else [0]

    @property
    def stage_count(self) -> int:
        return self.layout.pp * self.options.pipeline.local_stages if self.layout.pp > 1 else 1

    def blocks(self, stage: int) -> int:
        """Blocks of a stage."""
        given = self.options.pipeline.split
        split = given or split_layers(self.model, self.stage_count, self.options.seq_len)
        return split[stage]

    def outer(self, stage: int) -> Shapes:
        """Shapes of what a stage has besides blocks, cut by tp. A tied head on another stage than
        its embedding is a weight of its own."""
        first, last = stage == 0, stage == self.stage_count - 1
        shapes = dict(self.model.outer_shapes)
        if self.model.tied and not (first and last):
            shapes["head.weight"] = shapes["embedding.weight"]
        front = ("embedding.weight", "positions.weight")
        return self.cut({n: s for n, s in shapes.items() if (first if n in front else last)})

    @property
    def block(self) -> Shapes:
        """Shapes of a block without experts that ep has spread, cut by tp."""
        shapes = self.model.block_shapes
        return self.cut({n: s for n, s in shapes.items() if not self.is_spread(n)})

    @property
    def experts(self) -> Shapes:
        """Shapes of a block's experts that this rank has of those that ep has spread."""
        ep = self.layout.ep
        shapes = self.model.block_shapes
        return {n: (s[0] // ep, *s[1:]) for n, s in shapes.items() if self.is_spread(n)}

    def is_spread(self, name: str) -> bool:
        return self.layout.ep > 1 and ".experts." in name

    def cut(self, shapes: Shapes) -> Shapes:
        """What tp leaves of each: rows of most, columns of those that narrow, norms whole."""
        tp = self.layout.tp

        def part(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
            if tp == 1 or not is_cut(name):
                return shape
            if name.endswith(("out.weight", "down.weight")):
                return (shape[0], shape[1] // tp)
            return (shape[0] // tp, *shape[1:])

        return {name: part(name, shape) for name, shape in shapes.items()}

    @property
    def sharded(self) -> bool:
        return self.layout.dp_shard > 1 and self.options.zero_stage > 1

    @property
    def has_policy(self) -> bool:
        """Weights have a precision policy, and activations are low throughout; else autocast."""
        layout = self.layout
        replicated = layout.data_parallel * layout.cp > 1
        return self.sharded or (replicated and (layout.pp > 1 or layout.tp > 1 or layout.ep > 1))

    @property
    def low(self) -> tuple[str, int]:
        """Name and bytes of the dtype that matmuls run in."""
        return DTYPE_NAMES[self.options.precision], ITEM_BYTES[self.options.precision]

    @property
    def between(self) -> tuple[str, int]:
        """The same of what goes from block to block."""
        return self.low if self.has_policy else ("float32", 4)

    @property
    def activation(self) -> int:
        """Numbers of a micro-batch's activations on one rank, B T D."""
        o = self.options
        return o.micro_batch_size * o.seq_len // self.layout.cp * self.model.d_model


def is_cut(name: str) -> bool:
    """Whether tp cuts a parameter: not norms, positions, and the biases of what narrows."""
    whole = "norm" in name or "positions" in name
    return not whole and not name.endswith(("out.bias", "down.bias"))


def padded_size(shapes: Iterable[tuple[int, ...]], n: int) -> int:
    """Numbers in parameters of those shapes once fully_shard has cut them n ways.

    It cuts the first dimension, and pads it to a multiple of n.
    """
    return sum(math.ceil(shape[0] / n) * n * math.prod(shape[1:]) for shape in shapes)
