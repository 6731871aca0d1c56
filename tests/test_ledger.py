"""The ledger's schema: what is written can be read, and what breaks it is named in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costs.ledger import MEMORY_PARTS, TIME_PARTS, check, read, step_of, wire_bytes, write


def a_step() -> dict[str, Any]:
    row = {
        "collective": "all_reduce",
        "axis": "dp_replicate",
        "group_size": 2,
        "dtype": "float32",
        "phase": "backward",
        "calls": 3,
        "payload_bytes": 4001,
        "wire_bytes": 4000,
        "backend_bytes": 4000,
        "time_s": 0.01,
    }
    return {
        "tokens": 2048,
        "time_s": {"total": 0.5, **dict.fromkeys(TIME_PARTS, 0.1)},
        "memory_bytes": {"peak": 60, **dict.fromkeys(MEMORY_PARTS, 10)},
        "process_bytes": {"resident_peak": 90, "allocator_peak": None},
        "communication": [row],
        "control": {
            "calls": 0,
            "payload_bytes": 0,
            "outside_steps": {"calls": 2, "payload_bytes": 300},
        },
        "flops": {"model": 1e9, "hardware": None},
        "tokens_per_s": 4096.0,
        "mfu": 0.5,
        "hfu": None,
    }


def a_ledger() -> dict[str, Any]:
    axes = dict.fromkeys(("pp", "dp_shard", "cp", "tp", "ep"), 1)
    return {
        "schema": "worldsize.ledger/1",
        "source": "measured",
        "config": {"steps": 3},
        "layout": {"world_size": 2, "dp_replicate": 2, **axes},
        "model": {"parameters": 1000, "flops_per_token": 6000},
        "environment": {"device": "cpu"},
        "pipeline": {
            "schedule": "1f1b",
            "micro_batches": 4,
            "ideal_bubble": 0.2,
            "stages": [{"rank": 0, "stages": [0], "bubble_s": 0.1, "bubble": None}],
        },
        "training": {"steps": 2, "losses": [2.0, None], "validation_loss": None},
        "step": a_step(),
        "ranks": [a_step(), a_step()],
    }


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.json"
    write(path, a_ledger())
    assert read(path) == a_ledger()
    assert list(tmp_path.iterdir()) == [path], "no part is left"


def test_the_step_of_stages_has_their_mean_hfu() -> None:
    """The first stage has no head: it computes less than its share of the model's FLOPs."""
    first, last = a_step() | {"mfu": 0.4, "hfu": 0.38}, a_step() | {"mfu": 0.4, "hfu": 0.46}
    assert step_of([first, last])["hfu"] == pytest.approx(0.42)
    assert step_of([a_step(), a_step()])["hfu"] is None


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    ledger = a_ledger()
    change(ledger)
    return ledger


