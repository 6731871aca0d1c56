"""Trials of how a run ends and what is said of it: kills, signals, limits, left-over variables."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from costs import ledger as ledgers
from experiments.memory_limit import V1, V2, cgroups
from experiments.process import TORCHRUN, ranks_below
from experiments.reliability.trials import Launch, newest_in, side_by_side, wait_for
from tests.launching import PATIENCE_S, environment, launch, start, wait_until
from tests.soak.trial import trial

STARTS = "It starts, or says why not"
KEPT = "No work is lost"
D = ("data=generated", "data.tokens=200000", "sample.tokens=0", "validation.batches=0")
SMALL = (
    *D,
    *("model.n_layer=2", "model.d_model=64", "model.context=64"),
    *("micro_batch_size=4", "run.save=false"),
)
LONG = (*SMALL, "steps=1000000")
KILLS = 50
SLOW_S = 26  # a step that takes longer than a run once got to save


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def said(run: Launch, folder: Path, status: int) -> str:
    """Wait for a launch, hold its exit status to `status`, return both without the folder."""
    assert run.wait() == status, (run.process.returncode, run.said)
    return f"exit {status}: {last_line(run.said).replace(str(folder) + '/', '')}"


def begun(folder: Path, *overrides: str, steps: int = 2) -> Launch:
    """Start a run and wait until it has done some steps."""
    run = Launch(folder, [*LONG, *overrides])
    assert run.reach(steps), run.said
    return run


def limited_by(text: str) -> bool:
    return bool(re.search(r"the limit is [\d.]+ GB, of (this machine|cgroup)", text))


# --- it starts, or says why not


@trial(STARTS, "torchrun is killed by SIGKILL, and by SIGTERM")
def torchrun_killed(folder: Path) -> str:
    seen = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        run = begun(folder / number.name)
        (torchrun,) = run.victims("torchrun")
        torchrun.send_signal(number)
        seen.append(said(run, folder, 1))
        assert f"torchrun was ended by {number.name}" in seen[-1], seen
        assert limited_by(seen[-1]) or number != signal.SIGKILL
        assert run.survivors(10) == 0
    return "; ".join(seen)


@trial(STARTS, "a rank gets SIGTERM from outside")
def rank_terminated(folder: Path) -> str:
    run = begun(folder / "run")
    ranks = sorted(ranks_below(run.process.pid), key=lambda rank: rank.pid)
    ranks[-1].terminate()
    seen = said(run, folder, 1)
    assert re.search(r"rank \d was ended by SIGTERM, from outside", seen), seen
    return seen


@trial(STARTS, "`ulimit -n 16`; TORCH_LOGS=junk; torch is missing")
def torchrun_cannot_start(folder: Path) -> str:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("import torch_is_not_there\n")
    root, more = str(Path(ledgers.__file__).parents[1]), {"PYTHONSAFEPATH": "1"}
    cases = {
        "Too many open files": ("ulimit -n 16", root, {}),
        "Invalid log settings": ("true", root, {"TORCH_LOGS": "junk"}),
        "No module named 'torch_is_not_there'": ("true", f"{folder}:{root}", {}),
    }
    seen = []
    for expected, (first, path, variables) in cases.items():
        place = folder / str(len(seen))
        words = " ".join([sys.executable, "-m", "experiments", *SMALL, f"run.dir={place}"])
        done = subprocess.run(
            ["bash", "-c", f"{first}; exec {words}"],
            env={**environment(), **more, "PYTHONPATH": path, **variables},
            capture_output=True,
            text=True,
            cwd=folder,
        )
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert expected in done.stderr, done.stderr
        seen.append(f"exit 1: {done.stderr.strip().replace(str(folder) + '/', '')[:160]}")
    return "; ".join(seen)


@trial(STARTS, "run.dir on disks of 24, 64 and 200 kB")
def full_disk(folder: Path) -> str:
    seen = []
    for size in (24, 64, 200):
        disk = folder / str(size)
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            done = launch(*LONG, f"run.dir={disk}/run", f"data.cache={folder}/cache", cwd=folder)
        finally:
            subprocess.run(["umount", disk], check=True)
        assert done.returncode == 1, (done.returncode, done.stderr)
        assert re.search(r"No space left|bytes are left on its disk", done.stderr), done.stderr
        text = last_line(done.stderr).replace(f"{folder}/", "")
        seen.append(f"{size} kB: exit 1: {text[:150]}")
    return "; ".join(seen)


@contextmanager
def memory_cgroup(gigabytes: float) -> Iterator[Path]:
    """Make a cgroup with a limit below this process's own; who shall be in it goes there."""
    own, names = next(cgroups())
    group = own / f"trial-{os.getpid()}"
    group.mkdir()
    try:
        (group / names[0]).write_text(str(int(gigabytes * 1e9)))
        assert names in (V1, V2)
        yield group
    finally:
        wait_until("its processes are gone", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def launched_in(group: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    words = " ".join([sys.executable, "-m", "experiments", *overrides])
    root = str(Path(ledgers.__file__).parents[1])
    return subprocess.run(
        ["bash", "-c", f"echo $$ > {group}/cgroup.procs; exec {words}"],
        env={**environment(), "PYTHONPATH": root, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
    )


@trial(
    STARTS, "a memory cgroup (as docker -m makes): 4 ranks in 1 GB; a batch that 1.5 GB do not take"
)
def memory_limits(folder: Path) -> str:
    with memory_cgroup(1.0) as group:
        done = launched_in(group, folder, *SMALL, "layout.dp_replicate=4", "run.dir=refused")
        assert done.returncode == 2 and f"of cgroup {group}" in done.stderr, done.stderr
        refused = done.stderr.strip().replace(str(group), "GROUP")
    with memory_cgroup(1.5) as group:
        done = launched_in(group, folder, *D, "micro_batch_size=1024", "run.dir=killed")
        assert done.returncode == 1 and f"of cgroup {group}" in done.stderr, done.stderr
        assert "was ended by SIGKILL, for the kernel ran out of memory" in done.stderr, done.stderr
        killed = last_line(done.stderr).replace(str(group), "GROUP")
    return f"exit 2: {refused}; exit 1: {killed[:220]}"


PLACES = [  # variables, what is asked for, and what its one line says
    ("RANK=0 WORLD_SIZE=1", "-m", "-m: this process is rank 0 of 1"),
    ("RANK=0 WORLD_SIZE=1", "--json", "--json: this process is rank 0 of 1"),
    ("RANK=0 WORLD_SIZE=1", "launch=dry", "launch=dry: this process is rank 0 of 1"),
    ("RANK=foo", "steps=2", "RANK=foo: must be a whole number"),
    ("RANK=1", "steps=2", "RANK=1: makes this process a rank, but WORLD_SIZE is not set"),
    (
        "RANK=1 WORLD_SIZE=4",
        "steps=2",
        "RANK=1 WORLD_SIZE=4: makes this process a rank, but MASTER",
    ),
]


@trial(STARTS, "left-over RANK, WORLD_SIZE: a sweep, --json, launch=dry; RANK=foo; set in part")
def left_over_variables(folder: Path) -> str:
    for variables, asked, expected in PLACES:
        pairs = dict(pair.split("=") for pair in variables.split())
        done = launch(*SMALL, "seed=1", asked, cwd=folder, **pairs)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith(f"launch.sh: {expected}"), done.stderr
        assert done.stdout == "" and not list(folder.iterdir())
    return f"{len(PLACES)} of {len(PLACES)}: exit 2 and one line, such as `{done.stderr.strip()}`"


@trial(
    STARTS, "RANK=1 WORLD_SIZE=4 with an address, and an interactive srun of 4 tasks; timeout_s=5"
)
def ranks_that_nobody_starts(folder: Path) -> str:
    seen = []
    for pairs in (
        {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29987"},
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "MASTER_PORT": "29988"},
    ):
        done = launch(*SMALL, "timeout_s=5", cwd=folder, **pairs)
        waits, ended = done.stderr.strip().splitlines()
        assert done.returncode == 1 and " waits for the other ranks at 127.0.0.1:2998" in waits
        assert " did not meet the other ranks at 127.0.0.1:2998" in ended
        seen.append(f"`{waits}`, then exit 1: `{ended}`")
    return "; ".join(seen)


# --- no work is lost


@trial(
    KEPT,
    "a sweep with checkpoint.every=50 resume=auto, stopped after step 101; the same line again",
)
def sweep_goes_on(folder: Path) -> str:
    asked = ("-m", *SMALL, "steps=160", "seed=1,2", "checkpoint.every=50", "resume=auto")
    first = start(*asked, "run.dir=sweep", cwd=folder)
    metrics = folder / "sweep" / "0" / "metrics.jsonl"
    wait_until("step 101", lambda: first.poll() is not None or lines(metrics) >= 101)
    first.terminate()
    first.communicate()
    assert first.returncode == 128 + signal.SIGTERM
    saved = newest_in(folder / "sweep" / "0")
    assert saved is not None and saved >= 101
    again = launch(*asked, "run.dir=sweep", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert f"after {saved} steps" in again.stdout, again.stdout
    assert [lines(folder / "sweep" / str(i) / "metrics.jsonl") for i in (0, 1)] == [160, 160]
    return (
        f"exit 143 with step {saved} saved; again: went on after {saved} steps, exit 0, both done"
    )


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@trial(KEPT, "SIGTERM and USR1 after the last step of a sweep's first job, and of a run of `ask`")
def signal_after_the_last_step(folder: Path) -> str:
    seen = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        place = folder / number.name
        asked = ("-m", *SMALL, "steps=40", "seed=1,2,3", f"run.dir={place}", "trace=true")
        run = start(*asked, cwd=folder)
        metrics = place / "0" / "metrics.jsonl"
        wait_until("the last step", lambda: run.poll() is not None or lines(metrics) == 40)  # noqa: B023
        run.send_signal(number)
        _, err = run.communicate()
        assert run.returncode == 128 + number, (run.returncode, err)
        assert ledgers.read(place / "0" / "ledger.json") and not (place / "1").exists()
        assert f"{number.name}: 2 of 3 jobs are left" in err
        seen.append(
            f"sweep, {number.name}: the first job is kept, no other starts, exit {run.returncode}"
        )
    run = start("ask", "what-does-accumulation-change", cwd=folder)
    kept = folder / "runs" / "ask"
    wait_until(
        "the last step of a run",
        lambda: run.poll() is not None or any(lines(m) >= 20 for m in kept.glob("*/metrics.jsonl")),
    )
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM, (run.returncode, err)
    assert not list(kept.glob("*/failed.txt"))
    return "; ".join([*seen, f"ask, SIGTERM: exit {run.returncode}: {last_line(err)}"])


def killed_early(place: Path, moment: float, at_ranks: bool) -> int:
    """SIGKILL a launcher so many seconds after its start, or after its first rank's; return how
    many of its processes are alive 10 s later."""
    run = Launch(place, [*LONG])
    if at_ranks:
        wait_for(lambda: ranks_below(run.process.pid), run, poll_s=0.005)
    time.sleep(moment)
    run.process.kill()
    run.process.wait()
    return run.survivors(10)


@trial(
    KEPT, f"the launcher gets SIGKILL, {KILLS} times: in its first second, and as the ranks start"
)
def launcher_killed(folder: Path) -> str:
    dice = random.Random(0)
    half = KILLS // 2
    moments = [dice.uniform(0, 1.0) for _ in range(half)]
    moments += [dice.uniform(0, 0.4) for _ in range(KILLS - half)]
    places = [folder / str(i) for i in range(KILLS)]
    at_ranks = [False] * half + [True] * (KILLS - half)
    alive = list(side_by_side(killed_early, places, moments, at_ranks))
    assert len(alive) == KILLS and sum(alive) == 0, alive
    return f"{KILLS} kills, {half} of them within 0.4 s of the first rank's start: 0 survivors"


@trial(KEPT, f"SIGUSR1 in a step of more than {SLOW_S} s; once more with a second signal")
def signal_in_a_slow_step(folder: Path) -> str:
    # the same work per micro-batch as in SMALL, and as many as take longer than SLOW_S
    slow = [*SMALL, "steps=50", "gradient_accumulation_steps=4000"]
    run = Launch(folder / "slow", slow)
    wait_for(lambda: in_step(run.folder, 0), run)
    run.process.send_signal(signal.SIGUSR1)
    begin = time.monotonic()
    status, took = run.wait(), time.monotonic() - begin
    assert status == 128 + signal.SIGUSR1 and took > SLOW_S, (status, took, run.said)
    assert newest_in(run.folder) == run.steps() == 1
    first = f"waited {took:.0f} s, exit {status}: {last_line(run.said)}"
    run = Launch(folder / "twice", slow)
    wait_for(lambda: run.steps() >= 1 and in_step(run.folder, 1), run)
    run.process.send_signal(signal.SIGUSR1)
    wait_for(lambda: "SIGUSR1: the run saves" in run.said, run)
    run.process.send_signal(signal.SIGTERM)
    second = said(run, folder, 1)
    assert "1 steps were not saved: a second signal, SIGTERM, ended the run" in second
    assert run.survivors(10) == 0 and newest_in(run.folder) is None
    return f"{first.replace(str(folder) + '/', '')}; two signals: {second}"


def in_step(folder: Path, step: int) -> bool:
    """Return whether rank 0 is in a step, as its counter says (costs/standing.py)."""
    from costs.standing import read

    found = read(folder / "logs" / "rank-0.calls")
    return found is not None and found.step == step


@trial(KEPT, "`lab` -m of two jobs: the torchrun of node 1 gets SIGKILL in the first")
def lab_node_killed(folder: Path) -> str:
    asked = ("lab", "nodes=2", "-m", *SMALL, "steps=60", "seed=1,2", "run.dir=sweep", "--json")
    run = start(*asked, cwd=folder)
    metrics = folder / "sweep" / "0" / "metrics.jsonl"
    wait_until("two steps", lambda: run.poll() is not None or lines(metrics) >= 2)
    nodes = [p for p in psutil.Process(run.pid).children(recursive=True) if is_node(p, 1)]
    nodes[0].kill()
    out, err = run.communicate(timeout=PATIENCE_S)
    rows = json.loads(out)["jobs"]
    assert run.returncode == 1, (run.returncode, err)
    assert [row["status"] for row in rows] == ["failed", "done"], rows
    assert "node 1: torchrun was ended by SIGKILL" in rows[0]["reason"], rows
    return f"exit 1, rows failed and done: {rows[0]['reason'].replace(str(folder) + '/', '')[:160]}"


def is_node(process: psutil.Process, number: int) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return TORCHRUN in words[:4] and f"--node-rank={number}" in words
