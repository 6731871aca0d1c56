"""A world of which one rank is there: its messages go nowhere, its tensors have no memory.

torch.distributed believes that all ranks have joined: a c10d backend takes every message, notes it
and calls it done. Tensors are fake ones (torch's FakeTensorMode): shapes, dtypes and storages, and
no numbers. So what this rank reads of numbers, where its program depends on them, is made up:
  ints    1   (pipelining's vote on known shapes)
  floats  1e6 (a gradient norm: above any bound, so that gradients are clipped)
  counts  of the rows that experts get: even shares
One such world in a process at a time, and none beside a real process group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.parallel.distributed as torch_ddp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._mesh_layout import _MeshLayout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import (
    _clear_fast_path_sharding_prop_cache,
    _clear_python_sharding_prop_cache,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import minigpt.experts
import parallel.experts
from costs.communication import METHODS, RecordingGroup, describe
from costs.messages import Call, tensors_in
from minigpt.model import GPT
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh

BACKEND = "silent"
NORM = 1e6  # what a number of floating point is taken for


class Listener(Protocol):
    """Who is told what this rank sends."""

    def message(self, call: Call, peer: int | None, tensors: list[Tensor]) -> int:
        """A message was handed over; `peer` is the other rank of a send or recv. Returns the
        number by which `waited` will name it."""
        ...

    def waited(self, number: int) -> None: ...

    def will_wait(self, number: int) -> None:
        """Something in C++ waits for it, sooner or later: DDP, at the end of backward."""
        ...


class _Wire:
    listener: Listener | None = None


_wire = _Wire()


class SilentWork(dist.Work):
    """Done before it began."""

    def __init__(self, number: int | None, result: list[Tensor]) -> None:
        super().__init__()
        self.number, self.tensors = number, result

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self.number is not None and _wire.listener:
            _wire.listener.waited(self.number)
        return True

    def get_future(self) -> Any:
        if self.number is not None and _wire.listener:
            _wire.listener.will_wait(self.number)
        future: Any = torch.futures.Future()
        future.set_result(self.tensors)
        return future

    def is_completed(self) -> bool:
        return True


class _Nobody:
    """Stands where a group has its backend."""

    def ignore(self, *_args: Any) -> None: ...

    _set_group_name = _set_group_desc = shutdown = abort = ignore


class SilentGroup(RecordingGroup):
    """A process group whose other ranks are not there."""

    def __init__(self, rank: int, ranks: list[int]) -> None:
        super().__init__(_Nobody(), rank, ranks)  # type: ignore[arg-type]
        self.members = ranks  # global, in the order of their rank in the group


def _silent(collective: str, payload: int | None) -> Callable:
    def call(self: SilentGroup, *args: Any, **_kwargs: Any) -> SilentWork:
        argument = args[payload] if payload is not None and len(args) > payload else ()
        number = None
        if _wire.listener and len(self.members) > 1 and collective != "barrier":
            peer = self.members[args[1]] if collective in ("send", "recv") else None
            made = describe(collective, self, argument, 0.0)
            number = _wire.listener.message(made, peer, list(tensors_in(list(args))))
        return SilentWork(number, list(tensors_in(args[0])) if args else [])

    return call


for _method, (_collective, _payload) in METHODS.items():
    setattr(SilentGroup, _method, _silent(_collective, _payload))


def _create(options: Any, _backend_options: Any) -> SilentGroup:
    """What init_process_group calls for the backend, and new_group for subgroups."""
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    return SilentGroup(options.group_rank, ranks)


dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Tell `listener` what is sent inside."""
    _wire.listener = listener
    try:
        yield
    finally:
        _wire.listener = None


