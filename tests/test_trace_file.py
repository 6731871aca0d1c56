"""The trace file: what is written is read back, and a viewer finds slices that nest."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from costs.program import Message, Wait, Work
from costs.trace import COMMUNICATION, COMPUTE, MemorySample, Slice, Trace, lanes, read, write


def a_trace() -> Trace:
    number = {"number": 0, "axis": "pp", "payload_bytes": 32}
    return Trace(
        slices=[
            Slice(0, COMPUTE, "step", 0.0, 0.5),
            Slice(0, COMPUTE, "forward", 0.0, 0.125, stage=0, micro_batch=3),
            Slice(0, COMMUNICATION, "send", 0.125, 0.25, args=number),
            Slice(1, COMPUTE, "wait", 0.0, 0.25, args={"collective": "recv", "number": 0}),
        ],
        programs={
            0: [
                Work("forward", seconds=0.125, stage=0, micro_batch=3),
                Message(0, "send", "pp", (0, 1), "float32", 32, "forward", seconds=0.125),
                Wait(0, "forward"),
            ],
            1: [],
        },
        memory=[MemorySample(0, 0.25, {"parameters": 7, "other": 0})],
        about={"step": 12},
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    write(path, a_trace())
    assert read(path) == a_trace()
    assert list(tmp_path.iterdir()) == [path], "no part is left"


def test_a_viewer_finds_ranks_tracks_and_names(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    write(path, a_trace())
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert names == ["rank 0", "compute", "communication", "rank 1", "compute"]
    slices = {e["name"]: e for e in events if e["ph"] == "X"}
    assert list(slices) == ["step", "forward 3", "send pp", "wait for recv"]
    assert slices["send pp"]["tid"] == 1 and slices["send pp"]["dur"] == 125_000


def test_messages_that_overlap_get_tracks_of_their_own() -> None:
    times = [(0, 4), (1, 2), (2, 3), (5, 6)]
    spread = lanes(Slice(0, COMMUNICATION, "send", *map(float, t)) for t in times)
    assert [[(s.start, s.end) for s in lane] for lane in spread] == [
        [(0, 4), (5, 6)],
        [(1, 2), (2, 3)],
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"traceEvents": [{}]}'])
def test_a_file_that_is_no_trace_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match=str(path)) as refused:
        read(path)
    path.write_text(text or "plain")
    with pytest.raises(ValueError, match=str(path)):
        read(path)
    assert "\n" not in str(refused.value)
