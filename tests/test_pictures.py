"""Pictures of made-up steps: what is in them, and that the same step gives the same picture."""

from __future__ import annotations

import re
from pathlib import Path

from costs.ledger import MEMORY_PARTS
from costs.trace import COMMUNICATION, COMPUTE, MemorySample, Slice
from experiments.pictures import COLOURS, draw_memory, draw_timeline


def a_step(micro_batches: int) -> list[Slice]:
    """Two ranks that take turns: the first forward, the second back."""
    slices = []
    for i in range(micro_batches):
        start = i * 0.1
        slices += [
            Slice(0, COMPUTE, "forward", start, start + 0.04, 0, i),
            Slice(0, COMMUNICATION, "send", start + 0.04, start + 0.05),
            Slice(1, COMPUTE, "wait", start, start + 0.05, args={"bubble_s": 0.04}),
            Slice(1, COMPUTE, "backward", start + 0.05, start + 0.1, 1, i),
        ]
    return slices


def words_of(path: Path) -> list[str]:
    return re.findall(r">\s*([^<>]+?)\s*</text>", path.read_text())


def test_a_timeline_has_ranks_numbers_and_colours(tmp_path: Path) -> None:
    draw_timeline(a_step(4), tmp_path / "timeline", "one step")
    svg = tmp_path / "timeline.svg"
    words = words_of(svg)
    assert {"one step", "rank 0", "rank 1", "forward", "backward", "idle", "ms"} <= set(words)
    for number in "0123":
        assert words.count(number) >= 2, "once in each rank's box"
    for kind in ("forward", "backward", "exposed", "message"):
        assert COLOURS[kind] in svg.read_text()
    assert "optimizer" not in words, "the legend names what is there"
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_one_micro_batch_needs_no_number(tmp_path: Path) -> None:
    draw_timeline(a_step(1), tmp_path / "one", "one")
    assert COLOURS["forward"] in (tmp_path / "one.svg").read_text()
    boxes = [w for w in words_of(tmp_path / "one.svg") if w == "1"]
    assert not boxes


def test_the_same_step_is_the_same_picture(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_timeline(a_step(2), tmp_path / name, "one step")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_memory_is_stacked_with_its_peak(tmp_path: Path) -> None:
    samples = [
        MemorySample(rank, time, dict.fromkeys(MEMORY_PARTS, size))
        for rank in (0, 1)
        for time, size in ((0.0, 1_000_000), (0.1, 2_000_000), (0.3, 500_000))
    ]
    draw_memory(samples, a_step(4), tmp_path / "memory", "one step")
    words = words_of(tmp_path / "memory.svg")
    assert words.count("peak 12.00 MB") == 2
    assert {"rank 0, MB", "rank 1, MB", *MEMORY_PARTS} <= set(words)
