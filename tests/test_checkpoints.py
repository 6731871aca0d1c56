"""Checkpoints on disk: damage is noticed and named, nothing of one is run, the newest is found."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import checkpoints
from experiments.checkpoints import (
    check,
    clean,
    folder_of,
    newest_whole,
    part_of,
    publish,
    set_aside,
    steps_of,
)
from experiments.figures.parity import make_config
from experiments.reliability.resuming import train_on, write
from experiments.reliability.state import DAMAGE, faulty
from experiments.resume import check_fits, choose, goes_on_in, run_dir, same_layout
from experiments.run_folder import make_folder, settings_of
from experiments.schedule_warnings import schedule_warnings
from minigpt.config import Schedule
from parallel.checkpoint import Writer
from parallel.checkpoint_index import read_index
from parallel.checkpoint_reader import read_whole
from parallel.damaged import Damaged
from parallel.layout import Layout
from parallel.mesh import Mesh

CONFIG = make_config(Layout(), {"steps": 9})
FACTS = {
    "config": settings_of(CONFIG),
    "batch_size": CONFIG.batch_size,
    "corpus": "its SHA-256",
    "scaler": None,
}
ALONE = Mesh(Layout(), torch.device("cpu"), None, None)


def save(run: Path, step: int, keep: int = 9) -> Path:
    """A checkpoint of two tensors."""
    folder = folder_of(run, step)
    state = {"model/a": torch.arange(40.0), "optimizer/a/step": torch.tensor(float(step))}
    facts = {"step": step, **FACTS}
    Writer(ALONE, False).write(state, part_of(folder), lambda: publish(folder, facts, keep))
    return folder


def damage(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert check(folder).step == 3 and check(folder).run == tmp_path
    assert torch.equal(read_whole(folder, "model")["a"], torch.arange(40.0))
    assert [path.name for path in folder.parent.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("fault", DAMAGE)
def test_every_fault_is_noticed_and_its_file_named(fault: str, tmp_path: Path) -> None:
    whole = save(tmp_path / "run", 1)
    for seed in range(25):
        with faulty(whole, fault, seed, tmp_path / "copy") as (folder, name):
            with pytest.raises(Damaged) as said:
                check(folder)
            assert name in str(said.value) and "\n" not in str(said.value)


def test_a_file_of_another_checkpoint_is_noticed(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 1), save(tmp_path / "b", 2)
    name = next(a.glob("*.distcp")).name
    assert (a / name).stat().st_size == (b / name).stat().st_size
    shutil.copy(b / name, a / name)
    with pytest.raises(Damaged, match=name):
        check(a)


def test_a_crafted_index_is_refused_and_not_run(tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    folder = save(tmp_path / "run", 1)
    (folder / ".metadata").write_bytes(pickle.dumps(Command()))
    for kind in ("model", "optimizer"):
        with pytest.raises(Damaged, match=r"holds \w+\.system, which is no part of an index"):
            read_whole(folder, kind)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Command()))
    assert (tmp_path / "ran").exists(), "the trap would have sprung"


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", pickle.dumps({"a": 1})])
def test_an_index_that_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(Damaged) as said:
        read_index(tmp_path)
    assert ".metadata" in str(said.value) and "\n" not in str(said.value)


def test_an_index_that_points_elsewhere_or_holds_objects_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    index = read_index(folder)
    for place in index.storage_data.values():
        place.relative_path = "../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(Damaged, match="points outside"):
        read_index(folder)
    index.state_dict_metadata["object"] = None  # type: ignore[assignment]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(Damaged, match="no index of tensors"):
        read_index(folder)


def test_the_newest_are_kept_and_a_save_that_was_cut_short_is_none(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert [path.name for path in steps_of(tmp_path)] == ["step-000010", "step-000002"]
    shutil.copytree(folder_of(tmp_path, 10), part_of(folder_of(tmp_path, 11)))
    found, skipped = newest_whole(tmp_path)
    assert found and found.step == 10 and not skipped
    clean(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_copy_under_the_name_of_another_step_is_not_believed(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 3), folder_of(tmp_path, 5))
    with pytest.raises(Damaged, match=r"step-000005: its manifest is of step 3"):
        check(folder_of(tmp_path, 5))
    found = choose("auto", tmp_path)
    assert found and found.step == 3 and "of step 3" in found.skipped[0]


def test_links_and_files_in_the_folder_are_left_alone_and_told(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    save(elsewhere, 1)
    save(run, 2, keep=2)
    folder = run / "checkpoints"
    links = [folder / "step-000001", folder / "step-000009.part", folder / "step-000007"]
    links[0].symlink_to(folder_of(elsewhere, 1))
    links[1].symlink_to(folder_of(elsewhere, 1))
    links[2].symlink_to(tmp_path / "nowhere")
    (folder / "step-000008.part").write_text("a file")
    (folder / "step-000004").write_text("a file where a checkpoint is to be")
    said = clean(run)
    assert len(said) == 5 and all("is left alone" in line for line in said)
    assert [path.name for path in steps_of(run)] == ["step-000002", "step-000001"]
    assert check(links[0]).step == 1, "a link to a checkpoint is read"
    for step in (3, 4, 5):
        save(run, step, keep=2)
    assert [p.name for p in steps_of(run)] == ["step-000005", "step-000004", "step-000001"]
    assert all(link.is_symlink() for link in links) and check(links[0])
    assert (folder / "step-000004.other-1").read_text().startswith("a file")
    assert choose("auto", run) == check(folder_of(run, 5))


def test_an_old_one_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of an open file on NFS, a mount, or files of another user."""
    save(tmp_path, 1)

    def refuses(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuses)
        save(tmp_path, 2)
        facts, folder = {"step": 3, **FACTS}, folder_of(tmp_path, 3)
        part_of(folder, "a").mkdir()
        (line,) = publish(folder, facts, 2, "a")
        assert "step-000001 could not be removed: Directory not empty" in line
        assert newest_whole(tmp_path)[0] == check(folder)
        (line,) = clean(tmp_path)
        assert "step-000001.a.part could not be removed" in line
    assert clean(tmp_path) == []
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step-000002", "step-000003"]


