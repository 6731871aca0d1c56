"""./launch.sh lab: nodes in namespaces, real links between them, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from costs import ledger as ledgers
from costs.messages import gloo_bytes
from experiments.__main__ import main
from experiments.commands import Row
from experiments.lab import report as lab_report
from experiments.lab import shaped_links
from experiments.lab.command import Lab, comparison, delay_of, predicted_seconds, rate_of, show
from experiments.lab.profile import PAYLOAD, profile_of, slower_device
from experiments.lab.shaped_links import Links, Missing
from experiments.predict import clusters
from simulator.collectives import Group, seconds
from simulator.hardware import OperatorSpeed, numbers, tables
from tests.launching import PATIENCE_S, ROOT, SMALL, ended, environment, launch, start, wait_until
from tests.test_ledger import a_ledger

LAPTOP = clusters.load("laptop")
SLOW = 5e6  # bits/s


@pytest.fixture
def namespaces() -> None:
    """Skip where this system or user cannot have such a network."""
    try:
        shaped_links.probe(Links(2, SLOW))
    except Missing as error:
        pytest.skip(str(error))


def test_rates_and_delays_are_read_as_tc_writes_them() -> None:
    assert [rate_of(t) for t in ("100mbit", "1gbit", "2.5gbit", "none")] == [1e8, 1e9, 2.5e9, None]
    assert [delay_of(t) for t in ("50us", "2ms", "1s")] == pytest.approx([50e-6, 2e-3, 1.0])


REFUSED = [
    (["rate=1gbit"], "nodes is not set: give it as nodes=2 or more"),
    (["nodes=1"], "nodes=1: must be a whole number from 2 to 250"),
    (["nodes=two"], "nodes=two: must be a whole number"),
    (["nodes=2", "rate=fast"], "rate=fast: must be a number with kbit, mbit or gbit, or none"),
    (["nodes=2", "rate=0gbit"], "rate=0gbit: must be a number"),
    (["nodes=2", "rate=-1gbit"], "rate=-1gbit: must be a number"),
    (["nodes=2", "delay=3"], "delay=3: must be a number with us, ms or s"),
    (["nodes=2", "machine=moon"], "machine=moon: no such option; allowed: a100_40g,"),
    (["nodes=2", "machine=moon.yaml"], "machine=moon.yaml: no such option; allowed: a100_40g,"),
    (["nodes=2", "recorded=nowhere"], "nowhere: no trace.json.gz there"),
]


@pytest.mark.parametrize("argv,line", REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_bad_input_is_one_line(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", *argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"launch.sh: {line}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv,line",
    [
        (["device=cuda"], "device=cuda: the lab's ranks are CPU ranks"),
        (["layout.dp_replicate=3"], "nodes=2: the layout's 3 ranks do not divide"),
    ],
)
def test_a_job_that_does_not_fit_the_nodes_is_refused(
    namespaces: None,
    argv: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["lab", "nodes=2", *SMALL, *argv]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"launch.sh: {line}") and not list(tmp_path.iterdir())


def test_without_the_tools_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shaped_links, "PLACES", "/nowhere")
    assert main(["lab", "nodes=2"]) == 2
    assert capsys.readouterr().err == "launch.sh: lab: ip is not installed (package iproute2)\n"


def test_what_the_kernel_does_not_take_is_one_line(namespaces: None) -> None:
    """No kernel has a delay below zero, and some have none at all."""
    with pytest.raises(Missing, match=r"^delay needs a kernel with netem .*: tc .*-1000000us") as e:
        shaped_links.probe(Links(2, None, delay=-1.0))
    assert "\n" not in str(e.value)


def test_the_profile_has_the_links_and_the_machines_own_limits() -> None:
    slow = profile_of(Links(2, 1e8, 3e-3), 2, 2, LAPTOP)
    assert slow.between_nodes.rate == pytest.approx(1e8 / 8 * PAYLOAD)
    latency = LAPTOP.in_node.of("all_reduce").latency
    assert slow.between_nodes.latency == pytest.approx(latency + 3e-3)
    assert slow.node_size == 1
    assert slow.overlap == pytest.approx(1 - slow.between_nodes.rate / slow.in_node.rate)
    fast = profile_of(Links(2, 1e12), 2, 2, LAPTOP)
    assert fast.between_nodes.rate == LAPTOP.in_node.of("all_reduce").rate and fast.overlap == 0
    assert set(fast.sources) == {*dict(numbers(fast)), *tables(fast)}


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "send"])
def test_a_slow_link_carries_what_gloo_sends(collective: str) -> None:
    """A large message takes what gloo makes a rank send, over the rate of its link."""
    cluster = profile_of(Links(4, 1e6), 4, 4, LAPTOP)
    payload, n = 10**8, 2 if collective == "send" else 4
    found = float(seconds(collective, payload, Group(n, 1), cluster))
    sent = gloo_bytes(collective, payload, n)
    assert found == pytest.approx(sent / (1e6 / 8 * PAYLOAD), rel=1e-3)


@pytest.mark.parametrize("nodes, longer", [(2, 1.5), (4, 1.0)])
def test_an_all_gather_of_two_ranks_takes_longer_than_its_bytes(nodes: int, longer: float) -> None:
    cluster = profile_of(Links(nodes, 1e6), nodes, nodes, LAPTOP)
    found = float(seconds("all_gather", 10**8, Group(nodes, 1), cluster))
    ring = gloo_bytes("all_gather", 10**8, nodes) / (1e6 / 8 * PAYLOAD)
    assert found == pytest.approx(longer * ring, rel=1e-3)


def test_ranks_that_share_a_core_have_a_part_of_it() -> None:
    whole, half = (profile_of(Links(4, None), ranks, 4, LAPTOP) for ranks in (4, 8))
    assert half.node_size == 2
    assert half.device.flops("fp32") == pytest.approx(whole.device.flops("fp32") / 2)
    assert half.operator_overhead == pytest.approx(whole.operator_overhead * 2)
    speed = OperatorSpeed(1e-6, flops=1e9)
    device = slower_device(replace(LAPTOP.device, operators={"mm": speed}), 0.5)
    assert device.operators["mm"].seconds(1e6, 0) == pytest.approx(2 * speed.seconds(1e6, 0))


def test_a_run_without_a_timed_step_has_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both of its steps were looked at operator by operator: its time is null."""
    ledger = a_ledger()
    for step in (ledger["step"], *ledger["ranks"]):
        step["time_s"] = dict.fromkeys(step["time_s"])
    ledgers.write(tmp_path / "ledger.json", ledger)
    (tmp_path / "config.yaml").write_text("steps: 2\nlayout: {dp_replicate: 2}\n")
    lab = Lab(Links(2, 1e8), LAPTOP)
    found = comparison(lab, Row([], "done", tmp_path), None)
    assert found["measured_time_s"] is found["predicted_time_s"] is found["error"] is None
    show(lab, found)
    assert "%" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_nodes_train_over_links_that_slow(namespaces: None, tmp_path: Path) -> None:
    """A run leaves its record; no message is faster than its link."""
    arguments = ("lab", "nodes=2", "rate=5mbit", *SMALL, "run.dir=slow", "trace=true", "--json")
    done = launch(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ledger = ledgers.read(tmp_path / "slow" / "ledger.json")
    assert ledger["layout"]["world_size"] == 2
    assert found["measured_time_s"] == ledger["step"]["time_s"]["total"]
    fast = tmp_path / "slow" / "fast"
    assert found["recorded"] == "slow/fast" and (fast / "trace.json.gz").is_file()
    quoted = predicted_seconds(fast, Links(2, SLOW), LAPTOP)
    assert found["predicted_time_s"] == quoted, "what docs/results/lab.md would quote"
    assert found["error"] == quoted / found["measured_time_s"] - 1
    rows = [r for r in ledger["step"]["communication"] if r["dtype"] == "float32"]
    # what each link lets through at once, a burst, can be there before
    bits = 8 * (sum(row["wire_bytes"] for row in rows) - shaped_links.SMALLEST_BURST)
    assert bits > 0 and found["measured_time_s"] > bits / SLOW
    profile = clusters.read(tmp_path / "slow" / "cluster.yaml")
    assert profile.between_nodes.rate == pytest.approx(SLOW / 8 * PAYLOAD)
    again = launch("replay", "slow", "cluster=slow/cluster.yaml", "out=there", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(
    namespaces: None, tmp_path: Path, number: signal.Signals
) -> None:
    before = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout
    long = (*SMALL, "steps=100000", f"run.dir={tmp_path}/long")
    process = start("lab", "nodes=2", "rate=100mbit", *long, cwd=tmp_path)
    metrics = tmp_path / "long" / "metrics.jsonl"
    wait_until("a step", lambda: process.poll() is not None or lines(metrics) > 1)
    theirs = psutil.Process(process.pid).children(recursive=True)
    networks = {namespace_of(p) for p in theirs}
    assert len(networks - {namespace_of(psutil.Process())}) == 3, "the bridge's and two nodes'"
    process.send_signal(number)
    _, err = ended(process)
    wait_until("no process is left", lambda: not any(alive(p) for p in theirs))
    if number == signal.SIGINT:
        assert process.returncode == 130 and "stopped by SIGINT; what was measured is in" in err
    assert subprocess.run(["ip", "-br", "link"], capture_output=True, text=True).stdout == before


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def namespace_of(process: psutil.Process) -> str:
    return os.readlink(f"/proc/{process.pid}/ns/net")


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_node_that_fails_ends_the_others(namespaces: None, tmp_path: Path) -> None:
    """Node 1 fails at once; node 0 would go on for an hour."""
    spec = tmp_path / "spec.json"
    lines: list[Any] = [["sleep", "3600"], [sys.executable, "-c", "raise SystemExit(7)"]]
    shaped_links.write(spec, Links(2, None), lines)
    program = "import sys; from experiments.lab import shaped_links as s; s.NOTICE_S = 0.5; "
    program += "sys.exit(s.main(sys.argv[1:]))"
    prefix = shaped_links.command()[: -len([sys.executable, "-m", "module"])]
    done = subprocess.run([*prefix, sys.executable, "-c", program, str(spec)], timeout=PATIENCE_S)
    assert done.returncode == 7


@pytest.mark.slow
def test_a_torchrun_on_each_of_two_hosts(namespaces: None, tmp_path: Path) -> None:
    """As README.md says for several nodes: each has an address of its own, and is told one."""
    links, spec = Links(2, None), tmp_path / "spec.json"
    shared = [str(ROOT / "launch.sh"), "--nnodes=2", "--master-port=29500", *SMALL]
    shared += [f"--master-addr={links.address(0)}", "run.dir=shared", "layout.tp=2"]
    lines = [[*shared, f"--node-rank={i}", "layout.dp_replicate=2"] for i in range(2)]
    shaped_links.write(spec, links, lines)
    done = subprocess.run(
        shaped_links.command(spec),
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert ledgers.read(tmp_path / "shared" / "ledger.json")["layout"]["world_size"] == 4
    assert "crosses nodes" not in done.stderr, "two ranks a node: tp stays inside"


def test_the_reports_errors_are_of_pairs() -> None:
    """A round that others slowed has slowed what is predicted of it too."""
    found = lab_report.Found(measured={"r": [1.0, 2.0, 1.0]}, predicted={"r": [1.1, 2.2, 1.1]})
    assert found.error("r") == pytest.approx(0.1)
    uneven = lab_report.Found(measured={"r": [1.0, 3.0, 2.0]}, predicted={"r": [0.9, 3.0, 2.4]})
    assert uneven.error("r") == pytest.approx(0.0)


def test_what_others_take_is_what_the_children_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10 s two cores were busy for 12, of which the children had 8: others had 4 of 20."""
    seconds = iter([(0.0, 5.0, 1.0), (10.0, 17.0, 9.0)])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with lab_report.Neighbours(lambda: next(seconds)) as others:
        pass
    assert others.share == pytest.approx(0.2)
    before = lab_report.spent()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    after = lab_report.spent()
    assert after[0] > before[0] and after[1] > before[1] and after[2] > before[2]
