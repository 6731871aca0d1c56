"""The process group and the mesh of named axes: where a rank learns who the others are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import MESH_AXES, Layout


def join(
    backend: str, timeout_s: float, rank: int, world_size: int, store: dist.Store | None = None
) -> None:
    """Enter the default process group, through `store` or else the address in the environment.

    The timeout is explicit: torch's default would let a job with a dead rank sit for half an hour.
    """
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, store=store)


def leave() -> None:
    """Leave the process group together.

    Destroying without the barrier hangs or aborts one run in five at exit (gloo, torch 2.13).
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Mesh:
    """The axes of a layout that have more than one rank, as torch's DeviceMesh.

    A mesh of one rank (`device_mesh` is None) needs no process group.
    """

    layout: Layout
    device: torch.device
    device_mesh: DeviceMesh | None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes with more than one rank, outermost first."""
        return tuple(axis for axis in MESH_AXES if getattr(self.layout, axis) > 1)

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.device_mesh else 0

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank reads: 0 ... layout.data_parallel - 1."""
        return self._index("dp_replicate") * self.layout.dp_shard + self._index("dp_shard")

    def sub(self, *axes: str) -> DeviceMesh:
        """The mesh of those axes, which all have more than one rank."""
        assert self.device_mesh is not None
        return self.device_mesh[axes if len(axes) > 1 else axes[0]]

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add a small tensor up over all ranks, in place."""
        if self.device_mesh:
            dist.all_reduce(numbers)
        return numbers

    def axis_of_ranks(self) -> dict[frozenset[int], str]:
        """The axis that a group of global ranks stands for, for every group this rank is in.

        The group of all ranks has the axes joined by a star where the layout has several.
        """
        names = {}
        if self.device_mesh:
            names[frozenset(range(self.layout.world_size))] = "*".join(self.axes)
            for axis in self.axes:
                names[frozenset(dist.get_process_group_ranks(self.sub(axis).get_group()))] = axis
        return names

    def _index(self, axis: str) -> int:
        return self.sub(axis).get_local_rank() if getattr(self.layout, axis) > 1 else 0


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """Make the mesh of a resolved layout. The process group must be up unless it is one rank."""
    names = tuple(axis for axis in MESH_AXES if getattr(layout, axis) > 1)
    if not names:
        return Mesh(layout, device, None)
    sizes = tuple(getattr(layout, axis) for axis in names)
    world_size = dist.get_world_size()
    assert math.prod(sizes) == world_size, f"{layout} != {world_size} ranks"
    return Mesh(layout, device, init_device_mesh(device.type, sizes, mesh_dim_names=names))
