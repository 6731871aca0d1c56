"""./launch.sh calibrate [to=FILE]: this machine as a cluster profile, measured in a minute.

A device is one rank: a core of the processor, as the launcher starts ranks on it. One measures
alone, and then all at the same time, for they share the memory, and maybe more. Without `to` the
YAML is printed.

Operators are timed where they run, in training steps of small models
(experiments/operator_times.py), messages one by one (experiments/message_times.py). The few numbers
that the closed forms take, which know no operator by its name, follow from the same steps.
"""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from omegaconf import OmegaConf

from experiments.arguments import key_values
from experiments.config import TrainConfig
from experiments.refused import Refused
from minigpt.config import FFN, ModelConfig, Norm, Positions
from simulator.formula_ledger import formula_steps
from simulator.hardware import Cluster, Device, Efficiency, Level, Peak, numbers, tables

if TYPE_CHECKING:  # they import torch
    from experiments.message_times import Times
    from experiments.operator_times import Steps

RANKS = 2
PATIENCE_S = 1800.0  # a busy machine may need minutes
PEAK_S = 1.5  # seconds of products for a peak
COMMAND = "./launch.sh calibrate"
GPT2 = {"norm": Norm.layernorm, "positions": Positions.learned, "ffn": FFN.gelu, "tied": True}
# name -> layers, width, sequence, sequences, micro-batches, and what else the model has
SHAPES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "small": (4, 128, 64, 12, 2, GPT2),
    "small, rotary": (4, 128, 128, 8, 1, {}),
    "wide": (2, 512, 256, 6, 1, GPT2),
}
WHOLE = "wide"  # whose step the closed form must give


@dataclass(frozen=True)
class Found:
    """What one rank found while the others did the same, and rank 0 alone."""

    messages: Times
    steps: dict[str, Steps]  # by name in SHAPES
    alone: Alone | None


@dataclass(frozen=True)
class Alone:
    """What a rank found while the others did nothing."""

    fp32: float  # FLOP/s
    bf16: float
    step_s: float  # of WHOLE


def command(argv: list[str]) -> int:
    """Measure, and print or write the profile. Raises Refused."""
    _, given = key_values("calibrate", "to=FILE", argv)
    file = Path(given["to"]) if given else None
    if file and not file.parent.is_dir():
        raise Refused(f"to={file}: no such folder as {file.parent}")
    text = yaml_of(measured())
    if file:
        file.write_text(text)
        print(f"wrote {file}")
    else:
        print(text, end="")
    return 0


def yaml_of(cluster: Cluster) -> str:
    """A file of configs/cluster. What a device or an operator does not have is left out."""
    return OmegaConf.to_yaml(OmegaConf.create(_without_none(asdict(cluster))))


def _without_none(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_none(value) for key, value in node.items() if value is not None}


def measured() -> Cluster:
    """This machine. Its network is the loopback that gloo's messages take, on every level."""
    from experiments import message_times, operator_times
    from experiments.ranks import run_ranks

    found: list[Found] = run_ranks(RANKS, measure_rank, timeout_s=PATIENCE_S)
    alone = found[0].alone
    assert alone
    slow = max(1.0, sum(rank.steps[WHOLE].seconds for rank in found) / RANKS / alone.step_s)
    steps = [one.faster(slow) for rank in found for one in rank.steps.values()]
    samples = [sample for one in steps for sample in one.samples]
    rates = operator_times.rates_of(samples)
    peak = max(rates.products, alone.fp32)
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    links = message_times.fit(found[0].messages, RANKS)
    plain = links["all_reduce"]
    level = Level(plain.bandwidth, plain.latency, collectives=links)
    cluster = Cluster(
        name="laptop",
        device=Device(
            name=f"one core of {platform.machine()}",
            peak_flops=Peak(fp32=_short(peak), bf16=_short(alone.bf16)),
            memory_bytes=float(psutil.virtual_memory().total // cores),
            memory_bandwidth=1.0,  # below
            efficiency=Efficiency(
                matmul=_short(rates.products / peak),
                half_size=_short(rates.half_size),
                attention=_short(min(1.0, rates.attention / peak)),
            ),
            asynchronous=False,
            operators=operator_times.fit(samples),
        ),
        node_size=cores,
        in_node=level,
        between_nodes=level,
        operator_overhead=_short(sum(one.outside for one in steps) / len(samples)),
        overlap=0.0,  # a message's work is done by the core that computes
        crowding=_short(slow - 1),
    )
    return with_sources(with_bandwidth(cluster, alone.step_s))


def _short(value: float) -> float:
    return float(f"{max(value, 0.0):.4g}")


def with_bandwidth(cluster: Cluster, wanted: float) -> Cluster:
    """With the bandwidth by which the closed form gives the step of WHOLE that was measured, in
    seconds: it counts element-wise operators in bytes alone. Caches are in it."""
    config, low, high = config_of(WHOLE), 1e8, 1e13
    for _ in range(30):
        middle = (low * high) ** 0.5
        trial = cluster.changed({"device.memory_bandwidth": middle})
        (step,) = formula_steps(config.model, config.layout, config.options, trial)
        low, high = (low, middle) if step["time_s"]["total"] < wanted else (middle, high)
    return cluster.changed({"device.memory_bandwidth": _short(high)})


def with_sources(cluster: Cluster) -> Cluster:
    """Each number with where it is from."""
    measured_here = f"measured: {COMMAND}, {datetime.date.today()}"
    fixed = "set: the peaks and rates above are measured as they are had, nothing is lost of them"
    sources = {key: fixed if value in (0, 1) else measured_here for key, value in numbers(cluster)}
    return replace(cluster, sources=sources | dict.fromkeys(tables(cluster), measured_here))


def config_of(name: str) -> TrainConfig:
    """The single process that each rank trains, of SHAPES."""
    layers, width, sequence, batch, micro_batches, others = SHAPES[name]
    model = ModelConfig(
        n_layer=layers, n_head=width // 64, d_model=width, context=sequence, **others
    )
    return TrainConfig(
        model=model,
        micro_batch_size=batch // micro_batches,
        gradient_accumulation_steps=micro_batches,
        seq_len=sequence,
        clip=1e-3,  # a bound that no gradient keeps: every step does the same
    )


def measure_rank() -> Found:
    """What one rank finds; all call it at once."""
    import torch
    import torch.distributed as dist

    from experiments import message_times, operator_times

    torch.set_num_threads(1)
    alone = measure_alone() if dist.get_rank() == 0 else None
    dist.barrier()
    messages = message_times.measure()
    return Found(messages, {n: operator_times.watch(config_of(n)) for n in SHAPES}, alone)


def measure_alone() -> Alone:
    """While the others wait for this rank, which they do asleep."""
    import torch

    from costs.flops import measure_peak_flops
    from experiments import operator_times

    cpu = torch.device("cpu")
    return Alone(
        measure_peak_flops(cpu, torch.float32, PEAK_S),
        measure_peak_flops(cpu, torch.bfloat16, PEAK_S),
        operator_times.step_alone(config_of(WHOLE)),
    )
