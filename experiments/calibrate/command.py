"""./launch.sh calibrate [to=FILE.yaml] [device=auto|cpu|cuda]: this machine as a cluster profile.

Two minutes at most. Without `to` the YAML is printed; with it there are also FILE.png, what was
measured beside the profile's curves, and FILE.csv, the same as numbers with their quartiles.
Between nodes: start it on all of them, a rank a device, as torchrun or srun do for training
(docs/nodes.md).

A device is a GPU, or one core of the processor, as the launcher starts ranks on it. One measures
alone (device_times.py), and then all at the same time, for they share the memory, and
maybe more. A core's operators are timed where they run, in training steps of small models
(operator_times.py), messages one by one (message_times.py). The few numbers
that the closed forms take, which know no operator by its name, follow from the same steps. What a
GPU's profile has is in gpu.py.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from omegaconf import OmegaConf

from experiments import environment
from experiments.arguments import key_values
from experiments.calibrate.spread import Point, Spread, spread_of
from experiments.config import Device as Kind
from experiments.config import TrainConfig
from experiments.process import end
from experiments.refused import Refused
from minigpt.config import FFN, ModelConfig, Norm, Positions
from simulator.formula_ledger import formula_steps
from simulator.hardware import Cluster, Device, Efficiency, Level, Link, Peak, numbers, tables

if TYPE_CHECKING:  # they import torch
    from experiments.calibrate.ranks import Found

PATIENCE_S = 1800.0  # a busy machine may need minutes
MOST_RANKS = 8  # cores that are measured at the same time
COMMAND = "./launch.sh calibrate"
GPT2 = {"norm": Norm.layernorm, "positions": Positions.learned, "ffn": FFN.gelu, "tied": True}
# name -> layers, width, sequence, sequences, micro-batches, and what else the model has
SHAPES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "small": (4, 128, 64, 12, 2, GPT2),
    "small, rotary": (4, 128, 128, 8, 1, {}),
    "wide": (2, 512, 256, 6, 1, GPT2),
}
WHOLE = "wide"  # whose step the closed form must give
SMALLEST = "small"
Links = dict[str, dict[str, Link]]  # by level and collective
FIXED = "set: the peaks and rates above are measured as they are had, nothing is lost of them"


@dataclass(frozen=True)
class Calibration:
    """The profile, and all that was measured for it beside what the profile's curves say."""

    cluster: Cluster
    points: list[Point]


def command(argv: list[str]) -> int:
    """Measure, and print or write the profile. Of a world's ranks the first one does."""
    status = calibrate(argv)
    if environment.given_rank():
        end(status)  # as every rank does: torch may abort in an ordinary exit
    return status


def calibrate(argv: list[str]) -> int:
    _, given = key_values("calibrate", "to=FILE and device=auto, cpu or cuda", argv)
    path = Path(given["to"]) if "to" in given else None
    if path and path.suffix != ".yaml":
        raise Refused(f"to={path}: must end with .yaml, as every cluster's file does")
    if path and not path.parent.is_dir():
        raise Refused(f"to={path}: no such folder as {path.parent}")
    name = given.get("device", "auto")
    if name not in list(Kind):
        raise Refused(f"device={name}: must be auto, cpu or cuda")
    found = measure(Kind(name))
    if found is None:
        return 0
    if path is None:
        print(yaml_of(found.cluster), end="")
        return 0
    from experiments.calibrate.picture import draw, write  # matplotlib takes a second

    path.write_text(yaml_of(replace(found.cluster, name=path.stem)))  # as a cluster's file must
    write(found.points, path.with_suffix(".csv"))
    draw(found, path.with_suffix(".png"))
    print(f"wrote {path}, and {path.stem}.png and {path.stem}.csv beside it")
    return 0


def yaml_of(cluster: Cluster) -> str:
    """A file of configs/cluster. What a device or an operator does not have is left out."""
    return OmegaConf.to_yaml(OmegaConf.create(_without_none(asdict(cluster))))


def _without_none(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_none(value) for key, value in node.items() if value is not None}


def measured() -> Cluster:
    """This machine's cores as a cluster."""
    found = measure(Kind.cpu)
    assert found
    return found.cluster


def measure(wanted: Kind) -> Calibration | None:
    """This machine's devices, or those of all nodes where torchrun or SLURM have started a rank on
    each; None on the ranks that are not the first. Raises ValueError for a device that is not
    there."""
    gpus = environment.gpu_count()
    device = environment.pick_device(wanted, gpus)
    rank = environment.given_rank()
    from experiments.calibrate import ranks as calibrate_ranks

    if rank is not None and rank.world_size > 1:
        found, node_size = calibrate_ranks.in_a_world(rank, device)
        if rank.rank:
            return None
    else:
        node_size = gpus if device == Kind.cuda else max(2, min(cores(), MOST_RANKS))
        found = calibrate_ranks.on_this_machine(device, node_size)
    if device == Kind.cuda:
        from experiments.calibrate.gpu import calibration_of_gpus

        return calibration_of_gpus(found, node_size)
    return calibration_of_cores(found, node_size)


