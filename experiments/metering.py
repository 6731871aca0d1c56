"""The meters of one run, put together: what the training loop and the ledger ask for.

Every step is timed and its messages are recorded. One step, after the first two have warmed up, is
also looked at operator by operator for memory and flops: that slows it, so its time is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from costs import communication, flops
from costs.ledger import MEMORY_PARTS, TIME_PARTS, median_step
from costs.memory import MemoryMeter
from costs.timing import StepTimer
from experiments.config import Backend, TrainConfig
from minigpt.config import FFN
from parallel.precision import DTYPES
from parallel.step import Trainer

DETAILED_STEP = 2  # the third: by then DDP has its final buckets and AdamW its moments
WARMUP_STEPS = 5  # left out of times: caches, compilation, first touches of memory


class Meters:
    """Implements parallel.step.Marks, so that a step tells it what it is doing."""

    def __init__(self, config: TrainConfig, trainer: Trainer) -> None:
        self.config, self.trainer, self.mesh = config, trainer, trainer.replica.mesh
        trainer.marks = self
        alone = config.layout.world_size == 1
        metered = config.backend == Backend.gloo and not alone
        self.communication = communication.meter if metered else None
        self.timer = StepTimer(self.mesh.device, self.communication, alone)
        self.detailed_step = min(DETAILED_STEP, config.steps - 1)
        self.times: list[dict[str, float | None]] = []
        self.rows: list[dict[str, Any]] = []
        self.memory: dict[str, int | None] = dict.fromkeys(("peak", *MEMORY_PARTS))
        self.hardware_flops: int | None = None
        self.memory_meter: MemoryMeter | None = None
        self.last_step_s = 0.0
        self.flops_per_token = flops_per_token(config)

    @contextmanager
    def step(self, index: int) -> Iterator[None]:
        """Around one step of the loop; `index` counts from 0."""
        detailed = index == self.detailed_step
        with ExitStack() as stack:
            if self.communication:
                stack.enter_context(communication.recorded())
            looking = stack.enter_context(self._looking()) if detailed else None
            start = time.perf_counter()
            with self.timer.step():
                yield
            self.last_step_s = time.perf_counter() - start
        if looking:
            self._keep_details(looking)
        elif index >= min(WARMUP_STEPS, self.config.steps // 2):
            self.times.append(self.timer.last)

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

    @contextmanager
    def _looking(self) -> Iterator[Any]:
        """Memory and flops of the step inside. A compiled step hides its operators: null then."""
        if self.config.compile:
            yield None
            return
        memory = MemoryMeter(self.trainer.replica.model, self.trainer.optimizer)
        self.memory_meter = memory
        with flops.counted() as counter, memory:
            yield counter
        self.memory = dict(memory.result())
        self.memory_meter = None

    def _keep_details(self, counter: Any) -> None:
        self.hardware_flops = counter.get_total_flops()

    def costs(self) -> dict[str, Any]:
        """This rank's `step` of the ledger. Call it after the last step, on all ranks."""
        if self.communication:
            self.rows = self.communication.rows(self.mesh.axis_of_ranks())
        times = median_step(self.times) if self.times else dict.fromkeys(("total", *TIME_PARTS))
        tokens = self.config.batch_size * self.config.seq_len
        model_flops = self.flops_per_token * tokens / self.config.layout.world_size
        self.peak_flops = self._measure_peak()
        total = times["total"]
        return {
            "tokens": tokens,
            "time_s": times,
            "memory_bytes": self.memory,
            "communication": self.rows,
            "flops": {"model": model_flops, "hardware": self.hardware_flops},
            "tokens_per_s": tokens / total if total else None,
            "mfu": utilisation(model_flops, total, self.peak_flops),
            "hfu": utilisation(self.hardware_flops, total, self.peak_flops),
        }

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
    kv_dim, gated = model.kv_heads * model.head_dim, model.ffn == FFN.swiglu
    weights = flops.matmul_parameters(
        model.n_layer, model.d_model, kv_dim, model.ff_dim, gated, model.vocab_size
    )
    return flops.model_flops_per_token(weights, model.n_layer, model.d_model, config.seq_len)


def utilisation(done: float | None, seconds: float | None, peak: float | None) -> float | None:
    """The share of the peak; null where any of the three was not measured."""
    if done is None or not seconds or not peak:
        return None
    return done / seconds / peak
