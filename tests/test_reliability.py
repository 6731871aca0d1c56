"""The command that makes docs/results/reliability.md: what it takes, and what it leaves as it
was."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.reliability.__main__ import PARTS, main, with_section
from experiments.reliability.kills import shares


def test_a_part_made_anew_leaves_the_others_and_their_order(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    for name in ("soak", "kills", "damage", "kills"):
        made = f"## {PARTS[name][0]}\n\n{name} {document.exists()}\n\n- ## no title\n"
        document.write_text(with_section(document, name, made))
    heading, *parts = document.read_text().split("\n## ")
    assert heading.startswith("# Reliability\n")
    assert [part.splitlines()[0] for part in parts] == [
        PARTS[name][0] for name in ("kills", "damage", "soak")
    ]
    assert [part.splitlines()[2] for part in parts] == ["kills True", "damage True", "soak False"]


@pytest.mark.parametrize("wrong", ["--share=0", "--share=1.5", "--share=x", "kill"])
def test_what_it_cannot_do_is_told_before_anything_runs(
    wrong: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([wrong])
    assert ended.value.code == 2
    assert wrong.partition("=")[2] in capsys.readouterr().err


def test_shares_add_up() -> None:
    assert list(shares(100, 6)) == [16, 17, 17, 16, 17, 17]
    assert list(shares(2, 6)) == [0, 0, 1, 0, 0, 1]
