"""What calibrate makes of times, and what a measured profile's tables change."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from costs.program import Message, Program, Wait, Work
from experiments.__main__ import main
from experiments.calibrate import device_times, message_times, profile
from experiments.calibrate.gpu import attention_shares, calibration_of_gpus
from experiments.calibrate.operator_times import Sample, fit, rates_of
from experiments.calibrate.picture import draw, write
from experiments.calibrate.ranks import Alone, Found
from experiments.calibrate.spread import Spread, spread_of
from experiments.environment import gpu_count
from experiments.predict import clusters
from simulator.collectives import Group, ring, seconds
from simulator.estimate import narrower
from simulator.event_times import EventTimes
from simulator.hardware import (
    Cluster,
    Device,
    Efficiency,
    Level,
    Link,
    OperatorSpeed,
    Peak,
    numbers,
    tables,
)
from simulator.programs import sent_by_the_device
from simulator.replay import replay
from tests.launching import ROOT, environment, free_ports

PRODUCT = OperatorSpeed(latency=3e-6, flops=1e11, fill=5e9)
GELU = OperatorSpeed(latency=2e-6, bandwidth=4e9)
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


def taking(seconds: float) -> Spread:
    return spread_of([seconds])


def product(rows: int, inner: int, columns: int, name: str = "aten.mm") -> Sample:
    flops, sides = 2 * rows * inner * columns, (rows, inner, columns)
    return Sample(name, flops, 4 * rows * columns, sides, taking(PRODUCT.seconds(flops, 0, sides)))


SAMPLES = [
    *(product(rows, inner, 64) for rows in (16, 256, 4096) for inner in (32, 512)),
    *(Sample("aten.gelu", 0, 2**n, (), taking(GELU.seconds(0, 2**n))) for n in (10, 18, 24)),
    Sample(ATTENTION, 4 * 10**9, 0, (512, 64, 512), taking(0.1)),
    Sample("aten.odd", 0, 8, (), taking(1e-5)),  # one call: no line, but a time
]


def test_lines_of_operators_are_found_again() -> None:
    found = fit(SAMPLES)
    for name, wanted in (("aten.mm", PRODUCT), ("aten.gelu", GELU)):
        for key in ("latency", "bandwidth", "flops", "fill"):
            value = getattr(wanted, key)
            near = value if value is None else pytest.approx(value, rel=0.01)
            assert getattr(found[name], key) == near, (name, key)
    assert found["aten.odd"].seconds(0, 8) == pytest.approx(1e-5, rel=0.01)
    assert found["aten.odd"].seconds(0, 10**9) < 1  # eight bytes say nothing of a bandwidth


def test_what_the_closed_forms_take_follows_from_the_same_samples() -> None:
    rates = rates_of(SAMPLES)
    assert rates.products == pytest.approx(1e11, rel=0.01)
    assert rates.half_size == pytest.approx(1e11 / 5e9, rel=0.01)
    assert rates.attention == pytest.approx(2e10 * (1 + 20 * 2 / 512), rel=0.01)


LINKS = {
    "in_node": {"all_reduce": Link(1e9, 1e-4), "send": Link(3e9, 2e-5)},
    "between_nodes": {"all_reduce": Link(1e7, 1e-3), "send": Link(3e7, 2e-3)},
}


def messages() -> list[message_times.Timed]:
    """What a network of LINKS would take, in groups of several sizes."""
    return [
        message_times.Timed(
            level,
            name,
            ranks,
            size,
            spread_of([float(ring(name, size, ranks, link.latency, link.bandwidth))]),
        )
        for level, links in LINKS.items()
        for name, link in links.items()
        for ranks in (2, 4)
        for size in (1024, 2**18, 2**24)
    ]


def test_lines_of_messages_are_found_again() -> None:
    found = message_times.fit(messages())
    assert found.keys() == LINKS.keys()
    for level, links in LINKS.items():
        for name, link in links.items():
            assert found[level][name].bandwidth == pytest.approx(link.bandwidth, rel=1e-3)
            assert found[level][name].latency == pytest.approx(link.latency, rel=1e-3)
    for point in message_times.points(messages(), found):
        assert point.error == pytest.approx(0, abs=1e-3)
    inside, between = profile.levels(found)
    assert between.of("send").bandwidth == pytest.approx(3e7, rel=1e-3)
    assert profile.levels({"in_node": found["in_node"]}) == (inside, inside)


def test_groups_of_two_and_up_in_a_node_and_between_nodes() -> None:
    """Six ranks on two nodes, each with its like on the other."""
    assert message_times.groups(6, 3) == [
        ("in_node", [[0, 1]]),
        ("in_node", [[0, 1, 2]]),
        ("between_nodes", [[0, 3], [1, 4], [2, 5]]),
    ]
    assert [len(groups[0]) for _, groups in message_times.groups(8, 8)] == [2, 4, 8]
    assert message_times.groups(1, 1) == []


def test_quartiles_are_those_of_numpy() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    found = spread_of(values)
    low, middle, high = np.percentile(values, (25, 50, 75))
    assert (found.low, found.middle, found.high) == pytest.approx((low, middle, high))
    rate = found.rate(12.0)
    assert (rate.low, rate.middle, rate.high) == pytest.approx((12 / high, 12 / middle, 12 / low))
    assert spread_of([2.0]) == Spread(2.0, 2.0, 2.0)


CPU = torch.device("cpu")
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
    assert none.cluster.sources["in_node.bandwidth"] == "assumed: one device"
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


REFUSED = [
    (["speed=2"], "speed=2: calibrate takes to=FILE and device=auto, cpu or cuda"),
    (["to="], "to=: calibrate takes to=FILE"),
    (["to=a.yaml", "to=b.yaml"], "to=b.yaml: calibrate takes to=FILE"),
    (["laptop.yaml"], "laptop.yaml: calibrate takes to=FILE"),
    (["--json"], "--json: calibrate takes to=FILE"),
    (["to=moon/laptop.yaml"], "to=moon/laptop.yaml: no such folder as moon"),
    (["to=mine.txt"], "to=mine.txt: must end with .yaml"),
    (["device=tpu"], "device=tpu: must be auto, cpu or cuda"),
]


@pytest.mark.parametrize("argv,line", REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_bad_input_is_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, captured = main(["calibrate", *argv]), capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith(f"launch.sh: {line}") and captured.err.count("\n") == 1


@pytest.mark.skipif(gpu_count() > 0, reason="there is a GPU, which is not refused")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "device=cuda"]) == 2
    assert capsys.readouterr().err.startswith("launch.sh: device=cuda: torch sees no CUDA device")


@pytest.mark.slow
def test_two_nodes_of_one_rank_find_what_is_between_them(tmp_path: Path) -> None:
    """torchrun starts a rank on each; the first writes the profile. Sizes are small: what is held
    to here is the way, not this machine."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    line += ["--master-addr=127.0.0.1", f"--master-port={free_ports(1)[0]}"]
    module = ["-m", "tests.calibrate_on_nodes", "to=nodes.yaml"]
    env = {**environment(), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [
        subprocess.Popen([*line, f"--node-rank={i}", *module], cwd=tmp_path, env=env)
        for i in range(2)
    ]
    assert [node.wait(timeout=900) for node in nodes] == [0, 0]
    cluster = clusters.read(tmp_path / "nodes.yaml")
    assert cluster.between_nodes.collectives
    assert cluster.sources["in_node.bandwidth"].startswith("assumed: no message was measured")
    assert "its lines are off by" in cluster.sources["between_nodes.collectives"]
    assert (tmp_path / "nodes.png").stat().st_size > 0
    rows = list(csv.DictReader((tmp_path / "nodes.csv").open()))
    assert {row["kind"] for row in rows} == {"product", "memory", "message", "operator"}


def machine(**changes: Any) -> Cluster:
    level = Level(1e9, 1e-5, collectives={"reduce_scatter": Link(5e8, 2e-5)})
    device = Device("", Peak(fp32=1e11), 1e9, 1e10, efficiency=Efficiency(matmul=0.5), **changes)
    return Cluster("", device, 2, level, level, operator_overhead=1e-5)


def test_a_collective_may_have_a_line_of_its_own() -> None:
    pair, size = Group(2, 2), 10**6
    cluster = machine()
    assert seconds("reduce_scatter", size, pair, cluster) == pytest.approx(2e-5 + size / 2 / 5e8)
    assert seconds("all_gather", size, pair, cluster) == pytest.approx(1e-5 + size / 2 / 1e9)


def test_an_operator_may_have_a_line_of_its_own_and_the_host_adds_on_a_core() -> None:
    work = Work("forward", "aten.gelu", bytes=10**6)
    own = {"operators": {"aten.gelu": GELU}}
    busy = GELU.seconds(0, 10**6)
    assert EventTimes(machine(**own)).work(work) == pytest.approx(busy)  # the launch is shorter
    on_a_core = EventTimes(machine(**own, asynchronous=False)).work(work)
    assert on_a_core == pytest.approx(busy + 1e-5)
    assert EventTimes(machine(asynchronous=False)).work(work) == pytest.approx(1e-4 + 1e-5)


def ddp() -> Program:
    ranks = (0, 1)
    return [
        Work("backward", seconds=1.0),
        Message(0, "all_reduce", "dp_replicate", ranks, "float32", 8, "backward"),
        Work("backward", seconds=1.0),
        Wait(0, "backward"),
    ]


@given(st.floats(0, 5))
def test_what_a_core_sends_takes_its_time(message_s: float) -> None:
    """A GPU hides a message behind a second of work, a core none of it."""

    def total(program: Program) -> float:
        programs = {0: program, 1: program}
        return replay(programs, lambda work: work.seconds or 0.0, lambda _: message_s).total

    assert total(ddp()) == pytest.approx(1 + max(1, message_s))
    assert total(sent_by_the_device(ddp())) == pytest.approx(2 + message_s)


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
