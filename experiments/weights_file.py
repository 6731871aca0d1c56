"""Weights in one .safetensors file: ours out and in, and GPT-2's in.

The format (github.com/huggingface/safetensors): 8 bytes that say how long the header is, a header
in JSON, and bytes. So the launcher checks names and shapes without torch, and nothing is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.config import FFN, ModelConfig, Norm, Positions, require
from minigpt.gpt2 import from_gpt2, gpt2_name, gpt2_shape

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_HEADER = 100_000_000  # what the format allows
Shape = tuple[int, ...]
# fields of a model that its weights were trained under, and that no shape tells
UNSEEN = ("n_head", "norm", "positions", "ffn", "gelu_tanh")
GPT2 = "transformer."  # what a language model's checkpoint has before GPT-2's own names


def shapes_in(path: Path) -> dict[str, Shape]:
    """Names and shapes of its tensors. Raises ValueError, one line, where it is no such file."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, Shape], dict[str, Any]]:
    """The same, and the model's fields where our own export has written them."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= LONGEST_HEADER:
                raise ValueError("no header")
            header = json.loads(file.read(length))
        about = header.pop("__metadata__", None) or {}
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
        return shapes, _model_in(about.get("model"))
    except OSError as error:
        raise ValueError(f"init={path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"init={path}: is no .safetensors file, or is damaged") from error


def _model_in(text: Any) -> dict[str, Any]:
    """Ours is JSON; what others call `model` is theirs."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def shapes_of(model: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the whole model."""
    blocks = {
        f"blocks.{i}.{name}": shape
        for i in range(model.n_layer)
        for name, shape in model.block_shapes.items()
    }
    return {**model.outer_shapes, **blocks}


def check_init(path: Path, model: ModelConfig) -> None:
    """Raise ValueError, one line, unless the file has what the model needs. Imports no torch."""
    (there, theirs), wanted = read_header(path), shapes_of(model)
    if is_gpt2(there):
        _check_gpt2(path, model)
        prefix = prefix_in(there)
        pairs = [(prefix + gpt2_name(n), gpt2_shape(n, shape)) for n, shape in wanted.items()]
    else:
        pairs = list(wanted.items())
        extra = sorted(there.keys() - wanted.keys())
        tied = ": model.tied=true" if extra == ["head.weight"] else ""
        for key in UNSEEN:
            own = getattr(getattr(model, key), "value", getattr(model, key))
            same = theirs.get(key, own) == own
            require(same, f"init={path}: model.{key} is {theirs.get(key)} there, and {own} here")
        require(not extra, f"init={path}: the model has no place for {', '.join(extra[:3])}{tied}")
    for name, shape in pairs:
        require(name in there, f"init={path}: has no {name}")
        require(
            there[name] == shape,
            f"init={path}: {name} is {list(there[name])}, and the model's {list(shape)}",
        )


def is_gpt2(names: dict[str, Shape]) -> bool:
    return "wte.weight" in names or f"{GPT2}wte.weight" in names


def prefix_in(names: dict[str, Shape]) -> str:
    return GPT2 if f"{GPT2}wte.weight" in names else ""


def _check_gpt2(path: Path, model: ModelConfig) -> None:
    """The keys that make a model the one that GPT-2's weights were trained in."""
    needed = {
        "norm": Norm.layernorm,
        "positions": Positions.learned,
        "ffn": FFN.gelu,
        "gelu_tanh": True,
        "bias": True,
        "tied": True,
        "kv_heads": model.n_head,
    }
    wrong = {k: v for k, v in needed.items() if getattr(model, k) != v}
    said = " ".join(f"model.{key}={getattr(v, 'value', v)}".lower() for key, v in wrong.items())
    require(not wrong, f"init={path}: GPT-2's weights need {said}")


def reader(path: Path) -> Callable[[str], Tensor]:
    """A function from a parameter's name to its value in a checked file, one read at a time."""
    from safetensors import safe_open

    file, names = safe_open(path, framework="pt"), shapes_in(path)
    if not is_gpt2(names):
        return file.get_tensor
    prefix = prefix_in(names)
    return lambda name: from_gpt2(name, lambda theirs: file.get_tensor(prefix + theirs))


def write(path: Path, weights: dict[str, Tensor], model: dict[str, object]) -> None:
    """All weights, with the model's configuration beside them: whole or not at all."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    try:
        about = {"format": "pt", "model": json.dumps(model)}
        save_file({name: t.contiguous() for name, t in weights.items()}, part, metadata=about)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
