"""The process group and the mesh of named axes: where a rank learns who the others are."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel.layout import MESH_AXES, Axis, Layout, expert_axes, weights_axes


def join(
    backend: str, timeout_s: float, rank: int, world_size: int, store: dist.Store | None = None
) -> None:
    """Enter the default process group, through `store` or else the address in the environment.

    The timeout is explicit: torch's default would let a job with a dead rank sit for half an hour.
    DeviceMesh gives the groups that it makes that default, and takes no other.
    """
    timeout = timedelta(seconds=timeout_s)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
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

    `axes_mesh` has one dimension for each of them. `weights_mesh` is how weights are spread, for
    which cp counts as data: its ranks hold the same weights and see other tokens, so that cp is
    joined with the axis that shards, or else with the one that replicates ("dp_shard*cp").
    `experts_mesh` is how experts are spread: ep takes neighbours out of a data axis, and what that
    axis has left ("dp_shard/ep") holds copies or shards of the same experts.
    All are None on a mesh of one rank, which needs no process group.
    """

    layout: Layout
    device: torch.device
    axes_mesh: DeviceMesh | None
    weights_mesh: DeviceMesh | None
    experts_mesh: DeviceMesh | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes with more than one rank, outermost first."""
        return tuple(axis for axis in MESH_AXES if getattr(self.layout, axis) > 1)

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.axes_mesh else 0

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank reads: 0 ... layout.data_parallel - 1."""
        return self.index("dp_replicate") * self.layout.dp_shard + self.index("dp_shard")

    @property
    def counts(self) -> bool:
        """Whether this rank's loss is its own; along tp all ranks have the same one."""
        return self.index("tp") == 0

    def index(self, axis: str) -> int:
        """This rank's place on an axis."""
        return self.sub(axis).get_local_rank() if getattr(self.layout, axis) > 1 else 0

    def sub(self, axis: str) -> DeviceMesh:
        """The mesh of one axis, which has more than one rank."""
        assert self.axes_mesh is not None
        return self.axes_mesh[axis]

    def group(self, axis: str) -> dist.ProcessGroup:
        """The ranks along one axis, this one among them."""
        return self.sub(axis).get_group()

    @property
    def tensor(self) -> DeviceMesh:
        """The mesh of tp, such that the data axes can cut the same weights again."""
        assert self.weights_mesh is not None
        return self.weights_mesh["tp"]

    def data(self, *kinds: str) -> DeviceMesh | None:
        """The mesh over which weights are replicated, sharded, or (both named) first one, then the
        other; None where none of the axes has more than one rank."""
        axes = weights_axes(self.layout)
        return _sub_mesh(self.weights_mesh, [axes[kind] for kind in kinds])

    @property
    def experts(self) -> DeviceMesh:
        """The mesh of ep."""
        assert self.experts_mesh is not None
        return self.experts_mesh["ep"]

    def expert_data(self) -> DeviceMesh | None:
        """What `data("replicate", "shard")` is for weights, for experts that ep has spread."""
        return _sub_mesh(self.experts_mesh, expert_axes(self.layout))

    def sum(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add a small tensor up over all ranks, in place."""
        if self.axes_mesh:
            dist.all_reduce(numbers)
        return numbers

    def from_all(self, own: Any) -> list[Any]:
        """What each rank hands over, by rank; all ranks call it."""
        if not self.axes_mesh:
            return [own]
        everyone: list[Any] = [None] * self.layout.world_size
        dist.all_gather_object(everyone, own)
        return everyone

    def axis_of_ranks(self) -> dict[frozenset[int], str]:
        """The axis that a group of global ranks stands for, for every group this rank is in.

        Joined axes have a star between them, as has the group of all ranks.
        """
        names = {}
        if self.axes_mesh and self.weights_mesh:
            names[frozenset(range(self.layout.world_size))] = "*".join(self.axes)
            for mesh in filter(None, (self.experts_mesh, self.weights_mesh, self.axes_mesh)):
                for name in mesh.mesh_dim_names or ():
                    names[frozenset(dist.get_process_group_ranks(mesh[name].get_group()))] = name
        return names


def _sub_mesh(mesh: DeviceMesh | None, axes: list[Axis]) -> DeviceMesh | None:
    """The dimensions of those axes that have more than one rank; None where none has."""
    names = tuple(name for name, size in axes if size > 1)
    if not names:
        return None
    assert mesh is not None
    return mesh[names if len(names) > 1 else names[0]]


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """Make the mesh of a resolved layout. The process group must be up unless it is one rank."""
    named = [(axis, getattr(layout, axis)) for axis in MESH_AXES if getattr(layout, axis) > 1]
    if not named:
        return Mesh(layout, device, None, None)
    world_size = dist.get_world_size()
    assert layout.world_size == world_size, f"{layout} != {world_size} ranks"
    axes_mesh = weights_mesh = _init(device, named)
    experts_mesh = None
    if layout.cp > 1:
        data = weights_axes(layout).values()
        weights_mesh = _init(device, [("pp", layout.pp), *data, ("tp", layout.tp)])
    if layout.ep > 1:
        spread = [("pp", layout.pp), *expert_axes(layout), ("ep", layout.ep)]
        experts_mesh = _init(device, spread, own_group="ep")
    return Mesh(layout, device, axes_mesh, weights_mesh, experts_mesh)


def _init(device: torch.device, axes: list[Axis], own_group: str | None = None) -> DeviceMesh:
    """A mesh of those axes that have more than one rank.

    `own_group`: the axis that gets a group of its own even if it spans all ranks: DeviceMesh would
    give it the default group, and its messages could not be told from those of another axis.
    """
    names, sizes = zip(*[(name, size) for name, size in axes if size > 1], strict=True)
    override: Any = {own_group: dist.get_backend()} if own_group else None
    return init_device_mesh(device.type, sizes, mesh_dim_names=names, backend_override=override)
