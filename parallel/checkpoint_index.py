"""Reads the index of torch's checkpoint format without trusting any of it.

The index, `.metadata`, is a pickle, and a pickle calls whatever it names and sets attributes of
whatever it gets hold of (torch 2.13's own reader lets it). Here it gets hold of stand-ins only,
made for one load: classes that do nothing but keep what they are given. The real index is built
from their fields, each of which is checked, and then against the files: the chunks of a tensor must
tile it, and the bytes of each must lie in a file of the folder and in no other's.
"""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from parallel.damaged import Damaged

INDEX = ".metadata"
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
RECORDS = "torch.distributed.checkpoint.metadata"
# what an index is made of
ALLOWED = {
    *[("torch", name) for name in (*DTYPES, "strided", "Size")],
    ("torch.serialization", "_get_layout"),
    *[
        (RECORDS, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ],
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *[(module, "PosixPath") for module in ("pathlib", "pathlib._local")],
}
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a chunk, along each dim


class _StandIn:
    """Keeps what a pickle makes an object of: the arguments, and the state that follows them."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Gives a pickle stand-ins for what it names: classes of this load only, or plain names."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.classes: dict[str, type[_StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise Damaged(f"{INDEX}: holds {module}.{name}, which is no part of an index")
        if module == "torch" and name != "Size":
            return name  # a dtype or a layout
        if name not in self.classes:
            self.classes[name] = type(name, (_StandIn,), {})
        return self.classes[name]


def read_index(folder: Path) -> Metadata:
    """Return which tensor lies where. Raises Damaged, one line, if it is no index of tensors, or
    if it is not true of the files beside it."""
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            index = _index_from(_Unpickler(file).load())
        _check_files(folder, index)
    except (Damaged, OSError) as error:
        raise Damaged(f"{folder}: {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise Damaged(f"{path}: cannot be read: {type(error).__name__}") from error
    return index


# --- from stand-ins to records


def _fields(value: Any, name: str, *keys: str) -> list[Any]:
    """Return these fields of the stand-in of a `name`; what it does not have is None."""
    if not isinstance(value, _StandIn) or type(value).__name__ != name:
        raise Damaged(f"{INDEX}: is no index of tensors: no {name} where one should be")
    state = getattr(value, "state", None)
    if not isinstance(state, dict):
        raise Damaged(f"{INDEX}: is no index of tensors: a {name} without fields")
    return [state.get(key) for key in keys]


def _size_from(value: Any) -> torch.Size:
    """Return a torch.Size of whole numbers that are not negative."""
    arguments = getattr(value, "arguments", None) if type(value).__name__ == "Size" else None
    inner = arguments[0] if arguments and len(arguments) == 1 else None
    if not isinstance(inner, tuple) or not all(type(n) is int and n >= 0 for n in inner):
        raise Damaged(f"{INDEX}: is no index of tensors: a size that is none")
    return torch.Size(inner)


def _dtype_from(value: Any) -> torch.dtype:
    """Return the dtype of a TensorProperties, whose state is a tuple that begins with it."""
    known = isinstance(value, _StandIn) and type(value).__name__ == "TensorProperties"
    state = getattr(value, "state", None) if known else None
    name = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(name, str) or name not in DTYPES:
        raise Damaged(f"{INDEX}: is no index of tensors: a dtype that is none")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _index_from(top: Any) -> Metadata:
    """Return the index that a pickle's stand-ins describe."""
    tensors, places = _fields(top, "Metadata", "state_dict_metadata", "storage_data")
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise Damaged(f"{INDEX}: is no index of tensors")
    return Metadata(
        {_text(name): _tensor_from(about) for name, about in tensors.items()},
        storage_data=dict(_place_from(key, place) for key, place in places.items()),
    )


def _text(value: Any) -> str:
    if type(value) is not str:
        raise Damaged(f"{INDEX}: is no index of tensors: a name that is none")
    return value


def _tensor_from(about: Any) -> TensorStorageMetadata:
    properties, size, chunks = _fields(
        about, "TensorStorageMetadata", "properties", "size", "chunks"
    )
    if not isinstance(chunks, list):
        raise Damaged(f"{INDEX}: is no index of tensors: a tensor without chunks")
    boxes = [_fields(chunk, "ChunkStorageMetadata", "offsets", "sizes") for chunk in chunks]
    return TensorStorageMetadata(
        TensorProperties(dtype=_dtype_from(properties)),
        _size_from(size),
        [ChunkStorageMetadata(_size_from(first), _size_from(sizes)) for first, sizes in boxes],
    )


def _place_from(key: Any, place: Any) -> tuple[MetadataIndex, _StorageInfo]:
    name, first = _fields(key, "MetadataIndex", "fqn", "offset")
    path, *numbers, transforms = _fields(
        place, "_StorageInfo", "relative_path", "offset", "length", "transform_descriptors"
    )
    if transforms or not all(type(n) is int and n >= 0 for n in numbers):
        raise Damaged(f"{INDEX}: is no index of tensors: a place that is none")
    if Path(_text(path)).name != path:
        raise Damaged(f"{INDEX}: points outside of its folder: {path!r}")
    return MetadataIndex(_text(name), _size_from(first)), _StorageInfo(path, *numbers)


# --- against the files


def _check_files(folder: Path, index: Metadata) -> None:
    """Raise Damaged unless chunks tile their tensors and each has bytes of its own in a file."""
    known = 0
    for name, about in index.state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata)
        boxes: list[Box] = [(tuple(c.offsets), tuple(c.sizes)) for c in about.chunks]
        if not tiles(boxes, ((0,) * len(about.size), tuple(about.size))):
            raise Damaged(f"{INDEX}: the chunks of {name!r} do not tile it")
        for first, sizes in boxes:
            place = index.storage_data.get(MetadataIndex(name, first))
            needed = math.prod(sizes) * about.properties.dtype.itemsize
            if place is None or place.length < needed:
                raise Damaged(f"{INDEX}: a chunk of {name!r} has not the bytes that it needs")
        known += len({first for first, _ in boxes})
    if known != len(index.storage_data):
        raise Damaged(f"{INDEX}: has places of what is no chunk of a tensor")
    by_file: dict[str, list[tuple[int, int]]] = {}
    for place in index.storage_data.values():
        by_file.setdefault(place.relative_path, []).append((place.offset, place.length))
    for file, spans in by_file.items():
        _check_spans(folder / file, sorted(spans))


