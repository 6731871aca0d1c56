"""Why a run failed: who stood still, who called something else, who was killed, in one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from costs.standing import KINDS, CallCounter, Called, Kind, Standing, read
from experiments.memory_limit import lowest_limit
from experiments.verdict import (
    clear,
    culprits,
    failure,
    is_stopped,
    last_error,
    mismatches,
    path_of,
    waited_for,
    write_error,
)

ALL = Kind(None, (0, 1, 2, 3))
LEFT, RIGHT = Kind("tp", (0, 1)), Kind("tp", (2, 3))
UP, DOWN = Kind("dp_shard", (0, 2)), Kind("dp_shard", (1, 3))


def standing(step: int = 3, **calls: tuple) -> Standing:
    """A rank's: name of a kind above -> (calls, time, bytes, collective)."""
    kinds = {"all": ALL, "left": LEFT, "right": RIGHT, "up": UP, "down": DOWN}
    return Standing(0, step, {kinds[name]: Called(*said) for name, said in calls.items()})


def called(calls: int, time: float, size: int = 8, collective: str = "all_reduce") -> tuple:
    return calls, time, size, collective


def test_what_a_rank_counts_is_read_while_it_runs_and_after_it_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.calls"
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from costs.standing import CallCounter, Kind
        counter = CallCounter(Path({str(path)!r}), os.getpid())
        tally = counter.tally(Kind("tp", (0, 1)))
        for size in (4, 5, 6):
            tally.add(size, "all_gather")
        counter.tally(Kind("pp", (0, 2), "recv", 2)).add(7, "recv")
        counter.at_step(12)
        os.kill(os.getpid(), signal.SIGKILL)"""
    died = subprocess.run([sys.executable, "-c", code])
    assert died.returncode == -signal.SIGKILL
    found = read(path)
    assert found and found.step == 12
    seen = {kind: (c.calls, c.payload_bytes, c.collective) for kind, c in found.called.items()}
    assert seen == {
        Kind("tp", (0, 1)): (3, 6, "all_gather"),
        Kind("pp", (0, 2), "recv", 2): (1, 7, "recv"),
    }


def test_more_kinds_than_there_is_room_for_are_not_counted(tmp_path: Path) -> None:
    counter = CallCounter(tmp_path / "calls", os.getpid())
    tallies = [counter.tally(Kind(str(i), (0, 1))) for i in range(KINDS + 3)]
    assert all(tallies[:KINDS]) and not any(tallies[KINDS:])
    assert counter.tally(Kind(None, tuple(range(20_000)))) is None
    found = read(tmp_path / "calls")
    assert found and len(found.called) == KINDS


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 70_000, bytes(2**16)])
def test_a_damaged_count_is_none_or_empty(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "calls").write_bytes(content)
    found = read(tmp_path / "calls")
    assert found is None or found.called == {}


def test_the_rank_that_all_wait_for_is_named_and_not_those_that_it_holds_up() -> None:
    """Rank 3 stands still in tp; rank 2 waits for it there, and rank 0 waits for rank 2 above."""
    ranks = {
        0: standing(all=called(5, 1), left=called(9, 9), up=called(4, 10)),
        1: standing(all=called(5, 1), left=called(9, 9), down=called(4, 10)),
        2: standing(all=called(5, 1), right=called(8, 8), up=called(3, 3)),
        3: standing(all=called(5, 1), right=called(7, 7), down=called(3, 3)),
    }
    (wait,) = culprits(ranks)
    assert (wait.missing, wait.waiting, wait.kind) == (3, 2, RIGHT)
    said = waited_for(ranks, 0)
    assert said and said.startswith("rank 3 stands still in step 3: it never came to all_reduce")
    assert "over tp (8 bytes), where rank 2 waited" in said
    assert waited_for(ranks, 3) is None, "no rank accuses itself"


def test_of_ranks_that_wait_for_each_other_the_first_that_fell_silent_is_named() -> None:
    back, forth = Kind("pp", (0, 1), "recv", 1), Kind("pp", (0, 1), "recv", 0)
    ranks = {
        0: Standing(0, 2, {back: Called(3, 20.0, 4, "recv")}),
        1: Standing(0, 2, {forth: Called(3, 10.0, 4, "recv")}),
    }
    (wait,) = culprits(ranks)
    assert (wait.missing, wait.waiting) == (1, 0)


def test_a_rank_that_does_not_take_what_it_is_sent_is_named_where_nobody_waits_for_more() -> None:
    """A pipeline's first stage sends its activations, and may time out in that."""
    to, taken = Kind("pp", (0, 1), "send", 1), Kind("pp", (0, 1), "recv", 0)
    ranks = {
        0: Standing(0, 2, {to: Called(4, 20.0, 64, "send")}),
        1: Standing(0, 2, {taken: Called(3, 10.0, 64, "recv")}),
    }
    said = waited_for(ranks, 0)
    assert said == (
        "rank 1 stands still in step 2: it never came to recv along pp (64 bytes), "
        "where rank 0 waited"
    )
    asked, answered = Kind("pp", (0, 1), "recv", 1), Kind("pp", (0, 1), "send", 0)
    ranks[0].called[asked] = Called(2, 21.0, 64, "recv")
    ranks[1].called[answered] = Called(1, 9.0, 64, "send")
    (wait,) = culprits(ranks)
    assert (wait.missing, wait.kind) == (1, asked), "what nobody has asked for yet may lie there"