def cores() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def calibration_of_cores(found: list[Found], node_size: int) -> Calibration:
    """Of what all ranks found, `node_size` on each node. In a node gloo takes the loopback."""
    from experiments.calibrate import device_times, message_times, operator_times

    alone = found[0].alone
    assert alone
    ranks = len(found)
    step = sum(rank.steps[WHOLE].step.middle for rank in found) / ranks
    slow = max(1.0, step / alone.step.middle)
    steps = [one.faster(slow) for rank in found for one in rank.steps.values()]
    samples = [sample for one in steps for sample in one.samples]
    rates = operator_times.rates_of(samples)
    products = {name: device_times.peak(of) for name, of in alone.times.products.items()}
    copies = device_times.bandwidth(alone.times)
    peak = max(rates.products, products["fp32"].middle)
    links = message_times.fit(found[0].messages)
    operators = operator_times.fit(samples)
    overhead = sum(one.outside.middle for one in steps) / len(samples)
    in_node, between = levels(links)
    cluster = Cluster(
        name="laptop",
        device=Device(
            name=alone.about[0],
            peak_flops=Peak(fp32=short(peak), bf16=short(products["bf16"].middle)),
            memory_bytes=float(alone.about[1]),
            memory_bandwidth=short(copies.middle),
            efficiency=Efficiency(
                matmul=short(rates.products / peak),
                half_size=short(rates.half_size),
                attention=short(min(1.0, rates.attention / peak)),
            ),
            asynchronous=False,
            operators=operators,
        ),
        node_size=cores(),
        operator_overhead=short(overhead),
        overlap=0.0,  # a message's work is done by the core that computes
        # linear in the cores that compute (simulator/hardware.py), of which there may be more
        crowding=short((slow - 1) * max(cores() - 1, 1) / max(node_size - 1, 1)),
        in_node=in_node,
        between_nodes=between,
    )
    spreads = {
        "device.peak_flops.fp32": products["fp32"],
        "device.peak_flops.bf16": products["bf16"],
        "device.memory_bandwidth": copies,
        "operator_overhead": _widest([one.overhead for one in steps]),
    }
    points = device_times.points(alone.times)
    points += message_times.points(found[0].messages, links)
    points += operator_times.points(samples, ranks, operators)
    fitted = with_memory_share(cluster, alone.step.middle)
    return Calibration(with_sources(fitted, spreads, points, links), points)


def levels(links: Links) -> tuple[Level, Level]:
    """In a node and between nodes; where one was not measured it is as the other one."""
    made = {}
    for level, by_name in links.items():
        plain = by_name["all_reduce"]
        made[level] = Level(plain.bandwidth, plain.latency, collectives=by_name)
    either = next(iter(made.values()), Level())
    return made.get("in_node", either), made.get("between_nodes", either)


def short(value: float) -> float:
    return float(f"{max(value, 0.0):.4g}")


def _widest(spreads: list[Spread]) -> Spread:
    """From the lowest quartile to the highest, of what differs from model to model."""
    middles = sorted(one.middle for one in spreads)
    low, high = min(one.low for one in spreads), max(one.high for one in spreads)
    return Spread(middles[len(middles) // 2], low, high)


def with_memory_share(cluster: Cluster, wanted: float) -> Cluster:
    """With the share of the copies' bandwidth by which the closed form gives the step of WHOLE that
    was measured, in seconds: it counts element-wise operators in bytes alone. Where caches make it
    more than a copy's, the bandwidth itself is."""
    config, low, high = config_of(WHOLE), 1e8, 1e13
    for _ in range(30):
        middle = (low * high) ** 0.5
        trial = cluster.changed({"device.memory_bandwidth": middle})
        (step,) = formula_steps(config.model, config.layout, config.options, trial)
        low, high = (low, middle) if step["time_s"]["total"] < wanted else (middle, high)
    share = high / cluster.device.memory_bandwidth
    if share > 1:
        return cluster.changed({"device.memory_bandwidth": short(high)})
    return cluster.changed({"device.efficiency.memory": short(share)})


def with_sources(
    cluster: Cluster, spreads: dict[str, Spread], points: list[Point], links: Links
) -> Cluster:
    """Each number with where it is from; a measured one with its quartiles, a table with how far
    its lines are from what was measured, a level without messages with what was assumed of it."""
    measured_here = f"measured: {COMMAND}, {datetime.date.today()}"
    sources = {key: FIXED if value in (0, 1) else measured_here for key, value in numbers(cluster)}
    sources |= {key: f"{measured_here}; {spread}" for key, spread in spreads.items()}
    for key in tables(cluster):
        level = key.partition(".")[0]
        mine = [
            abs(point.error)
            for point in points
            if point.name.startswith(level) or (level == "device" and point.kind == "operator")
        ]
        off = f"; its lines are off by {spread_of(mine)} (shares)" if mine else ""
        sources[key] = measured_here + off
    for level in {"in_node", "between_nodes"} - set(links):
        why = "no message was measured there; it is as the other level" if links else "one device"
        of_it = [key for key in sources if key.startswith(f"{level}.")]
        sources |= dict.fromkeys(of_it, f"assumed: {why}")
    return replace(cluster, sources=sources)


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