@contextmanager
def silent_world(layout: Layout, rank: int) -> Iterator[tuple[Mesh, FakeTensorMode]]:
    """Be `rank` of a resolved layout. The mesh is built; enter the mode to run anything.

    Raises RuntimeError where this process is in a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a trace needs a process that has joined no process group")
    size = layout.world_size
    mode = Numberless()
    with ExitStack() as patches:
        for owner, name, value in _patches(mode):
            patches.enter_context(replaced(owner, name, value))
        patches.callback(_clear_caches)  # they would hand out meshes of the last world
        if size > 1:
            dist.init_process_group(BACKEND, rank=rank, world_size=size, store=dist.HashStore())
            patches.callback(dist.destroy_process_group)
        yield build_mesh(layout, torch.device("cpu")), mode


def filling(mode: FakeTensorMode) -> Callable[[GPT], None]:
    """What parallelize() calls to give a model its memory: storages of the right size."""

    def fill(model: GPT) -> None:
        # parallelize() itself runs outside the mode. Plain tensors on the meta device are cut in
        # a thousand shards in no time; fake ones took two minutes (70 B parameters, 1024 ranks)
        mode.allow_non_fake_inputs = True
        with mode:
            model.to_empty(device="cpu")
            model.tie()
        mode.allow_non_fake_inputs = False

    return fill


def _clear_caches() -> None:
    _clear_python_sharding_prop_cache()
    _clear_fast_path_sharding_prop_cache()


class Numberless(FakeTensorMode):
    """Answers what reads a number with one that is made up."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard is a tenth of a trace's time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return NORM if args[0].dtype.is_floating_point else 1
        return self.dispatch(func, types, args, kwargs or {})


def even_shares(counts: Tensor, even: int) -> list[int]:
    """`even` rows dealt out to as many as there are counts, the first ones getting the rest."""
    share, rest = divmod(even, len(counts))
    return [share + (i < rest) for i in range(len(counts))]


def _patches(mode: FakeTensorMode) -> Iterable[tuple[Any, str, Any]]:
    """Where torch (2.13) or this program reads numbers."""
    yield minigpt.experts, "on_host", even_shares
    yield parallel.experts, "on_host", even_shares
    # a mesh is made of real tensors of ranks, also where it is made or cut within the mode
    real = functools.partial(_inside, unset_fake_temporarily)
    yield _MeshLayout, "remap_to_tensor", real(_MeshLayout.remap_to_tensor)
    yield DeviceMesh, "__getitem__", real(DeviceMesh.__getitem__)
    yield DeviceMesh, "__init__", real(DeviceMesh.__init__)
    yield DeviceMesh, "_concatenate", staticmethod(real(DeviceMesh._concatenate))
    # DTensor tries an operator that is new to it on the whole shapes: that is not the rank's work,
    # and no mode may record it
    name = "_propagate_tensor_meta_non_cached"
    yield (
        ShardingPropagator,
        name,
        _inside(_disable_current_modes, getattr(ShardingPropagator, name)),
    )
    # DDP makes its buckets as it is made; it compares and broadcasts weights once, before a step
    ddp = torch_ddp.DistributedDataParallel
    yield ddp, "__init__", _inside(lambda: mode, ddp.__init__)
    yield torch_ddp, "_verify_param_shape_across_processes", _nothing
    yield torch_ddp, "_sync_module_states", _nothing


def _nothing(*_args: Any, **_kwargs: Any) -> None: ...


def _inside(context: Callable[[], AbstractContextManager], function: Callable) -> Callable:
    """`function`, which then always runs inside what `context` gives."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return called


class _RealIndices(TorchDispatchMode):
    """Integers that were never fake stay real: DDP's reducer reads them in C++."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in([*args, *kwargs.values()]))
        dtype = kwargs.get("dtype", tensors[0].dtype if tensors else None)
        if dtype == torch.int32 and not any(isinstance(t, FakeTensor) for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def rebuild_buckets(model: Any) -> None:
    """As DDP does before its second forward, in the order in which gradients came."""
    with _RealIndices():
        model.reducer._rebuild_buckets()  # a no-op but for once


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `owner` has `value` for its attribute `name`, which it may have inherited."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
