"""Writes down what a rank does, operator by operator and message by message, as a Program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from costs.communication import describe
from costs.memory import WRAPPERS, MemoryMeter
from costs.messages import Call, axis_of
from costs.program import Message, Program, Wait, Work
from costs.timing import MESSAGE_KINDS
from simulator.trace_operators import cost_of
from simulator.trace_streams import Streams

functional = torch.ops._c10d_functional
# every look at a fake tensor's device is an operator, and there is one device
DEVICE, CPU = torch.ops.prim.device.default, torch.device("cpu")
# functional collective -> (collective, whether the payload is what it gives, not what it takes)
FUNCTIONAL = {
    functional.all_reduce.default: ("all_reduce", False),
    functional.all_gather_into_tensor.default: ("all_gather", True),
    functional.reduce_scatter_tensor.default: ("reduce_scatter", False),
    functional.all_to_all_single.default: ("all_to_all", False),
    functional.broadcast.default: ("broadcast", False),
}
HALVES = ("backward_input", "backward_weight")
Label = tuple[str, int | None, int | None]  # phase, stage, micro-batch
# What an operator of DTensors takes the host besides its local one, in operators of plain tensors,
# as `./launch.sh python -m experiments.figures.dispatch` measures it (two cores, torch 2.13)
DISPATCH = 2.4


class Recorder(TorchDispatchMode):
    """Records between entering and leaving. Enter it after the memory meter.

    Implements simulator.silent_world.Listener, and parallel.passes.Marks so that a step tells it
    its phases.
    """

    def __init__(
        self, axis_of_ranks: dict[frozenset[int], str], meter: MemoryMeter, streams: bool = False
    ) -> None:
        """`streams`: messages go on streams of their own where the program hands them over so, as
        on a GPU; without, they hold the rank up until they are over, as on CPUs."""
        super().__init__()
        self.axis_of_ranks, self.meter = axis_of_ranks, meter
        self.streams = Streams(self) if streams else None
        self.events: Program = []  # in the order in which the host came to them
        self.keys: list[float] = []  # of each, in the order of the program
        self.last_key: dict[tuple, float] = {}  # by group: of its last message
        self.calls: list[Call] = []
        self.label: Label = ("other", None, None)
        self.half = ""  # of a backward that a pipeline runs in two
        self.labels: dict[int, Label] = {}  # of tensors that pipeline stages send or receive
        self.arriving: dict[int, int] = {}  # storage of a functional collective -> its message
        self.in_flight: list[int] = []  # messages for which C++ will wait
        self.dispatched = 0  # operators of DTensors since the last local one

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here (simulator/silent_world.py)

    # -- operators

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is DEVICE:
            return CPU
        if any(issubclass(kind, WRAPPERS) for kind in types):
            self.dispatched += any(issubclass(kind, DTensor) for kind in types)
            return NotImplemented  # their local operators come here one by one
        kwargs = kwargs or {}
        if func is functional.wait_tensor.default:
            number = self.arriving.pop(args[0].untyped_storage()._cdata, None)
            if number is not None:
                self.waited(number)
            return args[0]  # as the real one does; a fake one makes another tensor
        out = func(*args, **kwargs)
        if func in FUNCTIONAL:
            self._functional(func, args, out)
        elif func.namespace == "_c10d_functional":
            raise ValueError(f"{func}: a collective that cannot be traced")
        else:
            self._operator(func, args, kwargs, out)
        return out

    def _operator(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        cost = cost_of(func, args, kwargs, out)
        if cost is None:
            return
        phase, stage, micro_batch = self.label
        name = str(func._overloadpacket)
        work = Work(phase, name, None, cost.flops, cost.bytes, cost.dtype, cost.shape)
        work.stage, work.micro_batch = stage, micro_batch
        work.action = self.half
        work.operators += DISPATCH * self.dispatched
        self.dispatched = 0
        self._add(work)

    def _add(self, event: Work | Message | Wait) -> None:
        place = self.streams.place() if self.streams and isinstance(event, Message) else None
        key = len(self.events) if place is None else place - 0.5  # before the event of that place
        if isinstance(event, Message):
            group = (event.axis, event.ranks)
            key = self.last_key[group] = max(key, self.last_key.get(group, key))
        self.events.append(event)
        self.keys.append(key)

    @property
    def program(self) -> Program:
        """All events, each in its place."""
        order = sorted(range(len(self.events)), key=self.keys.__getitem__)
        return [self.events[i] for i in order]

    def length(self) -> int:
        return len(self.events)

    def held_up(self, number: int) -> None:
        self._add(Wait(number, self.label[0]))

    # -- messages

    def message(self, call: Call, peer: int | None, tensors: list[Tensor]) -> int:
        self.meter.sent(tensors)
        number = len(self.calls)
        self.calls.append(call)
        ranks = tuple(sorted(call.ranks))
        label = self.label
        if peer is not None:
            own = torch.distributed.get_rank()
            ranks = (own, peer) if call.collective == "send" else (peer, own)
            label = self.labels.pop(id(tensors[0]), label)
        call.phase = label[0]
        axis = axis_of(call, self.axis_of_ranks)
        made = Message(
            number, call.collective, axis, ranks, call.dtype, call.payload_bytes, label[0]
        )
        made.stage, made.micro_batch = label[1:]
        self._add(made)
        if self.streams:
            self.streams.handed_over(number)
        return number

    def waited(self, number: int) -> None:
        if self.streams and self.streams.place() is not None:
            return  # another stream waits: the one that computes goes on
        if number in self.in_flight:
            self.in_flight.remove(number)
        self.held_up(number)

    def will_wait(self, number: int) -> None:
        self.in_flight.append(number)

    def _functional(self, func: Any, args: tuple, out: Tensor) -> None:
        collective, gives = FUNCTIONAL[func]
        group: Any = _resolve_process_group(args[-1])
        if len(group.ranks) == 1:
            return
        call = describe(collective, group, out if gives else args[0], 0.0)
        self.arriving[out.untyped_storage()._cdata] = self.message(call, None, [args[0], out])

    # -- where in the step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step: data, forward_backward, optimizer."""
        inside = ("forward", 0, 0) if name == "forward_backward" else (name, None, None)
        self.label, outside = inside, self.label
        self.half = ""
        with self.meter.phase(name):
            yield
            self._wait_for_all()
        self.label = outside

    @contextmanager
    def backward(self, _loss: Tensor) -> Iterator[None]:
        """Around the backward of a micro-batch where there is no pipeline."""
        _, stage, micro_batch = self.label
        self.label = ("backward", stage, micro_batch)
        yield
        self._wait_for_all()

    def follow(self, stages: Iterable[nn.Module]) -> None:
        """Notice where the next micro-batch begins: until then all goes with the last backward, as
        in costs/phases.py. Pipelines say it themselves (`action`)."""
        for stage in stages:
            stage.register_forward_pre_hook(self._called, prepend=True)

    def _called(self, *_: object) -> None:
        phase, stage, micro_batch = self.label
        if phase == "backward":
            self.label = ("forward", stage, (micro_batch or 0) + 1)

    def _wait_for_all(self) -> None:
        for number in list(self.in_flight):
            self.waited(number)

    @contextmanager
    def action(self, kind: str, stage: int, micro_batch: int) -> Iterator[None]:
        """Around one micro-batch's way through a pipeline's stage."""
        if kind not in MESSAGE_KINDS:
            phase = "forward" if kind in ("forward", "loss") else "backward"
            # it stays: the loss, computed when this is over, belongs to it
            self.label = (phase, stage, micro_batch)
            self.half = kind if kind in HALVES else ""
        yield

    def patches(self) -> Iterator[tuple[type, str, Callable]]:
        """What to put in the place of PipelineStage's methods, so that stage and micro-batch of
        each message are known, and of torch's streams: (owner, name, function)."""
        if self.streams:
            yield from self.streams.patches()
        for name, phase in (
            ("get_fwd_recv_ops", "forward"),
            ("get_fwd_send_ops", "forward"),
            ("get_bwd_recv_ops", "backward"),
            ("get_bwd_send_ops", "backward"),
        ):
            yield PipelineStage, name, self._sending(name, phase)

    def _sending(self, name: str, phase: str) -> Callable:
        original = getattr(PipelineStage, name)

        def call(stage: Any, micro_batch: int) -> Any:
            operations = original(stage, micro_batch)
            for one in operations:
                self.labels[id(one.tensor)] = (phase, stage.stage_index, micro_batch)
            return operations

        return call
