"""One rank's step of any layout, traced: the model and the strategies that train, and no memory.

The very code of parallel/ runs as one rank of N on fake tensors in a world where nobody else is
(simulator/silent_world.py). What comes out is what a run measures, but for times: every operator,
every message, memory by category, flops. It is a step that has others before it, of which no more
is run than leaves a trace: see prepare().
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from costs.memory import MemoryMeter
from costs.messages import Row, rows_of
from costs.program import Program, Work
from minigpt.config import ModelConfig, OptimizerConfig
from parallel.layout import Impl, Layout, Options, Precision
from parallel.moments import inner
from parallel.parallelize import parallelize
from parallel.passes import MicroBatch
from parallel.step import Trainer
from parallel.training import trainer_of
from simulator import trace_kernels
from simulator.silent_world import filling, heard, rebuild_buckets, replaced, silent_world
from simulator.trace_recorder import Recorder

LR = 1e-3  # any: nothing is learned
INITIALIZERS = ("_initialize_stages", "_initialize_stage")  # of schedules of many stages and of one


@dataclass(frozen=True)
class Traced:
    """One rank's step."""

    program: Program  # times are not known: the replay fills them
    rows: list[Row]  # as a ledger's `communication`
    memory_bytes: dict[str, int]  # as a ledger's
    flops: int  # that ran: `hardware` of a ledger


class TracedTrainer(Trainer):
    """Assumes that every target counts, since there are none to look at."""

    def _read(self, totals: Tensor) -> tuple[float, float]:
        ranks = self.replica.mesh.layout.data_parallel
        return 1.0, float(self.micro_batch_tokens * self.accumulation * ranks)


def trace(
    model: ModelConfig,
    layout: Layout,
    options: Options,
    rank: int = 0,
    optimizer: OptimizerConfig | None = None,
    clip: float | None = 1.0,
    gpu: bool = False,
) -> Traced:
    """The optimiser step of `rank`, in a plan that parallel.rules lets pass.

    `gpu`: as on a GPU, whose streams overlap messages (simulator/trace_streams.py) and which has
    other kernels than a CPU (simulator/trace_kernels.py).
    Dropless experts are assumed to get even shares, gradients to be clipped where `clip` is set.
    Raises ValueError for what cannot be traced, RuntimeError in a process that is in a process
    group: the caller starts one of its own.
    """
    lacks = {
        f"impl={options.impl.value}": options.impl != Impl.torch,
        "compile=true": options.compile,
        "precision=fp8": options.precision == Precision.fp8,
    }
    for what in (key for key, holds in lacks.items() if holds):
        raise ValueError(f"{what}: cannot be traced; the default can")
    optimizer = optimizer or OptimizerConfig(lr=LR)
    with silent_world(layout, rank) as (mesh, mode), ExitStack() as kernels:
        for method in trace_kernels.patches() if gpu else ():
            kernels.enter_context(replaced(*method))
        replica = parallelize(model, mesh, options, seed=0, fill=filling(mode))
        with mode:
            trainer = trainer_of(replica, optimizer, options, clip, TracedTrainer)
            prepare(trainer, options)
            return record(trainer, options, gpu)


def prepare(trainer: Trainer, options: Options) -> None:
    """Bring a trainer to where each step is like the one before: the optimizer has its state, DDP
    the buckets that it makes after its first step, a pipeline's stages what they receive into."""
    passes: Any = trainer.replica.passes
    call, schedule = getattr(passes, "call", None), getattr(passes, "schedule", None)
    if isinstance(call, DistributedDataParallel):
        trainer.step(batch(options))
        rebuild_buckets(call)
        return
    if schedule is not None:
        initialize(trainer, schedule, options)
    for parameter in trainer.parameters:
        if parameter.requires_grad:  # a frozen weight never has a gradient
            parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()


class _Initialized(Exception):
    """Raised out of a pipeline's step that has come so far."""


def initialize(trainer: Trainer, schedule: Any, options: Options) -> None:
    """A schedule's step up to where its stages are initialized; the whole of it where torch calls
    that by another name than 2.13 does."""
    name = next((n for n in INITIALIZERS if hasattr(schedule, n)), None)
    original = getattr(schedule, name) if name else None

    def stop(*args: Any, **kwargs: Any) -> None:
        if original:
            original(*args, **kwargs)
            raise _Initialized

    with suppress(_Initialized), replaced(schedule, name or "_not_there", stop):
        trainer.step(batch(options))


def batch(options: Options) -> list[MicroBatch]:
    """Micro-batches of the right shapes."""
    shape = (options.micro_batch_size, options.seq_len)
    return [
        (torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64))
        for _ in range(options.micro_batches)
    ]


def record(trainer: Trainer, options: Options, streams: bool) -> Traced:
    """One step of a trainer in a silent world."""
    mesh = trainer.replica.mesh
    meter = MemoryMeter(trainer.replica, inner(trainer.optimizer).state)
    recorder = Recorder(mesh.axis_of_ranks(), meter, streams)
    trainer.marks = recorder
    if mesh.layout.pp == 1:
        recorder.follow(trainer.replica.stages)
    with ExitStack() as stack:
        stack.enter_context(no_collector())
        for method in recorder.patches():
            stack.enter_context(replaced(*method))
        for listening in (meter, recorder, heard(recorder)):
            stack.enter_context(listening)
        with recorder.phase("data"):
            micro_batches = batch(options)
        trainer.step(micro_batches)
    program = recorder.program
    flops = sum(event.flops for event in program if isinstance(event, Work))
    rows = rows_of(recorder.calls, recorder.axis_of_ranks)
    return Traced(program, rows, meter.result(), flops)


@contextmanager
def no_collector() -> Iterator[None]:
    """Without Python's garbage collector, which would free memory at a moment of its own."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
