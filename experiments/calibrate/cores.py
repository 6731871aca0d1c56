"""A machine's cores as a cluster profile, from what its ranks have measured over gloo."""

from __future__ import annotations

from experiments.calibrate import device_times, message_times, operator_times
from experiments.calibrate.models import WHOLE, config_of
from experiments.calibrate.profile import Calibration, levels, short, with_sources
from experiments.calibrate.ranks import Found
from experiments.calibrate.spread import Spread
from experiments.environment import physical_cores
from simulator.formula_ledger import formula_steps
from simulator.hardware import Cluster, Device, Efficiency, Peak


def calibration_of_cores(found: list[Found], node_size: int) -> Calibration:
    """Of what all ranks found, `node_size` on each node. In a node gloo takes the loopback."""
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
        node_size=physical_cores(),
        operator_overhead=short(overhead),
        overlap=0.0,  # a message's work is done by the core that computes
        # linear in the cores that compute (simulator/hardware.py), of which there may be more
        crowding=short((slow - 1) * max(physical_cores() - 1, 1) / max(node_size - 1, 1)),
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


def _widest(spreads: list[Spread]) -> Spread:
    """The median of the medians, between the lowest and the highest quartile of all: of what
    differs from model to model."""
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
