"""Whatever is given: never a traceback, never a hang, never a wrong answer taken for right.

Files come from anywhere: another version, a disk that lost a block, somebody who means harm.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.__main__ import main
from experiments.compose import keys_of
from experiments.config import TrainConfig
from experiments.figures.parity import make_config
from experiments.predict import clusters
from experiments.predict.score import ROWS
from experiments.refused import Refused
from experiments.run_folder import Launched, read_config, read_launched, write_config
from experiments.step_log import read_metrics
from experiments.weights_file import check_init
from minigpt.config import ModelConfig
from parallel.layout import Layout
from simulator.published import read as read_table
from tests.configs import compose
from tests.launching import ROOT
from tests.odd_input import NASTY, as_bytes, few, json_values, many, one_line, values

CONFIG = make_config(Layout(), {"steps": 9})
# a download, a folder anywhere, a process: what a test must not start
LEFT_OUT = ("data.source", "data.cache", "data.path", "run.dir", "launch", "logging.to")
KEYS = [key for key in keys_of(TrainConfig) if not key.startswith(LEFT_OUT)]


# --- what a user types


@pytest.mark.parametrize("verb", ["compare", "search"])
def test_a_reader_who_has_enough_ends_the_command_without_a_word(verb: str) -> None:
    """As `| head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "experiments", verb, "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(KEYS), values), min_size=1, max_size=3))
@few
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(pairs: list[tuple[str, str]]) -> None:
    try:
        config = compose(*(f"{key}={value}" for key, value in pairs))
    except (Refused, ValueError) as error:
        one_line(error)
    else:
        assert isinstance(config, TrainConfig) and config.steps >= 1


axis = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 2**40])


@pytest.mark.slow
@given(
    st.fixed_dictionaries({name: axis for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")})
)
@few
def test_any_layout_is_taken_or_refused_in_one_line(axes: dict[str, int]) -> None:
    try:
        config = compose(*(f"layout.{name}={size}" for name, size in axes.items()))
    except (Refused, ValueError) as error:
        one_line(error)
    else:
        layout = config.layout
        assert layout.open_axis or layout.world_size >= 1


@pytest.mark.parametrize(
    "argument",
    [
        "+hydra.callbacks.mine._target_=posix.system",
        "+hydra.callbacks.mine={_target_: torch.load, f: evil}",
        "model._target_=os.system",
        "+model={_target_: posix.system, command: 'touch ran'}",
        "hydra.launcher._target_=subprocess.run",
        "hydra.sweeper._target_=builtins.exec",
        "+x=${hydra:runtime.cwd}",
        "model.n_layer=${eval:1}",
    ],
)
def test_no_key_can_say_what_is_run(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([argument, "launch=dry", "data=generated"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("launch.sh: ") and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


verbs = st.sampled_from(["replay", "export", "generate", "score", "resume", "--nnodes=2", "-m"])


@pytest.mark.slow
@given(verbs, st.lists(st.text(max_size=12).filter(lambda s: "\0" not in s), max_size=4))
@few
def test_any_words_are_answered(verb: str, words: list[str]) -> None:
    try:
        status = main([verb, *words, "launch=dry", "run=/nowhere", "cluster=none"])
    except SystemExit as stopped:  # --help and its like
        status = stopped.code  # type: ignore[assignment]
    assert status in (0, 1, 2)


# --- the files of a run


@given(st.binary(max_size=200) | (st.text(max_size=60) | json_values.map(str)).map(as_bytes))
@many
def test_any_config_file_is_read_or_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "launch.json").write_bytes(content)
    for read in (read_config, read_launched):
        try:
            read(tmp_path)
        except ValueError as error:
            one_line(error)


def test_yaml_that_would_run_something_does_not(tmp_path: Path) -> None:
    for tag in ("!!python/object/apply:os.system", "!!python/name:os.system", "!!python/module:os"):
        (tmp_path / "config.yaml").write_text(f"steps: {tag} ['touch {tmp_path}/ran']\n")
        with pytest.raises(ValueError, match=r"config.yaml is damaged"):
            read_config(tmp_path)
    assert not (tmp_path / "ran").exists()


@given(st.data())
@few
def test_one_changed_value_of_a_frozen_config_is_told(tmp_path: Path, data: Any) -> None:
    write_config(tmp_path, CONFIG, Launched([], "corpus", 0.0))
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    key, _, _ = lines[number].partition(":")
    lines[number] = f"{key}: {data.draw(values)}"
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    try:
        read_config(tmp_path)
    except ValueError as error:
        one_line(error)


@given(
    st.lists(json_values.map(json.dumps) | st.text(max_size=20), max_size=6), st.binary(max_size=9)
)
@many
def test_any_metrics_are_lines_of_steps_or_left_out(
    tmp_path: Path, lines: list[str], tail: bytes
) -> None:
    good = json.dumps({"step": 0, "loss": 1.5, "skipped": False})
    (tmp_path / "metrics.jsonl").write_bytes(as_bytes("\n".join([good, *lines, ""])) + tail)
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found[0]["loss"] == 1.5 and all("step" in line for line in found)


MEASURED = list(csv.reader(ROWS.read_text().splitlines()))
KNOWN = clusters.load_all()


@given(
    st.integers(1, len(MEASURED) - 1),
    st.integers(0, len(MEASURED[0]) - 1),
    st.sampled_from(NASTY) | st.text(max_size=8),
)
@example(line=1, column=3, value="0\n0")
@many
def test_any_cell_of_a_table_of_measurements_is_read_or_told(
    tmp_path: Path, line: int, column: int, value: str
) -> None:
    row = list(MEASURED[line])
    row[column] = value
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([MEASURED[0], row])
    try:
        rows, unknown = read_table(path, KNOWN)
    except ValueError as error:
        one_line(error)
    else:
        assert len(rows) + len(unknown) <= 1 and all("\n" not in said for said in unknown.values())


# --- weights


@given(st.binary(max_size=100) | json_values.map(lambda v: with_header(json.dumps(v).encode())))
@many
def test_any_file_of_weights_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError) as said:
        check_init(path, ModelConfig())
    one_line(said.value)


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header
