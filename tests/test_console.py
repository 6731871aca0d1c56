"""What the user reads."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from experiments.console import (
    Reporter,
    costs_tables,
    explained_table,
    human_bytes,
    human_seconds,
    print_sweep,
    share,
)
from experiments.explain import Explained, Explanation, case_of, flops, messages
from experiments.figures.parity import make_config
from experiments.tracking import without_secrets
from parallel.layout import ActivationCheckpointing, Layout, PipelineConfig, PipelineSchedule
from tests.test_ledger import a_ledger


@pytest.mark.parametrize(
    "number, said",
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (3_412_480, "3.41 MB"),
        (5e12, "5.00 TB"),
        (5e16, "50000.00 TB"),
    ],
)
def test_bytes_are_decimal(number: float | None, said: str) -> None:
    assert human_bytes(number) == said


def test_null_is_a_dash_and_zero_is_zero() -> None:
    assert human_seconds(None) == share(None, 1.0) == share(1.0, None) == "-"
    assert human_seconds(0.0) == "0.00 ms" and human_seconds(2) == "2.00 s"
    assert share(0.0, 2.0) == "0.0 %"


def text_of(ledger: dict) -> str:
    console = Console(width=100, file=io.StringIO())
    for table in costs_tables(ledger):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_hold_every_part_and_every_collective() -> None:
    said = text_of(a_ledger())
    for word in ("exposed communication", "optimizer", "activations", "all_reduce", "dp_replicate"):
        assert word in said
    unknown = a_ledger()
    unknown["step"]["communication"] = None
    assert "not measured" in text_of(unknown)
    unknown["step"]["communication"] = []
    assert "none" in text_of(unknown)


def explained_text(rows: list[Explained]) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(explained_table(Explanation(rows)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_each_cost_stands_beside_its_formula() -> None:
    config = make_config(Layout(dp_replicate=2), {"clip": 1.0})
    case = case_of(config, 0)
    parameters = config.model.parameters
    row = {"collective": "all_reduce", "axis": "dp_replicate", "dtype": "float32"}
    loss = {**row, "dtype": "float64", "payload_bytes": 16}
    rows = [{**row, "payload_bytes": 4 * parameters}, loss]
    right = messages(case, rows, config.impl)
    assert [(r.formula, r.off) for r in right] == [("gradients 4 P", 0), ("loss and count 16", 0)]
    said = explained_text(right)
    assert said.count(human_bytes(4 * parameters)) == 2 and "P: weights" in said

    rows[0]["payload_bytes"] -= 8  # a gradient of two numbers got lost
    assert [r.off for r in messages(case, rows, config.impl)] == [-8, 0]
    assert "-8 B" in explained_text(messages(case, rows, config.impl))
    missing = messages(case, rows[1:], config.impl)
    assert [r.off for r in missing] == [0, -4 * parameters]
    assert all(r.off is None for r in messages(case, None, config.impl)), "not measured"


def test_what_has_no_closed_form_says_why() -> None:
    experts = {"model.ffn": "moe", "model.n_expert": 4}
    config = make_config(Layout(dp_replicate=2, ep=2), experts)
    row = {"collective": "all_to_all", "axis": "ep", "dtype": "float32", "payload_bytes": 12}
    (free, *_) = messages(case_of(config, 0), [row], config.impl)
    assert free.why and "freely" in explained_text([free])
    pieces = {
        "activation_checkpointing": ActivationCheckpointing.full,
        "pipeline": PipelineConfig(schedule=PipelineSchedule("zbv_zero_bubble")),
        "gradient_accumulation_steps": 4,
    }
    split = make_config(Layout(pp=2), pieces)
    ran = [{"model": 1.0, "hardware": 2}, {"model": 1.0, "hardware": None}]
    model, hardware = flops(split, 100, ran)
    assert model.measured == 2 and hardware.closed_form is hardware.measured is None
    assert hardware.why and "split" in hardware.why


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(3, shown=True) as reporter:
        for step in range(3):
            reporter.step(step, 2.5, 1234.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/3  loss 2.5000  1,234 tokens/s"
    assert lines[-1].startswith("step 3/3")
    with Reporter(3, shown=False) as silent:
        silent.step(0, 2.5, 1.0)
        silent.say("nothing")
    assert capsys.readouterr().out == ""


def test_a_sweeps_table_shows_what_differs_and_what_it_cost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows: list = [
        (["steps=3", "strategy=ddp"], "done", None, a_ledger()),
        (["steps=3", "strategy=none"], "refused", "strategy=none: no such option", None),
    ]
    print_sweep(Path("runs/sweep"), rows)
    said = capsys.readouterr().out
    assert "strategy=ddp" in said and "steps=3" not in said
    for cost in ("500.00 ms", "60 B", "4.00 kB", "refused: "):
        assert cost in said


def test_no_key_reaches_a_mirror() -> None:
    settings = {"api_key": "x", "nested": {"hf_token": "x", "PASSWORD": "x", "tokens": 5}, "lr": 1}
    assert without_secrets(settings) == {"nested": {"tokens": 5}, "lr": 1}
