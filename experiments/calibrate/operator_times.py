"""How long each of torch's operators takes in training steps on this machine, and the curve of it.

Ranks train models of their own at the same time, for they share the memory and the caches; each
call of an operator is timed. Times are of the thread that computes (time.thread_time), so that
other programs on the machine count for little. `./launch.sh calibrate` fits one line to each
operator's times.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from costs.memory import WRAPPERS
from costs.moments import wait_for
from experiments.assemble import make_batches, make_trainer, share_of_batch
from experiments.calibrate.spread import Point, Spread, spread_of
from experiments.config import TrainConfig
from minigpt.corpus import prepare
from parallel.mesh import build_mesh
from simulator.hardware import OperatorSpeed
from simulator.trace_operators import cost_of

WARMUP, WATCHED, TIMED = 3, 5, 9  # steps
FEW_AND_MANY = 1, 4  # times as many blocks
CPU = torch.device("cpu")
LARGE = 2**18  # bytes: what is smaller says nothing of a bandwidth


@dataclass(frozen=True)
class Sample:
    """One call of an operator, and how long it took each time: in steps it is the same in each."""

    name: str
    flops: int
    bytes: int
    sides: tuple[int, ...]  # of its product
    taken: Spread  # seconds

    @property
    def seconds(self) -> float:
        return self.taken.middle


@dataclass(frozen=True)
class Steps:
    """What one rank found in the steps of one configuration."""

    samples: list[Sample]
    step: Spread  # seconds of a step that nothing watches

    def faster(self, times: float) -> Steps:
        """The same, so many times faster."""
        samples = [replace(sample, taken=sample.taken.over(times)) for sample in self.samples]
        return Steps(samples, self.step.over(times))

    @property
    def outside(self) -> Spread:
        """Seconds of such a step that no operator takes: Python and autograd."""
        inside = sum(sample.seconds for sample in self.samples)
        return Spread(*(seconds - inside for seconds in astuple(self.step)))

    @property
    def overhead(self) -> Spread:
        """Of one operator."""
        return self.outside.over(len(self.samples))


class Stopwatch(TorchDispatchMode):
    """Times each operator that starts a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Sample] = []

    def seconds(self) -> list[float]:
        return [call.seconds for call in self.calls]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(issubclass(kind, WRAPPERS) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        start = time.thread_time()
        out = func(*args, **kwargs)
        taken = time.thread_time() - start
        cost = cost_of(func, args, kwargs, out)
        if cost is not None:
            name = str(func._overloadpacket)
            spread = spread_of([taken])
            self.calls.append(Sample(name, cost.flops, cost.bytes, cost.shape[1:], spread))
        return out


def watch(config: TrainConfig) -> Steps:
    """Train `config`, whose layout is one rank, and time its operators. All ranks call it."""
    step = step_of(config)
    watches = []
    for _ in range(WATCHED):
        dist.barrier()
        with Stopwatch() as one:
            step()
        watches.append(one)
    times = [spread_of(each) for each in zip(*(w.seconds() for w in watches), strict=True)]
    calls = zip(watches[0].calls, times, strict=True)
    samples = [replace(call, taken=taken) for call, taken in calls]
    return Steps(samples, timed(step, dist.barrier))


def step_alone(config: TrainConfig) -> Spread:
    """Seconds of a step of `config` while no other rank computes. One rank calls it."""
    return timed(step_of(config), lambda: None)


def launches(config: TrainConfig, device: torch.device) -> Spread:
    """Seconds that the host takes for an operator of a block: between steps of `config` with few
    and with many, so small that a GPU has always done one operator before the next is launched.
    One rank calls it."""
    found = []
    for times in FEW_AND_MANY:
        model = replace(config.model, n_layer=times * config.model.n_layer)
        step = step_of(replace(config, model=model), device)
        with Stopwatch() as watch:
            step()
        taken = []
        for _ in range(TIMED):
            start = time.perf_counter()
            step()
            wait_for(device)
            taken.append(time.perf_counter() - start)
        found.append((len(watch.calls), taken))
    (few, fast), (many, slow) = found
    rest = statistics.median(fast)
    return spread_of([taken - rest for taken in slow]).over(many - few)


def step_of(config: TrainConfig, device: torch.device = CPU) -> Callable[[], object]:
    """A training step on one rank, that has run some times."""
    trainer = make_trainer(config, build_mesh(config.layout, device))
    batches = make_batches(config, prepare(config.data))
    rows = list(share_of_batch(batches, 0, config, trainer.replica.mesh))
    for _ in range(WARMUP):
        trainer.step(rows)
    return lambda: trainer.step(rows)


def timed(step: Callable[[], object], ready: Callable[[], object]) -> Spread:
    """Seconds of a step; `ready` comes before each."""
    taken = []
    for _ in range(TIMED):
        ready()
        start = time.thread_time()
        step()
        taken.append(time.thread_time() - start)
    return spread_of(taken)


def fit(samples: list[Sample]) -> dict[str, OperatorSpeed]:
    """One line an operator: of relative errors the least squares, no part of it below zero."""
    by_name: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_name[sample.name].append(sample)
    found = {name: line_of(calls) for name, calls in sorted(by_name.items())}
    known = [line.bandwidth for line in found.values() if line.bandwidth is not None]
    for name, line in found.items():
        if line.flops is None and line.bandwidth is None:  # seen on little: as others do
            found[name] = replace(line, bandwidth=statistics.median(known))
    return found


def line_of(calls: list[Sample]) -> OperatorSpeed:
    """The line of one operator: of relative errors the least squares, no part below zero."""
    seconds = np.array([call.seconds for call in calls])
    parts = {"latency": np.ones(len(calls))}
    if any(call.flops for call in calls):
        flops = np.array([float(call.flops) for call in calls])
        parts["flops"] = flops
        if all(call.sides for call in calls):
            sides = [sum(1 / side for side in call.sides if side) for call in calls]
            parts["fill"] = flops * np.array(sides)
    elif max(call.bytes for call in calls) >= LARGE:
        parts["bandwidth"] = np.array([float(call.bytes) for call in calls])
    found = _least_squares(parts, seconds)
    values: dict[str, Any] = {k: float(f"{1 / v:.4g}") for k, v in found.items() if k != "latency"}
    return OperatorSpeed(latency=float(f"{found.get('latency', 0.0):.4g}"), **values)


def _least_squares(parts: dict[str, Any], seconds: Any) -> dict[str, float]:
    """Coefficients above zero; a part that would be below is left out."""
    names = [name for name, column in parts.items() if column.any()]
    while names:
        matrix = np.stack([parts[name] / seconds for name in names], axis=1)
        size = np.abs(matrix).max(axis=0)
        found = np.linalg.lstsq(matrix / size, np.ones(len(seconds)), rcond=None)[0] / size
        if (found > 0).all():
            return dict(zip(names, found, strict=True))
        names.pop(int(np.argmin(found * size)))
    return {}


def points(samples: list[Sample], ranks: int, operators: dict[str, OperatorSpeed]) -> list[Point]:
    """Each call beside its operator's line."""
    return [
        Point(
            "operator",
            one.name,
            ranks,
            one.bytes,
            one.flops or one.bytes,
            one.taken,
            operators[one.name].seconds(one.flops, one.bytes, one.sides),
        )
        for one in samples
    ]


@dataclass(frozen=True)
class Rates:
    """What the closed forms take, which know products and attention and no operator by its name."""

    products: float  # FLOP/s of large ones
    half_size: float  # as in simulator.hardware.Efficiency
    attention: float  # FLOP/s of a flash kernel, counting what the causal mask leaves


def rates_of(samples: list[Sample]) -> Rates:
    """Of all products, and of all calls of attention, in these samples."""
    attention = [s for s in samples if "scaled_dot_product" in s.name]
    products = [s for s in samples if s.sides and "scaled_dot_product" not in s.name]
    line = line_of(products)
    assert line.flops is not None
    half_size = line.flops / line.fill if line.fill else 0.0
    return Rates(line.flops, half_size, flash_rate(attention, half_size))


def flash_rate(calls: list[Sample], half_size: float) -> float:
    """FLOP/s of attention, counting what the causal mask leaves. Rows and columns of scores fill
    tiles, as simulator.estimate.flash_seconds has it."""
    filled = [s.flops / 2 * (1 + half_size * (1 / s.sides[0] + 1 / s.sides[2])) for s in calls]
    return sum(filled) / sum(s.seconds for s in calls)
