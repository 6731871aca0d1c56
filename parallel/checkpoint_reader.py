"""Reads tensors of a checkpoint without running any of it.

parallel/checkpoint_index.py reads the index, which says where they lie; the tensors themselves
torch reads with weights_only.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from parallel.checkpoint_index import read_index
from parallel.damaged import Damaged


class Reader(FileSystemReader):
    """torch's, with the index read safely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


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
