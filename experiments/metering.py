"""The meters of one run, put together: what the training loop and the ledger ask for.

Every step is timed and its messages are recorded; the ledger shows one of them, the same of all
ranks. Two steps are also looked at operator by operator, one for flops and one for memory: that
slows them, so their times are left out. They are two because torch's flop counter keeps alive what
activation checkpointing would have freed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from costs import clock, communication, flops
from costs.ledger import MEMORY_PARTS, TIME_PARTS
from costs.memory import MemoryMeter
from costs.messages import control_of, rows_of
from costs.timeline import Transfer, bubbles, name_axes, transfers
from costs.timing import Interval, StepRecord, StepTimer
from experiments.config import TrainConfig
from experiments.step_log import KEPT_STEPS, followed_steps, kernels_step, untimed_steps
from parallel.moments import inner
from parallel.precision import DTYPES
from parallel.step import Trainer
from simulator import lora
from simulator.flops import model_flops_per_token


class Meters:
    """Implements parallel.step.Marks, so that a step tells it what it is doing."""

    def __init__(self, config: TrainConfig, trainer: Trainer, first: int = 0) -> None:
        """`first`: the step that this process begins with, where a run goes on."""
        self.config, self.trainer, self.mesh = config, trainer, trainer.replica.mesh
        trainer.marks = self
        self.alone = config.layout.world_size == 1
        metered = dist.is_initialized() and dist.get_backend() == communication.BACKEND
        self.communication = communication.meter if metered else None
        shared = self.communication is not None and not self.alone
        self.clock_offset = clock.offset_to_first() if shared else 0.0
        if self.communication:
            self.communication.phases.follow(trainer.replica.stages)
        self.timer = StepTimer(self.mesh.device, self.communication)
        self.first = first
        self.flops_step, self.memory_step = followed_steps(config.steps, first)
        on_gpu = self.mesh.device.type == "cuda"
        self.kernels_step = kernels_step(config.steps, first) if config.trace and on_gpu else None
        self.kernels: torch.profiler.profile | None = None  # once it has recorded a step
        self.steps: deque[StepRecord] = deque(maxlen=KEPT_STEPS)
        self.last = StepRecord(0.0)  # warm-up or not
        self.records: list[StepRecord] = []  # the step that is shown, of all ranks, on one clock
        self.transfers: list[list[Transfer]] = []
        self.followed: MemoryMeter | None = None  # once it has followed a step
        self.memory_record = StepRecord(0.0)  # of that step
        self.allocator_peak: int | None = None
        self.hardware_flops: int | None = None
        self.memory_meter: MemoryMeter | None = None
        self.last_step_s = 0.0
        self.flops_per_token = flops_per_token(config)

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Around one step of the loop; `index` counts from 0."""
        looking = self._looking(index)
        if self.communication and self.communication.standing:
            self.communication.standing.at_step(index)
        with ExitStack() as stack:
            if self.communication:
                stack.enter_context(communication.recorded())
            stack.enter_context(looking or nullcontext())
            start = time.perf_counter()
            with self.timer.step():
                yield
            self.last_step_s = time.perf_counter() - start
        self.last = self.timer.record
        if index == self.memory_step:
            self.memory_record = self.last
        if index not in untimed_steps(self.config.steps, self.config.compile, self.first):
            self.steps.append(self.last)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step: data, forward_backward, optimizer."""
        messages = self.communication.phases.during(name) if self.communication else nullcontext()
        looked_at = self._phase_looked_at(name) if self.memory_meter else self.timer.phase(name)
        with messages, looked_at:
            yield

    def backward(self, loss: Tensor) -> AbstractContextManager:
        return self.timer.backward(loss)

    def action(self, kind: str, stage: int, micro_batch: int) -> AbstractContextManager:
        return self.timer.action(kind, stage, micro_batch)

    @contextmanager
    def _phase_looked_at(self, name: str) -> Iterator[None]:
        assert self.memory_meter
        with self.memory_meter.phase(name), self.timer.phase(name):
            yield

    def _looking(self, index: int) -> AbstractContextManager | None:
        """What looks at every operator of step `index`; None for nearly all steps.

        A compiled step hides its operators: its memory and flops stay null. A GPU's allocator knows
        what it held all the same.
        """
        if index == self.kernels_step:
            return self._record_kernels()
        if index == self.memory_step:
            followed = nullcontext() if self.config.compile else self._follow_memory()
            return self._ask_allocator(followed)
        looked_at = index == self.flops_step and not self.config.compile
        return self._count_flops() if looked_at else None

    @contextmanager
    def _follow_memory(self) -> Iterator[None]:
        state = inner(self.trainer.optimizer).state
        self.memory_meter = MemoryMeter(self.trainer.replica, state)
        with self.memory_meter:
            yield
        self.followed, self.memory_meter = self.memory_meter, None

    @contextmanager
    def _ask_allocator(self, inside: AbstractContextManager) -> Iterator[None]:
        on_gpu = self.mesh.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.mesh.device)
        with inside:
            yield
        if on_gpu:
            self.allocator_peak = torch.cuda.max_memory_allocated(self.mesh.device)

    @contextmanager
    def _record_kernels(self) -> Iterator[None]:
        """The host's operators and the device's kernels, by torch's profiler."""
        with torch.profiler.profile() as recorded:
            yield
        self.kernels = recorded

    @contextmanager
    def _count_flops(self) -> Iterator[None]:
        with flops.counted() as counter:
            yield
        self.hardware_flops = counter.get_total_flops()

    def costs(self) -> dict[str, Any]:
        """This rank's `step` of the ledger. Call it after the last step, on all ranks."""
        self.timer.settle()
        shown = self._show()
        times = dict.fromkeys(("total", *TIME_PARTS))
        if self.steps:
            seen = self.alone or self.communication is not None
            times = shown.parts(self._bubble(), metered=seen)
        tokens = self.config.batch_size * self.config.seq_len
        model_flops = self.flops_per_token * tokens / self.config.layout.world_size
        self.peak_flops = self._measure_peak()
        total = times["total"]
        return {
            "tokens": tokens,
            "time_s": times,
            "memory_bytes": self._memory(),
            "process_bytes": {
                "resident_peak": resident_peak(),
                "allocator_peak": self.allocator_peak,
            },
            "communication": self._rows(shown),
            "control": self._control(shown),
            "flops": {"model": model_flops, "hardware": self.hardware_flops},
            "tokens_per_s": tokens / total if total else None,
            "mfu": utilisation(model_flops, total, self.peak_flops),
            "hfu": utilisation(self.hardware_flops, total, self.peak_flops),
        }

    def _show(self) -> StepRecord:
        """Settle which step the ledger shows, and let all ranks see it of all ranks where a
        pipeline or a trace asks for that."""
        shown = self._median_step() if self.steps else self.last
        name_axes(shown, self.mesh.axis_of_ranks())
        if self.config.layout.pp > 1 or self.config.trace:
            shown.shift(self.clock_offset)
            self.records = self.mesh.from_all(shown)
            self.transfers = transfers(self.records)
        return shown

    def _median_step(self) -> StepRecord:
        """The step with the (lower) median time of its slowest rank: a real one, so that its parts
        add up, and the same on all ranks."""
        totals = self.mesh.from_all([step.total for step in self.steps])
        slowest = [max(times) for times in zip(*totals, strict=True)]
        return self.steps[
            sorted(range(len(slowest)), key=slowest.__getitem__)[(len(slowest) - 1) // 2]
        ]

    def _memory(self) -> dict[str, int | None]:
        """What was held at the peak; null where no step was followed."""
        if self.followed:
            return dict(self.followed.result())
        return dict.fromkeys(("peak", *MEMORY_PARTS))

    def _bubble(self) -> list[Interval] | None:
        """When this rank had nothing to do; null where messages are not seen."""
        if self.config.layout.pp == 1:
            return []
        rank = self.mesh.rank
        return bubbles(self.records[rank], self.transfers[rank]) if self.communication else None

    def _rows(self, shown: StepRecord) -> list[dict[str, Any]] | None:
        """Null where the backend is not metered: what was not seen is not zero."""
        if self.communication is None and not self.alone:
            return None
        return rows_of(shown.calls, self.mesh.axis_of_ranks())

    def _control(self, shown: StepRecord) -> dict[str, Any] | None:
        """Traffic that is no part of a step's mathematics; null where it was not seen."""
        if self.communication is None:
            return None
        outside = asdict(self.communication.outside)
        return {**asdict(control_of(shown.calls)), "outside_steps": outside}

    def _measure_peak(self) -> float:
        """This device's own peak, on all ranks at once, as they compute at once too. With fp8 it is
        bf16's, in which much is still computed: more than all of it may be had."""
        return flops.measure_peak_flops(self.mesh.device, DTYPES[self.config.precision])

    @property
    def device_name(self) -> str | None:
        device = self.mesh.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def resident_peak() -> int | None:
    """The high-water mark of this process's resident memory (Linux's VmHWM), in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    marks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(marks[0]) * 1024 if marks else None


def flops_per_token(config: TrainConfig) -> int:
    """Model flops of one token, forward and backward."""
    if config.finetune.on:
        return lora.model_flops_per_token(config.model, config.finetune, config.seq_len)
    return model_flops_per_token(config.model, config.seq_len)


def utilisation(done: float | None, seconds: float | None, peak: float | None) -> float | None:
    """The share of the peak; null where any of the three was not measured."""
    if done is None or not seconds or not peak:
        return None
    return done / seconds / peak