BREAKS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda x: x.update(schema="worldsize.ledger/9"), "schema: 'worldsize.ledger/9'"),
    (lambda x: x.update(source="guessed"), "source: must be one of measured"),
    (lambda x: x.pop("ranks"), "ledger.ranks: is missing"),
    (lambda x: x.update(extra=1), "ledger.extra: is not in the schema"),
    (lambda x: x["ranks"].pop(), "ranks: 1 of 2 ranks"),
    (lambda x: x["layout"].update(tp=0), "layout.tp: 0 is not a whole number of at least 1"),
    (lambda x: x["model"].update(parameters=1.5), "model.parameters: 1.5 is not a whole"),
    (lambda x: x["training"]["losses"].append("low"), "training.losses[2]: 'low' is not"),
    (lambda x: x["step"]["time_s"].update(compute=0.2), "step.time_s: parts sum to 0.6"),
    (lambda x: x["step"]["time_s"].update(total=None), "step.time_s: has parts"),
    (lambda x: x["step"]["memory_bytes"].update(peak=61), "step.memory_bytes: parts sum to 60"),
    (lambda x: x["step"]["memory_bytes"].update(peak=-1), "step.memory_bytes.peak: -1"),
    (lambda x: x["step"].update(more=1), "step.more: is not in the schema"),
    (lambda x: x["step"]["memory_bytes"].update(more=1), "step.memory_bytes.more: is not"),
    (
        lambda x: x["step"]["process_bytes"].update(resident_peak=1.5),
        "step.process_bytes.resident_peak: 1.5 is not a whole",
    ),
    (lambda x: x["ranks"][0]["process_bytes"].pop("resident_peak"), "ranks[0].process_bytes.resi"),
    (lambda x: x["pipeline"].update(extra=1), "pipeline.extra: is not in the schema"),
    (lambda x: x["pipeline"]["stages"][0].update(bubble=-1.0), "pipeline.stages[0].bubble: -1.0"),
    (lambda x: x.update(pipeline=None), "pipeline: must be an object"),
    (lambda x: x["step"].update(mfu=float("nan")), "step.mfu: nan is not a finite number"),
    (lambda x: x["step"].update(mfu=True), "step.mfu: True is not"),
    (lambda x: x["step"].update(communication={}), "step.communication: must be a list"),
    (
        lambda x: x["ranks"][1]["communication"][0].update(wire_bytes=9999),
        "ranks[1].communication[0].wire_bytes: 9999, but a ring sends 4001",
    ),
    (
        lambda x: x["step"]["communication"][0].update(phase="sideways"),
        "step.communication[0].phase: 'sideways' is not one of data, forward",
    ),
    (
        lambda x: x["step"]["control"]["outside_steps"].update(calls=None),
        "step.control.outside_steps.calls: None is not a whole number",
    ),
    (
        lambda x: x["step"]["communication"][0].update(collective="shout"),
        "shout: no such collective",
    ),
    (
        lambda x: x["step"]["communication"][0].update(group_size=1),
        "step.communication[0].group_size: 1",
    ),
]


@pytest.mark.parametrize("change, said", BREAKS, ids=[said for _, said in BREAKS])
def test_a_broken_ledger_is_neither_written_nor_read(
    tmp_path: Path, change: Callable, said: str
) -> None:
    ledger, path = broken(change), tmp_path / "ledger.json"
    with pytest.raises(ValueError) as refused:
        write(path, ledger)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)
    assert not path.exists()
    path.write_text(json.dumps(ledger))
    with pytest.raises(ValueError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_what_was_not_measured_may_be_null() -> None:
    ledger = a_ledger()
    ledger["step"]["time_s"] = dict.fromkeys(("total", *TIME_PARTS))
    ledger["step"]["memory_bytes"] = dict.fromkeys(("peak", *MEMORY_PARTS))
    ledger["step"]["communication"] = ledger["step"]["control"] = None
    check(ledger)


def test_ledgers_from_before_phases_and_control_are_read() -> None:
    ledger = a_ledger()
    for step in (ledger["step"], *ledger["ranks"]):
        del step["control"], step["communication"][0]["phase"]
        del step["communication"][0]["backend_bytes"]
    check(ledger)


def test_what_may_be_there_may_be_missing() -> None:
    ledger = a_ledger()
    del ledger["pipeline"]
    for step in (ledger["step"], *ledger["ranks"]):
        del step["process_bytes"]
    check(ledger)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    for key, part in inside:
        found += places(part, (*path, key)) if isinstance(part, dict | list) else [(*path, key)]
    return found


@given(st.sampled_from(places(a_ledger())), json_values)
@settings(max_examples=300)
def test_any_damage_is_named_or_harmless(place: tuple, value: Any) -> None:
    """check() answers with a ValueError or not at all, whatever stands wherever."""
    ledger = copy.deepcopy(a_ledger())
    target = ledger
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    try:
        check(ledger)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": NaN}', "\x00"])
def test_a_file_that_is_no_ledger_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)) as refused:
        read(path)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="No such file"):
        read(tmp_path / "nothing.json")


@given(st.integers(2, 64), st.integers(0, 10**12))
def test_wire_bytes_of_a_ring(n: int, payload: int) -> None:
    """An all_reduce is a reduce_scatter and an all_gather (Thakur et al. 2005)."""
    both = wire_bytes("all_gather", payload, n) + wire_bytes("reduce_scatter", payload, n)
    assert abs(wire_bytes("all_reduce", payload, n) - both) <= 1
    assert wire_bytes("send", payload, n) == payload
    assert wire_bytes("recv", payload, n) == wire_bytes("barrier", payload, n) == 0
    assert wire_bytes("all_to_all", n * payload, n) == (n - 1) * payload
