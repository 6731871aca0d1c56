"""./launch.sh -m: what its points are, which of them are done, and where the others run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.compose import jobs_of
from experiments.config import TrainConfig
from experiments.environment import settle
from experiments.run_folder import Launched, write_config
from experiments.sweep_points import Points, folder_of
from tests.configs import compose
from tests.launching import SMALL, launch
from tests.made_runs import a_run

DDP = ["strategy=ddp", "precision=bf16"]


def settled(overrides: list[str]) -> TrainConfig:
    return settle(compose(*overrides), None, 0)


def a_point(folder: Path, overrides: list[str], done: bool) -> TrainConfig:
    """A folder as the launcher leaves it."""
    config = settled(overrides)
    if done:
        a_run(folder)
    else:
        folder.mkdir(parents=True)
    write_config(folder, config, Launched(overrides, "", 0.0))
    return config


def test_points_are_hydras_own() -> None:
    jobs = jobs_of(["-m", "strategy=ddp,tp", "steps=range(2,5,2)", "precision=choice(fp32,bf16)"])
    assert jobs and len(jobs) == 8
    assert jobs[0] == ["strategy=ddp", "steps=2", "precision=fp32"]
    assert jobs[-1] == ["strategy=tp", "steps=4", "precision=bf16"]
    assert jobs_of(["strategy=ddp"]) is None


def test_the_same_sweep_finds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs = [["steps=2", "seed=0"], ["steps=2", "seed=1"]]
    folder = folder_of(jobs)
    assert folder.parent == Path("runs") and folder.name.startswith("sweep-")
    folder.mkdir(parents=True)
    assert folder_of([job[::-1] for job in reversed(jobs)]) == folder, "in any order"
    assert folder_of([*jobs, ["steps=2", "seed=2"]]).name[-8:] != folder.name[-8:]
    assert folder_of([["steps=2", "run.dir=mine"]]) == Path("mine")
    assert folder_of([["hydra.sweep.dir='my runs'"]]) == Path("my runs")


def test_what_is_done_is_kept_and_what_failed_runs_again(tmp_path: Path) -> None:
    other = ["strategy=fsdp", "precision=bf16"]
    config = a_point(tmp_path / "0", DDP, done=True)
    a_point(tmp_path / "1", other, done=False)
    points = Points(tmp_path)
    assert points.done([*DDP[::-1], "run.dir=x"], config) == tmp_path / "0"
    assert points.done(other, settled(other)) is None
    assert points.place(other, 7, first=False) == tmp_path / "1"
    assert (tmp_path / "1").exists(), "another node's"
    (tmp_path / "1" / "logs").mkdir()
    (tmp_path / "1" / "logs" / "torchrun.log").touch()
    assert points.place(other, 7, first=True, dry=True) == tmp_path / "7", "nothing is lost"
    assert points.place(other, 7, first=True) == tmp_path / "1"
    assert not (tmp_path / "1").exists()
    new = ["strategy=tp", "precision=bf16"]
    assert points.done(new, settled(new)) is None
    assert points.place(new, 0, first=True) == tmp_path / "2"
    assert points.place(["strategy=pp"], 1, first=True) == tmp_path / "3", "each its own"


def test_a_point_that_saved_is_gone_on_with(tmp_path: Path) -> None:
    """With resume=auto; without, a new attempt takes the place of what was stopped."""
    job = [*DDP, "checkpoint.every=50", "resume=auto"]
    a_point(tmp_path / "0", job, done=False)
    a_point(tmp_path / "1", job, done=False)  # an older program's second attempt, which got further
    (tmp_path / "1" / "checkpoints" / "step-000101").mkdir(parents=True)
    points = Points(tmp_path)
    assert points.place(job, 0, first=True, resume=True) == tmp_path / "1"
    assert (tmp_path / "1" / "checkpoints" / "step-000101").is_dir(), "nothing of it is deleted"
    (tmp_path / "1" / "checkpoints" / "step-000101").rmdir()
    assert Points(tmp_path).place(job, 0, first=True, resume=True) == tmp_path / "0"
    assert not (tmp_path / "0").exists(), "it had saved nothing"


def test_a_point_whose_defaults_have_changed_is_not_done(tmp_path: Path) -> None:
    config = a_point(tmp_path / "0", DDP, done=True)
    path = tmp_path / "0" / "config.yaml"
    path.write_text(path.read_text().replace("steps: 300", "steps: 200"))
    assert Points(tmp_path).done(DDP, config) is None
    assert Points(tmp_path).place(DDP, 0, first=True) == tmp_path / "1"
    assert (tmp_path / "0" / "ledger.json").exists(), "what was measured stays"
    path.write_text("damaged: [")
    assert Points(tmp_path).done(DDP, config) is None


def test_a_sweep_has_its_folder_to_itself(tmp_path: Path) -> None:
    first, second = Points(tmp_path / "sweep"), Points(tmp_path / "sweep")
    first.lock()
    first.lock()
    for _job in range(2):  # each asks anew: none of them may go on without the lock
        with pytest.raises(ValueError, match="a sweep is running there"):
            second.lock()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not a folder"):
        Points(tmp_path / "file").lock()


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_ended(tmp_path: Path) -> None:
    """One point trains, one diverges; then the first is kept and the second is tried again."""
    sweep = ("-m", *SMALL, "strategy=single", "clip=null", "optimizer.lr=1e-3,1e30", "seed=3")
    done = launch(*sweep, cwd=tmp_path)
    assert done.returncode == 1 and "NonFinite" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    first = (folder / "0" / "ledger.json").stat().st_mtime_ns
    assert f"./launch.sh compare runs/{folder.name}" in done.stdout

    done = launch(*sweep, "--json", cwd=tmp_path)
    rows = json.loads(done.stdout)["jobs"]
    assert done.returncode == 1
    assert [row["status"] for row in rows] == ["kept", "failed"]
    assert [Path(row["run"]).name for row in rows] == ["0", "1"]
    assert "NonFinite" in rows[1]["reason"]
    assert (folder / "0" / "ledger.json").stat().st_mtime_ns == first

    compared = launch("compare", str(folder), "--json", cwd=tmp_path)
    assert compared.returncode == 0
    assert len(json.loads(compared.stdout)["runs"]) == 1
    assert "1/ledger.json: No such file" in compared.stderr and compared.stderr.count("\n") == 1
