"""Sampling text from a GPT on one device, with the keys and values of earlier tokens kept.

Shape letters as in model.py; S is the number of positions in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.by_hand.sampling import draw, keep_nucleus, keep_top_k
from minigpt.model import GPT


class KVCache:
    """Room for the keys and values of `context` positions, layer by layer."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.length = 0  # positions that every layer has
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, K, T, H) of the newest tokens; returns (B, K, S, H) of all of them."""
        if layer not in self.keys:
            B, K, _, H = k.shape
            self.keys[layer] = k.new_empty(B, K, self.context, H)
            self.values[layer] = v.new_empty(B, K, self.context, H)
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


@torch.no_grad()
def generate(
    model: GPT,
    tokens: list[int],
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[int]:
    """The `length` ids that follow `tokens`. Temperature 0 takes the likeliest each time."""
    if not tokens:
        raise ValueError("prompt is empty: at least one token is needed")
    device = next(model.parameters()).device
    stream = torch.Generator(device).manual_seed(seed)
    context = model.config.context
    ids = list(tokens)
    cache, fresh = KVCache(context), ids[-context:]
    for _ in range(length):
        if cache.length + len(fresh) > context:
            # The context is full. Positions cannot slide inside a cache, so start a new one from
            # its second half: a full pass every context / 2 tokens, not at every token.
            cache, fresh = KVCache(context), ids[-max(1, context // 2) :]
        logits = model(torch.tensor([fresh], device=device), cache=cache)[0, -1]
        cache.length += len(fresh)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: there is nothing to draw from")
        fresh = [choose(logits, temperature, stream, top_k, top_p)]
        ids += fresh
    return ids[len(tokens) :]


def choose(
    logits: Tensor,
    temperature: float,
    stream: torch.Generator,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Draw one id from logits (V,): of the `top_k` likeliest, and of those that hold `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_nucleus(logits, top_p)
    return draw(logits, stream)
