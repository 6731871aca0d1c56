"""How the depth of a model is cut into stages. No torch: the simulator cuts it too."""

from __future__ import annotations

from minigpt.config import FFN, ModelConfig
from parallel.layout import PipelineConfig


def split_layers(model: ModelConfig, stages: int, seq_len: int) -> list[int]:
    """Blocks of each stage: the costliest is as cheap as can be, and the others are as even.

    Costs are flops of a token: the embedding adds its lookup to the first stage, the head its
    product to the last. Each block goes to the stage that is cheapest so far, of equal ones to the
    first: those ranks wait longest for their last gradient. Every stage has one.
    """
    costs = [0.0] * stages
    costs[0] += model.d_model
    costs[-1] += 2.0 * model.vocab_size * model.d_model
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


def ideal_bubble(pipeline: PipelineConfig, ranks: int, micro_batches: int) -> float:
    """The share of forward and backward in which a rank of a pipeline must idle.

    With p ranks, m micro-batches and v stages a rank, messages that take no time, stages that cost
    alike and backwards that take twice as long as forwards (their halves as long):
    GPipe, 1F1B           (p-1) / (m + p-1)      Huang et al. 2019; Narayanan et al. 2021, 2.2
    interleaved, looped   (p-1) / (v m + p-1)    Narayanan et al. 2021, 2.2; Lamy-Poirier 2023
    that split backwards  (p-1) / (3 v m + p-1)  p-1 times F + B - W, a third of 1F1B's: ZB-H1 of
                                                 Qi et al. 2023, section 2
    The zero of ZB-V and DualPipeV is that of ranks that start and end one after the other. Here all
    start together and add up their losses together at the end, so that p-1 forwards are left. They
    need 2 (p-1) micro-batches for it. A test holds this to the orders that torch makes.
    """
    stage_slots = pipeline.local_stages * micro_batches
    work = 3 * stage_slots if pipeline.splits_backward else stage_slots
    return (ranks - 1) / (work + ranks - 1)
