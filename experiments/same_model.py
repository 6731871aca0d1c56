"""Compares the model that weights were trained in with the one that is to compute with them.

Shapes show most of a model, and not all of it: with another rope_theta the same weights load, and
give other logits. So whatever holds weights (an exported file, model.json beside model.pt, the
manifest of a checkpoint) also holds every field of its model, and readers compare them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any

from minigpt.config import FFN, ModelConfig, Positions

# how a model is computed or trained; the logits of given weights are the same
HOW_ONLY = ("attention", "impl", "dropout", "balance")
# a wrong value of these gives other names or shapes, which are compared one by one
SHOWN_BY_SHAPES = (
    "n_layer",
    "n_kv_head",
    "d_model",
    "d_ff",
    "pad_vocab_to",  # not so vocab_size: rows do not tell which of them only pad
    "context",  # rows of a learned position table; with other positions it only bounds seq_len
    "n_expert",
    "bias",
    "tied",
)
# field -> another field and its value, without which the first one has no effect
ONLY_WITH: dict[str, tuple[str, Enum]] = {
    "rope_theta": ("positions", Positions.rotary),
    "gelu_tanh": ("ffn", FFN.gelu),
    "experts_per_token": ("ffn", FFN.moe),
    "capacity_factor": ("ffn", FFN.moe),
}


def unseen_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that change what `model` computes and that no shape of a weight shows."""
    values = {field.name: getattr(model, field.name) for field in fields(model)}
    for name in (*HOW_ONLY, *SHOWN_BY_SHAPES):
        del values[name]
    for name, (other, needed) in ONLY_WITH.items():
        if getattr(model, other) != needed:
            del values[name]
    return {name: _plain(value) for name, value in values.items()}


def check_same(said: str, theirs: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """Return the names of the fields that `theirs` does not have, which cannot be compared.

    `theirs` are fields of the model that the weights were trained in, as JSON has them. Raises
    ValueError, one line that begins with `said`, if one of them has another value in `model`.
    """
    ours = unseen_fields(model)
    wrong = {k: theirs[k] for k in ours if k in theirs and theirs[k] != ours[k]}
    if wrong:
        there = ", ".join(
            f"model.{key} is {value} there, and {ours[key]} here" for key, value in wrong.items()
        )
        would_do = " ".join(f"model.{key}={override(value)}" for key, value in wrong.items())
        raise ValueError(f"{said}: {there}; {would_do} would do")
    return [key for key in ours if key not in theirs]


def unverified(said: str, missing: list[str]) -> list[str]:
    """Return the warning, one line or none, that these fields could not be compared."""
    if not missing:
        return []
    names = ", ".join(f"model.{key}" for key in missing)
    return [f"{said}: does not say in what model it was trained; unverified: {names}"]


def override(value: Any) -> str:
    """Return a field's value as a user would write it on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
