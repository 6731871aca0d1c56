"""./launch.sh calibrate [to=FILE]: this machine as a cluster profile, measured in a few seconds.

A device is one rank: a core of the processor, as the launcher starts ranks on it. All of them
measure at the same time, for they share the memory. Without `to` the YAML is printed.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf

from experiments.compose import Refused
from simulator.hardware import Cluster, Device, Efficiency, Level, Peak, numbers

RANKS = 2
SMALL = 64  # side of the product that tells half_size
PEAK_S = 3.0  # seconds of products for a peak
ATTENDED = 512  # tokens of the attention that is timed
COPIED = 32 * 2**20  # numbers of 4 bytes: far beyond any cache
BIG_MESSAGE, SMALL_MESSAGE = 16 * 2**20, 256  # numbers of 4 bytes
COMMAND = "./launch.sh calibrate"


def command(argv: list[str]) -> int:
    """Measure, and print or write the profile."""
    given = dict(argument.partition("=")[::2] for argument in argv)
    if set(given) - {"to"} or not all(given.values()):
        raise Refused(f"{argv[0]}: calibrate takes to=FILE")
    text = yaml_of(measured())
    if "to" not in given:
        print(text, end="")
        return 0
    Path(given["to"]).write_text(text)
    print(f"wrote {given['to']}")
    return 0


def yaml_of(cluster: Cluster) -> str:
    """A file of configs/cluster. Units that a device does not have are left out."""
    values = asdict(cluster)
    peaks = values["device"]["peak_flops"]
    values["device"]["peak_flops"] = {k: v for k, v in peaks.items() if v is not None}
    return OmegaConf.to_yaml(OmegaConf.create(values))


def measured() -> Cluster:
    """This machine. Its network is the loopback that gloo's messages take, on every level."""
    from experiments.ranks import run_ranks

    ranks = run_ranks(RANKS, measure_rank)
    # of the ranks the better one: nothing else held it up
    lower = ("latency", "overhead", "half_size")
    sides = {name: [rank[name] for rank in ranks] for name in ranks[0]}
    found = {n: min(v) if n in lower else max(v) for n, v in sides.items()}
    found = {name: float(f"{value:.4g}") for name, value in found.items()}
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    level = Level(bandwidth=found["bandwidth"], latency=found["latency"])
    cluster = Cluster(
        name="laptop",
        device=Device(
            name=f"one core of {platform.machine()}",
            peak_flops=Peak(fp32=found["fp32"], bf16=found["bf16"]),
            memory_bytes=float(psutil.virtual_memory().total // cores),
            memory_bandwidth=found["memory_bandwidth"],
            efficiency=Efficiency(half_size=found["half_size"], attention=found["attention"]),
        ),
        node_size=cores,
        in_node=level,
        between_nodes=level,
        operator_overhead=found["overhead"],
        overlap=0.0,  # a message's work is done by the core that computes
    )
    said = f"measured: {COMMAND}, {datetime.date.today()}"
    fixed = "set: the peaks and rates above are measured as they are had, nothing is lost of them"
    return OmegaConf.to_object(
        OmegaConf.merge(
            OmegaConf.structured(cluster),
            {
                "sources": {
                    key: fixed if value in (0, 1) else said for key, value in numbers(cluster)
                }
            },
        )
    )  # type: ignore[return-value]


def measure_rank() -> dict[str, float]:
    """What one rank finds while the others do the same."""
    import torch
    import torch.distributed as dist

    from costs.flops import measure_peak_flops

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    dist.barrier()
    fp32 = measure_peak_flops(cpu, torch.float32, PEAK_S)
    bf16 = measure_peak_flops(cpu, torch.bfloat16, PEAK_S)
    small = torch.randn(SMALL, SMALL)
    rate = 2 * SMALL**3 / best(lambda: torch.mm(small, small), 200)
    source, target = torch.ones(COPIED), torch.empty(COPIED)
    copied = 2 * 4 * COPIED / best(lambda: target.copy_(source), 20)
    one = torch.ones(8)
    sent = {n: best(_reduction(torch.ones(n)), 30) for n in (BIG_MESSAGE, SMALL_MESSAGE)}
    half_size = max(0.0, fp32 / rate - 1) * SMALL / 3  # rate = peak / (1 + 3 half_size / side)
    filled = 1 + 2 * half_size / ATTENDED  # as simulator.estimate.flash_seconds has it
    ranks = dist.get_world_size()
    steps = 2 * (ranks - 1)  # of a ring's all_reduce
    latency = sent[SMALL_MESSAGE] / steps
    moved = 4 * BIG_MESSAGE / ranks
    return {
        "fp32": fp32,
        "bf16": bf16,
        "half_size": half_size,
        "attention": min(1.0, filled * attention_flops() / fp32),
        "memory_bandwidth": copied,
        "overhead": best(lambda: one.add_(1), 1000),
        "latency": latency,
        "bandwidth": moved / max(sent[BIG_MESSAGE] / steps - latency, 1e-9),
    }


def _reduction(tensor: Any) -> Callable[[], Any]:
    import torch.distributed as dist

    return lambda: dist.all_reduce(tensor)


def attention_flops() -> float:
    """FLOP/s of causal attention, counting what the mask leaves: 2 B N T T H forward."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    batch, heads, tokens, width = 1, 4, ATTENDED, 64
    q = torch.randn(batch, heads, tokens, width)
    seconds = best(lambda: scaled_dot_product_attention(q, q, q, is_causal=True), 20)
    return 2 * batch * heads * tokens * tokens * width / seconds


def best(function: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of so many calls: the one that nothing else held up."""
    function()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken)
