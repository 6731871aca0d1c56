"""No process outlives its launcher, and nothing is lost or half-written."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from costs import ledger as ledgers
from experiments.process import RANK, TORCHRUN
from tests.launching import (
    ROOT,
    SMALL,
    ended,
    environment,
    launch,
    only_run,
    processes_of,
    start,
    wait_until,
)

pytestmark = pytest.mark.slow
LONG = (*SMALL, "steps=100000", "run.dir=long")


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_process_and_keeps_what_was_measured(
    tmp_path: Path, number: signal.Signals
) -> None:
    process, folder = start(*LONG, cwd=tmp_path), tmp_path / "long"
    wait_until("three steps", lambda: lines(folder) > 3 or process.poll() is not None)
    assert len(processes_of(Path("long"))) >= 3, "torchrun and two ranks"
    process.send_signal(number)
    _, err = ended(process)
    assert process.returncode == 128 + number
    if number == signal.SIGTERM:  # a scheduler's: it lets the ranks save
        asked, said = err.splitlines()
        assert asked.startswith("launch.sh: SIGTERM: the run saves and stops after the step that")
        assert re.fullmatch(
            r"launch.sh: stopped by SIGTERM after (\d+) steps, which are saved; run.dir=long "
            "resume=auto goes on",
            said,
        )
    else:
        assert err == f"launch.sh: stopped by {number.name}; what was measured is in long\n"
    wait_until("no process is left", lambda: not ranks_of(tmp_path))
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] > 0
    assert not (folder / "ledger.json").exists()


def test_signals_that_the_caller_ignores_end_nothing(tmp_path: Path) -> None:
    """nohup ignores the hang-up and a shell's & Ctrl-C. SIGTERM still ends the run."""
    line = f"trap '' HUP INT; exec {ROOT}/launch.sh {' '.join(LONG)}"
    process = subprocess.Popen(["bash", "-c", line], cwd=tmp_path, env=environment())
    folder = tmp_path / "long"
    wait_until("three steps", lambda: lines(folder) > 3 or process.poll() is not None)
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    seen = lines(folder)
    wait_until("more steps", lambda: lines(folder) > seen + 3 or process.poll() is not None)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    wait_until("no process is left", lambda: not ranks_of(tmp_path))


@pytest.mark.parametrize("victim", ["launcher", "torchrun", "rank"])
def test_a_kill_leaves_no_process(tmp_path: Path, victim: str) -> None:
    process, folder = start(*LONG, cwd=tmp_path), tmp_path / "long"
    wait_until("three steps", lambda: lines(folder) > 3 or process.poll() is not None)
    ranks = ranks_of(tmp_path)
    if victim == "launcher":
        process.kill()
    else:
        module = {"torchrun": TORCHRUN, "rank": RANK}[victim]
        # python -m MODULE ...; torchrun's own line names the worker's module later on
        next(p for p in ranks if module in p.cmdline()[:4]).kill()
    _, err = ended(process)
    wait_until("no process is left", lambda: not ranks_of(tmp_path))
    if victim != "launcher":
        assert process.returncode == 1 and err.startswith("launch.sh: the run failed: ")
        assert err.count("\n") == 1


def test_a_run_of_one_node_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    process, folder = start(*LONG, cwd=tmp_path), tmp_path / "long"
    wait_until("three steps", lambda: lines(folder) > 3)
    everything = [c for p in ranks_of(tmp_path) for c in p.net_connections()]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    listening = {c.laddr.ip for c in everything if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def ranks_of(cwd: Path) -> list:
    """torchrun and its ranks, which run in the test's folder."""
    return [p for p in processes_of(Path("long")) if p.is_running() and p.cwd() == str(cwd)]


def limited(kilobytes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Launch where no file may grow beyond a size: as on a disk that is full."""
    command = f"ulimit -f {kilobytes}; exec {ROOT}/launch.sh {' '.join(arguments)}"
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment(), capture_output=True, text=True
    )


def test_a_full_disk_while_saving_leaves_no_half_file(tmp_path: Path) -> None:
    done = limited(64, *SMALL, "model.d_model=128", "sample.tokens=0", cwd=tmp_path)
    assert done.returncode == 1
    assert "File too large" in done.stderr or "rank 0" in done.stderr
    assert done.stderr.count("\n") == 1
    folder = only_run(tmp_path)
    assert not (folder / "model.pt").exists() and not list(folder.glob("*.part"))
    assert ledgers.read(folder / "ledger.json")["training"]["steps"] == 4
    refused = launch("generate", f"run={folder}", cwd=tmp_path)
    assert refused.returncode == 2 and "no model.pt there" in refused.stderr


def test_a_full_disk_while_caching_leaves_nothing_to_be_read_as_whole(tmp_path: Path) -> None:
    small = (*SMALL, "data=stdlib", "data.cache=cache")
    done = limited(64, *small, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "launch.sh: data.cache=cache: File too large\n"
    assert not list((tmp_path / "cache").iterdir())
    assert launch(*small, cwd=tmp_path).returncode == 0
