"""The small models whose training steps a machine is measured in. No torch."""

from __future__ import annotations

from typing import Any

from experiments.config import TrainConfig
from minigpt.config import FFN, ModelConfig, Norm, Positions

PATIENCE_S = 1800.0  # a busy machine may need minutes
GPT2 = {"norm": Norm.layernorm, "positions": Positions.learned, "ffn": FFN.gelu, "tied": True}
# name -> layers, width, sequence, sequences, micro-batches, and what else the model has
SHAPES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "small": (4, 128, 64, 12, 2, GPT2),
    "small, rotary": (4, 128, 128, 8, 1, {}),
    "wide": (2, 512, 256, 6, 1, GPT2),
}
WHOLE = "wide"  # whose step the closed form must give
SMALLEST = "small"


def config_of(name: str) -> TrainConfig:
    """The single process that each rank trains, of SHAPES."""
    layers, width, sequence, batch, micro_batches, others = SHAPES[name]
    model = ModelConfig(
        n_layer=layers, n_head=width // 64, d_model=width, context=sequence, **others
    )
    return TrainConfig(
        model=model,
        micro_batch_size=batch // micro_batches,
        gradient_accumulation_steps=micro_batches,
        seq_len=sequence,
        clip=1e-3,  # a bound that no gradient keeps: every step does the same
    )
