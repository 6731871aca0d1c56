"""A GPT on one device. It knows no rank: every strategy is applied from outside.

Shape letters: B batch, T sequence, D width, N query heads, K key-value heads, H head width,
F MLP width, L layers, V vocabulary.

Five rules make that possible: q, k, v are separate and heads come from view(B, T, -1, H); a tied
head is explicit; blocks sit in a ModuleDict under their global number, and what a pipeline stage
lacks is None; forward returns logits and the loss is a function beside it; __init__ makes shapes
only, and each weight's first value depends on its name alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.attention import ATTEND, Attend
from minigpt.autocast import cast_once
from minigpt.by_hand import dropout, layer_norm, mlp
from minigpt.by_hand.cross_entropy import IGNORE
from minigpt.by_hand.multi_head import merge_heads, split_heads
from minigpt.by_hand.positions import rotary_angles, rotate, sinusoids
from minigpt.config import FFN, ModelConfig, Norm, Pieces, Positions
from minigpt.experts import MoE


class Cache(Protocol):
    """Keys and values of earlier positions, for generation."""

    length: int

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == Norm.rmsnorm:
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    kind: type[nn.LayerNorm] = LayerNormByHand if config.impl == Pieces.by_hand else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_eps, bias=config.bias)


class LayerNormByHand(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return layer_norm.layer_norm(x, self.weight, self.bias, self.eps)


def dropout_of(config: ModelConfig) -> Callable[[Tensor, float, bool], Tensor]:
    """What drops a share of a tensor while training."""
    return dropout.dropout if config.impl == Pieces.by_hand else F.dropout


class Attention(nn.Module):
    """Multi-head attention; grouped-query where k and v have fewer heads (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        kv_dim = config.kv_heads * config.head_dim
        self.q = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.k = nn.Linear(config.d_model, kv_dim, bias=config.bias)
        self.v = nn.Linear(config.d_model, kv_dim, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.attend: Attend = ATTEND[config.attention]
        self.drop = dropout_of(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, cache: Cache | None = None
    ) -> Tensor:
        x = cast_once(x)
        q, k, v = (split_heads(y, self.head_dim) for y in self.project(x))  # (B, N or K, T, H)
        if rotary:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        y = self.attend(q, k, v, self.dropout if self.training else 0.0)
        return self.drop(self.out(merge_heads(y)), self.dropout, self.training)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """What q, k and v make of x: three products. In a compiled graph they are one, over their
        weights side by side, which costs nothing where autocast copies those anyway."""
        three = (self.q, self.k, self.v)
        if not (torch.compiler.is_compiling() and all(map(is_plain, three))):
            return [linear(x) for linear in three]
        weight = torch.cat([linear.weight for linear in three])
        bias = None if self.q.bias is None else torch.cat([linear.bias for linear in three])
        return F.linear(x, weight, bias).split([len(linear.weight) for linear in three], dim=-1)


def is_plain(linear: nn.Module) -> bool:
    """Whether nothing has taken its place or cut it: an adapter, fp8, tensor parallelism."""
    return type(linear) is nn.Linear and type(linear.weight) in (Tensor, nn.Parameter)


class MLP(nn.Module):
    """GELU, or SwiGLU with a gate beside `up` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gated = config.ffn == FFN.swiglu
        self.gate = nn.Linear(config.d_model, config.ff_dim, bias=config.bias) if gated else None
        self.up = nn.Linear(config.d_model, config.ff_dim, bias=config.bias)
        self.down = nn.Linear(config.ff_dim, config.d_model, bias=config.bias)
        self.dropout, self.drop = config.dropout, dropout_of(config)
        self.gelu = "tanh" if config.gelu_tanh else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.compute(cast_once(x)), self.dropout, self.training)

    def compute(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate=self.gelu))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MLPByHand(MLP):
    def compute(self, x: Tensor) -> Tensor:
        gate = None if self.gate is None else (self.gate.weight, self.gate.bias)
        up, down = ((linear.weight, linear.bias) for linear in (self.up, self.down))
        return mlp.mlp(x, gate, up, down)


def make_mlp(config: ModelConfig) -> nn.Module:
    if config.ffn == FFN.moe:
        return MoE(config)
    return MLPByHand(config) if config.impl == Pieces.by_hand else MLP(config)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None, cache: Cache | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, cache)
        return x + self.mlp(self.mlp_norm(x))


VOCABULARY = ("embedding.weight", "head.weight")  # the weights that have a row for each id


class GPT(nn.Module):
    """Decoder-only transformer. A stage of a pipeline has None for what it lacks."""

    embedding: nn.Embedding | None
    positions: nn.Embedding | None
    norm: nn.Module | None
    head: nn.Linear | None
    # changes logits in place; tensor parallelism puts in one for its columns. None: no padding
    hide_padding: Callable[[Tensor], None] | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        learned = config.positions == Positions.learned
        self.embedding = nn.Embedding(config.vocab_rows, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layer)})
        self.norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_rows, bias=False)
        padding = config.vocab_rows > config.vocab_size
        self.hide_padding = partial(hide_from, config.vocab_size) if padding else None
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding's weight, where the config says so and both are here.

        Whatever replaces parameters (to_empty, tensor parallelism) must call it again.
        """
        if self.config.tied and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(
        self, x: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); a stage takes and gives activations (B, T, D) instead.

        `positions` (T,) defaults to those that follow the cache.
        """
        if positions is None:
            start = cache.length if cache else 0
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        if self.embedding is not None:
            x = self.embed(x, positions)
        rotary = None
        if self.config.positions == Positions.rotary:
            rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        for block in self.blocks.values():
            x = block(x, rotary, cache)
        if self.norm is not None:
            x = self.norm(x)
        if self.head is None:
            return x
        logits = self.head(x)
        if self.hide_padding is not None:
            self.hide_padding(logits)
        return logits

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, T) to (B, T, D)."""
        assert self.embedding is not None
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        elif self.config.positions == Positions.sinusoidal:
            x = x + sinusoids(positions, self.config.d_model).to(x.dtype)
        return self.dropout(x)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, whether the model is whole, a stage, or was on the meta device."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, self.config, seed))


def hide_from(first: int, logits: Tensor) -> None:
    """Set the logits of the ids from `first` on to -inf, in place: they get no probability.

    Their gradient is 0 by itself, being a probability, so autograd does not have to know.
    """
    logits.detach()[..., first:].fill_(-math.inf)


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The first value of the parameter `name`: GPT-2's (Radford et al. 2019, section 2.3).

    Each has a random stream of its own, made from its global name and always on the CPU, so that
    stages, shards and GPUs start from the same numbers as a single process.
    """
    if name.endswith((".bias", ".lora_b")):
        return torch.zeros(*shape)
    if "norm" in name:
        return torch.ones(*shape)
    if name in VOCABULARY and shape[0] > config.vocab_size:
        # the rows of real ids are those of a model without padding
        plain = initial_value(name, (config.vocab_size, *shape[1:]), config, seed)
        return torch.cat([plain, torch.zeros(shape[0] - len(plain), *shape[1:])])
    std = 0.02
    if name.endswith(("attention.out.weight", "mlp.down.weight", "mlp.experts.down")):
        std /= math.sqrt(2 * config.n_layer)  # so that the residual stream does not grow with depth
    if name.endswith(".lora_a"):
        std = 1 / math.sqrt(shape[1])  # so that A x is as large as x
    # a hash, for torch's CPU generator takes no more than 32 bits of its seed
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(*shape).normal_(0.0, std, generator=stream)


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies (nats, fp32) of the targets that count, and how many count.

    A sum and a count, never a mean: means of parts with different counts must not be averaged.
    """
    flat = targets.flatten()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), flat, ignore_index=IGNORE, reduction="sum")
    return loss, (flat != IGNORE).sum()
