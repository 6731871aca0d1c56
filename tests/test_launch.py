"""./launch.sh from outside: what it writes, prints and refuses, and who may start the ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from costs import ledger as ledgers
from experiments.__main__ import main
from experiments.environment import settle
from experiments.figures.parity import trajectory
from experiments.process import TORCHRUN
from tests.configs import compose
from tests.launching import ROOT, SMALL, ended, environment, free_ports, launch, only_run, start

pytestmark = pytest.mark.slow


def test_a_run_leaves_its_record_and_says_what_it_cost(tmp_path: Path) -> None:
    done = launch(*SMALL, "data=stdlib", "validation.every=2", "steps=9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    ledger = ledgers.read(folder / "ledger.json")
    assert ledger["layout"]["world_size"] == 2 and len(ledger["training"]["losses"]) == 9
    assert ledger["step"]["mfu"] > 0 and ledger["step"]["memory_bytes"]["peak"] > 0
    assert ledger["environment"]["corpus"]["sha256"] and ledger["training"]["startup_s"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["validation_loss"] is not None for line in lines] == [False, True] * 4 + [True]
    assert [line["loss"] for line in lines] == ledger["training"]["losses"]
    for said in ("dp_replicate2 on 2 ranks", "step 9/9", "all_reduce", "peak", "validation loss"):
        assert said in done.stdout
    assert f"run folder {folder.relative_to(tmp_path)}" in done.stdout
    assert "--- sample ---\ndef " in done.stdout
    assert done.stderr == ""

    text = launch("generate", f"run={folder}", "tokens=20", "prompt=class ", cwd=tmp_path)
    assert text.returncode == 0 and text.stdout.startswith("class ")
    shutil.rmtree(Path(json.loads((folder / "launch.json").read_text())["corpus"]))
    said = launch("generate", f"run={folder}", "tokens=20", "--json", cwd=tmp_path)
    assert set(json.loads(said.stdout)) == {"run", "prompt", "text"}, "the run folder is enough"


def test_json_is_the_ledger_and_nothing_else(tmp_path: Path) -> None:
    done = launch(*SMALL, "strategy=fsdp", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == ledgers.read(only_run(tmp_path) / "ledger.json")


def test_a_dry_run_prints_a_line_that_runs(tmp_path: Path) -> None:
    done = launch(*SMALL, "launch=dry", "layout.dp_replicate=3", cwd=tmp_path)
    assert f"start.py {TORCHRUN} " in done.stdout and "--nproc-per-node=3" in done.stdout
    assert not (only_run(tmp_path) / "ledger.json").exists()
    line = done.stdout.strip()
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    subprocess.run(line, shell=True, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert ledgers.read(only_run(tmp_path) / "ledger.json")["layout"]["world_size"] == 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["precision=fp4"], "precision=fp4: Invalid value 'fp4'"),
        (["data=text", "data.path=nowhere.txt"], "data.path=nowhere.txt: no such file"),
        (["layout.dp_replicate=99999"], "layout needs 99999 ranks here"),
        (["run.dir=/proc/nowhere"], "run.dir=/proc/nowhere: cannot be made"),
        (["data.cache=/proc/nowhere"], "data.cache=/proc/nowhere"),
        (["trian"], "trian: no such command; there are train, generate, "),
        (["--nnodes", "2"], "--nnodes: write it with its value"),
        (["--nnodes=2", "run.dir=x"], "--node-rank is not set"),
        (["--nnodes=two"], "--nnodes=two: must be a whole number"),
        (["generate"], "run is not set"),
        (["generate", "run=nowhere"], "run=nowhere: no config.yaml there"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: what launch.sh does besides, a refusal of the next tests goes through."""
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"launch.sh: {said}") and err.count("\n") == 1
    assert out == "" and not list(tmp_path.iterdir())


def test_a_run_is_not_written_over_and_its_damaged_weights_are_one_line(tmp_path: Path) -> None:
    assert launch(*SMALL, "run.dir=mine", cwd=tmp_path).returncode == 0
    before = (tmp_path / "mine" / "ledger.json").read_bytes()
    again = launch(*SMALL, "run.dir=mine", cwd=tmp_path)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.startswith("launch.sh: run.dir=mine: already holds a run; ")
    assert again.stderr.count("\n") == 1
    assert (tmp_path / "mine" / "ledger.json").read_bytes() == before
    path = tmp_path / "mine" / "model.pt"
    weights = torch.load(path, weights_only=True)
    path.write_bytes(path.read_bytes()[:-100])
    done = launch("generate", "run=mine", cwd=tmp_path)
    assert done.returncode == 2 and "is damaged" in done.stderr and done.stderr.count("\n") == 1
    torch.save({name: tensor[:1] for name, tensor in weights.items()}, path)
    (tmp_path / "mine" / "model.json").unlink()
    done = launch("generate", "run=mine", cwd=tmp_path)
    assert done.returncode == 2 and "does not fit" in done.stderr


def test_a_sweep_is_a_launch_a_job_and_a_bad_job_is_a_row(tmp_path: Path) -> None:
    jobs = ("strategy=single,fsdp", "optimizer.lr=1e-3,1e30", "clip=null", "model.tied=true")
    done = launch("-m", *SMALL, *jobs, "--json", cwd=tmp_path)
    assert done.returncode == 1
    rows = json.loads(done.stdout)["jobs"]
    assert [row["status"] for row in rows] == ["done", "failed"] * 2
    assert rows[3]["overrides"][-4:] == [
        "strategy=fsdp",
        "optimizer.lr=1e+30",
        "clip=null",
        "model.tied=True",
    ]
    for row in rows:
        folder = tmp_path / row["run"]
        assert (folder / "ledger.json").exists() == (row["status"] == "done")
        assert (row["status"] == "done") or "NonFinite: the loss is" in row["reason"]
    assert len({row["run"] for row in rows}) == 4


