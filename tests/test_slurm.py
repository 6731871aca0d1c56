"""The sbatch script under SLURM's own daemons, where they are installed, and what their variables
mean to a rank.

    apt install slurmctld slurmd slurm-client munge        as root: two nodes on this machine
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from costs import ledger as ledgers
from experiments import environment as machine
from experiments.__main__ import main
from experiments.checkpoints import FOLDER
from experiments.config import TrainConfig
from experiments.step_log import read_metrics
from experiments.warn import warn
from parallel.layout import Layout
from tests.launching import ROOT, SMALL, environment, free_ports, wait_until

SCRIPT = ROOT / "experiments" / "cluster" / "train.sbatch"
TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "munged")
CONFIG = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def test_the_place_of_a_rank_comes_from_the_scheduler() -> None:
    by_slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NODELIST": "gpu[003-004]",
        "SLURM_JOB_ID": "4711",
    }
    assert machine.given_rank(by_slurm) == machine.Rank(5, 1, 8, nodes=2)
    assert machine.rendezvous(2, by_slurm) == {"MASTER_ADDR": "gpu003", "MASTER_PORT": "19711"}
    own = {**by_slurm, "MASTER_ADDR": "10.0.0.1"}
    assert machine.rendezvous(2, own) == {"MASTER_PORT": "19711"}, "the user's own wins"
    alone = machine.rendezvous(1, by_slurm)
    assert alone["MASTER_ADDR"] == "127.0.0.1" and "GLOO_SOCKET_IFNAME" in alone
    by_torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
    by_torchrun |= {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert machine.given_rank(by_torchrun) == machine.Rank(3, 1, 4, nodes=2)
    assert machine.rendezvous(2, by_torchrun) == {}


BAD_PLACES = [
    ({"RANK": "foo"}, "RANK=foo: must be a whole number from 0 on"),
    ({"RANK": "1"}, "RANK=1: makes this process a rank, but WORLD_SIZE is not set; set what is"),
    ({"WORLD_SIZE": "1"}, "WORLD_SIZE=1: makes this process a rank, but RANK is not set"),
    (
        {"RANK": "1", "WORLD_SIZE": "4"},
        "RANK=1 WORLD_SIZE=4: makes this process a rank, but MASTER_ADDR and MASTER_PORT are not",
    ),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number from 1 on"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1: must be below WORLD_SIZE=1, for ranks count from"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: must be a whole number"),
    (
        {"SLURM_STEP_NUM_TASKS": "4"},
        "SLURM_STEP_NUM_TASKS=4: makes this process a rank, but SLURM_",
    ),
    ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS=x: must be a whole number from 1 on"),
]


@pytest.mark.parametrize("variables, said", BAD_PLACES)
def test_variables_that_are_no_place_are_one_line(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        machine.given_rank(variables)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_a_rank_says_what_made_it_one_and_how_to_be_a_launcher() -> None:
    left_over = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "7"}
    rank = machine.given_rank(left_over)
    assert rank and str(rank) == "rank 1 of 4 (RANK=1 WORLD_SIZE=4)"
    assert rank.as_launcher == "env -u RANK -u WORLD_SIZE ./launch.sh ..."
    assert machine.meeting_place(rank, left_over) == "h:7"
    assert machine.others_may_be_missing(rank, left_over)
    assert not machine.others_may_be_missing(rank, {**left_over, "TORCHELASTIC_RUN_ID": "x"})


@pytest.mark.parametrize("what", ["-m", "--json", "launch=dry", "--max-restarts=2"])
def test_what_only_a_launcher_does_is_refused_to_a_rank(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """RANK=0 WORLD_SIZE=1 left over in a shell: a sweep would train its first job alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([*SMALL, "seed=1", what]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"launch.sh: {what}: this process is rank 0 of 1 (RANK=0 WORLD_SIZE=1), which trains one "
        "run beside the other ranks; env -u RANK -u WORLD_SIZE ./launch.sh ... makes it a "
        "launcher\n"
    )
    assert not list(tmp_path.iterdir())


