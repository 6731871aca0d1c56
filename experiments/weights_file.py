"""Weights in one .safetensors file: ours out and in, and GPT-2's in.

The format (github.com/huggingface/safetensors): 8 bytes that say how long the header is, a header
in JSON, and bytes. So the launcher checks a file without torch, and nothing of it is ever run. The
format has no checksum; in the metadata of its header our own files have

    model       every field of the model that the weights were trained in, as JSON
    tokenizer   what tells the tokenizer that they were trained with (same_tokenizer.py), as JSON
    digests     SHA-256 of each tensor's bytes, by its name, as JSON
    seal        SHA-256 of the rest of the header: names, types, shapes, and the entries above

and any other entry that `write` is given, which the seal covers too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.same_model import check_same, override, unverified
from experiments.same_tokenizer import check_tokenizer
from minigpt.config import FFN, ModelConfig, Norm, Positions, require
from minigpt.gpt2 import from_gpt2, gpt2_name, gpt2_shape

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
DIGESTS, SEAL = "digests", "seal"  # entries of the metadata
FORMAT = {"format": "pt"}  # what other readers of the format look for
# the dtypes that weights may have, by torch's name and by the format's
FLOATS = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
}
BLOCK = 2**20  # bytes that are hashed at once
GPT2 = "transformer."  # what a language model's checkpoint has before GPT-2's own names


@dataclass(frozen=True)
class Header:
    """The header of a .safetensors file whose names, shapes and offsets hold together."""

    dtypes: dict[str, str]
    shapes: dict[str, Shape]
    places: dict[str, tuple[int, int]]  # of each tensor's bytes in the file: first and end
    about: dict[str, Any]  # the entries of the metadata that are JSON; ours all are
    digests: dict[str, str]  # empty where the file is another program's

    @property
    def model(self) -> dict[str, Any]:
        """Fields of the model that the weights were trained in; empty in a foreign file."""
        found = self.about.get("model")
        return found if isinstance(found, dict) else {}


def read_header(path: Path) -> Header:
    """Return the header. Raises ValueError, one line, unless it describes the file's bytes."""
    from safetensors import SafetensorError, safe_open

    sharded = path.name.endswith(".index.json")
    require(
        not path.is_dir() and not sharded,
        f"init={path}: is {'an index of several files' if sharded else 'a folder'}; what is read "
        "is one .safetensors file, of ours (./launch.sh export) or GPT-2's from Hugging Face",
    )
    try:
        # safetensors' own reader checks that the tensors tile the file, without gap or overlap
        with safe_open(path, framework="np"), open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ValueError(f"init={path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"init={path}: is no .safetensors file, or is damaged: {said}") from error
    metadata = header.pop("__metadata__", None) or {}
    dtypes = {name: tensor["dtype"] for name, tensor in header.items()}
    shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    offsets = {name: tensor["data_offsets"] for name, tensor in header.items()}
    start = 8 + length
    places = {name: (start + first, start + end) for name, (first, end) in offsets.items()}
    about = {key: _json_in(text) for key, text in metadata.items() if key not in FORMAT}
    digests = about.pop(DIGESTS, None)
    if SEAL in metadata:
        sealed = {key: text for key, text in metadata.items() if key != SEAL}
        require(
            metadata[SEAL] == seal(sealed, dtypes, shapes),
            f"init={path}: is damaged: its header is not the one that was sealed",
        )
    ours = SEAL in metadata and isinstance(digests, dict)
    return Header(dtypes, shapes, places, about, digests if ours else {})


def _json_in(text: str) -> Any:
    """Return what `text` says if it is JSON; another program's entry need not be."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def seal(metadata: dict[str, str], dtypes: dict[str, str], shapes: dict[str, Shape]) -> str:
    """Return the SHA-256 of a header: its metadata without the seal, its names, types, shapes."""
    tensors = {name: (dtypes[name], shapes[name]) for name in dtypes}
    text = json.dumps([metadata, tensors], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shapes_of(model: ModelConfig) -> dict[str, Shape]:
    """Every parameter of the whole model."""
    blocks = {
        f"blocks.{i}.{name}": shape
        for i in range(model.n_layer)
        for name, shape in model.block_shapes.items()
    }
    return {**model.outer_shapes, **blocks}


def check_init(path: Path, model: ModelConfig) -> list[str]:
    """Return warnings, one line each, about what the file does not tell. Imports no torch.

    Raises ValueError, one line, unless the header has what the model needs: names, shapes, types,
    and the fields of the model that its weights were trained in. `check_bytes` checks the rest.
    """
    header, needed = read_header(path), shapes_of(model)
    there = header.shapes
    if is_gpt2(there):
        _check_gpt2(path, model)
        prefix = prefix_in(there)
        pairs = [(prefix + gpt2_name(n), gpt2_shape(n, shape)) for n, shape in needed.items()]
        missing = ["n_head"]  # all else that shapes do not show has one value in GPT-2
    else:
        pairs = list(needed.items())
        missing = check_same(f"init={path}", header.model, model)
        extra = sorted(there.keys() - needed.keys())
        tied = ": model.tied=true" if extra == ["head.weight"] else ""
        require(not extra, f"init={path}: the model has no place for {', '.join(extra[:3])}{tied}")
    for name, shape in pairs:
        require(name in there, f"init={path}: has no {name}")
        require(
            there[name] == shape,
            f"init={path}: {name} is {list(there[name])}, and the model's {list(shape)}",
        )
        dtype = header.dtypes[name]
        known = ", ".join(FLOATS.values())
        require(dtype in FLOATS.values(), f"init={path}: {name} is {dtype}; weights are {known}")
    unhashed = [] if header.digests else [f"init={path}: has no digests; its bytes are unverified"]
    return [*unverified(f"init={path}", missing), *unhashed]


def check_init_tokenizer(path: Path, tokenizer: str | None) -> list[str]:
    """Return the warning, one line or none, that the file does not name its tokenizer.

    `tokenizer` is that of the data (Corpus.vocabulary). Raises ValueError, one line, if the
    weights were trained with another.
    """
    return check_tokenizer(f"init={path}", read_header(path).about.get("tokenizer"), tokenizer)


def check_bytes(path: Path) -> None:
    """Read every tensor once. Raises ValueError, one line, if one is not what was written."""
    header = read_header(path)
    with open(path, "rb") as file:
        for name, digest in header.digests.items():
            first, end = header.places.get(name, (0, 0))
            file.seek(first)
            sha256 = hashlib.sha256()
            for start in range(first, end, BLOCK):
                sha256.update(file.read(min(BLOCK, end - start)))
            require(sha256.hexdigest() == digest, _damaged(path, name))


def _damaged(path: Path, name: str) -> str:
    return f"init={path}: is damaged: the SHA-256 of {name} is not what was written"


def is_gpt2(names: dict[str, Shape]) -> bool:
    return "wte.weight" in names or f"{GPT2}wte.weight" in names


def prefix_in(names: dict[str, Shape]) -> str:
    return GPT2 if f"{GPT2}wte.weight" in names else ""


def _check_gpt2(path: Path, model: ModelConfig) -> None:
    """The keys that make a model the one that GPT-2's weights were trained in."""
    needed = {
        "norm": Norm.layernorm,
        "norm_eps": 1e-5,
        "positions": Positions.learned,
        "ffn": FFN.gelu,
        "gelu_tanh": True,
        "bias": True,
        "tied": True,
        "kv_heads": model.n_head,
    }
    wrong = {k: v for k, v in needed.items() if getattr(model, k) != v}
    said = " ".join(f"model.{key}={override(getattr(v, 'value', v))}" for key, v in wrong.items())
    require(not wrong, f"init={path}: GPT-2's weights need {said}")


def reader(path: Path) -> Callable[[str], Tensor]:
    """Return a function from a parameter's name to its value in a file that check_init has passed.

    It reads one tensor at a time, and raises ValueError if one is not what was written.
    """
    from safetensors import safe_open

    file, header = safe_open(path, framework="pt"), read_header(path)

    def get(name: str) -> Tensor:
        tensor: Tensor = file.get_tensor(name)
        if header.digests:
            require(digest_of(tensor) == header.digests.get(name), _damaged(path, name))
        return tensor

    if not is_gpt2(header.shapes):
        return get
    prefix = prefix_in(header.shapes)
    return lambda name: from_gpt2(name, lambda theirs: get(prefix + theirs))


def digest_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a CPU tensor's bytes, as the format stores them."""
    import torch

    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()


def write(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write all weights, whole or not at all, with what their reader must know.

    `about` has `model`, every field of the model, and may have further entries.
    """
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    digests = {name: digest_of(tensor) for name, tensor in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in {**about, DIGESTS: digests}.items()}
    metadata |= FORMAT
    dtypes = {name: FLOATS[str(tensor.dtype)] for name, tensor in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    metadata[SEAL] = seal(metadata, dtypes, shapes)
    try:
        save_file(tensors, part, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
