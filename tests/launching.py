"""launch.sh as a user runs it, small enough for a test."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from experiments.reliability.trials import without_scheduler

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 1200.0  # for what takes seconds: a machine may be busy
SMALL = (
    "data=generated",
    "model.n_layer=2",
    "model.d_model=32",
    "model.context=32",
    "micro_batch_size=2",
    "steps=4",
    "validation.batches=1",
    "sample.tokens=8",
)


def environment() -> dict[str, str]:
    """The suite's own interpreter, whatever is active, and no variable of a scheduler."""
    return {**without_scheduler(), "PYTHON": sys.executable}


def start(*arguments: str, cwd: Path, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [str(ROOT / "launch.sh"), *arguments],
        cwd=cwd,
        env={**environment(), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    """Run to the end: status, output, errors."""
    process = start(*arguments, cwd=cwd, **more)
    out, err = ended(process)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def ended(process: subprocess.Popen) -> tuple[str, str]:
    """Output and errors of a launch that comes to its end; none is left at work if it does not."""
    try:
        return process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its ranks end with it
        raise


def only_run(cwd: Path) -> Path:
    """The one run folder that is there."""
    (folder,) = (cwd / "runs").iterdir()
    return folder


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose command line names the folder, but for this one's children's shells."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def wait_until(what: str, holds, seconds: float = PATIENCE_S) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.05)