def test_a_value_that_does_not_compose_is_a_row_too(tmp_path: Path) -> None:
    jobs = ("model=tiny,tinny,llama3_405b", "precision=fp32,fp4", "launch=dry", "run.dir=all")
    done = launch("-m", *SMALL, *jobs, "--json", cwd=tmp_path)
    assert done.returncode == 2
    rows = json.loads(done.stdout)["jobs"]
    assert [row["status"] for row in rows] == ["dry", *["refused"] * 5]
    for i, said in (
        (1, "precision=fp4: Invalid"),
        (2, "model=tinny: no"),
        (4, "model.d_model=32 % "),
    ):
        assert rows[i]["reason"].startswith(said)
    assert [folder.name for folder in (tmp_path / "all").iterdir()] == ["0"]


def test_a_run_that_fails_is_one_line_with_its_traceback_in_a_file(tmp_path: Path) -> None:
    done = launch(*SMALL, "optimizer.lr=1e30", "run.dir=mine", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "launch.sh: the run failed: rank " in done.stderr and "NonFinite" in done.stderr
    path = Path(done.stderr.partition("(traceback: ")[2].rstrip(")\n"))
    assert "Traceback" in (tmp_path / path).read_text()


def test_torchrun_may_start_the_ranks(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    command = [*torchrun, "-m", "experiments", *SMALL, "strategy=fsdp"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    ledger = ledgers.read(only_run(tmp_path) / "ledger.json")
    assert ledger["layout"]["dp_shard"] == 2, "one folder for both ranks"


def test_slurm_may_start_the_ranks(tmp_path: Path) -> None:
    """srun's variables; a task of its own for each rank, and launch.sh in each."""
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "4711",
    }
    tasks = [
        subprocess.Popen(
            [str(ROOT / "launch.sh"), *SMALL],
            cwd=tmp_path,
            env={**environment(), **shared, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [ended(task)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    waits = "launch.sh: rank {} of 2 (SLURM_PROCID={} SLURM_STEP_NUM_TASKS=2) waits for the other"
    assert "run folder" in said[0] and waits.format(0, 0) in said[0]
    # this one speaks only if it came seconds before the other
    assert said[1] == "" or (said[1].startswith(waits.format(1, 1)) and said[1].count("\n") == 1)
    assert ledgers.read(only_run(tmp_path) / "ledger.json")["layout"]["dp_replicate"] == 2


def test_a_link_to_launch_sh_trains_whatever_lies_in_the_current_folder(tmp_path: Path) -> None:
    """Another checkout, and files with names of the standard library and of packages."""
    here = tmp_path / "here"
    (here / "experiments").mkdir(parents=True)
    (here / "bin").mkdir()
    for name in ("random.py", "csv.py", "numpy.py", "experiments/worker.py"):
        (here / name).write_text("raise SystemExit('the current folder was searched')")
    (here / "bin" / "first").symlink_to(ROOT / "launch.sh")
    (here / "bin" / "second").symlink_to("first")
    command = ["bin/second", *SMALL]
    done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert ledgers.read(only_run(here) / "ledger.json")["training"]["steps"] == 4


def test_a_run_outlives_a_standard_output_that_is_full_or_closed(tmp_path: Path) -> None:
    for name, sink, said in (
        ("full", ">/dev/full", "No space left on device; the run goes on"),
        ("closed", ">&-", "standard output is closed"),
    ):
        line = f"{ROOT}/launch.sh {' '.join(SMALL)} run.dir={name} {sink}"
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stderr and done.stderr.count("\n") == 1
        assert (tmp_path / name / "model.pt").exists()


def test_more_ranks_than_ten_start(tmp_path: Path) -> None:
    """torchrun's own --redirects takes one digit a rank; each rank but the first has its files."""
    tiny = ("model.n_head=1", "model.n_layer=1", "micro_batch_size=1", "steps=2")
    done = launch(*SMALL, *tiny, "strategy=fsdp", "layout.dp_shard=12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    ledger = ledgers.read(folder / "ledger.json")
    assert ledger["layout"]["world_size"] == 12 and len(ledger["ranks"]) == 12
    assert "step 2/2" in done.stdout
    files = {int(path.parent.name) for path in (folder / "logs").rglob("stdout.log")}
    assert files == set(range(1, 12))


def test_two_nodes_make_one_run(tmp_path: Path) -> None:
    """Both on this machine: torchrun's own options are passed through."""
    (port,) = free_ports(1)
    shared = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}")
    more = (*SMALL, "run.dir=shared", "layout.dp_replicate=2", "layout.dp_shard=2")
    nodes = [start(*shared, f"--node-rank={i}", *more, cwd=tmp_path) for i in range(2)]
    said = [ended(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert ledgers.read(tmp_path / "shared" / "ledger.json")["layout"]["world_size"] == 4


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    command = f"{ROOT}/launch.sh {' '.join(SMALL)} | head -1"
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), check=True)
    assert ledgers.read(only_run(tmp_path) / "ledger.json")["training"]["steps"] == 4


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_blocks_train_alike(tmp_path: Path, strategy: str) -> None:
    small = (*SMALL, "model.n_layer=1")
    done = launch(*small, f"strategy={strategy}", "compile=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ledger = ledgers.read(only_run(tmp_path) / "ledger.json")
    assert ledger["config"]["compile"] and ledger["step"]["memory_bytes"]["peak"] is None
    alone = settle(compose(*small, "strategy=single", "micro_batch_size=4"), None, 0)
    assert ledger["training"]["losses"] == pytest.approx(trajectory(alone).losses, abs=5e-6)
