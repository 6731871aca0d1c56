"""What calibrate makes of times, and what a measured profile's tables change."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costs.program import Message, Program, Wait, Work
from experiments.__main__ import main
from experiments.message_times import fit as fit_messages
from experiments.operator_times import Sample, fit, rates_of
from simulator.collectives import Group, ring, seconds
from simulator.event_times import EventTimes
from simulator.hardware import Cluster, Device, Efficiency, Level, Link, OperatorSpeed, Peak
from simulator.programs import sent_by_the_device
from simulator.replay import replay

PRODUCT = OperatorSpeed(latency=3e-6, flops=1e11, fill=5e9)
GELU = OperatorSpeed(latency=2e-6, bandwidth=4e9)
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


def product(rows: int, inner: int, columns: int, name: str = "aten.mm") -> Sample:
    flops, sides = 2 * rows * inner * columns, (rows, inner, columns)
    return Sample(name, flops, 4 * rows * columns, sides, PRODUCT.seconds(flops, 0, sides))


SAMPLES = [
    *(product(rows, inner, 64) for rows in (16, 256, 4096) for inner in (32, 512)),
    *(Sample("aten.gelu", 0, 2**n, (), GELU.seconds(0, 2**n)) for n in (10, 18, 24)),
    Sample(ATTENTION, 4 * 10**9, 0, (512, 64, 512), 0.1),
    Sample("aten.odd", 0, 8, (), 1e-5),  # one call: no line, but a time
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


def test_lines_of_messages_are_found_again() -> None:
    links = {"all_reduce": Link(1e9, 1e-4), "send": Link(3e9, 2e-5)}
    times = {
        name: {size: float(ring(name, size, 2, link.latency, link.bandwidth)) for size in SIZES}
        for name, link in links.items()
    }
    for name, found in fit_messages(times, 2).items():
        assert found.bandwidth == pytest.approx(links[name].bandwidth, rel=1e-3)
        assert found.latency == pytest.approx(links[name].latency, rel=1e-3)


SIZES = (1024, 2**18, 2**24)


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


@pytest.mark.parametrize(
    "argv,line",
    [
        (["to="], "to=: calibrate takes to=FILE"),
        (["to=a.yaml", "to=b.yaml"], "to=b.yaml: calibrate takes to=FILE"),
        (["laptop.yaml"], "laptop.yaml: calibrate takes to=FILE"),
        (["--json"], "--json: calibrate takes to=FILE"),
        (["to=moon/laptop.yaml"], "to=moon/laptop.yaml: no such folder as moon"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, captured = main(["calibrate", *argv]), capsys.readouterr()
    assert (status, captured.out, captured.err) == (2, "", f"launch.sh: {line}\n")
