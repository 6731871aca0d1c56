"""What calibrate makes of one device's times, and a GPU's profile: shown on a core."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.calibrate import device_times, profile
from experiments.calibrate.gpu import attention_shares, calibration_of_gpus
from experiments.calibrate.operator_times import Sample
from experiments.calibrate.picture import draw, write
from experiments.calibrate.ranks import Alone, Found
from experiments.calibrate.spread import Spread
from experiments.predict import clusters
from simulator.estimate import narrower
from simulator.hardware import Efficiency, numbers, tables
from tests.test_calibrate import CPU, messages

FEW = device_times.Sizes(
    ((16, 16, 16), (64, 32, 64)),
    (2**10, 2**12, 2**16, 2**18),
    ((1, 2, 16, 64), (1, 2, 16, 128)),
    ((64, 32),),
)


def test_a_device_is_measured_in_every_dtype_that_it_has() -> None:
    """This checks what is recorded of each call, not how fast this machine is."""
    found = device_times.measure(CPU, FEW)
    assert set(found.products) == set(device_times.DTYPES)
    for calls in (*found.products.values(), found.copies, found.attention, found.elementwise):
        assert all(0 < c.taken.low <= c.seconds <= c.taken.high for c in calls)
    assert [c.flops for c in found.products["bf16"]] == [2 * 16**3, 2 * 64 * 32 * 64]
    assert [c.bytes for c in found.copies] == [2**11, 2**13, 2**17, 2**19]
    assert [c.flops for c in found.attention] == [14 * 2 * 16 * 16 * h for h in (64, 128)]
    (one,) = found.elementwise  # a norm 14 bytes, a GELU 4, a residual 10; once more and a half
    assert one.bytes == 64 * 32 * 28 * 2.5 and one.flops == 0
    points = device_times.points(found)
    assert {p.name for p in points} == {"fp32", "bf16", "fp16", "copy"}
    assert points[1].size == pytest.approx(3 / (1 / 64 + 1 / 32 + 1 / 64))
    largest = points[-1]
    assert device_times.bandwidth(found).middle == 2**19 / largest.seconds.middle
    assert largest.error == pytest.approx(0)


def test_no_time_is_lost_on_a_dtype_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_times, "TOO_LONG_S", 0.0)
    shapes = ((8, 8, 8), (16, 16, 16))
    assert device_times.products_in(torch.float32, shapes, CPU) == []
    monkeypatch.setattr(device_times, "TOO_LONG_S", 1e-12)
    found = device_times.products_in(torch.float32, shapes, CPU)
    assert [one.sides for one in found] == [(8, 8, 8)], "the next would take longer"


def test_a_gpus_profile_has_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    """From numbers that a CPU gave: the way from ranks' findings to a file and a picture."""
    times = device_times.measure(CPU, FEW)
    alone = Alone(times, Spread(5e-6, 4e-6, 6e-6), ("a GPU", 80 * 10**9))
    none = calibration_of_gpus([Found([], {}, alone)], 1)
    found = calibration_of_gpus([Found(messages(), {}, alone)], 4)
    cluster = found.cluster
    assert cluster.device.asynchronous and cluster.node_size == 4
    assert cluster.operator_overhead == 5e-6 and cluster.device.memory_bytes == 8e10
    assert "middle half from 4e-06 to 6e-06" in cluster.sources["operator_overhead"]
    assert cluster.between_nodes.of("send").bandwidth == pytest.approx(3e7, rel=1e-3)
    assert cluster.sources["overlap"].startswith("assumed: as cluster=h100")
    assert none.cluster.in_node == clusters.load("h100").in_node, "one GPU sends nothing"
    assert none.cluster.sources["in_node.bandwidth"].startswith("assumed: as cluster=h100")
    file = tmp_path / "gpus.yaml"
    for one in (none, found):
        keys = {*dict(numbers(one.cluster)), *tables(one.cluster)}
        assert set(one.cluster.sources) == keys
        file.write_text(profile.yaml_of(one.cluster))
        assert clusters.read(file) == one.cluster
        draw(one, tmp_path / "gpus.png")
        write(one.points, tmp_path / "gpus.csv")
        rows = list(csv.DictReader((tmp_path / "gpus.csv").open()))
        assert len(rows) == len(one.points)
        assert all(float(r["low"]) <= float(r["seconds"]) <= float(r["high"]) for r in rows)


def test_narrow_heads_reach_less_and_a_score_is_at_most_as_dear() -> None:
    share = Efficiency(attention=0.6, attention_narrow=0.4)
    assert [narrower(share, w) * 0.6 for w in (64, 128)] == pytest.approx([0.4, 0.6])
    widths = np.array([32.0, 64.0, 96.0, 128.0, 256.0])
    reached = narrower(share, widths) * 0.6
    assert (np.diff(reached) > 0).all() and (np.diff(widths / reached) > 0).all()
    assert (narrower(Efficiency(attention=0.6), widths) == 1.0).all()
    calls = [
        Sample("scaled_dot_product", 10**9, 0, (1024, width, 1024), Spread(s, s, s))
        for width, s in ((64, 2e-3), (128, 1e-3))
    ]
    assert attention_shares(calls, 0.0, 1e12) == {128: 0.5, 64: 0.25}
    faster = [replace(call, taken=Spread(5e-4, 5e-4, 5e-4)) for call in calls]
    assert attention_shares(faster, 0.0, 1e12) == {128: 1.0, 64: 1.0}
