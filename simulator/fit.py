"""Fitting the efficiencies of clusters to measured step times: few numbers a kind of device.

Least squares on the logarithm of predicted over measured, each source with the same weight, each
number held near a prior; large errors count by their size and not by its square. Gauss-Newton with
Levenberg's damping (Levenberg 1944; Marquardt 1963), derivatives by differences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from simulator.estimate import step_seconds
from simulator.hardware import DTYPES, Cluster, Device, is_share
from simulator.plans import Array
from simulator.published import Row
from simulator.score import FITS
from simulator.work import Work

# file of configs/cluster -> kind of device that shares efficiencies
KINDS = {
    "v100": "volta",
    "a100_40g": "ampere",
    "a100_80g": "ampere",
    "h100": "hopper",
    "h100_96g_500w": "hopper",
    "h200": "hopper",
    "gh200": "hopper",
    "b200": "blackwell",
    "b300": "blackwell",
    "gb200_nvl72": "blackwell",
    "gb300_nvl72": "blackwell",
}
SCATTER = 0.07  # of a log error that is worth as much as one standard deviation of a prior
SOFT = 0.005  # of a logarithm of seconds, within which candidates tie
STEP = 0.02  # of a number, in standard deviations, for its derivative


@dataclass(frozen=True)
class Parameter:
    """One number of all clusters of a kind. It is searched as prior exp(x spread), a share by its
    odds, with as much of a move at the prior."""

    key: str
    prior: float
    spread: float  # standard deviation of the prior, of the logarithm
    clusters: tuple[str, ...] = tuple(KINDS)

    def value(self, x: float) -> float:
        """Of a share the odds are moved, so that it stays below 1 and no bound stops a search."""
        if not is_share(self.key):
            return float(self.prior * np.exp(x * self.spread))
        room = 1 - self.prior
        return float(1 / (1 + room / self.prior * np.exp(-x * self.spread / room)))


def parameters() -> list[Parameter]:
    """What is fitted. Priors: products as NVIDIA's libraries reach them (Volta to Hopper, large
    squares), kernels of attention as their papers report, memory as copies reach it."""
    matmul = {"volta": 0.75, "ampere": 0.8, "hopper": 0.68, "blackwell": 0.5}
    attention = {"volta": 0.3, "ampere": 0.55, "hopper": 0.31, "blackwell": 0.3}
    found = []
    for kind, share in matmul.items():
        files = tuple(name for name, own in KINDS.items() if own == kind)
        inner = "device.efficiency."
        found += [
            Parameter(inner + "matmul", share, 0.1, files),
            Parameter(inner + "half_size", 150.0, 0.2, files),
            Parameter(inner + "attention", attention[kind], 0.2, files),
            Parameter(inner + "memory", 0.75, 0.08, files),
            Parameter("in_node.efficiency", 0.75, 0.15, files),
        ]
        if kind in ("hopper", "blackwell"):
            found.append(Parameter(inner + "matmul_fp8", 0.7, 0.15, files))
            found.append(Parameter(inner + "attention_fused", 0.43, 0.2, files))
    return [
        *found,
        Parameter("device.efficiency.unaligned", 0.08, 0.5),
        Parameter("device.clock", 0.72, 0.05, ("h100_96g_500w",)),
        Parameter("between_nodes.efficiency", 0.7, 0.3),
        Parameter("operator_overhead", 2e-5, 0.3),
        Parameter("overlap", 0.7, 0.3),
        Parameter("tensor_overlap", 0.8, 0.2),
        Parameter("straggling", 0.005, 0.3),
    ]


def stacked(nodes: list[Any]) -> Any:
    """Many clusters as one whose numbers are arrays, for step_seconds()."""
    made = object.__new__(type(nodes[0]))
    for item in fields(nodes[0]):
        values = [getattr(node, item.name) for node in nodes]
        if is_dataclass(values[0]):
            value: Any = stacked(values)
        elif isinstance(values[0], str | dict):
            value = values[0]
        else:
            value = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
        object.__setattr__(made, item.name, value)
    if isinstance(made, Device):  # null: as fast as what stands in for it
        for name in DTYPES:
            rates = [node.flops(name) / node.clock for node in nodes]
            setattr(made.peak_flops, name, np.array(rates))
        share: Any = made.efficiency
        share.matmul_fp8 = np.where(np.isnan(share.matmul_fp8), share.matmul, share.matmul_fp8)
    if isinstance(made, Cluster):
        whole: Any = made
        whole.crowding = np.nan_to_num(whole.crowding)  # null: none
    return made


class Problem:
    """Rows, their candidates as one Work, and the clusters that they ran on.

    Of a row's candidates those that do not fit on its device are left out; where none does, all
    are kept.
    """

    def __init__(self, rows: list[Row], clusters: dict[str, Cluster]) -> None:
        self.rows = rows
        own = [clusters[row.cluster].changed(row.changes) for row in rows]
        self.capacity = np.array([cluster.device.memory_bytes for cluster in own])
        chosen, needed = [], []
        for row, capacity in zip(rows, self.capacity, strict=True):
            memory = [candidate.memory_bytes for candidate in row.candidates]
            fitting = [i for i, size in enumerate(memory) if size <= FITS * capacity]
            kept = fitting or range(len(memory))
            chosen.append([row.candidates[i] for i in kept])
            needed += [memory[i] for i in kept]
        counts = [len(some) for some in chosen]
        self.work = Work.joined([candidate.work for some in chosen for candidate in some])
        self.needed = np.array(needed)
        self.counts = counts
        self.start = np.cumsum([0, *counts[:-1]])
        self.files = np.repeat([row.cluster for row in rows], counts)
        self.cluster = stacked([c for c, n in zip(own, counts, strict=True) for _ in range(n)])
        self.sources = np.array([row.source for row in rows])
        self.measured = np.array([row.seconds or np.nan for row in rows])

    def predict(self) -> Array:
        """Seconds of each row, of the fastest of its candidates."""
        total = step_seconds(self.work, self.cluster)["total"]
        return np.minimum.reduceat(total, self.start)

    def memory(self) -> Array:
        """Peak bytes of each row, of the fastest of its candidates."""
        total = step_seconds(self.work, self.cluster)["total"]
        ends = [*self.start[1:], len(total)]
        best = [a + int(np.argmin(total[a:b])) for a, b in zip(self.start, ends, strict=True)]
        return self.needed[best]

    def put(self, found: Iterable[Parameter], x: Array) -> None:
        """Give the clusters these numbers."""
        for parameter, at in zip(found, x, strict=True):
            *path, last = parameter.key.split(".")
            node = self.cluster
            for name in path:
                node = getattr(node, name)
            which = np.isin(self.files, parameter.clusters)
            value = np.where(which, parameter.value(at), getattr(node, last))
            object.__setattr__(node, last, value)

    def errors(self, found: list[Parameter], x: Array) -> Array:
        """log(predicted / measured) of each row. The fastest candidate is taken softly: where two
        tie, the hard minimum has an edge on which a search by slopes would stop."""
        self.put(found, x)
        logs = np.log(step_seconds(self.work, self.cluster)["total"])
        least = np.minimum.reduceat(logs, self.start)
        above = (logs - np.repeat(least, self.counts)) / SOFT
        return (
            least
            - SOFT * np.log(np.add.reduceat(np.exp(-above), self.start))
            - np.log(self.measured)
        )


def fit(problem: Problem, used: Array, rounds: int = 60) -> Array:
    """The numbers of parameters() that fit the rows where `used` is true, as x of each."""
    found = parameters()
    names, counts = np.unique(problem.sources[used], return_counts=True)
    share = dict(zip(names.tolist(), np.sqrt(np.mean(counts) / counts).tolist(), strict=True))
    weight = np.array([share.get(source, 0.0) for source in problem.sources]) * used

    def residual(x: Array) -> Array:
        z = problem.errors(found, x) / SCATTER
        soft = np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z * z) - 1))
        return np.concatenate([weight * soft, x])

    x, damping = np.zeros(len(found)), 1.0
    r = residual(x)
    stuck = 0
    for _ in range(rounds):
        moved = [residual(x + STEP * unit) for unit in np.eye(len(x))]
        slopes = (np.stack(moved, 1) - r[:, None]) / STEP
        normal, gradient = slopes.T @ slopes, slopes.T @ r
        for _ in range(10):
            move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            after = residual(x + move)
            if after @ after < r @ r:
                break
            damping *= 4
        else:
            break
        stuck = stuck + 1 if after @ after > 0.9999 * (r @ r) else 0
        x, r, damping = x + move, after, max(damping / 5, 1e-4)
        if stuck == 3:
            break
    problem.put(found, x)
    return x


def leave_one_source_out(problem: Problem) -> Array:
    """Seconds of each row, predicted with numbers that were fitted on all other sources."""
    predicted = np.empty(len(problem.rows))
    for source in np.unique(problem.sources):
        own = problem.sources == source
        fit(problem, ~own)
        predicted[own] = problem.predict()[own]
    return predicted
