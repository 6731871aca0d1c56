"""Real gloo ranks inside a test: run_ranks(2, function, ...) returns what each rank returned."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 240) -> list[Any]:
    """Call `function(*args)`, a function of a module, on `world_size` ranks of the metered backend.

    Raises AssertionError with the traceback of the first rank that failed. No process is left.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = (function.__module__, function.__qualname__, args)
        (folder / "task").write_bytes(pickle.dumps(task))
        environ = {
            **os.environ,
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", "tests.ranks", name]
        ranks = [
            subprocess.Popen(command, env={**environ, "RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(world_size)
        ]
        try:
            _wait(ranks, folder, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [pickle.loads((folder / f"result{i}").read_bytes()) for i in range(world_size)]


def _wait(ranks: list[subprocess.Popen], folder: Path, deadline: float) -> None:
    """Until all have ended well; the first that does not fails the test."""
    while any(process.poll() is None for process in ranks):
        failed = [i for i, process in enumerate(ranks) if process.poll() not in (None, 0)]
        assert not failed, _why(failed[0], ranks, folder)
        assert time.monotonic() < deadline, "the ranks did not end in time"
        time.sleep(0.02)
    for i, process in enumerate(ranks):
        assert process.returncode == 0, _why(i, ranks, folder)


def _why(rank: int, ranks: list[subprocess.Popen], folder: Path) -> str:
    time.sleep(0.5)  # the rank that began it may still be writing
    errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime)
    text = errors[0].read_text() if errors else "no traceback"
    return f"rank {rank} exited with {ranks[rank].returncode}\n{text}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(folder: Path) -> None:
    """One rank: join, call, leave the result, and end at once as the project's own ranks do."""
    import importlib
    import traceback

    from costs.communication import BACKEND
    from experiments.process import die_with_parent
    from parallel.mesh import join, leave

    die_with_parent()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    status = 0
    try:
        join(BACKEND, 120, rank, world_size)
        module, name, args = pickle.loads((folder / "task").read_bytes())
        result = getattr(importlib.import_module(module), name)(*args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        leave()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        status = 1
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
