"""What fills a rank's memory, by category, at the moment when it is fullest.

A storage is counted once, however many tensors view it, from the operator that makes it until
Python's last reference goes. Every change is kept in a log; what a storage was is decided after the
step, with all that was learned of it: a buffer that ends as a parameter's gradient was a gradient
from the beginning. Works with any wrapper, since it looks at storages and at no module.

Categories, the first that fits (DDP's buckets are gradients, which are views of them):
parameters     this rank's part of the model's parameters and buffers
gradients      storages that were some parameter's .grad in this step
optimizer      tensors in the optimizer's state
communication  what a collective read or wrote, and weights that FSDP has gathered
activations    made in forward or backward, temporaries of backward included
other          the rest: batches, temporaries of the optimizer
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from costs.ledger import MEMORY_PARTS
from costs.messages import tensors_in

# Tensors around tensors, whose own storage is none
WRAPPERS = (DTensor, AsyncCollectiveTensor)
# Gathering a block's gradients for reduce_scatter is part of the message
FSDP_COPIES = ("fsdp::chunk_cat", "fsdp::split_with_sizes_copy", "fsdp::all_gather_copy_in")
STRONGEST_FIRST = (
    "parameters",
    "gradients",
    "optimizer",
    "communication",
    "activations",
    "other",
)
STRENGTH = {category: -i for i, category in enumerate(STRONGEST_FIRST)}


def moves_messages(operator: Any) -> bool:
    """Whether what an operator reads and makes is there for a message."""
    of_messages = operator.namespace in ("c10d", "_c10d_functional")
    return of_messages or operator.name().startswith(FSDP_COPIES)


class HoldsTensors(Protocol):
    """A module, or what stands for several."""

    def parameters(self) -> Iterator[Tensor]: ...

    def buffers(self) -> Iterator[Tensor]: ...


class MemoryMeter(TorchDispatchMode):
    """Follows every storage between entering and leaving. Enter before gradients are zeroed."""

    following = False  # whether one of them is between entering and leaving

    def __init__(self, model: HoldsTensors, optimizer_state: Mapping[Any, Any]) -> None:
        super().__init__()
        self.model, self.optimizer_state = model, optimizer_state
        self.default = "other"  # the category of what is made now; the phases set it
        # (storage number, change in bytes, when by time.perf_counter)
        self.log: list[tuple[int, int, float]] = []
        self.category: dict[int, str] = {}  # by storage number
        self._number: dict[int, int] = {}  # of live storages, by address
        self._size: list[int] = []  # by storage number
        self._alive: dict[int, weakref.ref] = {}  # by storage number
        self._is_message: dict[Any, bool] = {}  # by operator
        self.fake_mode: FakeTensorMode | None = None  # of a traced step; a real one has none

    def __enter__(self) -> MemoryMeter:
        self.fake_mode = detect_fake_mode()
        self.look()
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._patched_resize()  # type: ignore[method-assign]
        super().__enter__()
        MemoryMeter.following = True
        return self

    def __exit__(self, *error: Any) -> None:
        MemoryMeter.following = False
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self.look()
        self._alive.clear()  # what ends later is none of this meter's business

    def look(self) -> None:
        """Find what is a parameter, a gradient or the optimizer's. Call it between phases too."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._add(tensor, "parameters")
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                self._add(parameter.grad, "gradients")
        for state in self.optimizer_state.values():
            for tensor in tensors_in(list(state.values())):
                self._add(tensor, "optimizer")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step: what forward and backward make are activations."""
        self.default = "activations" if name == "forward_backward" else "other"
        yield
        self.default = "other"
        self.look()

    def sent(self, tensors: Iterable[Tensor]) -> None:
        """What a message reads or writes."""
        for tensor in tensors:
            self._add(tensor, "communication")

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for kind in types:
            if issubclass(kind, WRAPPERS):
                return NotImplemented  # their local operators come here one by one
        out = func(*args, **kwargs) if kwargs else func(*args)
        message = self._is_message.get(func)
        if message is None:
            message = self._is_message[func] = moves_messages(func)
        category = self.default
        if message:
            category = "communication"
            self.sent(tensors_in([*args, *(kwargs or {}).values()]))
        if type(out) is Tensor:  # nearly always
            self._add(out, category)
        else:
            for tensor in tensors_in(out):
                self._add(tensor, category)
        return out

    def result(self) -> dict[str, int]:
        """The peak in bytes and its parts, which add up to it."""
        total, peak, at = 0, 0, 0
        for i, (_, change, _) in enumerate(self.log):
            total += change
            if total > peak:
                peak, at = total, i + 1
        parts = dict.fromkeys(MEMORY_PARTS, 0)
        for number, change, _ in self.log[:at]:
            parts[self.category[number]] += change
        return {"peak": peak, **parts}

    def timeline(self, samples: int = 1000) -> list[tuple[float, dict[str, int]]]:
        """(moment, bytes by category) in order; of each stretch of time the fullest moment and the
        last, so that the peak is there however few `samples` there are."""
        held, total = dict.fromkeys(MEMORY_PARTS, 0), 0
        if not self.log:
            return []
        begin = self.log[0][2]
        width = (self.log[-1][2] - begin) / samples or 1.0
        found: dict[int, list[tuple[float, dict[str, int]]]] = {}
        fullest: dict[int, int] = {}
        for number, change, moment in self.log:
            held[self.category[number]] += change
            total += change
            stretch = int((moment - begin) / width)
            now = (moment, dict(held))
            if total > fullest.get(stretch, -1):  # the first of several, as in result()
                fullest[stretch], found[stretch] = total, [now]
            else:
                found[stretch][1:] = [now]
        return [sample for stretch in found.values() for sample in stretch]

    def _add(self, tensor: Tensor, category: str) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor  # to_local() makes a view, and a node of autograd
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.elem
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        # DTensor runs an operator that is new to it on fake tensors of its own, to learn shapes
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is not self.fake_mode:
            return
        self._see(tensor.untyped_storage(), category)

    def _see(self, storage: torch.UntypedStorage, category: str) -> None:
        """Note a storage, its size as it is now, and the strongest category it has shown."""
        address = storage._cdata
        number = self._number.get(address)
        if number is None:
            number = self._number[address] = len(self._size)
            self._size.append(0)
            self.category[number] = category
            self._alive[number] = weakref.ref(storage, partial(self._gone, address, number))
        elif STRENGTH[category] > STRENGTH[self.category[number]]:
            self.category[number] = category
        self._resized(number, storage.nbytes())

    def _resized(self, number: int, size: int) -> None:
        change = size - self._size[number]
        if change:
            self._size[number] = size
            self.log.append((number, change, time.perf_counter()))

    def _gone(self, address: int, number: int, _storage: object) -> None:
        self._resized(number, 0)
        self._alive.pop(number, None)
        if self._number.get(address) == number:
            del self._number[address]

    def _patched_resize(self) -> Any:
        """FSDP frees and refills the weights that it gathers by resizing their storage."""
        original = self._resize

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = original(storage, size)
            self._see(storage, "communication")
            return done

        return resize
