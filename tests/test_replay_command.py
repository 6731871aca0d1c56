"""./launch.sh replay: what it refuses, what it writes, and real runs given back."""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path

import pytest

from costs import ledger as ledgers
from costs import trace as traces
from costs.program import Message, Program, Wait, Work
from costs.trace import COMMUNICATION, COMPUTE, WAIT, Slice, Trace
from experiments.__main__ import main
from experiments.figures.given_back import CASES, given_back
from experiments.predict import clusters
from simulator.event_times import EventTimes
from simulator.hardware import Cluster, Device, Efficiency, Level, Peak
from tests.test_ledger import a_ledger


def a_run(folder: Path, with_trace: bool = True) -> Path:
    """A measured run of two ranks: 0.3 s of work, a message of 0.1 s, 0.1 s of update."""
    folder.mkdir()
    ledger = a_ledger()
    for step in (ledger["step"], *ledger["ranks"]):
        parts = {"compute": 0.3, "exposed_communication": 0.1, "optimizer": 0.1}
        step["time_s"] = {"total": 0.5, "bubble": 0.0, "other": 0.0, **parts}
        step["communication"][0].update(calls=1, payload_bytes=10**9, wire_bytes=10**9)
    ledgers.write(folder / "ledger.json", ledger)
    (folder / "config.yaml").write_text("steps: 2\n")
    program: Program = [
        Work("backward", "backward", 0.3),
        Message(0, "all_reduce", "dp_replicate", (0, 1), "float32", 10**9, "backward", 0.1),
        Wait(0, "backward"),
        Work("optimizer", "", 0.1),
    ]
    if with_trace:
        args = {"number": 0, "axis": "dp_replicate"}
        slices = [
            Slice(rank, track, kind, 0.3, 0.4, args=args)
            for rank in (0, 1)
            for track, kind in ((COMMUNICATION, "all_reduce"), (COMPUTE, WAIT))
        ]
        about = {"layout": "dp_replicate2"}
        traces.write(folder / "trace.json.gz", Trace(slices, {0: program, 1: program}, [], about))
    return folder