def test_calls_that_meet_and_are_not_alike_are_told() -> None:
    ranks = {i: standing(all=called(5, 1)) for i in range(4)}
    assert list(mismatches(ranks)) == []
    ranks[2] = standing(all=called(5, 1, 28, "broadcast"))
    (said,) = mismatches(ranks)
    assert said.startswith(
        "rank 2 called broadcast (28 bytes), and ranks 0, 1, 3 called all_reduce"
    )
    uneven = {i: standing(all=called(5, 1, 8 * i, "all_to_all")) for i in range(4)}
    assert list(mismatches(uneven)) == []


def test_the_first_rank_that_failed_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert "died without a word" in failure(tmp_path)
    for rank in (1, 0):
        try:
            path_of(tmp_path, rank, "nothing").read_text()
        except OSError as error:
            write_error(tmp_path, rank, error)
    said = failure(tmp_path)
    assert said.startswith("rank 1: FileNotFoundError: ") and "\n" not in said
    assert " at tests/test_verdict.py:" in said and "rank-1.traceback.txt)" in said
    write_error(tmp_path, 0, ValueError("later\nand longer"), start=1)
    assert failure(tmp_path).startswith("rank 0: ValueError: later (")
    clear(tmp_path)
    assert "died without a word" in failure(tmp_path)


REPORT = """
  time      : 2026-01-01
  rank      : {rank} (local_rank: {rank})
  exitcode  : {status} (pid: 12{rank}) (SIGKILL)
  error_file: <N/A>
"""


