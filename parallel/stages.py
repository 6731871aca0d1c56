"""How the depth of a model is cut into stages. No torch: the simulator cuts it too."""

from __future__ import annotations

import math

from minigpt.config import FFN, ModelConfig


def split_layers(model: ModelConfig, stages: int, seq_len: int) -> list[int]:
    """Blocks of each stage, so that the costliest stage is as cheap as can be.

    Costs are flops of a token: the embedding adds its lookup to the first stage, the head its
    product to the last. Of the best splits it takes the one with most blocks in front: those ranks
    wait longest for their last gradient, and the head sits at the other end anyway.
    """
    if stages == 1:
        return [model.n_layer]
    block = flops_of_block(model, seq_len)
    first, last = float(model.d_model), 2.0 * model.vocab_size * model.d_model
    most = math.ceil(model.n_layer / stages) * block + first + last

    def longest(limit: float) -> list[int] | None:
        """Fill each stage up to `limit`, front first, leaving a block for each that follows."""
        left, split = model.n_layer, []
        for stage in range(stages):
            room = limit - (first if stage == 0 else 0.0) - (last if stage == stages - 1 else 0.0)
            after = stages - stage - 1
            count = min(int(room // block), left - after)
            if count < 1:
                return None
            split.append(count)
            left -= count
        return split if left == 0 else None

    limits = [n * block + extra for n in range(1, model.n_layer + 1) for extra in (0, first, last)]
    for limit in sorted({*limits, most}):
        split = longest(limit * (1 + 1e-9))
        if split:
            return split
    raise AssertionError(f"{model.n_layer} blocks do not fill {stages} stages")


def flops_of_block(model: ModelConfig, seq_len: int) -> float:
    """Forward flops of one token in one block: 2 a weight, and attention over seq_len keys."""
    d, kv = model.d_model, model.kv_heads * model.head_dim
    matrices = 2 if model.ffn == FFN.gelu else 3
    experts = model.experts_per_token if model.ffn == FFN.moe else 1
    weights = 2 * d * d + 2 * d * kv + experts * matrices * d * model.ff_dim
    return 2.0 * weights + 4.0 * seq_len * d