def said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["replay", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_ledger_of_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 GB between two machines on 10 Gb/s: each sends all of it, twice a half."""
    run, out = a_run(tmp_path / "run"), tmp_path / "out"
    argv = [str(run), "cluster=ethernet_10g", f"out={out}", "--json"]
    status, text, _ = said(argv, capsys)
    ledger = json.loads(text)
    assert status == 0 and ledger == ledgers.read(out / "ledger.json")
    assert ledger["source"] == "replayed" and "training" not in ledger
    assert abs(ledger["environment"]["replay"]["own_error"]) < 1e-6
    parts, was = ledger["step"]["time_s"], ledgers.read(run / "ledger.json")["step"]
    level = clusters.load("ethernet_10g").between_nodes
    message = 10**9 / level.rate + 2 * level.latency
    assert parts["exposed_communication"] == pytest.approx(message)
    assert (parts["compute"], parts["optimizer"]) == (0.3, pytest.approx(0.1))
    assert ledger["step"]["communication"][0]["time_s"] == pytest.approx(message)
    faster = was["time_s"]["total"] / parts["total"]
    assert ledger["step"]["tokens_per_s"] == pytest.approx(was["tokens_per_s"] * faster)
    assert traces.read(out / "trace.json.gz").programs[0][1].seconds == pytest.approx(message)  # type: ignore[union-attr]
    assert (out / "timeline.png").is_file()


def test_the_table_says_how_well_the_run_is_given_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    status, text, _ = said([str(run), "cluster=h100", f"out={tmp_path / 'out'}"], capsys)
    assert status == 0
    assert "replayed on its own messages 500.00 ms, measured 500.00 ms" in text


def test_the_trace_of_a_run_is_taken_for_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = a_run(tmp_path / "run") / "trace.json.gz"
    status, text, _ = said([str(trace), "cluster=h100", f"out={tmp_path / 'out'}"], capsys)
    assert status == 0 and "measured 500.00 ms" in text


REFUSED: list[tuple[list[str], str]] = [
    (["RUN", "cluster=moon"], "cluster=moon: no such option; allowed: a100_40g,"),
    (["RUN"], "cluster is not set: give it as cluster=..., a100_40g,"),
    (["RUN", "cluster=h100", "speed=2"], "speed=2: replay takes RUN, cluster=NAME|FILE, out="),
    (["cluster=h100"], "replay takes one run's folder, not 0: replay RUN cluster=NAME"),
    (["BARE", "cluster=h100"], "BARE: no trace.json.gz there; ./launch.sh trace=true ..."),
    (["KINETO/trace.json.gz", "cluster=h100"], "(torch's profiler writes none); ./launch.sh tr"),
    (
        ["KINETO/trace.json", "cluster=h100"],
        "trace.json: replay takes a run's folder, or its trace",
    ),
    (["RUN", "cluster=KINETO/notes.txt"], "notes.txt: not a cluster's profile: "),
    (["RUN", "cluster=h100", "out=RUN"], "run.dir=RUN: already holds a run"),
]


@pytest.mark.parametrize("argv,line", REFUSED, ids=[line[:30] for _, line in REFUSED])
def test_bad_input_is_one_line(
    argv: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kineto = tmp_path / "kineto"
    kineto.mkdir()
    text = json.dumps({"traceEvents": [], "schemaVersion": 1, "displayTimeUnit": "ms"})
    (kineto / "trace.json").write_text(text)
    (kineto / "notes.txt").write_text("two racks of eight\n")
    with gzip.open(kineto / "trace.json.gz", "wt") as file:
        file.write(text)
    places = {
        "KINETO": kineto,
        "RUN": a_run(tmp_path / "run"),
        "BARE": a_run(tmp_path / "bare", with_trace=False),
    }

    def filled(text: str) -> str:
        for name, folder in places.items():
            text = text.replace(name, str(folder)) if "takes" not in text else text
        return text

    status, out, error = said([filled(a) for a in argv], capsys)
    assert (status, out) == (2, "") and error.count("\n") == 1
    wanted = filled(line)
    assert wanted in error, error


CLUSTER = Cluster(
    device=Device("", Peak(fp32=1e12), 1e9, 1e9, efficiency=Efficiency(matmul=0.5, half_size=10)),
    node_size=2,
    in_node=Level(1e9, 1e-6),
    between_nodes=Level(1e8, 1e-5),
    operator_overhead=1e-6,
)


def test_the_roofline() -> None:
    """Bound by products (whose small side halves the rate), by bytes, by launches."""
    times = EventTimes(CLUSTER)
    wide, big = 10**6, 10**9
    product = Work("forward", flops=2 * 10 * wide * wide, shape=(1, 10, wide, wide))
    assert times.work(product) == pytest.approx(product.flops / 5e11 * (2 + 2e-5))
    assert times.work(Work("forward", bytes=big)) == pytest.approx(1.0)
    assert times.work(Work("forward", operators=7)) == pytest.approx(7e-6)
    assert times.work(Work("forward", bytes=big, seconds=0.25)) == 0.25


def test_messages_use_the_network_between_their_ranks() -> None:
    """Two ranks of a node send over it, others over what joins the nodes."""
    times = EventTimes(CLUSTER)
    for ranks, alpha, rate in (((0, 1), 1e-6, 1e9), ((1, 2), 1e-5, 1e8)):
        message = Message(0, "send", "pp", ranks, "float32", 10**6, "forward", seconds=9.0)
        assert times.message(message) == pytest.approx(alpha + 10**6 / rate)


@pytest.mark.slow
def test_recorded_runs_are_given_back() -> None:
    """Replayed on its own messages, a run takes about the time that was measured.

    A busy machine holds threads up where nothing records it, which only makes the replay shorter:
    so the lower bound is wide here; experiments/figures/simulator.py shows how near it comes.
    """
    ratios = given_back(5)
    assert len(ratios) == len(CASES)
    for label, of_runs in ratios.items():
        assert 0.7 < statistics.median(of_runs) < 1.05, label


def test_every_cluster_prices_every_collective() -> None:
    for cluster in clusters.load_all().values():
        times = EventTimes(cluster)
        for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"):
            message = Message(0, name, "tp", tuple(range(16)), "float32", 10**6, "forward")
            assert times.message(message) > 0
