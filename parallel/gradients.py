"""What happens to gradients between backward and the optimizer: one global norm, one scaling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def axes_that_cut(tensor: DTensor) -> list[int]:
    """Positions in its mesh of the axes along which ranks hold different pieces of it."""
    return [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def _shard_groups(gradient: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which a gradient is cut in pieces, so that their squares must be added."""
    if not isinstance(gradient, DTensor):
        return ()
    return tuple(gradient.device_mesh.get_group(i) for i in axes_that_cut(gradient))


@torch.no_grad()
def local_norms(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The 2-norm of this rank's piece of each gradient that is there; no rank is asked."""
    pieces = [local(p.grad) for p in parameters if p.grad is not None]
    return list(torch._foreach_norm(pieces)) if pieces else []


@torch.no_grad()
def gradient_norm(
    parameters: Iterable[Tensor], mesh: Mesh, norms: list[Tensor] | None = None
) -> Tensor:
    """The 2-norm of all gradients together, the same 0-d tensor on all ranks.

    Every parameter counts once: pieces are added over the axes that shard it and over the stages of
    a pipeline, and never over axes that hold a copy. `clip_grad_norm_` refuses parameters of
    several meshes; this takes them. `norms`: what `local_norms` said of these parameters.
    """
    there = [parameter for parameter in parameters if parameter.grad is not None]
    cut: dict[tuple, tuple[dist.ProcessGroup, ...]] = {}  # by the ranks of the groups
    parts: dict[tuple, list[Tensor]] = defaultdict(list)
    for parameter, norm in zip(there, norms or local_norms(there), strict=True):
        groups = _shard_groups(parameter.grad)  # type: ignore[arg-type]
        # by ranks, not by group: DTensor may hand over an equal mesh of another model
        key = tuple(tuple(dist.get_process_group_ranks(group)) for group in groups)
        cut.setdefault(key, groups)
        parts[key].append(norm)
    total = torch.zeros((), device=mesh.device)
    for key, of_pieces in parts.items():
        squares = torch.stack(of_pieces).square().sum()
        for group in cut[key]:
            dist.all_reduce(squares, group=group)
        total += squares
    if mesh.layout.pp > 1:
        dist.all_reduce(total, group=mesh.group("pp"))
    return total.sqrt()


@torch.no_grad()
def align_gradients(parameters: Iterable[Tensor]) -> None:
    """Give each gradient the placements of its parameter, where autograd left it otherwise.

    Under sequence parallelism each rank has the partial sum of a norm's gradient for its part of
    the sequence; of an embedding that is cut by rows each has the whole gradient and keeps its own.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply all gradients by `factor`, in place."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, factor)
