"""Reading a checkpoint without running any of it.

The index of torch's format, `.metadata`, is a pickle, and a pickle can run anything when it is
loaded (torch 2.13's own reader lets it). This one knows the records that an index is made of, and
refuses all else. The tensors themselves torch reads with weights_only.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from parallel.damaged import Damaged

INDEX = ".metadata"
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool", "strided")
RECORDS = "torch.distributed.checkpoint.metadata"
# what an index is made of; nothing here acts when it is made
ALLOWED = {
    *[("torch", name) for name in (*DTYPES, "Size")],
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise Damaged(f"{INDEX}: holds {module}.{name}, which is no part of an index")


class Reader(FileSystemReader):
    """torch's, with the index read safely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


def read_index(folder: Path) -> Metadata:
    """Which tensor lies where. Raises Damaged where it is anything but an index of tensors."""
    path = folder / INDEX
    try:
        with open(path, "rb") as file:
            index = _Unpickler(file).load()
    except (Damaged, OSError) as error:
        raise Damaged(f"{folder}: {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise Damaged(f"{path}: cannot be read: {type(error).__name__}") from error
    tensors = isinstance(index, Metadata) and all(
        isinstance(about, TensorStorageMetadata) for about in index.state_dict_metadata.values()
    )
    if not tensors:
        raise Damaged(f"{path}: is no index of tensors")
    for place in index.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            raise Damaged(f"{path}: points outside of its folder: {place.relative_path}")
    return index


def read(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Fill tensors, whole or DTensors, in place; each rank reads for itself. Raises Damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is alone, which is what is asked for
            dcp.load(dict(wanted), storage_reader=Reader(folder), no_dist=True)
    except CheckpointException as error:  # no Exception: it would pass by any usual handler
        raise Damaged(f"{folder}: {reason_of(error)}") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise Damaged(f"{folder}: {str(error).splitlines()[0]}") from error


def read_whole(folder: Path, kind: str) -> dict[str, Tensor]:
    """Every tensor of a kind (model, optimizer, random), whole, by name: for one process."""
    index = read_index(folder)
    found = {
        name: torch.empty(about.size, dtype=about.properties.dtype)  # type: ignore[union-attr]
        for name, about in index.state_dict_metadata.items()
        if name.startswith(f"{kind}/")
    }
    read(folder, found)
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in found.items()}


def reason_of(error: CheckpointException) -> str:
    """One line for what torch tells in a page: the first rank that failed, and why."""
    rank, (first, _) = min(error.failures.items())
    said = (str(first).splitlines() or [type(first).__name__])[0]
    return f"rank {rank}: {type(first).__name__}: {said}"
