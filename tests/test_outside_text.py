"""Text from outside: whatever it holds, it is shown as it reads, in every kind of output."""

from __future__ import annotations

import csv
import html
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.table import Table

from experiments.console import make_console, print_sweep, progress
from experiments.outside_text import NUMBER, complain, csv_cell, visible
from experiments.sheets import Cell, Sheet

# what attacks, and what merely looks odd, beside all of Unicode
ODD = st.text(
    st.sampled_from("[]/\\`*_~|<>&!=+-@:#'\"\x1b\x07\x9b\u202e\u2066\r\n\t\x00 ab1\ud800")
    | st.characters(),
    max_size=30,
)
UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


@given(ODD)
@example("\x1b]0;title\x07\x1b[2J\u202egnp.exe\x9b31m")
def test_nothing_that_is_not_seen_is_left(text: str) -> None:
    one, lines = visible(text), visible(text, lines=True)
    assert one.isprintable()
    one.encode()  # raises for a lone surrogate
    assert not UNSEEN.search(lines) and lines.count("\n") == text.count("\n")
    assert not text.isprintable() or one == text


@settings(deadline=None)
@given(ODD)
@example("[red]x[/red] [/] :smile: [q],[q,v]")
@example("[W ProcessGroupGloo.cpp:1] connect [/172.17.0.2]:41 failed")
def test_a_cell_of_a_terminals_table_is_what_was_given(text: str) -> None:
    console = make_console()
    console.file, console.width = io.StringIO(), 4 * len(visible(text)) + 40
    table = Table("head", title="title")
    table.add_row(text)
    console.print(table)
    console.print(text, soft_wrap=True)
    shown = console.file.getvalue()
    assert not UNSEEN.search(shown)
    for line in visible(text, lines=True).split("\n"):
        assert shown.count(line.strip()) >= 2, (line, shown)


def test_a_sweeps_row_says_why_its_job_failed(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "RuntimeError: [/tmp/gloo/pair.cc:534] \x1b[31mConnection closed [127.0.0.1]:2[/x]"
    rows: list[Any] = [
        (["finetune.targets=[q]"], "failed", reason, None),
        (["finetune.targets=[q,v]"], "done", None, None),
    ]
    print_sweep(Path("runs/[sweep]"), rows)
    shown = capsys.readouterr().out
    assert "runs/[sweep]" in shown
    rows_shown = [line.split("\u2502")[1:-1] for line in shown.splitlines() if line[:1] == "\u2502"]
    _, differs, status, *_ = (
        "".join(map(str.strip, cells)) for cells in zip(*rows_shown, strict=True)
    )
    assert differs == "finetune.targets=[q]finetune.targets=[q,v]"
    assert status.replace(" ", "") == f"failed:{visible(reason)}done".replace(" ", "")


@given(st.lists(ODD | st.integers() | st.floats() | st.none(), min_size=1))
@example(["=1+1", "+cmd|' /C calc'!A0", "-1", "-1.5e-3", "@SUM(A1)", "\t=1", "  =1", "-2+3", -4])
def test_a_spreadsheet_computes_no_cell(row: list[Any]) -> None:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(map(csv_cell, row))
    (read,) = csv.reader(io.StringIO(file.getvalue()))
    for given_value, cell in zip(row, read, strict=True):
        if isinstance(given_value, str):
            begins = cell.lstrip()[:1]
            assert begins not in tuple("=+-@\t\r") or NUMBER.fullmatch(cell), cell
            assert cell.removeprefix("'") == visible(given_value).removeprefix("'")
        else:
            assert cell == ("" if given_value is None else str(given_value))


@settings(deadline=None)
@given(st.lists(ODD, min_size=2, max_size=2))
@example(["a|b", "<img src=x onerror=alert(1)>"])
@example(["![x](http://evil.example/x.png)", "**b** `c` <!-- -->"])
@example(["\\|\\", "&lt;_a_ __b__ ~~c~~"])
def test_a_cell_of_markdown_is_read_as_it_is(texts: list[str]) -> None:
    sheet = Sheet("title | <b>", ("one|", "<two>"), [tuple(map(Cell, texts))], words=("one|",))
    made = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(sheet.to_markdown())
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", made)
    assert len(cells) == 4 and not re.search(r"<(?!/?(p|strong|table|t[rdh]|thead|tbody)\b)", made)
    read = [" ".join(html.unescape(cell).split()) for cell in cells]
    given_texts = ("one|", "<two>", *texts)
    assert read == [" ".join(visible(text, lines=True).split()) for text in given_texts]


def test_lines_on_standard_error_are_visible(capsys: pytest.CaptureFixture[str]) -> None:
    complain("run=\x1b[2Jx\ny")
    progress("resumed from \u202erun")
    assert capsys.readouterr().err == "launch.sh: run=\\x1b[2Jx\\ny\nresumed from \\u202erun\n"
    assert sys.stderr.encoding
