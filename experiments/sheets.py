"""A table before it is shown: on a terminal, as Markdown, as HTML or in a mirror of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.table import Table

from experiments.console import DASH
from experiments.outside_text import markdown_cell


class Cell(NamedTuple):
    """What is read, and what it is sorted by: a number, None where there is none."""

    text: str
    value: float | str | None = None


NOTHING = Cell(DASH)
WORDS_WIDTH = 20  # characters, at least, of a column on a terminal that has that many


@dataclass(frozen=True)
class Sheet:
    """Rows under named columns. Columns of `words` are read from the left, numbers at the right."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    words: tuple[str, ...] = ()
    caption: str = ""

    def to_rich(self, most: int | None = None) -> Table:
        """For a terminal, at most so many rows."""
        left = len(self.rows) - most if most is not None else 0
        more = f"and {left:,} more" if left > 0 else ""
        caption = "; ".join(text for text in (more, self.caption) if text) or None
        table = Table(
            title=self.title,
            caption=caption,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            collapse_padding=True,
        )
        for k, name in enumerate(self.columns):
            longest = max((len(row[k].text) for row in self.rows), default=0)
            table.add_column(
                name,
                justify="left" if name in self.words else "right",
                overflow="fold",
                # numbers are not broken, and words keep room beside them
                min_width=min(longest, WORDS_WIDTH),
            )
        for row in self.rows[:most]:
            table.add_row(*(cell.text for cell in row))
        return table

    def to_markdown(self) -> str:
        """As GitHub reads it."""
        rule = (":---" if name in self.words else "---:" for name in self.columns)
        rows = (tuple(cell.text for cell in row) for row in self.rows)
        head, *body = (tuple(map(markdown_cell, line)) for line in (self.columns, *rows))
        cells = ("| " + " | ".join(line) + " |" for line in (head, tuple(rule), *body))
        end = f"\n\n{markdown_cell(self.caption)}" if self.caption else ""
        return f"**{markdown_cell(self.title)}**\n\n" + "\n".join(cells) + end
