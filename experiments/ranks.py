"""Real gloo ranks for a function: run_ranks(2, function, ...) returns what each rank returned."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.environment import of_a_rank

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300.0


class RankFailed(RuntimeError):
    """A rank raised, died, or did not end in time; the message holds its traceback."""


def run_ranks(
    world_size: int,
    function: Callable,
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    variables: dict[str, str] | None = None,
    backend: str | None = None,
) -> list[Any]:
    """Call `function(*args)`, a function of a module, on `world_size` ranks.

    `backend` defaults to the metered one, `variables` to what the launcher gives its ranks. Raises
    RankFailed. No process is left behind.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module = function.__module__
        spec = sys.modules["__main__"].__spec__
        if module == "__main__" and spec:  # of python -m: the ranks know it by its own name
            module = spec.name
        task = (backend, module, function.__qualname__, args)
        (folder / "task").write_bytes(pickle.dumps(task))
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environ = {
            **os.environ,
            **(of_a_rank() if variables is None else variables),
            "WORLD_SIZE": str(world_size),
            "PYTHONPATH": path,
        }
        command = [sys.executable, "-m", "experiments.ranks", name]
        ranks = [
            subprocess.Popen(command, env={**environ, "RANK": str(i), "LOCAL_RANK": str(i)})
            for i in range(world_size)
        ]
        try:
            _wait(ranks, folder, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [pickle.loads((folder / f"result{i}").read_bytes()) for i in range(world_size)]


def _wait(ranks: list[subprocess.Popen], folder: Path, deadline: float) -> None:
    """Until all have ended well, or one has not."""
    while any(process.poll() is None for process in ranks):
        failed = [i for i, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed:
            raise RankFailed(_why(failed[0], ranks, folder))
        if time.monotonic() > deadline:
            raise RankFailed("the ranks did not end in time")
        time.sleep(0.02)
    for i, process in enumerate(ranks):
        if process.returncode:
            raise RankFailed(_why(i, ranks, folder))


def _why(rank: int, ranks: list[subprocess.Popen], folder: Path) -> str:
    time.sleep(0.5)  # the rank that began it may still be writing
    errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime)
    text = errors[0].read_text() if errors else "no traceback"
    return f"rank {rank} exited with {ranks[rank].returncode}\n{text}"


def main(folder: Path) -> None:
    """One rank: join, call, leave the result, and end at once as the project's own ranks do."""
    import importlib
    import traceback

    import torch.distributed as dist

    from costs.communication import BACKEND
    from experiments.process import die_with_parent, end
    from parallel.mesh import join, leave

    die_with_parent()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    status = 0
    try:
        # a file to meet at: a port found free now may be taken a moment later
        store = dist.FileStore(str(folder / "store"), world_size)
        backend, module, name, args = pickle.loads((folder / "task").read_bytes())
        join(backend or BACKEND, TIMEOUT_S, rank, world_size, store)
        result = getattr(importlib.import_module(module), name)(*args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        leave()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        status = 1
    end(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
