"""A cluster that you don't have, as numbers: device, network levels, and how much of a peak is had.

Standard library only. configs/cluster/*.yaml hold the numbers, and under `sources` where each of
them comes from: a datasheet, a measurement or the fit. Units: seconds, bytes, FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

NARROW, WIDE = 64, 128  # widths of heads in which attention is measured
DTYPES = ("fp32", "bf16", "fp8", "fp4")  # fp16 is as fast as bf16 on all of them


@dataclass
class Peak:
    """FLOP/s of dense matrix products by dtype. Null: the device has no units for it."""

    fp32: float | None = None
    bf16: float | None = None
    fp8: float | None = None
    fp4: float | None = None


@dataclass
class Efficiency:
    """How much of a peak is had. Fitted on published runs, or measured; see simulator/estimate.py.

    A product of m x k by k x n takes 2 m k n / (peak matmul) seconds, times
    1 + half_size (1/m + 1/k + 1/n): one dimension of `half_size` halves the rate. That is the time
    that a kernel's tiles and pipelines need to fill.
    """

    matmul: float = 1.0  # share of the peak that large bf16 (or fp32) products reach
    matmul_fp8: float | None = None  # the same of the fp8 and fp4 peaks; null: as bf16
    half_size: float = 0.0  # numbers
    attention: float = 1.0  # share of the bf16 peak that FlashAttention-2 reaches
    attention_fused: float | None = None  # that a kernel made for the device does; null: as above
    attention_narrow: float | None = None  # as `attention`, of heads of NARROW; null: all are alike
    memory: float = 1.0  # share of the memory bandwidth that element-wise operators reach
    unaligned: float = 1.0  # share of the matmul rate where a head's width is no multiple of 8


@dataclass
class OperatorSpeed:
    """What one of torch's operators was measured to take: latency + bytes / bandwidth + flops /
    rate, and flops x (sum of 1 / the sides of its product) / fill. Null: that part is not there."""

    latency: float = 0.0  # seconds
    bandwidth: float | None = None  # bytes/s, read and written
    flops: float | None = None  # FLOP/s
    fill: float | None = None  # FLOP/s x numbers: what small sides cost

    def seconds(self, flops: float, moved: float, sides: tuple[int, ...] = ()) -> float:
        """Of one call; `sides`: of its product, or none."""
        total = self.latency
        if self.bandwidth is not None:
            total += moved / self.bandwidth
        if self.flops is not None:
            total += flops / self.flops
        if self.fill is not None:
            total += flops * sum(1 / side for side in sides if side) / self.fill
        return total


@dataclass
class Device:
    """One accelerator, or one core. `memory_bytes` is what a program can allocate before it
    fails."""

    name: str = ""
    peak_flops: Peak = field(default_factory=Peak)
    memory_bytes: float = 0.0
    memory_bandwidth: float = 0.0  # bytes/s
    clock: float = 1.0  # share of the peaks that a power limit leaves
    efficiency: Efficiency = field(default_factory=Efficiency)
    # it runs what the host has launched, while the host goes on (a GPU). False: it is the host (a
    # core): Python's time adds to its own, and so does the work of sending
    asynchronous: bool = True
    # by name, as torch has it, in fp32; those that are not here follow the numbers above
    operators: dict[str, OperatorSpeed] = field(default_factory=dict)

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s in a dtype; where it has no units for it, in the next wider one."""
        order = [dtype, *reversed(DTYPES[: DTYPES.index(dtype)]), *DTYPES]
        known = [peak for name in order if (peak := getattr(self.peak_flops, name)) is not None]
        if not known:
            raise ValueError("cluster.device.peak_flops: has no dtype; give it one at least")
        return self.clock * known[0]


@dataclass
class Link:
    """What a message was measured to take: latency + bytes / bandwidth, of each step of a ring."""

    bandwidth: float = math.inf
    latency: float = 0.0


