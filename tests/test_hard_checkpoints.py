"""Checkpoints that are damaged, or made to do harm: told in one line, and never run."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments import checkpoints
from experiments.checkpoints import check, folder_of, publish
from experiments.figures.parity import make_config
from experiments.resume import check_fits, choose
from experiments.run_folder import settings_of
from parallel.checkpoint import Writer
from parallel.checkpoint_reader import read_whole
from parallel.damaged import Damaged
from parallel.layout import Layout
from parallel.mesh import Mesh
from tests.odd_input import json_values, many, one_line

CONFIG = make_config(Layout(), {"steps": 9})
ALONE = Mesh(Layout(), torch.device("cpu"), None, None)


def saved(run: Path) -> Path:
    folder = folder_of(run, 1)
    if not folder.exists():
        facts = {
            "step": 1,
            "config": settings_of(CONFIG),
            "batch_size": CONFIG.batch_size,
            "corpus": "",
            "scaler": None,
        }
        state = {"model/a": torch.arange(40.0), "optimizer/a/step": torch.tensor(1.0)}
        part = checkpoints.part_of(folder)
        Writer(ALONE, False).write(state, part, lambda: publish(folder, facts, 2))
    return folder


def seal(folder: Path, content: bytes) -> None:
    """As somebody would who knows how."""
    (folder / checkpoints.MANIFEST).write_bytes(content)
    (folder / checkpoints.SEAL).write_bytes(checkpoints.seal(content))


@given(st.data())
@many
def test_a_manifest_that_is_sealed_and_odd_is_told(tmp_path: Path, data: Any) -> None:
    folder = saved(tmp_path)
    manifest = json.loads((folder / checkpoints.MANIFEST).read_bytes())
    odd = copy.deepcopy(manifest)
    inner = [("files", ".metadata"), ("config", "model")]
    place = data.draw(st.sampled_from([(), *[(key,) for key in odd], *inner]))
    value = data.draw(json_values)
    target: Any = odd
    for key in place[:-1]:
        target = target[key]
    if place:
        target[place[-1]] = value
    seal(folder, json.dumps(odd if place else value).encode())
    try:
        found = choose("auto", tmp_path)
        assert found
        check_fits(found, settings_of(CONFIG), CONFIG.batch_size)
    except ValueError as error:
        one_line(error)
    finally:
        seal(folder, json.dumps(manifest).encode())


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b"])
def test_a_manifest_reads_nothing_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    manifest = json.loads((folder / checkpoints.MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    seal(folder, json.dumps(manifest).encode())
    with pytest.raises(Damaged, match="files is missing or is none"):
        check(folder)


class Crafted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_sealed_by_somebody_who_means_harm_it_still_runs_nothing(tmp_path: Path) -> None:
    """Hashes show damage, not malice: the index, and the tensors, are read by safe readers."""
    folder = saved(tmp_path)
    whole = json.loads((folder / checkpoints.MANIFEST).read_bytes())
    shard = next(folder.glob("*.distcp"))
    for path in (folder / ".metadata", shard):
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Crafted(tmp_path / "ran")).ljust(len(before), b"."))
        manifest = {**whole, "files": {**whole["files"], path.name: checkpoints.facts_of(path)}}
        seal(folder, json.dumps(manifest).encode())
        check(folder)
        with pytest.raises(Damaged) as said:
            read_whole(folder, "model")
        one_line(said.value)
        path.write_bytes(before)
    assert not (tmp_path / "ran").exists()


@given(st.binary(max_size=64), st.integers(0, 4000), st.integers(0, 64))
@many
def test_any_bytes_in_an_index_are_refused_or_read(
    tmp_path: Path, put: bytes, at: int, cut: int
) -> None:
    folder = saved(tmp_path)
    path = folder / ".metadata"
    before = path.read_bytes()
    at %= len(before)
    path.write_bytes(before[:at] + put + before[at + cut :])
    try:
        found = read_whole(folder, "model")
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
    except Damaged as error:
        one_line(error)
    finally:
        path.write_bytes(before)
