"""Closed forms of what LoRA leaves of a step's costs (Hu et al. 2021), where only data axes cut.

P is the number of frozen weights (R in no block, W in blocks), A of the adapters' numbers, n the
ranks that shard. Weights, gradients and AdamW's two moments have 4 bytes a number here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from minigpt.config import ModelConfig
from minigpt.finetune import FinetuneConfig
from parallel.layout import MESH_AXES, GradientSync, Layout, Options, Precision, weights_axes
from simulator.flops import model_flops_per_token as of_full_training

Key = tuple[str, str, str]  # collective, axis, dtype


def padded_numbers(shapes: Iterable[tuple[int, ...]], n: int = 1) -> int:
    """How many there are in weights of these shapes once fully_shard has padded the first dimension
    of each to a multiple of n."""
    return sum(-(-shape[0] // n) * n * math.prod(shape[1:]) for shape in shapes)


def unknown(layout: Layout, options: Options) -> str | None:
    """Why there is no closed form of the messages; None where there is one."""
    if layout.pp > 1 or layout.cp > 1:
        return f"finetune=lora: no closed form for {layout.label}; it has one for the data axes"
    if options.zero_stage == 1 and layout.dp_shard > 1:
        return "finetune=lora: no closed form for zero_stage=1"
    if options.precision != Precision.fp32:
        return f"finetune=lora: no closed form for precision={options.precision.value}"
    return None


def messages(
    model: ModelConfig, layout: Layout, options: Options, clipped: bool
) -> dict[Key, tuple[int, str]]:
    """Payload of one step of a rank, where nothing is `unknown`, and the formula that it follows.

    ddp   all_reduce of the adapters' gradients: 4 A, not 4 (P + A)
    fsdp  all_gather of all weights, frozen or not, m times forward and, of the blocks, m times
          backward; reduce_scatter of the adapters' gradients: 4 A, or 4 m A (gradient_sync)
    hsdp  and an all_reduce of the scattered ones between the replicas
    """
    axes, m = weights_axes(layout), options.micro_batches
    (replicas, copies), (shards, n) = axes["replicate"], axes["shard"]
    adapters = model.n_layer * padded_numbers(options.finetune.shapes(model).values(), n)
    sent: dict[Key, tuple[int, str]] = {}

    def add(collective: str, axis: str, payload: int, formula: str, dtype: str = "float32") -> None:
        before, said = sent.get((collective, axis, dtype), (0, ""))
        sent[collective, axis, dtype] = before + payload, f"{said} + {formula}".removeprefix(" + ")

    if copies > 1:
        add("all_reduce", replicas, 4 * adapters // n, "4 adapters" + f" / {n}" * (n > 1))
    if n > 1:
        blocks = adapters + model.n_layer * padded_numbers(model.block_shapes.values(), n)
        outer = padded_numbers(model.outer_shapes.values(), n)
        times = 2 if options.zero_stage == 3 else 1
        gathered = 4 * m * (times * blocks + outer)
        add("all_gather", shards, gathered, f"4 m (R + {times} (W + adapters))")
        each = options.gradient_sync == GradientSync.micro_batch
        scattered = 4 * adapters * (m if each else 1)
        add("reduce_scatter", shards, scattered, "4 m adapters" if each else "4 adapters")
        if clipped:
            add("all_reduce", shards, 4, "norm 4")
    if layout.world_size > 1:
        sizes = zip(MESH_AXES, layout.sizes, strict=True)
        world = "*".join(axis for axis, size in sizes if size > 1)
        add("all_reduce", world, 16, "loss and count 16", "float64")
    return sent


def gradient_bytes(model: ModelConfig, finetune: FinetuneConfig, n: int = 1) -> int:
    """Of one rank, of n that shard: 4 A."""
    return 4 * model.n_layer * padded_numbers(finetune.shapes(model).values(), n) // n


def optimizer_bytes(model: ModelConfig, finetune: FinetuneConfig, n: int = 1) -> int:
    """The same of AdamW: two moments a number, and a count of steps (4 bytes) a tensor."""
    shapes = finetune.shapes(model)
    return 2 * gradient_bytes(model, finetune, n) + 4 * model.n_layer * len(shapes)


def model_flops_per_token(model: ModelConfig, finetune: FinetuneConfig, seq_len: int) -> int:
    """4 P + 6 A + 12 L D T: a frozen weight has a forward and the gradient of its input, and none
    of its own; N of simulator.flops.model_flops counts 6. P: weights that a token is multiplied
    with."""
    attention = 12 * model.n_layer * model.d_model * seq_len
    frozen = (of_full_training(model, seq_len) - attention) // 6
    return 4 * frozen + 6 * finetune.adapters(model) + attention
