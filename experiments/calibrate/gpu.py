"""A machine's GPUs as a cluster profile, from what its ranks have measured over NCCL.

Products in bf16 are the peak and the curve, as the closed forms want them; what a GPU hides behind
its products is not measured here, and taken from the fit of published runs on H100.
"""

from __future__ import annotations

from experiments.calibrate import device_times, message_times
from experiments.calibrate.operator_times import Sample, flash_rate
from experiments.calibrate.profile import Calibration, levels, short, with_sources
from experiments.calibrate.ranks import Found
from experiments.predict import clusters
from simulator.hardware import NARROW, WIDE, Cluster, Device, Efficiency, Peak

LIKE = "h100"  # whose overlap is taken


def attention_shares(calls: list[Sample], half_size: float, peak: float) -> dict[int, float]:
    """Of the peak, by the width of heads. A score of narrow ones takes no longer than one of wide
    ones, and no less than half."""
    of = {call.sides[1]: flash_rate([call], half_size) / peak for call in calls}
    wide = min(1.0, of[WIDE])
    return {WIDE: short(wide), NARROW: short(min(wide, max(wide / 2, of[NARROW])))}


def calibration_of_gpus(found: list[Found], node_size: int) -> Calibration:
    """Of what all ranks found: of the first alone, and of all together."""
    alone = found[0].alone
    assert alone
    name, memory = alone.about
    products = {key: device_times.peak(of) for key, of in alone.times.products.items()}
    copies = device_times.bandwidth(alone.times)
    low = "bf16" if "bf16" in products else "fp16"  # before Ampere
    peak, line = products[low].middle, device_times.lines(alone.times)[low]
    assert line.flops is not None
    rate = min(line.flops, peak)
    half_size = line.flops / line.fill if line.fill else 0.0
    links = message_times.fit(found[0].messages)
    fitted = clusters.load(LIKE)
    shares = attention_shares(alone.times.attention, half_size, peak)
    elementwise = device_times.elementwise_share(alone.times)
    in_node, between = levels(links) if links else (fitted.in_node, fitted.between_nodes)
    cluster = Cluster(
        name="gpus",
        device=Device(
            name=name,
            peak_flops=Peak(fp32=short(products["fp32"].middle), bf16=short(peak)),
            memory_bytes=float(memory),
            memory_bandwidth=short(copies.middle),
            efficiency=Efficiency(
                matmul=short(rate / peak),
                half_size=short(half_size),
                attention=shares[WIDE],
                attention_narrow=shares[NARROW],
                memory=short(min(1.0, elementwise.middle)),
            ),
        ),
        node_size=node_size,
        operator_overhead=short(alone.step.middle),
        overlap=fitted.overlap,
        tensor_overlap=fitted.tensor_overlap,
        in_node=in_node,
        between_nodes=between,
    )
    spreads = {
        "device.peak_flops.fp32": products["fp32"],
        "device.peak_flops.bf16": products[low],
        "device.memory_bandwidth": copies,
        "device.efficiency.memory": elementwise,
        "operator_overhead": alone.step,
    }
    points = device_times.points(alone.times)
    points += message_times.points(found[0].messages, links)
    made = with_sources(cluster, spreads, points, links)
    of_h100 = f"assumed: as cluster={LIKE} has it, where it is fitted"
    theirs = [key for key in made.sources if "node" in key and key != "node_size"]
    assumed = ["overlap", "tensor_overlap", *(theirs if not links else ())]
    made.sources.update(dict.fromkeys(assumed, of_h100))
    return Calibration(made, points)
