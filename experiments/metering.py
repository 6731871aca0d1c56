"""The meters of one run, put together: what the training loop and the ledger ask for.

Every step is timed and its messages are recorded. Two steps are also looked at operator by
operator, one for flops and one for memory: that slows them, so their times are left out. They are
two because torch's flop counter keeps alive what activation checkpointing would have freed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from costs import communication, flops
from costs.communication import Call, rows_of
from costs.ledger import MEMORY_PARTS, TIME_PARTS
from costs.memory import MemoryMeter
from costs.timing import StepTimer
from experiments.config import TrainConfig
from minigpt.config import FFN
from parallel.moments import inner
from parallel.precision import DTYPES
from parallel.step import Trainer

MEMORY_STEP = 2  # the third: by then DDP has its final buckets and AdamW its moments
WARMUP_STEPS = 5  # left out of times: caches, compilation, first touches of memory
KEPT_STEPS = 500  # the last ones, of which the median is taken: a long run must not grow


@dataclass(frozen=True)
class MeasuredStep:
    """Times and messages of one step, as they were."""

    time_s: dict[str, float | None]
    calls: list[Call]


class Meters:
    """Implements parallel.step.Marks, so that a step tells it what it is doing."""

    def __init__(self, config: TrainConfig, trainer: Trainer, first: int = 0) -> None:
        """`first`: the step that this process begins with, where a run goes on."""
        self.config, self.trainer, self.mesh = config, trainer, trainer.replica.mesh
        trainer.marks = self
        self.alone = config.layout.world_size == 1
        metered = dist.is_initialized() and dist.get_backend() == communication.BACKEND
        self.communication = communication.meter if metered else None
        staged = config.layout.pp > 1
        self.timer = StepTimer(self.mesh.device, self.communication, self.alone, staged)
        own = config.steps - first
        self.warm = first + min(WARMUP_STEPS, own // 2)
        self.memory_step = first + min(MEMORY_STEP, own - 1)
        self.flops_step = self.memory_step - 1  # a run of one step does not count its flops
        self.steps: deque[MeasuredStep] = deque(maxlen=KEPT_STEPS)
        self.last: MeasuredStep | None = None  # warm-up or not
        self.memory: dict[str, int | None] = dict.fromkeys(("peak", *MEMORY_PARTS))
        self.hardware_flops: int | None = None
        self.memory_meter: MemoryMeter | None = None
        self.last_step_s = 0.0
        self.flops_per_token = flops_per_token(config)

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Around one step of the loop; `index` counts from 0."""
        looking = self._looking(index)
        with ExitStack() as stack:
            if self.communication:
                stack.enter_context(communication.recorded())
            stack.enter_context(looking or nullcontext())
            start = time.perf_counter()
            with self.timer.step():
                yield
            self.last_step_s = time.perf_counter() - start
        calls = self.communication.calls if self.communication else []
        self.last = MeasuredStep(self.timer.last, calls)
        if not looking and index >= self.warm:
            self.steps.append(self.last)

    def phase(self, name: str) -> AbstractContextManager:
        """Around a part of the step: data, forward_backward, optimizer."""
        return self._phase_looked_at(name) if self.memory_meter else self.timer.phase(name)

    def backward(self, loss: Tensor) -> AbstractContextManager:
        return self.timer.backward(loss)

    @contextmanager
    def _phase_looked_at(self, name: str) -> Iterator[None]:
        assert self.memory_meter
        self.memory_meter.default = "activations" if name == "forward_backward" else "other"
        with self.timer.phase(name):
            yield
        self.memory_meter.default = "other"
        self.memory_meter.look()

    def _looking(self, index: int) -> AbstractContextManager | None:
        """What looks at every operator of step `index`; None for nearly all steps.

        A compiled step hides its operators: its memory and flops stay null.
        """
        if self.config.compile or index not in (self.memory_step, self.flops_step):
            return None
        return self._follow_memory() if index == self.memory_step else self._count_flops()

    @contextmanager
    def _follow_memory(self) -> Iterator[None]:
        state = inner(self.trainer.optimizer).state
        self.memory_meter = MemoryMeter(self.trainer.replica, state)
        with self.memory_meter:
            yield
        self.memory = dict(self.memory_meter.result())
        self.memory_meter = None

    @contextmanager
    def _count_flops(self) -> Iterator[None]:
        with flops.counted() as counter:
            yield
        self.hardware_flops = counter.get_total_flops()

    def costs(self) -> dict[str, Any]:
        """This rank's `step` of the ledger. Call it after the last step, on all ranks."""
        times = dict.fromkeys(("total", *TIME_PARTS))
        if self.steps:
            times = self._median_step().time_s
        tokens = self.config.batch_size * self.config.seq_len
        model_flops = self.flops_per_token * tokens / self.config.layout.world_size
        self.peak_flops = self._measure_peak()
        total = times["total"]
        return {
            "tokens": tokens,
            "time_s": times,
            "memory_bytes": self.memory,
            "communication": self._rows(),
            "flops": {"model": model_flops, "hardware": self.hardware_flops},
            "tokens_per_s": tokens / total if total else None,
            "mfu": utilisation(model_flops, total, self.peak_flops),
            "hfu": utilisation(self.hardware_flops, total, self.peak_flops),
        }

    def _median_step(self) -> MeasuredStep:
        """The step with the (lower) median time: a real one, so that its parts add up."""
        ordered = sorted(self.steps, key=lambda step: step.time_s["total"] or 0.0)
        return ordered[(len(ordered) - 1) // 2]

    def _rows(self) -> list[dict[str, Any]] | None:
        """Messages of the median step, or of the last where a run was too short to have one.

        None where the backend is not metered: what was not seen is not zero.
        """
        if self.communication is None and not self.alone:
            return None
        shown = self._median_step() if self.steps else self.last
        return rows_of(shown.calls, self.mesh.axis_of_ranks()) if shown else []

    def _measure_peak(self) -> float:
        """This device's own peak, on all ranks at once, as they compute at once too."""
        return flops.measure_peak_flops(self.mesh.device, DTYPES[self.config.precision])

    @property
    def device_name(self) -> str | None:
        device = self.mesh.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def flops_per_token(config: TrainConfig) -> int:
    """Model flops of one token, forward and backward."""
    model = config.model
    kv_dim, gated = model.kv_heads * model.head_dim, model.ffn != FFN.gelu
    experts = (model.n_expert, model.experts_per_token) if model.ffn == FFN.moe else (0, 1)
    weights = flops.matmul_parameters(
        model.n_layer, model.d_model, kv_dim, model.ff_dim, gated, model.vocab_size, *experts
    )
    return flops.model_flops_per_token(weights, model.n_layer, model.d_model, config.seq_len)


def utilisation(done: float | None, seconds: float | None, peak: float | None) -> float | None:
    """The share of the peak; null where any of the three was not measured."""
    if done is None or not seconds or not peak:
        return None
    return done / seconds / peak