def test_auto_skips_what_is_damaged_and_says_so_and_a_step_does_not(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    found = choose("auto", tmp_path)
    assert found and found.step == 1 and "step-000002/__0_0.distcp" in found.skipped[0]
    for path in (tmp_path, tmp_path / "step-2", tmp_path / "checkpoints" / "step-000002"):
        with pytest.raises(ValueError, match=r"is damaged.*also has step-000001"):
            choose(str(path), None)
    set_aside([folder_of(tmp_path, 2)])
    assert [path.name for path in steps_of(tmp_path)] == ["step-000001"]
    assert (tmp_path / "checkpoints" / "step-000002.damaged-1").is_dir()
    damage(folder_of(tmp_path, 1))
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole"):
        choose("auto", tmp_path)


def test_what_resume_means(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert choose(None, tmp_path) is None and choose("auto", tmp_path / "new") is None
    assert choose("auto", None) is None, "no run is there yet"
    chosen = {path: choose(str(tmp_path / path), None) for path in (".", "step-1", "step-000002")}
    assert {path: found and found.step for path, found in chosen.items()} == {
        ".": 2,
        "step-1": 1,
        "step-000002": 2,
    }
    assert goes_on_in("auto", tmp_path) and goes_on_in(str(tmp_path / "step-1"), tmp_path)
    assert not goes_on_in(str(tmp_path), tmp_path / "new") and not goes_on_in(None, tmp_path)
    for resume, run, said in (
        (str(tmp_path / "step-7"), None, "step-000007 is not there"),
        (str(tmp_path / "nowhere"), None, "no checkpoint there"),
        (str(tmp_path / "step-1"), tmp_path, "holds step-000002, which is newer"),
    ):
        with pytest.raises(ValueError, match=said):
            choose(resume, run)


def test_auto_without_a_folder_is_the_run_that_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_dir("auto", None) is None
    (tmp_path / "runs" / "no-checkpoint").mkdir(parents=True)
    for number, name in enumerate(("older", "newer", "oldest")):
        folder = save(tmp_path / "runs" / name, 1)
        os.utime(folder, (1000 + (number + 1) % 3, 1000 + (number + 1) % 3))
    assert run_dir("auto", None) == Path("runs/newer")
    assert run_dir("auto", "mine") == Path("mine") and run_dir(None, None) is None


def test_two_launches_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", Layout())
    with pytest.raises(ValueError, match="another launch is at work in it"):
        make_folder(folder, Layout(), again=True)
    assert make_folder(folder, Layout(), shared=True) == folder, "another node of the same launch"


def test_what_is_learned_may_not_change_and_how_may(tmp_path: Path) -> None:
    found = check(save(tmp_path, 3))
    check_fits(found, settings_of(CONFIG), CONFIG.batch_size)
    other = make_config(Layout(dp_shard=2), {"steps": 12, "optimizer.lr": 1.0})
    check_fits(found, settings_of(other), other.batch_size)
    assert same_layout(found, settings_of(CONFIG)) and not same_layout(found, settings_of(other))
    for changes, said in (
        ({"model.n_layer": 2}, "model.n_layer=2: .* was written with 4"),
        ({"seed": 1}, "seed=1: "),
        ({"steps": 3}, "steps=3: .* has 3 done already"),
    ):
        wrong = make_config(Layout(), {"steps": 9, **changes})
        with pytest.raises(ValueError, match=said):
            check_fits(found, settings_of(wrong), wrong.batch_size)
    with pytest.raises(ValueError, match="global batch size 8"):
        check_fits(found, settings_of(CONFIG), 8)


def test_a_learning_rate_that_jumps_is_told_with_its_numbers(tmp_path: Path) -> None:
    def config_of(steps: int, **optimizer: Any) -> Any:
        keys = {f"optimizer.{key}": value for key, value in optimizer.items()}
        return make_config(Layout(), {"steps": steps, **keys})

    first = config_of(300, lr=3e-3, warmup_steps=30)
    found = check(save(tmp_path, 9))
    manifest = {**found.manifest, "step": 300, "config": settings_of(first)}
    ended = replace(found, manifest=manifest)
    (line,) = schedule_warnings(config_of(600, lr=3e-3, warmup_steps=30), ended)
    assert "from 0.0003 in step 300 of 300 to 0.00176 in step 301 of 600" in line
    assert "optimizer.schedule=constant optimizer.lr=0.0003 would keep it" in line
    keeps = config_of(600, lr=3e-4, warmup_steps=30, schedule=Schedule.constant)
    assert schedule_warnings(keeps, ended) == []
    half = replace(found, manifest={**manifest, "step": 150})
    assert schedule_warnings(first, half) == [], "the same schedule goes on"
    (line,) = schedule_warnings(config_of(400, lr=3e-3, warmup_steps=30), half)
    assert "in step 150 of 300" in line
    (line,) = schedule_warnings(config_of(20, lr=3e-3, warmup_steps=30), None)
    assert "steps=20 end before it does; the learning rate rises to 0.00194" in line
    assert schedule_warnings(config_of(31, lr=3e-3, warmup_steps=30), None) == []


def test_a_save_that_cannot_be_written_is_an_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    old = save(tmp_path, 1)
    part_of(folder_of(tmp_path, 2)).write_text("a file where the folder would be")
    why = r"step-000002.part could not be written: rank 0.* \([\d,.]+ MB free\)"
    with pytest.raises(OSError, match=why):
        save(tmp_path, 2)
    assert check(old).step == 1
    folder = folder_of(tmp_path, 3)

    def fails() -> None:
        raise OSError(28, "No space left on device")

    writer = Writer(ALONE, asynchronous=True)
    writer.write({"model/a": torch.ones(3)}, part_of(folder), fails)
    with pytest.raises(OSError, match="could not be published: No space left"):
        writer.wait()
    assert newest_whole(tmp_path)[0] == check(old)


def test_a_write_in_the_background_has_what_was_there_when_it_began(tmp_path: Path) -> None:
    values = torch.zeros(1000)
    writer = Writer(ALONE, asynchronous=True)
    for number in range(3):  # the copy of the first is filled again
        writer.write({"model/a": values}, tmp_path / str(number), lambda: None)
        values += 1
    writer.wait()
    for number in range(3):
        stored = read_whole(tmp_path / str(number), "model")["a"]
        assert torch.equal(stored, torch.full((1000,), float(number)))


def test_a_manifest_of_another_program_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    content = json.dumps({"schema": "other/1", "files": {}}).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_bytes(checkpoints.seal(content))
    with pytest.raises(Damaged, match="schema 'other/1' is not"):
        check(folder)


def test_a_run_of_another_model_does_not_load(tmp_path: Path) -> None:
    from experiments.assemble import make_trainer
    from parallel.checkpoint import restore

    trainer = make_trainer(CONFIG, ALONE)
    train_on(CONFIG, trainer, 0, 1)
    write(trainer, tmp_path / "a")
    other = make_trainer(make_config(Layout(), {"model.d_ff": 64}), ALONE)
    with pytest.raises(Damaged, match="mlp"):
        restore(other, tmp_path / "a", same_layout=False)
