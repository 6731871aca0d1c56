"""Checkpoints that are damaged, or made to do harm: told in one line, and never run."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
from collections import Counter
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from experiments import checkpoints
from experiments.checkpoints import check, folder_of, publish
from experiments.figures.parity import make_config
from experiments.resume import check_fits, choose
from experiments.run_folder import settings_of
from parallel.checkpoint import Writer
from parallel.checkpoint_index import Box, read_index, tiles
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


@pytest.mark.parametrize("of", [PosixPath, MetadataIndex, torch.Size, TensorStorageMetadata])
def test_an_index_sets_no_attribute_of_a_class(of: type, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    before = dict(vars(of))
    name = pickle.dumps(of, protocol=2)[2:-1]  # without PROTO and STOP: pushes the class
    build = b"}" + pickle.dumps("name", protocol=2)[2:-1] + b"I1\nsb"
    (folder / ".metadata").write_bytes(b"\x80\x02" + name + build + b".")
    with pytest.raises(Damaged) as said:
        read_whole(folder, "model")
    one_line(said.value)
    assert dict(vars(of)) == before


def lie(folder: Path, change: Any) -> None:
    """Change the index and seal it again, as somebody would who knows how."""
    index = read_index(folder)
    change(index)
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps(index))
    manifest = json.loads((folder / checkpoints.MANIFEST).read_bytes())
    manifest["files"][path.name] = checkpoints.facts_of(path)
    seal(folder, json.dumps(manifest).encode())


def half(index: Metadata) -> None:
    about = index.state_dict_metadata["model/a"]
    about.chunks[0].sizes = torch.Size([20])  # type: ignore[union-attr]


def larger(index: Metadata) -> None:
    about: Any = index.state_dict_metadata["model/a"]
    about.size = about.chunks[0].sizes = torch.Size([2**50])


def longer(index: Metadata) -> None:
    next(iter(index.storage_data.values())).length = 2**40


def elsewhere(index: Metadata) -> None:
    next(iter(index.storage_data.values())).offset = 2**40


def shared(index: Metadata) -> None:
    a, b = index.storage_data.values()
    a.offset = b.offset = min(a.offset, b.offset)


def nowhere(index: Metadata) -> None:
    index.storage_data.pop(next(iter(index.storage_data)))


LIES = {
    half: "the chunks of 'model/a' do not tile it",
    larger: "a chunk of 'model/a' has not the bytes",
    longer: "has not the bytes that the index names",
    elsewhere: "has not the bytes that the index names",
    shared: "has not the bytes that the index names",
    nowhere: "a chunk of '.*' has not the bytes",
}


@pytest.mark.parametrize("change", LIES)
def test_an_index_that_lies_is_refused_before_a_byte_is_read(change: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    lie(folder, change)
    check(folder)
    with pytest.raises(Damaged, match=LIES[change]) as said:
        read_whole(folder, "model")
    one_line(said.value)


numbers = st.integers(-1, 50) | st.just(2**62)


@given(st.data())
@many
def test_an_index_of_any_numbers_gives_the_weights_or_is_refused(tmp_path: Path, data: Any) -> None:
    """Never memory that nothing was written to: all that is read is what was saved."""
    folder = saved(tmp_path)
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def change(index: Metadata) -> None:
        about: Any = index.state_dict_metadata["model/a"]
        place = index.storage_data[MetadataIndex("model/a", [0])]
        if data.draw(st.booleans()):
            about.size = torch.Size(data.draw(st.lists(st.integers(0, 50), max_size=2)))
        sizes = st.lists(st.integers(0, 50), min_size=1, max_size=2)
        for chunk in about.chunks:
            if data.draw(st.booleans()):
                chunk.sizes = torch.Size(data.draw(sizes))
            if data.draw(st.booleans()):
                chunk.offsets = torch.Size(data.draw(sizes))
        if data.draw(st.booleans()):
            place.length = data.draw(numbers)
        if data.draw(st.booleans()):
            place.offset = data.draw(numbers)

    try:
        lie(folder, change)
        found = read_whole(folder, "model")["a"]
        assert torch.equal(found, torch.arange(40.0)[: len(found)])
    except Damaged as error:
        one_line(error)
    finally:
        for path, content in files.items():
            path.write_bytes(content)


@st.composite
def regions(draw: Any) -> tuple[tuple[int, ...], list[Box]]:
    """A small region and boxes in it: a sharding, of which some are moved, dropped or doubled."""
    size = draw(st.lists(st.integers(0, 4), min_size=0, max_size=3))
    boxes: list[Box] = [((0,) * len(size), tuple(size))]
    for _ in range(draw(st.integers(0, 5)) if size else 0):
        number, dim = draw(st.integers(0, len(boxes) - 1)), draw(st.integers(0, len(size) - 1))
        first, sizes = boxes.pop(number)
        at = draw(st.integers(0, sizes[dim]))
        after = tuple(n + at * (i == dim) for i, n in enumerate(first))
        left = tuple(at if i == dim else n for i, n in enumerate(sizes))
        right = tuple(n - at if i == dim else n for i, n in enumerate(sizes))
        boxes += [(first, left), (after, right)]
    kind = draw(st.sampled_from(["as it is", "dropped", "doubled", "moved"]))
    if kind == "dropped":
        boxes.pop(0)
    if kind == "doubled":
        boxes.append(boxes[0])
    if kind == "moved" and size:
        first, sizes = boxes.pop()
        boxes.append((tuple(n + draw(st.integers(0, 1)) for n in first), sizes))
    return tuple(size), boxes


@given(regions())
@many
def test_boxes_tile_a_region_if_they_hold_each_of_its_places_once(
    drawn: tuple[tuple[int, ...], list[Box]],
) -> None:
    size, boxes = drawn
    held = Counter(
        place
        for first, sizes in boxes
        for place in itertools.product(
            *(range(a, a + n) for a, n in zip(first, sizes, strict=True))
        )
    )
    once = held == Counter(itertools.product(*map(range, size)))
    assert tiles(boxes, ((0,) * len(size), size)) == once


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
