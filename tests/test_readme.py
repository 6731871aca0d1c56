"""The lines of README.md and of the pages written by hand do what they say: each is composed and
checked as a user would type it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from experiments.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("strategies", "runs", "simulator")))
PAGES += ("docs/fault_tolerance.md",)
# need a run, a file or a network that is not there, or go on for minutes
ELSEWHERE = ("runs/", "safetensors", "test", "debug", "lab", "playground", "compare", "report")
ELSEWHERE += ("ask where-does-memory-go", "--help")
PREDICTS = ("simulate", "search", "score", "ask")


def commands() -> list[str]:
    """Return what follows ./launch.sh in fenced blocks; two spaces begin a comment."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    blocks = re.findall(r"^```\n(.*?)^```", text, re.S | re.M)
    lines = "".join(blocks).replace("\\\n    ", "").splitlines()
    found = [line.partition("./launch.sh ")[2] for line in lines if line.startswith("./launch.sh")]
    return [re.split(r" {2,}", line)[0] for line in found]


def here(command: str) -> bool:
    return bool(command) and not any(part in command for part in ELSEWHERE)


@pytest.mark.parametrize("command", [one for one in commands() if here(one)])
def test_a_line_of_the_pages_is_accepted(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 3000)
    words = shlex.split(command)
    trains = words[0] not in PREDICTS
    assert main([*words, "launch=dry"] if trains else words) == 0


def test_all_lines_are_found() -> None:
    assert len(commands()) > 40 and sum(map(here, commands())) > 20


def test_every_link_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+?)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
