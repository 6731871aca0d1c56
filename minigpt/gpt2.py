"""GPT-2's published weights under this model's names (Radford et al. 2019).

Theirs is Hugging Face's format: Conv1D weights are (in, out) where Linear's are (out, in), q, k and
v lie side by side in one c_attn, and the head is the embedding. The model that takes them needs
norm=layernorm positions=learned ffn=gelu gelu_tanh=true bias=true tied=true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the launcher reads the names, and must be fast
    from torch import Tensor

OUTER = {"embedding": "wte", "positions": "wpe", "norm": "ln_f", "head": "wte"}
INNER = {
    "attention_norm": "ln_1",
    "attention.q": "attn.c_attn",
    "attention.k": "attn.c_attn",
    "attention.v": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
PARTS = {"attention.q": 0, "attention.k": 1, "attention.v": 2}


def gpt2_name(name: str) -> str:
    """Where a parameter of ours lies: blocks.3.mlp.up.bias in h.3.mlp.c_fc.bias.

    Raises KeyError for one that GPT-2 does not have.
    """
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{OUTER[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"h.{layer}.{INNER[inner]}.{kind}"


def gpt2_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape there of what has `shape` here."""
    inner = name.rpartition(".")[0].split(".", 2)[-1]
    turned = shape[::-1] if name.startswith("blocks.") and len(shape) == 2 else shape
    return (*turned[:-1], 3 * turned[-1]) if inner in PARTS else turned


def from_gpt2(name: str, get: Callable[[str], Tensor]) -> Tensor:
    """Our parameter `name`, out of theirs by name."""
    value = get(gpt2_name(name))
    inner = name.rpartition(".")[0].split(".", 2)[-1]
    if inner in PARTS:
        value = value.chunk(3, dim=-1)[PARTS[inner]]
    turned = name.startswith("blocks.") and value.ndim == 2
    return value.T if turned else value
