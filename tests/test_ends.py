"""How a run's end is taken: by which signal, what was saved, and what is not started any more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import commands, launch
from experiments.__main__ import main
from experiments.ask import evidence
from experiments.lab.shaped_links import Together
from experiments.launch import Ended, Job, unsaved_steps
from experiments.process import PARENT, Forwarding, child_environment
from experiments.verdict import mark_stopped
from tests.launching import ROOT, SMALL

END = launch._ended
LEFT = 2  # steps of the run below since its checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of five steps that has saved after three."""
    (tmp_path / "logs").mkdir()
    lines = [json.dumps({"step": i, "loss": 1.0, "skipped": False}) for i in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    return tmp_path


def test_a_run_that_saved_as_it_was_asked_is_stopped(run: Path) -> None:
    mark_stopped(run, 5)
    ended = END(run, 0, signal.SIGUSR1, False)
    assert (ended.outcome, ended.status) == ("stopped", 128 + signal.SIGUSR1)
    assert (
        ended.reason
        == f"by SIGUSR1 after 5 steps, which are saved; run.dir={run} resume=auto " + ("goes on")
    )
    elsewhere = END(run, 0, 0, False)
    assert elsewhere.status == 128 + signal.SIGUSR1, "another node's launcher got the signal"
    assert elsewhere.signal, "and nothing else starts here either"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_was_asked_to_save_and_lost_steps_has_failed(
    run: Path, number: signal.Signals
) -> None:
    assert unsaved_steps(run) == LEFT
    ended = END(run, -signal.SIGKILL, number, False)
    assert (ended.outcome, ended.status, ended.signal) == ("failed", 1, number)
    said = f"{number.name} came and 2 steps were not saved: torchrun was ended by SIGKILL"
    assert ended.reason and ended.reason.startswith(said)
    twice = END(run, -signal.SIGKILL, number, False, None, signal.SIGINT)
    assert twice.reason == (
        f"{number.name} came and 2 steps were not saved: a second signal, SIGINT, ended the run"
    )
    (run / "checkpoints" / "step-000005").mkdir()
    assert unsaved_steps(run) == 0
    assert END(run, 1, number, False).status == 128 + number, "nothing was lost"


def test_ctrl_c_keeps_what_was_measured_and_saves_nothing(run: Path) -> None:
    ended = END(run, 1, signal.SIGINT, False)
    assert (ended.status, ended.reason) == (130, f"by SIGINT; what was measured is in {run}")


def test_torchrun_that_was_killed_is_a_failed_run_and_nobody_stopped_it(run: Path) -> None:
    for status in (-signal.SIGKILL, 247, 143, 1):
        ended = END(run, status, 0, False)
        assert (ended.outcome, ended.status, ended.signal) == ("failed", 1, 0)


def test_a_signal_after_the_last_step_leaves_the_run_done(run: Path) -> None:
    assert END(run, 0, signal.SIGTERM, False) == Ended("done", signal.SIGTERM)
    assert END(run, 0, 0, False) == Ended("done")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Runs that are done at once, while a SIGUSR1 comes; returns the folders of those started."""
    started: list[Path] = []

    def run(job: Job, quiet: bool) -> Ended:
        started.append(job.folder)
        return Ended("done", signal.SIGUSR1)

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(commands.Row, "ledger", lambda _row: None)
    monkeypatch.chdir(tmp_path)
    return started


@pytest.mark.parametrize("more", [[], ["hydra/launcher=basic"]])
def test_no_job_of_a_sweep_starts_after_a_signal(
    more: list[str], launches: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The sweep's own loop, and Hydra's."""
    assert main(["-m", *SMALL, "data.tokens=20000", "seed=1,2,3", *more]) == 128 + signal.SIGUSR1
    assert len(launches) == 1
    if not more:
        assert "SIGUSR1: 2 of 3 jobs are left" in capsys.readouterr().err


def test_the_last_job_of_a_sweep_and_a_single_run_leave_nothing_to_stop(
    launches: list[Path],
) -> None:
    assert main(["-m", *SMALL, "seed=1"]) == 0
    assert main([*SMALL]) == 0
    assert len(launches) == 2


def test_ask_ends_after_a_signal_and_keeps_the_run(
    launches: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "what-does-accumulation-change"]) == 128 + signal.SIGUSR1
    assert len(launches) == 1 and launches[0].parent == evidence.KEPT
    assert not (launches[0] / "failed.txt").exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "launch.sh: stopped by SIGUSR1: the run that was at work is done and kept"


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, env=environ, capture_output=True, text=True)


def test_a_process_whose_parent_has_died_before_it_asked_ends_at_once() -> None:
    code = "from experiments.process import die_with_parent; die_with_parent(); print('alive')"
    orphan = python(code, **{PARENT: str(2**22 + 1)})  # above Linux's largest process id
    assert (orphan.returncode, orphan.stdout) == (1, "")
    assert python(code, **{PARENT: str(os.getpid())}).stdout == "alive\n"
    assert python(code).stdout == "alive\n", "who started it has not said so"
    assert child_environment({"A": "1"})[PARENT] == str(os.getpid())


def test_a_request_that_comes_while_a_rank_starts_waits_for_it() -> None:
    """The agent blocks the signal; the rank that it starts inherits that."""
    code = """if True:
        import os, signal
        from experiments.process import REQUESTS, hear_requests
        os.kill(os.getpid(), signal.SIGUSR1)
        hear_requests(signal.SIGUSR1)
        print(REQUESTS == [signal.SIGUSR1])"""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        assert python(code).stdout == "True\n"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


RANK_LIKE = """if True:
    import signal, sys, time
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
    asked = []
    print("ready", flush=True)
    while len(asked) < int(sys.argv[2]):
        time.sleep(0.05)
    time.sleep(float(sys.argv[3]))"""


def forwarded(requests: int, step_s: float, *numbers: signal.Signals) -> tuple[int, int]:
    """Send this process signals while a stand-in for torchrun runs whose rank ends `step_s` after
    so many requests; return its status and the first signal."""
    rank = [sys.executable, "-c", RANK_LIKE, "experiments.worker", str(requests), str(step_s)]
    code = f"import subprocess; raise SystemExit(subprocess.run({rank!r}).returncode)"
    process: Any = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        with Forwarding(process) as forwarding:
            for number in numbers:
                os.kill(os.getpid(), number)
            return process.wait(), forwarding.received
    finally:
        process.kill()
        process.wait()


def test_a_saving_signal_waits_for_its_step_and_is_repeated(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks that torchrun starts again have not heard it: here the second request counts."""
    monkeypatch.setattr("experiments.process.ASK_AGAIN_S", 1)
    monkeypatch.setattr("experiments.process.GRACE_S", 1)
    assert forwarded(2, 1.5, signal.SIGUSR1) == (0, signal.SIGUSR1)
    said = capfd.readouterr().err
    assert said == (
        "launch.sh: SIGUSR1: the run saves and stops after the step that it is in; a second "
        "signal ends it at once\n"
    )
    assert forwarded(10**6, 0, signal.SIGTERM, signal.SIGUSR1) == (-9, signal.SIGTERM)


def test_a_node_that_a_signal_ended_has_failed_and_is_named(
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines = ["import time; time.sleep(0)", "import os; os.kill(os.getpid(), 9)"]
    together = Together([subprocess.Popen([sys.executable, "-c", line]) for line in lines])
    assert together.wait() == 1
    assert capfd.readouterr().err == "node 1: torchrun was ended by SIGKILL\n"