def _check_spans(path: Path, spans: list[tuple[int, int]]) -> None:
    """Raise Damaged unless spans of bytes, sorted, lie in the file and do not overlap."""
    ends = [first + length for first, length in spans]
    apart = all(end <= first for end, (first, _) in zip(ends, spans[1:], strict=False))
    if not path.is_file() or max(ends) > os.path.getsize(path) or not apart:
        raise Damaged(f"{INDEX}: {path.name!r} has not the bytes that the index names")


def tiles(boxes: list[Box], region: Box) -> bool:
    """Return whether boxes fill a region exactly once; those without an element count nothing.

    The region is cut along one dim wherever no box is in the way, and each part again: any layout
    shards a tensor so. Boxes that tile it and cannot be cut (a pinwheel) are refused.
    """
    if any(len(first) != len(region[0]) or len(sizes) != len(first) for first, sizes in boxes):
        return False
    full = [box for box in boxes if 0 not in box[1]]
    if 0 in region[1]:
        return not full
    if len(full) == 1:
        return full[0] == region
    for dim, (start, length) in enumerate(zip(*region, strict=True)):
        parts: list[tuple[int, int, list[Box]]] = []  # where each begins and ends, its boxes
        for box in sorted(full, key=lambda box: box[0][dim]):
            first, end = box[0][dim], box[0][dim] + box[1][dim]
            if parts and first < parts[-1][1]:
                before, last, inside = parts[-1]
                inside.append(box)
                parts[-1] = before, max(last, end), inside
            else:
                parts.append((first, end, [box]))
        if len(parts) < 2:
            continue
        edges = [start, *(end for _, end, _ in parts)]
        joined = edges[:-1] == [first for first, _, _ in parts]
        return (
            joined
            and edges[-1] == start + length
            and all(
                tiles(inside, _part(region, dim, first, end - first))
                for first, end, inside in parts
            )
        )
    return False


def _part(region: Box, dim: int, first: int, length: int) -> Box:
    """Return the part of a region from `first` on along `dim`."""
    offsets, sizes = list(region[0]), list(region[1])
    offsets[dim], sizes[dim] = first, length
    return tuple(offsets), tuple(sizes)
