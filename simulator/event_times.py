"""What an event of a program costs on a cluster: a roofline for work, alpha-beta for messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice

from costs.program import Message, Program, Work
from simulator import collectives
from simulator.data_seconds import SLOWED
from simulator.hardware import Cluster
from simulator.programs import sent_by_the_device
from simulator.reached import narrower
from simulator.replay import replay
from simulator.timeline import Timeline

# Names of costs/program.py -> of a device's peaks; fp16 is as fast as bf16
PEAKS = {"float32": "fp32", "float64": "fp32", "bfloat16": "bf16", "float16": "bf16"}
SEEN = 4096  # ranks of a group whose nodes are counted; how they lie in nodes repeats long before
LOW = ("bfloat16", "float16")  # a cluster's table of operators was measured without them


class EventTimes:
    """Seconds of each event. Alike events are priced once. `ranks`: of the world, which may crowd
    a node."""

    def __init__(self, cluster: Cluster, ranks: int = 1) -> None:
        self.cluster, self.slow = cluster, cluster.crowded(ranks)
        self.works: dict[tuple, float] = {}
        self.messages: dict[tuple, float] = {}

    def work(self, work: Work) -> float:
        """As measured; where it was not, the longer of what its products and its bytes take
        (Williams et al. 2009, Roofline), or what its operator takes by the cluster's table. The
        host's launches come on top where the device is the host; else they may be longer."""
        if work.seconds is not None:
            return work.seconds
        key = (work.flops, work.bytes, work.dtype, work.shape, work.operators, work.name)
        if key not in self.works:
            self.works[key] = self._work(work)
        return self.works[key]

    def _work(self, work: Work) -> float:
        device = self.cluster.device
        launches = work.operators * self.cluster.operator_overhead
        known = device.operators.get(work.name) if work.dtype not in LOW else None
        if known:
            busy = known.seconds(work.flops, work.bytes, work.shape[1:])
        else:
            moved = work.bytes / (device.memory_bandwidth * device.efficiency.memory)
            busy = max(self._products(work), moved)
        return self.slow * (max(busy, launches) if device.asynchronous else busy + launches)

    def _products(self, work: Work) -> float:
        device, share = self.cluster.device, self.cluster.device.efficiency
        if not work.flops:
            return 0.0
        peak = device.flops(PEAKS.get(work.dtype, "fp32"))
        if work.name == "attention" or "scaled_dot_product" in work.name:
            # counted in full, and a causal kernel leaves half out; rows and columns of scores fill
            # tiles (simulator/reached.py)
            rows, width, columns = work.shape[1:]
            slow = 1 + share.half_size * (1 / rows + 1 / columns)
            return work.flops / 2 / (peak * share.attention * float(narrower(share, width))) * slow
        # the time that a kernel needs to fill, for each dimension (simulator/reached.py)
        slow = 1 + share.half_size * sum(1 / size for size in work.shape[1:] if size)
        return work.flops / (peak * share.matmul) * slow

    def message(self, message: Message) -> float:
        """Of the model (simulator/collectives.py), whatever was measured on another network."""
        key = (message.collective, message.payload_bytes, message.ranks)
        if key not in self.messages:
            first = islice(message.ranks, SEEN)
            nodes = Counter(rank // self.cluster.node_size for rank in first)
            group = collectives.Group(len(message.ranks), max(nodes.values()))
            priced = collectives.seconds(
                message.collective, message.payload_bytes, group, self.cluster
            )
            self.messages[key] = float(priced)
        return self.messages[key]


def replay_on(
    programs: dict[int, Program], times: EventTimes, like: Callable[[int], int]
) -> Timeline:
    """Programs that nobody ran, on the cluster of `times`: a core sends by itself, and what others
    send while they compute slows that."""
    if times.cluster.device.asynchronous:
        return replay(programs, times.work, times.message, like, hidden_slows=SLOWED)
    programs = {rank: sent_by_the_device(program) for rank, program in programs.items()}
    return replay(programs, times.work, times.message, like)


def measured_work(work: Work) -> float:
    """Raises ValueError where the program has no measured seconds."""
    if work.seconds is None:
        raise ValueError(f"{work.name or work.phase}: its seconds were not measured")
    return work.seconds


def measured_message(message: Message) -> float:
    """Raises ValueError where the program has no measured seconds."""
    if message.seconds is None:
        raise ValueError(f"message {message.number} ({message.collective}): was not timed")
    return message.seconds
