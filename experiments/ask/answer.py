"""What a question gets: tables, pictures and sentences made of tagged numbers, in three forms.

On the terminal, as Markdown and as JSON. Each number has its tag; a column of one source has it in
its head, a table of one source in its title.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from experiments.ask.kept import code_of, digest
from experiments.ask.quantity import Quantity
from experiments.console import DASH
from experiments.predict.plan_command import wrapped

DRAWN_BY = ("experiments/ask/charts.py", "experiments/pictures.py")  # beside a question's own file
MARKDOWN_WIDTH = 100  # of a command's line
LEGEND = "[m] measured, [t] traced, [p] published by others, [f] by formula"


@dataclass(frozen=True)
class Said:
    """A sentence, and the numbers in it."""

    text: str
    numbers: tuple[Quantity, ...] = ()


Cell = Quantity | Said | str | None


def say(template: str, **values: Any) -> Said:
    """Fill a sentence: numbers get their tags, sentences in it keep their numbers."""
    numbers: list[Quantity] = []
    texts: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Quantity):
            numbers.append(value)
        if isinstance(value, Said):
            numbers += value.numbers
        texts[name] = value.text if isinstance(value, Said) else value
    return Said(template.format(**texts), tuple(numbers))


def listed(items: list[Said]) -> Said:
    """One after the other: a, b and c."""
    texts = [item.text for item in items]
    numbers = tuple(number for item in items for number in item.numbers)
    joined = " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]
    return Said(joined, numbers)


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers under a head. A cell that is None was not measured, or is not."""

    title: str
    head: list[str]
    rows: Sequence[Sequence[Any]]  # of Cell

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row) == len(self.head), (self.title, row)
            assert all(isinstance(cell, Cell) for cell in row), (self.title, row)

    @property
    def numbers(self) -> list[Quantity]:
        """In its cells, and in sentences there."""
        cells = [cell for row in self.rows for cell in row]
        said = [number for cell in cells if isinstance(cell, Said) for number in cell.numbers]
        return [cell for cell in cells if isinstance(cell, Quantity)] + said

    @property
    def source(self) -> str | None:
        """Of all numbers, where they have the same."""
        return only_source(cell for row in self.rows for cell in row)

    @property
    def full_title(self) -> str:
        """With the source of all numbers, where they have the same."""
        return f"{self.title} ({self.source})" if self.source else self.title

    @property
    def heads(self) -> list[str]:
        """With the tag of the column, where it has one and the title does not say it."""
        own = (None if self.source else self._source(i) for i in range(len(self.head)))
        return [
            f"{name} [{source[0]}]" if source else name
            for name, source in zip(self.head, own, strict=True)
        ]

    def cells(self) -> Iterator[list[str]]:
        """Rows as text."""
        said = [bool(self._source(i)) for i in range(len(self.head))]
        for row in self.rows:
            yield [_text(cell, plain) for cell, plain in zip(row, said, strict=True)]

    def _source(self, column: int) -> str | None:
        return only_source(row[column] for row in self.rows)

    def is_number(self, column: int) -> bool:
        return any(isinstance(row[column], Quantity) for row in self.rows)


def only_source(cells: Iterable[Cell]) -> str | None:
    """Of the numbers among them, where they have the same."""
    found = {cell.source for cell in cells if isinstance(cell, Quantity)}
    return found.pop() if len(found) == 1 else None


def _text(cell: Cell, plain: bool) -> str:
    if isinstance(cell, Quantity):
        return cell.plain if plain else str(cell)
    if isinstance(cell, Said):
        return cell.text
    return DASH if cell is None else cell


@dataclass(frozen=True)
class Picture:
    """A PNG: `draw` writes it, and as it is now draws the same for the same `key`."""

    name: str
    caption: str
    draw: Callable[[Path], None]
    key: str

    def at(self, folder: Path) -> Path:
        """The file, drawn where it is not there yet."""
        drawn_by = code_of(*DRAWN_BY, inspect.getfile(self.draw))
        path = folder / f"{self.name}-{digest([self.key, drawn_by])}.png"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self.draw(path)
        return path


@dataclass
class Answer:
    """What answers a question. Sentences are in the order in which they are read."""

    conclusion: list[Said]
    tables: list[Table] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)  # a plan's name, and its command
    pictures: list[Picture] = field(default_factory=list)
    carries_over: list[Said] = field(default_factory=list)  # from a laptop to GPUs
    does_not: list[Said] = field(default_factory=list)

    @property
    def numbers(self) -> list[Quantity]:
        """Every number that is shown, once."""
        said = [*self.conclusion, *self.carries_over, *self.does_not]
        every = [n for one in said for n in one.numbers]
        every += [n for table in self.tables for n in table.numbers]
        return list(dict.fromkeys(every))

    def said(self, name: str, question: str) -> dict[str, Any]:
        """For --json."""
        return {
            "name": name,
            "question": question,
            "conclusion": joined(self.conclusion),
            "numbers": [number.said() for number in self.numbers],
            "commands": [{"plan": plan, "command": command} for plan, command in self.commands],
            "carries_over": joined(self.carries_over),
            "does_not": joined(self.does_not),
        }


def joined(sentences: list[Said]) -> str:
    return " ".join(one.text for one in sentences)


def show(console: Console, name: str, question: str, answer: Answer, pictures: Path) -> None:
    """On the terminal. Pictures go into a folder, and their names are printed."""
    console.rule(name, align="left")
    console.print(question, style="bold", markup=False)
    for one in answer.conclusion:
        console.print(f"- {one.text}", markup=False)
    for table in answer.tables:
        console.print(rich_table(table))
    for plan, command in answer.commands:
        console.print(f"{plan}:", markup=False)
        said = wrapped(command, console.width) if console.is_terminal else command
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    for picture in answer.pictures:
        console.print(f"{picture.caption}: {picture.at(pictures)}", markup=False, soft_wrap=True)
    for title, sentences in (
        ("carries over from a laptop to GPUs", answer.carries_over),
        ("does not", answer.does_not),
    ):
        console.print(f"{title}:", style="bold")
        for one in sentences:
            console.print(f"- {one.text}", markup=False)
    console.print(LEGEND, markup=False, style="dim")


def rich_table(table: Table) -> RichTable:
    made = RichTable(
        title=table.full_title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, name in enumerate(table.heads):
        number = table.is_number(i)
        made.add_column(
            name, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for row in table.cells():
        made.add_row(*row)
    return made


def markdown(question: str, answer: Answer, place: Callable[[Picture], str]) -> list[str]:
    """Lines of Markdown. `place` says where a picture lies."""
    lines = [f"## {question}", ""]
    lines += [f"- {one.text}" for one in answer.conclusion]
    for table in answer.tables:
        lines += ["", f"**{table.full_title}**", ""]
        aligned = ["--:" if table.is_number(i) else "---" for i in range(len(table.head))]
        every = [table.heads, aligned, *table.cells()]
        lines += ["| " + " | ".join(row) + " |" for row in every]
    if answer.commands:
        lines += ["", "The plans as commands:", "", "```"]
        for plan, command in answer.commands:
            lines += [f"# {plan}", wrapped(command, MARKDOWN_WIDTH)]
        lines.append("```")
    for picture in answer.pictures:
        lines += ["", f"![{picture.caption}]({place(picture)})"]
    lines += ["", "What carries over from a laptop to GPUs:", ""]
    lines += [f"- {one.text}" for one in answer.carries_over]
    lines += ["", "What does not:", "", *[f"- {one.text}" for one in answer.does_not]]
    return lines
