"""How the depth of a model is cut into stages. No torch: the simulator cuts it too."""

from __future__ import annotations

from minigpt.config import FFN, ModelConfig


def split_layers(model: ModelConfig, stages: int, seq_len: int) -> list[int]:
    """Blocks of each stage: the costliest is as cheap as can be, and the others are as even.

    Costs are flops of a token: the embedding adds its lookup to the first stage, the head its
    product to the last. Each block goes to the stage that is cheapest so far, of equal ones to the
    first: those ranks wait longest for their last gradient. Every stage has one.
    """
    costs = [0.0] * stages
    costs[0] += model.d_model
    costs[-1] += 2.0 * model.vocab_rows * model.d_model
    block, split = flops_of_block(model, seq_len), [1] * stages
    for _ in range(model.n_layer - stages):
        cheapest = min(range(stages), key=lambda stage: costs[stage] + block * split[stage])
        split[cheapest] += 1
    return split


def flops_of_block(model: ModelConfig, seq_len: int) -> float:
    """Forward flops of one token in one block: 2 a weight, and attention over seq_len keys."""
    d, kv = model.d_model, model.kv_heads * model.head_dim
    matrices = 2 if model.ffn == FFN.gelu else 3
    experts = model.experts_per_token if model.ffn == FFN.moe else 1
    weights = 2 * d * d + 2 * d * kv + experts * matrices * d * model.ff_dim
    return 2.0 * weights + 4.0 * seq_len * d