def test_tensor_parallelism_that_leaves_a_node_is_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(layout: Layout, nodes: int) -> str:
        others = {**vars(TrainConfig()), "layout": layout}  # whatever heads the model has
        warn(cast(Any, SimpleNamespace(**others)), nodes)
        return capsys.readouterr().err

    assert said(Layout(dp_shard=2, tp=8), 2) == ""
    assert said(Layout(dp_shard=16), 2) == "", "data axes may leave it"
    assert said(Layout(dp_shard=4, tp=2, pp=2), 2) == ""
    assert "layout.tp=8 crosses nodes of 4 ranks" in said(Layout(dp_shard=2, tp=8), 4)
    assert "layout.tp=2 would stay inside" in said(Layout(dp_shard=3, tp=4), 2)
    assert Layout(dp_shard=4, tp=2).leaves_node("dp_shard", 4)
    assert not Layout(pp=2, dp_shard=2, tp=2).leaves_node("dp_shard", 4)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A controller and two nodes. Yields the variables that their commands need."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"needs root and SLURM's daemons; not installed: {missing}")
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    config.write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(3)))
    env = {**environment(), "SLURM_CONF": str(config)}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--socket={folder}/munge.socket", f"--log-file={folder}/munge.log"]
    munge += [f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed"]
    lines = [munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "node0"]]
    lines += [["slurmd", "-D", "-N", "node1"]]
    daemons = []
    try:
        for line in lines:
            quiet = subprocess.DEVNULL
            daemons.append(subprocess.Popen(line, env=env, stdout=quiet, stderr=quiet))
            if line is munge:
                wait_until("munge is up", (folder / "munge.socket").exists)
        idle = ("sinfo", "-h", "-t", "idle", "-o%D")
        wait_until("two nodes are idle", lambda: asked(*idle, env=env) == "2")
        yield env
    finally:
        asked("scancel", "--user=root", env=env)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def asked(*command: str, env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.stdout.strip()


def submitted(slurm: dict[str, str], folder: Path, *overrides: str) -> tuple[str, Path]:
    """sbatch the script from a folder that has the door. Returns the job's number and the run's
    folder, which has it in its name."""
    door = folder / "launch.sh"
    door.write_text(f'#!/bin/sh\nexec {ROOT}/launch.sh "$@"\n')
    door.chmod(0o755)
    # the nodes have no names of their own that could be looked up
    env = {**slurm, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    sbatch = ["sbatch", "--parsable", "--overcommit", str(SCRIPT)]
    job = subprocess.run(
        [*sbatch, *SMALL, *overrides], cwd=folder, env=env, capture_output=True, text=True
    )
    number = job.stdout.strip()
    return number, folder / "runs" / f"slurm-{number}"


@pytest.mark.slow
def test_the_script_trains_on_two_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    """Two tasks on each of two nodes, one run folder, which has the job's number."""
    plan = ("layout.dp_replicate=-1", "layout.tp=4")
    number, run = submitted(slurm, tmp_path, *plan)
    output = tmp_path / f"slurm-{number}.out"
    wait_until("the job is over", lambda: not asked("squeue", "-h", env=slurm), 240)
    said = output.read_text()
    ledger = ledgers.read(run / "ledger.json")
    assert ledger["layout"]["tp"] == 4 and ledger["layout"]["world_size"] == 4
    assert said.count("layout.tp=4 crosses nodes of 2 ranks") == 1, said


@pytest.mark.slow
def test_a_job_that_is_requeued_goes_on_in_the_same_folder(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """From its newest checkpoint, with the losses that it would have had."""
    plan = ("layout.dp_replicate=2", "layout.tp=2", "steps=1000000", "checkpoint.every=10")
    number, run = submitted(slurm, tmp_path, *plan)
    output = tmp_path / f"slurm-{number}.out"

    def steps() -> list[dict[str, Any]]:
        return read_metrics(run / "metrics.jsonl")

    wait_until("some checkpoints", lambda: len(steps()) > 25, 240)
    assert asked("scontrol", "requeue", number, env=slurm) == ""
    wait_until("its ranks have ended", lambda: "PENDING" in state(number, slurm), 120)
    before = steps()
    saved = max(int(folder.name.removeprefix("step-")) for folder in (run / FOLDER).iterdir())
    assert saved >= 20, "of this run"

    def goes_on() -> bool:
        if "PENDING" in state(number, slurm):  # until the last start's credentials end
            asked("scontrol", "update", f"JobId={number}", "StartTime=now", env=slurm)
        return len(steps()) > len(before) + 5

    wait_until("it goes on", goes_on, 240)
    said = output.read_text()
    assert f"going on from {run.relative_to(tmp_path)}/{FOLDER}/step-{saved:06d}, after" in said, (
        said
    )
    assert "Restarts=1" in asked("scontrol", "show", "job", number, env=slurm)
    after = steps()
    assert [line["step"] for line in after] == list(range(len(after))), "each step once"
    assert after[:saved] == before[:saved]
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [run.name]


def state(number: str, env: dict[str, str]) -> str:
    return asked("squeue", "-h", "-j", number, "-o", "%T", env=env)
