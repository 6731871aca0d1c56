"""Files that others wrote, damaged or made to harm: each is read rightly or refused in one line."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from costs import ledger as ledgers
from costs import outside
from costs import trace as traces
from costs.program import Message, Wait, Work
from costs.trace import Trace
from experiments.__main__ import main
from experiments.outside_yaml import load_yaml
from experiments.predict import clusters
from experiments.refused import Refused
from experiments.run_folder import read_config, read_launched
from experiments.step_log import read_seconds
from tests.made_runs import a_run
from tests.test_pictures import a_step

FLIPS = 200
PROGRAM = [
    Work("forward", seconds=0.1, stage=0, micro_batch=0, action="forward"),
    Message(0, "all_reduce", "dp_replicate", (0, 1), "float32", 4096, "backward", 0.01),
    Wait(0, "backward"),
    Work("optimizer", seconds=0.05),
]


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    """The folder of a run of two ranks with a trace."""
    folder = a_run(tmp_path / "run")
    (folder / "config.yaml").write_text("steps: 40\n")
    trace = Trace(a_step(2), {0: [*PROGRAM], 1: [*PROGRAM]}, [], {"layout": "dp_replicate2"})
    traces.write(folder / "trace.json.gz", trace)
    return folder


def flipped(content: bytes, random_bits: random.Random) -> bytes:
    """Return the content with one bit the other way."""
    made = bytearray(content)
    made[random_bits.randrange(len(made))] ^= 1 << random_bits.randrange(8)
    return bytes(made)


def lines_of(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Run a command here; return its exit status and standard error. A traceback would raise."""
    status = main([*argv])
    return status, capsys.readouterr().err


def test_a_flipped_bit_of_a_trace_is_a_line_or_a_right_read(traced: Path) -> None:
    path = traced / "trace.json.gz"
    whole, right = path.read_bytes(), traces.read(path)
    bits = random.Random(0)
    refused = 0
    for _ in range(FLIPS):
        path.write_bytes(flipped(whole, bits))
        try:
            assert traces.read(path) == right, "gzip has a checksum: no other trace comes out"
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused > FLIPS // 2