@dataclass
class Level:
    """One level of the network. Ranks that share the level below do not use it."""

    bandwidth: float = math.inf  # bytes/s a device and direction
    latency: float = 0.0  # seconds a message, software included
    efficiency: float = 1.0  # share of the bandwidth that large messages reach
    oversubscription: float = 1.0  # devices' bandwidth over what the level carries; 1: none
    # by name; those that are not here follow the numbers above
    collectives: dict[str, Link] = field(default_factory=dict)

    def of(self, collective: str) -> Level:
        """The level as one collective finds it."""
        own = self.collectives.get(collective)
        if own is None:
            return self
        return replace(self, bandwidth=own.bandwidth, latency=own.latency, collectives={})

    @property
    def rate(self) -> float:
        """Bytes/s that a device sends when all send at once."""
        return self.bandwidth * self.efficiency / self.oversubscription


@dataclass
class Cluster:
    """Devices in nodes, and what a program on them pays besides."""

    name: str = ""
    device: Device = field(default_factory=Device)
    node_size: int = 1  # devices that reach each other over in_node
    in_node: Level = field(default_factory=Level)
    between_nodes: Level = field(default_factory=Level)
    operator_overhead: float = 0.0  # seconds that the host needs to launch one operator
    overlap: float = 1.0  # share of the last backward behind which gradients can hide
    tensor_overlap: float = 0.0  # share of tp's messages that hide in products
    straggling: float = 0.0  # standard deviation of a node's speed, as a share of it
    crowding: float | None = None  # how much longer work takes when all of a node compute, a share
    sources: dict[str, str] = field(default_factory=dict)  # a number's key -> where it is from

    def __post_init__(self) -> None:
        for key, value in numbers(self):
            above = value > 0 or (key in MAY_BE_ZERO and value == 0)
            _need(above, key, value, "greater than 0")
        for key, value in numbers(self):
            if is_share(key):
                _need(value <= 1, key, value, "at most 1")

    def changed(self, values: dict[str, float]) -> Cluster:
        """The same cluster with other numbers, by dotted key."""
        return _changed(self, values)

    def crowded(self, ranks: Any) -> Any:
        """How many times longer work takes where so many ranks compute, packed into nodes; `ranks`
        may be an array, and so may the numbers of a cluster."""
        if self.crowding is None:
            return 1.0
        neighbours = (ranks < self.node_size) * ranks + (ranks >= self.node_size) * self.node_size
        others = self.node_size - 1
        return 1 + self.crowding * (neighbours - 1) / (others + (others == 0))

    def of(self, collective: str) -> Cluster:
        """The same cluster with its network as one collective finds it."""
        if not self.in_node.collectives and not self.between_nodes.collectives:
            return self
        levels = {name: getattr(self, name).of(collective) for name in ("in_node", "between_nodes")}
        return replace(self, **levels)


MAY_BE_ZERO = (
    "device.efficiency.half_size",
    "in_node.latency",
    "between_nodes.latency",
    "operator_overhead",
    "overlap",
    "tensor_overlap",
    "straggling",
    "crowding",
)


def is_share(key: str) -> bool:
    """Whether the number under a cluster's dotted key is a share of something: at most 1."""
    return (key.endswith("overlap") or ".efficiency" in key) and not key.endswith("half_size")


def numbers(node: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a cluster under its dotted key; those that are null are left out."""
    for item in fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from numbers(value, f"{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def tables(cluster: Cluster) -> list[str]:
    """Keys of the tables that a cluster has beside its numbers."""
    found = {
        "device.operators": cluster.device.operators,
        "in_node.collectives": cluster.in_node.collectives,
        "between_nodes.collectives": cluster.between_nodes.collectives,
    }
    return [key for key, table in found.items() if table]


def _changed(node: Any, values: dict[str, float]) -> Any:
    own: dict[str, Any] = {k: v for k, v in values.items() if "." not in k}
    for key in {k.partition(".")[0] for k in values if "." in k}:
        inner = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{key}.")}
        own[key] = _changed(getattr(node, key), inner)
    return replace(node, **own)


def _need(holds: bool, key: str, value: float, what: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value}: must be {what}")