def test_a_rank_that_was_killed_is_named_before_those_that_missed_it(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    report = REPORT.format(rank=0, status=1) + REPORT.format(rank=1, status=-9)
    log = tmp_path / "logs" / "torchrun.log"
    log.write_text(report)
    write_error(tmp_path, 0, RuntimeError("Connection closed by peer"))
    said = failure(tmp_path)
    assert said.startswith("rank 1 was ended by SIGKILL, from outside or for want of memory")
    assert "rank 0: RuntimeError: Connection closed by peer" in said
    log.write_text(REPORT.format(rank=1, status=-15))
    assert failure(tmp_path).startswith("rank 0: "), "SIGTERM is torchrun's own"
    sent = "W1130 21:00 api.py:1] Sending process {} closing signal SIGTERM\n"
    log.write_text(sent.format(121) + REPORT.format(rank=1, status=-15))
    assert failure(tmp_path).startswith("rank 0: "), "it says so"
    log.write_text(sent.format(120) + REPORT.format(rank=1, status=-15))
    said = failure(tmp_path)
    assert said.startswith("rank 1 was ended by SIGTERM, from outside (see "), "and not to this one"
    log.write_text("failed (exitcode: -11) local_rank: 3 (pid: 5) of binary: python")
    assert failure(tmp_path).startswith("rank 3 was ended by SIGSEGV (see ")


def test_torchrun_that_a_signal_ended_is_named_with_the_memory_limit(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    limit = str(lowest_limit())
    assert failure(tmp_path, -9) == (
        f"torchrun was ended by SIGKILL, from outside or for want of memory (the limit is {limit})"
    )
    assert failure(tmp_path, -9, oom_killed=True) == (
        f"torchrun was ended by SIGKILL, for the kernel ran out of memory: the limit is {limit}"
    )
    log = tmp_path / "logs" / "torchrun.log"
    log.write_text("SignalException: Process 7 got signal: 15\n")
    assert failure(tmp_path) == f"torchrun was ended by SIGTERM, from outside (see {log})"
    log.write_text("node 1: torchrun was ended by SIGKILL\n" + REPORT.format(rank=0, status=1))
    write_error(tmp_path, 0, RuntimeError("Connection closed by peer"))
    said = failure(tmp_path)
    assert said.startswith(f"node 1: torchrun was ended by SIGKILL (see {log}); rank 0: Runtime")


HEAD = "Traceback (most recent call last):"
ERRORS = [  # what Python wrote, and what of it is quoted
    (f"noise\n{HEAD}\n  File 1\nOSError: [Errno 24] Too many\n", "OSError: [Errno 24] Too many"),
    (f"{HEAD}\n  File 1\nValueError: \nbad settings\nall, of\n", "ValueError: bad settings"),
    (f"[rank1]: {HEAD}\n[rank1]:   File\n[rank1]: KeyError: 3\n", "KeyError: 3"),
    ("python: No module named torch\n\n", "python: No module named torch"),
    # torchrun's own error only says that a rank has failed
    (f"{HEAD}\n  File\ntorch.errors.ChildFailedError: \n====\n", None),
    ("W1130 19:39:58.7 torch/distributed/run.py:855] master_addr is only used for\n", None),
    ("", None),
]


@pytest.mark.parametrize("text, quoted", ERRORS)
def test_the_error_that_python_wrote_is_quoted(
    text: str, quoted: str | None, tmp_path: Path
) -> None:
    assert last_error(text) == quoted
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "torchrun.log"
    log.write_text(text)
    silent = f"a rank died without a word; see {log}"
    assert failure(tmp_path) == (f"torchrun: {quoted} (see {log})" if quoted else silent)


def test_a_rank_that_ended_before_it_could_leave_an_error_is_quoted_from_its_own_log(
    tmp_path: Path,
) -> None:
    own = tmp_path / "logs" / "none_x" / "attempt_0" / "1"
    own.mkdir(parents=True)
    (own / "stderr.log").write_text("python: No module named torch\n")
    (tmp_path / "logs" / "torchrun.log").write_text(REPORT.format(rank=1, status=1))
    said = f"rank 1: python: No module named torch (see {own / 'stderr.log'})"
    assert failure(tmp_path) == said


def test_a_full_disk_is_named_where_no_rank_could_leave_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=4096))
    assert failure(tmp_path) == (
        f"run.dir={tmp_path}: 4,096 bytes are left on its disk, too few for a rank to leave its "
        "error"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"rank": 1}', '"' * 3, "\x00"])
def test_half_an_error_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    path_of(tmp_path, 0, "error.json").write_text(content)
    assert "died without a word" in failure(tmp_path)


def test_a_stopped_process_is_seen() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert is_stopped(process.pid)
        # inside a call that all have come to: nobody is behind, and still it is named
        alike = {RIGHT: Called(*called(2, 2))}
        ranks = {0: Standing(os.getpid(), 3, alike), 1: Standing(process.pid, 3, alike)}
        assert waited_for(ranks, 0) == "rank 1 is stopped in step 3, and others wait for it"
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(process.pid)