def test_a_flipped_bit_of_a_ledger_or_its_log_never_ends_in_a_traceback(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = random.Random(1)
    out = traced.parent / "report.html"
    for name in ("ledger.json", "metrics.jsonl", "trace.json.gz"):
        whole = (traced / name).read_bytes()
        for number in range(FLIPS // 4):
            (traced / name).write_bytes(flipped(whole, bits))
            many = [["compare", str(traced)], ["report", str(traced), f"out={out}"]]
            argv = many[number % 10 == 0]  # a report takes longer
            status, said = lines_of(capsys, *argv)
            assert status in (0, 2) and "Traceback" not in said
            assert status == 0 or said.startswith("launch.sh: ")
        (traced / name).write_bytes(whole)


def bomb(path: Path, member: bytes, times: int) -> None:
    """Write a gzip file that unpacks to `times` copies of a member."""
    packed = gzip.compress(member)
    path.write_bytes(packed * times)


def test_a_gzip_that_unpacks_to_gigabytes_is_a_line(
    traced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb(traced / "trace.json.gz", b" " * 2**22, 1000)
    assert (traced / "trace.json.gz").stat().st_size < 5 * 2**20
    status, said = lines_of(capsys, "replay", str(traced), "cluster=ethernet_10g")
    assert status == 2 and "unpacks to more than 256 MiB" in said and said.count("\n") == 1
    bomb(traced / "trace.json.gz", b"[],{}," * 2**19, 20)
    status, said = lines_of(capsys, "replay", str(traced), "cluster=ethernet_10g")
    assert status == 2 and "has more than 16,777,216 values" in said and said.count("\n") == 1


JSON = (
    ("[" * 100_000, "nested"),
    ('{"schema":' + "[" * 40 + "]" * 40 + "}", "nested more than 32 deep"),
    ('{"a": NaN}', "NaN is no JSON number"),
    ('{"a": -Infinity}', "-Infinity is no JSON number"),
    ('{"a": 1e999}', "1e999 is not a finite number"),
    ('{"a": ' + "9" * 5000 + "}", "an integer of 5,000 digits"),
    ("", "Expecting value"),
    ("\x00", "Expecting value"),
)


@pytest.mark.parametrize("text, why", JSON)
def test_json_beyond_the_bounds_is_a_line(traced: Path, text: str, why: str) -> None:
    readers: list[tuple[str, Callable[[Path], Any]]] = [
        ("ledger.json", ledgers.read),
        ("trace.json.gz", traces.read),
        ("launch.json", lambda path: read_launched(path.parent)),
    ]
    for name, read in readers:
        packed = name.endswith(".gz")
        (traced / name).write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        with pytest.raises(ValueError, match=why.replace("{", r"\{")) as caught:
            read(traced / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
YAML = (
    (LAUGHS, "once its aliases are followed"),
    ("a: &a [*a]\n", "nested more than 32 deep"),
    ("a: " + "[" * 5000, "nested more than 32 deep"),
    ("a: " + "[" * 40 + "]" * 40, "nested more than 32 deep"),
    ("#" * 2**21, "has more than 1 MiB"),
)


@pytest.mark.parametrize("text, why", YAML)
def test_yaml_beyond_the_bounds_is_a_line(traced: Path, text: str, why: str) -> None:
    (traced / "config.yaml").write_text(text)
    for read, kind in ((read_config, ValueError), (clusters.read, Refused)):
        with pytest.raises(kind, match=why) as caught:
            read(traced if read is read_config else traced / "config.yaml")
        assert "\n" not in str(caught.value)


def test_yaml_with_few_aliases_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: *a\nc: [*a, *a]\n")
    assert load_yaml(tmp_path / "a.yaml") == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}] * 2}


def test_what_is_no_regular_file_is_a_line_and_not_waited_for(traced: Path) -> None:
    for name in ("ledger.json", "trace.json.gz", "metrics.jsonl", "config.yaml"):
        (traced / name).unlink()
        os.mkfifo(traced / name)
    readers: dict[str, Callable[[Path], Any]] = {
        "ledger.json": ledgers.read,
        "trace.json.gz": traces.read,
        "metrics.jsonl": read_seconds,
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match=f"{name}.*no regular file"):
            read(traced / name)
    with pytest.raises(ValueError, match=r"config.yaml.*no regular file"):
        read_config(traced)


def test_a_file_beyond_the_bound_is_a_line(traced: Path) -> None:
    with open(traced / "metrics.jsonl", "wb") as file:
        file.truncate(outside.MOST_BYTES + 1)  # sparse
    with pytest.raises(ValueError, match="has more than 256 MiB"):
        read_seconds(traced / "metrics.jsonl")


# one field of a trace's JSON, at a path, replaced by a value of another kind
WRONG: tuple[tuple[tuple[Any, ...], Any], ...] = (
    (("traceEvents", 2, "ts"), "now"),
    (("traceEvents", 2, "pid"), [1]),
    (("traceEvents", 2, "args"), {"bubble_s": "x", "seconds": {}}),
    (("traceEvents", 2, "args"), {"stage": "first"}),
    (("programs", "0", 0, "seconds"), "long"),
    (("programs", "0", 0, "phase"), "lunch"),
    (("programs", "0", 1, "ranks"), [0, "1"]),
    (("programs", "0", 1, "ranks"), []),
    (("programs", "0", 1, "ranks"), {"first": 0, "axes": [[2**40, 1]]}),
    (("programs", "0", 1, "ranks"), {"first": 0, "axes": [[2**30, 1]]}),
    (("programs", "0", 1, "collective"), "gossip"),
    (("programs", "0", 1, "payload_bytes"), True),
    (("programs", "0", 2, "number"), 7),
    (("programs",), {"0": 3}),
    (("about",), [1]),
)


@pytest.mark.parametrize("place, value", WRONG)
def test_a_trace_with_a_wrong_field_is_a_line(
    traced: Path, place: tuple[Any, ...], value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = traced / "trace.json.gz"
    whole = json.loads(gzip.decompress(path.read_bytes()))
    *way, last = place
    inner = whole
    for key in way:
        inner = inner[key]
    inner[last] = value
    path.write_bytes(gzip.compress(json.dumps(whole).encode()))
    shutil.rmtree(traced.parent / "out", ignore_errors=True)
    argv = ["replay", str(traced), "cluster=ethernet_10g", f"out={traced.parent / 'out'}"]
    status, said = lines_of(capsys, *argv)
    assert status == 2 and said.startswith("launch.sh: ") and said.count("\n") == 1
