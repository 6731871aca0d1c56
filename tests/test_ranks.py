"""Ranks for a function: each starts anew, a failure is told, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from experiments import ranks
from experiments.ranks import RankFailed, Server, run_ranks
from tests.launching import ROOT, environment, wait_until

pytestmark = pytest.mark.slow
KEPT: list[int] = []  # what one call leaves in a module must not be there in the next


def add_one(name: str) -> tuple[list[int], str, str | None, str]:
    KEPT.append(int(os.environ["RANK"]))
    found = os.environ.get(name)
    os.environ["LEFT"] = "behind"
    return KEPT, os.getcwd(), found, os.environ["WORLD_SIZE"]


def fail(rank: int, how: str) -> None:
    if int(os.environ["RANK"]) == rank:
        if how == "raise":
            raise LookupError("on purpose")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def test_every_call_has_new_ranks_of_the_same_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.getcwd()
    first, second = (run_ranks(2, add_one, "LEFT") for _ in range(2))
    server = Server.of(ranks.of_a_rank())
    monkeypatch.setenv("SAID", "now")
    monkeypatch.chdir(tmp_path)
    again = run_ranks(3, add_one, "SAID")
    assert first == second == [([rank], here, None, "2") for rank in (0, 1)]
    assert again == [([rank], str(tmp_path), "now", "3") for rank in (0, 1, 2)]
    assert Server.of(ranks.of_a_rank()) is server
    other = run_ranks(2, add_one, "OWN", variables={"OWN": "set"})
    assert [seen[2] for seen in other] == ["set", "set"]


def meet(folder: str, number: int) -> int:
    """Come back once another call's rank is at work too."""
    (Path(folder) / str(number)).touch()
    wait_until("the other call's rank", lambda: (Path(folder) / str(1 - number)).exists())
    return number


def test_calls_of_several_threads_are_at_work_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(run_ranks, 1, meet, str(tmp_path), n, timeout_s=60) for n in (0, 1)]
        assert [call.result() for call in calls] == [[0], [1]]


@pytest.mark.parametrize(
    "how, said", [("raise", "exited with 1\n.*LookupError: on purpose"), ("kill", "exited with -9")]
)
def test_a_rank_that_fails_is_told_and_the_others_end(how: str, said: str) -> None:
    with pytest.raises(RankFailed, match=f"(?s)^rank 1 {said}"):
        run_ranks(2, fail, 1, how)
    server = psutil.Process(Server.of(ranks.of_a_rank()).process.pid)
    assert not server.children()
    assert len(run_ranks(2, add_one, "LEFT")) == 2, "the next ones start"


def test_ranks_that_do_not_end_in_time_are_ended() -> None:
    server = Server.of(ranks.of_a_rank())
    with pytest.raises(RankFailed, match="did not end in time"):
        run_ranks(2, fail, -1, "never", timeout_s=0.5)
    assert server.process.returncode == 0 and Server.of(ranks.of_a_rank()) is not server


def test_ranks_end_with_the_process_that_wanted_them() -> None:
    program = "from experiments.ranks import run_ranks; from tests.test_ranks import fail; "
    command = [sys.executable, "-c", program + "run_ranks(2, fail, -1, 'never')"]
    parent = subprocess.Popen(command, env={**environment(), "PYTHONPATH": str(ROOT)})
    seen: list[psutil.Process] = []

    def three_are_there() -> bool:
        seen[:] = psutil.Process(parent.pid).children(recursive=True)
        return len(seen) == 3

    wait_until("the server and two ranks", three_are_there)
    parent.kill()
    parent.wait()
    wait_until("no process is left", lambda: not any(map(is_alive, seen)))


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
