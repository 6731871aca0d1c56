"""Real gloo ranks for a function: run_ranks(2, function, ...) returns what each rank returned.

Importing torch takes a rank seconds, and there are many short runs. So one process imports what
they need, once, and every rank is a fork of it, which has run nothing yet.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar

from experiments.environment import of_a_rank
from experiments.process import die_with_parent, end, module_command

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600.0  # a busy machine takes many times what a quiet one does


class RankFailed(RuntimeError):
    """A rank raised, died, or did not end in time; the message holds its traceback."""


@dataclass(frozen=True)
class Task:
    """What the ranks of a world do."""

    folder: Path  # they meet there, and leave their results or errors
    world_size: int
    backend: str | None
    module: str
    function: str
    args: bytes  # pickled: each rank reads its own
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    cwd: str = field(default_factory=os.getcwd)


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
    RankFailed. No rank is left behind.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module = function.__module__
        spec = sys.modules["__main__"].__spec__
        if module == "__main__" and spec:  # of python -m: the ranks know it by its own name
            module = spec.name
        name_in_it, given = function.__qualname__, pickle.dumps(args)
        task = Task(folder, world_size, backend, module, name_in_it, given)
        with Server.lent(of_a_rank() if variables is None else variables) as server:
            statuses = server.run(task, timeout_s)
        if any(statuses.values()):
            raise RankFailed(_why(statuses, folder))
        return [pickle.loads((folder / f"result{i}").read_bytes()) for i in range(world_size)]


def _why(statuses: dict[int, int], folder: Path) -> str:
    rank, status = next((rank, status) for rank, status in statuses.items() if status)
    errors = sorted(folder.glob("error*"), key=lambda path: path.stat().st_mtime)
    text = errors[0].read_text() if errors else "no traceback"
    return f"rank {rank} exited with {status}\n{text}"


class Server:
    """A process that forks ranks, from here, for one task at a time; it ends when this process
    does."""

    running: ClassVar[list[Server]] = []
    choosing: ClassVar[RLock] = RLock()  # threads may want ranks at the same time

    @classmethod
    def of(cls, variables: dict[str, str]) -> Server:
        """One that had these variables when torch came, and is not at work."""
        with cls.choosing:
            free = (one for one in cls.running if one.variables == variables and not one.busy)
            return next(free, None) or cls(variables)

    @classmethod
    @contextmanager
    def lent(cls, variables: dict[str, str]) -> Iterator[Server]:
        """The same, and nobody else's inside."""
        with cls.choosing:
            server = cls.of(variables)
            server.busy = True
        try:
            yield server
        finally:
            server.busy = False

    def __init__(self, variables: dict[str, str]) -> None:
        self.variables, self.busy = dict(variables), False
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.connection, theirs = Pipe()
        number = theirs.fileno()
        self.process = subprocess.Popen(
            [*module_command("experiments.ranks"), str(number)],
            env={**os.environ, **variables, "PYTHONPATH": path},
            pass_fds=[number],
        )
        theirs.close()
        self.running.append(self)

    def run(self, task: Task, timeout_s: float) -> dict[int, int]:
        """The exit status of every rank, in the order in which they ended; negative: by a signal.

        Raises RankFailed where they do not all end in time.
        """
        task.environ.update(self.variables)
        done = False
        try:
            self.connection.send(task)
            if not self.connection.poll(timeout_s):
                raise RankFailed("the ranks did not end in time")
            statuses = self.connection.recv()
            done = True
        except (EOFError, ConnectionError):
            raise RankFailed("the process that starts ranks has died") from None
        finally:
            if not done:
                self.close()
        return statuses

    def close(self) -> None:
        """End it, and the ranks that are still there."""
        self.connection.close()
        self.process.wait()
        with self.choosing:
            self.running.remove(self)


def serve(parent: Connection) -> None:
    """One task after the other, until the parent is gone, which may be while ranks are at work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who then leaves
    with suppress(EOFError, ConnectionError):
        while True:
            parent.send(_start(parent.recv(), parent))


def _start(task: Task, parent: Connection) -> dict[int, int]:
    """Fork the ranks and wait until all have ended well, or one has not."""
    with suppress(BaseException):  # each rank meets it too, and says so
        importlib.import_module(task.module)
    ranks = {rank: _fork(task, rank, parent) for rank in range(task.world_size)}
    statuses: dict[int, int] = {}
    try:
        while len(statuses) < len(ranks) and not any(statuses.values()):
            if parent.poll(0.01):
                parent.recv()  # EOFError: it has nothing to say while ranks are at work
            for rank in ranks.keys() - statuses.keys():
                ended, status = os.waitpid(ranks[rank], os.WNOHANG)
                if ended:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()):
            time.sleep(0.5)  # the rank that began it may still be writing
    finally:
        for rank in ranks.keys() - statuses.keys():
            os.kill(ranks[rank], signal.SIGKILL)
            statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(ranks[rank], 0)[1])
    return statuses


def _fork(task: Task, rank: int, parent: Connection) -> int:
    """The process id of a new rank."""
    server = os.getpid()
    process = os.fork()
    if process == 0:
        try:
            die_with_parent(server)
            parent.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(task.cwd)
            os.environ.clear()
            os.environ.update(task.environ)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ["WORLD_SIZE"] = str(task.world_size)
            be_rank(task, rank)
        finally:
            end(1)
    return process


def be_rank(task: Task, rank: int) -> None:
    """One rank: join, call, leave the result, and end at once as the project's own ranks do."""
    import torch.distributed as dist

    from costs.communication import BACKEND
    from parallel.mesh import join, leave

    status = 0
    try:
        # a file to meet at: a port found free now may be taken a moment later
        store = dist.FileStore(str(task.folder / "store"), task.world_size)
        join(task.backend or BACKEND, TIMEOUT_S, rank, task.world_size, store)
        function = getattr(importlib.import_module(task.module), task.function)
        result = function(*pickle.loads(task.args))
        (task.folder / f"result{rank}").write_bytes(pickle.dumps(result))
        leave()
    except BaseException:
        (task.folder / f"error{rank}").write_text(traceback.format_exc())
        status = 1
    end(status)


if __name__ == "__main__":
    # by its own name: what is sent here is pickled
    from experiments import ranks

    ranks.serve(Connection(int(sys.argv[1])))
