"""Every message that a rank sends, whoever sends it: a c10d backend that wraps gloo and records.

Wrapping the backend is the only place that sees them all: DDP's reducer calls it from C++, FSDP
and DTensor through the dispatcher, pipelines point to point. The time of a collective ends in a
callback of its future on gloo's own thread, so that an overlapped one is measured as it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, ProcessGroupGloo
from torch.utils._python_dispatch import _disable_current_modes

from costs.memory import MemoryMeter
from costs.messages import Call, CommunicationMeter, meter, tensors_in
from costs.standing import Kind, Tally

BACKEND = "metered_gloo"

# method of a c10d backend -> (collective, argument whose bytes are the payload)
# By NCCL's convention: what all_gather gives, what reduce_scatter takes.
METHODS = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 0),
    "allgather_coalesced": ("all_gather", 0),
    "_allgather_base": ("all_gather", 0),
    "allgather_into_tensor_coalesced": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "all_gather_single_coalesced": ("all_gather", 0),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "send": ("send", 0),
    "recv": ("recv", 0),
    "recv_anysource": ("recv", 0),
    "barrier": ("barrier", None),
    "monitored_barrier": ("barrier", None),
}
LETS_GO_S = 2e-3  # after a message of a step whose memory is followed
AXIS = "mesh_"  # how DeviceMesh describes the groups that it makes, before the axis's name


def describe(collective: str, group: RecordingGroup, argument: Any, start: float) -> Call:
    """The record of a call over `group` whose payload is `argument`."""
    ranks = group.ranks
    tensors = list(tensors_in(argument))
    size = sum(t.numel() * t.element_size() for t in tensors)
    if collective in ("gather", "scatter"):
        size *= len(ranks)  # the argument is one rank's share
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "none"
    phase = meter.phases.of(collective, tensors)
    return Call(collective, ranks, group.axis, dtype, size, start, phase=phase)


@contextmanager
def unseen() -> Iterator[None]:
    """Nobody looks at operators inside: gloo copies the result of a reduce_scatter out of a buffer
    of its own."""
    if not torch._C._len_torch_dispatch_stack():
        yield
        return
    with _disable_current_modes():
        yield


class RecordedWork(dist.Work):
    """A gloo work whose wait() is timed. Its future is gloo's own: DDP waits for that in C++."""

    def __init__(self, work: dist.Work, call: Call) -> None:
        super().__init__()
        self.work, self.call = work, call
        self.future = None
        try:
            self.future = work.get_future()
            self.future.add_done_callback(self._done)
        except RuntimeError:  # point to point and reduce_scatter have none: they end at wait()
            pass

    def _done(self, _future: object) -> None:
        self.call.end = time.perf_counter()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        start = time.perf_counter()
        with unseen():
            self.work.wait(timeout) if timeout else self.work.wait()
        end = time.perf_counter()
        if self.call.end is None:
            self.call.end = end
        if MemoryMeter.following:  # a step whose time is left out
            time.sleep(LETS_GO_S)  # gloo's thread lets go of what it has sent, or peaks would vary
        if meter.recording and threading.current_thread() is threading.main_thread():
            meter.waits.append((start, end, self.call))
        return True

    def get_future(self) -> Any:
        return self.future if self.future is not None else self.work.get_future()

    def is_completed(self) -> bool:
        return self.work.is_completed()

    def is_success(self) -> bool:
        return self.work.is_success()

    def exception(self) -> Any:
        return self.work.exception()

    def result(self) -> Any:
        return self.work.result()

    def source_rank(self) -> int:
        return self.work._source_rank()

    def synchronize(self) -> None:
        self.work.synchronize()


class RecordingGroup(dist.ProcessGroup):
    """gloo's process group behind one that records every call."""

    def __init__(self, inner: dist.ProcessGroup, rank: int, ranks: list[int]) -> None:
        super().__init__(rank, len(ranks))  # type: ignore[call-arg]
        self.inner, self.own_rank, self.ranks = inner, rank, frozenset(ranks)
        self.global_ranks = ranks  # by rank in this group
        self.own_name, self.own_desc = "", ""
        self.tallies: dict[tuple[str, int | None], Tally | None] = {}

    def getSize(self) -> int:
        return len(self.ranks)

    def getRank(self) -> int:
        return self.own_rank

    size, rank = getSize, getRank

    def getBackendName(self) -> str:
        return BACKEND

    def _set_group_name(self, name: str) -> None:
        self.own_name = name
        self.inner._set_group_name(name)  # type: ignore[arg-type]

    setGroupName = _set_group_name

    def _set_group_desc(self, desc: str) -> None:
        self.own_desc = desc
        self.inner._set_group_desc(desc)

    @property
    def axis(self) -> str | None:
        """The mesh axis that this group was made for. None: nobody said, as of the group of all.

        Two axes may have the same ranks (ep and dp_shard), but each has a group of its own.
        """
        return self.own_desc.removeprefix(AXIS) if self.own_desc.startswith(AXIS) else None

    def count(self, call: Call) -> None:
        """Note how far this rank has come, where somebody is to know."""
        if meter.standing is None or len(self.ranks) == 1:
            return
        key = (call.collective if call.peer is not None else "", call.peer)
        if key not in self.tallies:
            kind = Kind(self.axis, tuple(sorted(self.ranks)), *key)
            self.tallies[key] = meter.standing.tally(kind)
        if tally := self.tallies[key]:
            tally.add(call.payload_bytes, call.collective)

    def getGroupName(self) -> str:
        return self.own_name

    def getGroupDesc(self) -> str:
        return self.own_desc

    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    def shutdown(self) -> None:
        self.inner.shutdown()

    def abort(self) -> None:
        self.inner.abort()


def _recorded(method: str, collective: str, payload: int | None) -> Callable:
    def call(self: RecordingGroup, *args: Any, **kwargs: Any) -> Any:
        inner = getattr(self.inner, method)
        argument = args[payload] if payload is not None and len(args) > payload else ()
        made = describe(collective, self, argument, time.perf_counter())
        if method in ("send", "recv"):
            made.peer = self.global_ranks[args[1]]
        meter.add(made)
        self.count(made)
        work = inner(*args, **kwargs)
        if not meter.recording:
            return work
        if work is None:  # monitored_barrier is over when it returns
            made.end = time.perf_counter()
            return work
        return RecordedWork(work, made)

    return call


for _method, (_collective, _payload) in METHODS.items():
    setattr(RecordingGroup, _method, _recorded(_method, _collective, _payload))


def _create(options: Any, _backend_options: Any) -> RecordingGroup:
    """What init_process_group calls for the backend `metered_gloo`, and new_group for subgroups."""
    rank, size = options.group_rank, options.group_size
    gloo = ProcessGroupGloo(options.store, rank, size, timeout=options.timeout)
    ranks = list(options.global_ranks_in_group) or list(range(size))
    gloo.options.global_ranks_in_group = ranks
    gloo.options.group_name = options.group_id
    gloo._set_sequence_number_for_group()
    group = ProcessGroup(options.store, rank, size)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
    return RecordingGroup(group, rank, ranks)


dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


@contextmanager
def recorded() -> Iterator[CommunicationMeter]:
    """Record what is sent inside."""
    meter.start()
    try:
        yield meter
    finally:
        meter.stop()
