"""What calibrate makes of times, and what a measured profile's tables change."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from costs.program import Message, Program, Wait, Work
from experiments.__main__ import main
from experiments.calibrate import message_times, profile
from experiments.calibrate.operator_times import Sample, fit, rates_of
from experiments.calibrate.spread import Spread, spread_of
from experiments.environment import gpu_count
from experiments.predict import clusters
from simulator.collectives import Group, ring, seconds
from simulator.event_times import EventTimes
from simulator.hardware import (
    Cluster,
    Device,
    Efficiency,
    Level,
    Link,
    OperatorSpeed,
    Peak,
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
