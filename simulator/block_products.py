"""The products of a block's forward, and what its experts add: arrays over plans of one model.

Letters as in minigpt: D width, F MLP width, E experts, k experts of a token. A model of published
rows has more (simulator/described.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from minigpt.config import FFN, ModelConfig
from simulator.block_messages import expert_choices
from simulator.described import Described, score_width
from simulator.plans import Array, Plans

Sides = tuple[Any, Any, Any, Any]  # rows, inner, columns, how many
# Over the choices' rows B T k D, forward, each read and write: copied for each choice, sorted by
# expert where a rank has several, sorted back, and added up (Megatron-Core's token dispatcher).
# Where a token is sent once, the messages' own kernels do it, but for one copy at the end of a way
ROUTED_PASSES = 2 * 4
ROUTED_PASSES_ONCE = 2
# Launched besides by a block with experts: router, its softmax, top k and loss, masks, sorts
EXPERT_OPERATORS = 30
# and for each of a rank's experts, which are launched one by one: its two products, and in fp8 what
# casts their inputs (Transformer Engine's GroupedLinear)
EACH_EXPERT, EACH_EXPERT_CAST = 2, 2
LATENT_OPERATORS = 8  # and by latent attention: two products and norms more, pieces put together


@dataclass
class Block:
    """One block of each plan. A model's blocks without experts are averaged in: `share` of its
    blocks have them.

    expert_tp: in how many parts an expert is cut; where tp is more, its ranks have other tokens
    and other experts (Megatron-Core's expert-tensor-parallel-size).
    """

    plans: Plans
    tokens: Array
    expert_tp: Array

    @property
    def model(self) -> ModelConfig:
        return self.plans.model

    @cached_property
    def more(self) -> Described | None:
        return self.model if isinstance(self.model, Described) else None

    @cached_property
    def moe(self) -> bool:
        return self.model.ffn == FFN.moe

    @cached_property
    def share(self) -> float:
        return self.more.expert_layers / self.model.n_layer if self.more else float(self.moe)

    @cached_property
    def heads(self) -> int:
        """Predictions of a token: of the next, and of those after it."""
        return 1 + (self.more.predicted_further if self.more else 0)

    # attention

    @cached_property
    def query(self) -> float:
        """Numbers of a token's queries; as many of its keys where attention is latent."""
        rotated = self.more.rotated if self.more else 0
        return self.model.n_head * (self.model.head_dim + rotated)

    @cached_property
    def values(self) -> int:
        """Numbers that attention gives for a token."""
        return self.model.n_head * self.model.head_dim

    @cached_property
    def keys_and_values(self) -> float:
        if self.more and self.more.kv_rank:
            return self.query + self.values
        return 2 * self.model.kv_heads * self.model.head_dim

    @cached_property
    def latent(self) -> int:
        """Numbers of a token that queries, keys and values are made from, on every tp rank."""
        if not self.more or not self.more.kv_rank:
            return 0
        return self.more.q_rank + self.more.kv_rank + self.more.rotated

    @cached_property
    def score_flops(self) -> Array:
        """Forward: 4 B T T D (Narayanan et al. 2021, appendix A), less where a window hides keys;
        of a rank's part of the sequence."""
        plans, keys = self.plans, float(self.plans.seq_len)
        if self.more and self.more.window:  # every second block; of a causal row the half counts
            keys = (keys + min(keys, 2.0 * self.more.window)) / 2
        heads = plans.micro_batch_size * self.model.n_head / plans.tp
        return 4 * heads * (plans.seq_len / plans.cp) * keys * score_width(self.model)

    def _attention(self) -> list[Sides]:
        d, tp, tokens, more = self.model.d_model, self.plans.tp, self.tokens, self.more
        out = (tokens, self.values / tp, d, 1)
        if not more or not more.kv_rank:
            q = (tokens, d, self.values / tp, 1)
            return [q, (tokens, d, self.keys_and_values / tp, 1), out]
        q_inner = more.q_rank or d
        return [
            (tokens, d, self.latent, 1),
            (tokens, q_inner, self.query / tp, 1),
            (tokens, more.kv_rank, 2 * self.values / tp, 1),
            out,
        ]

    # the MLP or the experts

    @cached_property
    def matrices(self) -> int:
        """That widen: 2 where a gate is one of them."""
        return 1 if self.model.ffn == FFN.gelu else 2

    @cached_property
    def chosen(self) -> float:
        """Rows of experts for one token: its choices, or its part of a capacity's slots."""
        return (
            expert_choices(self.model, self.plans.seq_len) / self.plans.seq_len if self.moe else 1
        )

    @cached_property
    def held(self) -> Array:
        return self.model.n_expert / self.plans.ep

    @cached_property
    def routed_tokens(self) -> Array:
        """Tokens that this rank alone sends to experts."""
        return self.tokens * self.expert_tp / self.plans.tp

    @cached_property
    def wide(self) -> float:
        """Mean F that a token goes through in a block."""
        f = self.chosen * self.model.ff_dim
        if not self.more:
            return f
        return self.share * (f + self.more.shared_ff) + (1 - self.share) * self.more.dense_ff

    def _mlp(self, f: float, count: float) -> list[Sides]:
        d, tp = self.model.d_model, self.plans.tp
        up = (self.tokens, d, self.matrices * f / tp, count)
        return [up, (self.tokens, f / tp, d, count)] if f and count else []

    def _experts(self) -> list[Sides]:
        d, f, cut = self.model.d_model, self.model.ff_dim, self.expert_tp
        rows = self.routed_tokens * self.chosen / self.held
        many = self.held * self.share
        made: list[Sides] = [(rows, d, 2 * f / cut, many), (rows, f / cut, d, many)]
        made.append((self.routed_tokens, d, self.model.n_expert, self.share))
        if self.more:
            made += self._mlp(self.more.shared_ff, self.share)
            made += self._mlp(self.more.dense_ff, 1 - self.share)
        return made

    def products(self) -> list[Sides]:
        """q, k and v, out; up, down; the router and the MLPs beside experts."""
        mlp = self._experts() if self.moe else self._mlp(self.model.ff_dim, 1)
        return [*self._attention(), *mlp]

    def repeated(self, again: Array | float, selective: Array, stops: bool) -> list[Array]:
        """Of the products, how many run again in the backward: a share of them, `again`, or those
        that `selective` checkpointing does not keep, of experts that have a capacity and are
        batched (simulator/flops.py).

        stops: once backward has what it needs, before `down`, if no router reads what experts gave.
        """
        first, products = len(self._attention()), self.products()
        capped = self.moe and self.model.capacity_factor is not None
        experts = range(first, first + 2 * capped)
        spared = len(products) - 1 if stops and not self.moe else None
        return [
            selective * count * (i in experts) + again * count * (i != spared)
            for i, (*_, count) in enumerate(products)
        ]

    # what experts add

    @cached_property
    def routed_rows(self) -> Array:
        """B T k of what this rank sends, in a mean block."""
        return self.share * self.routed_tokens * self.chosen

    @cached_property
    def expert_numbers(self) -> Array:
        """Weights of a block's experts that ep and expert_tp leave."""
        if not self.moe:
            return np.zeros_like(self.plans.tp)
        return self.held * 3 * self.model.d_model * self.model.ff_dim / self.expert_tp

    @cached_property
    def operators(self) -> float:
        """Launched besides those of an MLP."""
        return self.share * EXPERT_OPERATORS + LATENT_OPERATORS * bool(self.latent)

    def launched_each(self, narrow: Array) -> Array | float:
        """Launched expert by expert. `narrow`: where products are in fp8."""
        if not self.more:
            return 0.0
        return self.share * self.held * (EACH_EXPERT + EACH_EXPERT_CAST * narrow)
