"""What one operator of torch costs, from its arguments: flops, bytes, the shape of its product."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

import costs.flops  # noqa: F401  registers what torch's counter misses
from costs.messages import tensors_in

aten = torch.ops.aten

# They give memory, or a number, and start no kernel. Views are known by their schema
NO_KERNEL = ("empty", "new_empty", "_local_scalar_dense", "resize_", "set_", "lift_fresh")
# Of their first argument they read as much as they give
READ_AS_GIVEN = ("embedding", "index_select", "gather", "index")
# Of what they change they touch as much as they are given
WRITE_AS_GIVEN = ("index_copy_", "index_put_", "index_add_", "scatter_", "scatter_add_")
# What they change they do not read
ONLY_WRITE = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_")
NOT_WRITTEN = {("_fused_adamw_", "grads"), ("_fused_sgd_", "grads")}  # whatever the schema says
# of a product: the places of its two matrices among the arguments
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}


class Cost(NamedTuple):
    flops: int
    bytes: int  # read and written
    dtype: str
    shape: tuple[int, ...]  # as in costs.program.Work


def cost_of(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Cost | None:
    """The cost of one call; None where it starts no kernel.

    Bytes are those of the tensors: what a kernel reads again, or keeps in a cache, is not known.
    """
    name = func._schema.name.partition("::")[2]
    if func.is_view or name.startswith(NO_KERNEL):
        return None
    if name == "all_gather_copy_in":  # of fsdp: into this rank's part of the buffer
        copied = list(tensors_in(args[0]))
        return Cost(0, 2 * _size(copied), _dtype(copied), ())
    given, changed, filled = _split(func, name, args, kwargs)
    known = {t.untyped_storage()._cdata for t in (*given, *changed, *filled)}
    fresh = [t for t in tensors_in(out) if t.untyped_storage()._cdata not in known] + filled
    if not changed and not fresh:
        return None
    formula = flop_registry.get(func._overloadpacket)
    flops = formula(*args, **kwargs, out_val=out) if formula else 0
    shape = _shape(name, args)
    dtype = _dtype(given if shape else fresh or changed)
    return Cost(int(flops), _bytes(name, given, changed, fresh), dtype, shape)


def _split(
    func: Any, name: str, args: tuple, kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Tensors that are only read, those that are changed, and those that `out=` has filled."""
    given: list[Tensor] = []
    changed: list[Tensor] = []
    filled: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        alias = argument.alias_info
        written = alias is not None and alias.is_write and (name, argument.name) not in NOT_WRITTEN
        into = given if not written else filled if argument.name == "out" else changed
        into.extend(tensors_in(value))
    return given, changed, filled


def _bytes(name: str, given: list[Tensor], changed: list[Tensor], fresh: list[Tensor]) -> int:
    if name in READ_AS_GIVEN:
        return 2 * _size(fresh) + _size(given[1:])
    if name in WRITE_AS_GIVEN:
        return 2 * _size(given)
    read = _size(given) + (0 if name in ONLY_WRITE else _size(changed))
    return read + _size(changed) + _size(fresh)


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors; of one that repeats itself, as expand() makes it, only once."""
    return sum(
        t.element_size() * math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step)
        for t in tensors
    )


def _dtype(tensors: list[Tensor]) -> str:
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "none"


def _shape(name: str, args: tuple) -> tuple[int, ...]:
    if name in PRODUCTS:
        left, right = (args[i] for i in PRODUCTS[name])
        return (1, *left.shape, right.shape[-1])[-4:]
    if "scaled_dot_product" in name:
        first = 1 if "backward" in name else 0  # a backward takes the gradient first
        (B, N, T, H), S = args[first].shape, args[first + 1].shape[2]
        return (B * N, T, H, S)
    return ()
