"""Makes text that came from outside fit to be shown: names, ledgers' strings, messages of errors.

One function for each kind of output; experiments/console.py and experiments/sheets.py call them for
every cell and line. The standard library alone, so that a refusal needs nothing else.
"""

from __future__ import annotations

import re
import sys
from typing import Any

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# a cell that begins with one of these is a formula to a spreadsheet, full-width forms included
FORMULA = "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20"
ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "\n": " "})
MARKDOWN = re.compile(r"[`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def visible(text: str, lines: bool = False) -> str:
    """Return the text with every character that does not show (escape sequences, bidirectional
    controls, lone surrogates) written as its escape; with `lines`, line breaks stay."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else repr(char)[1:-1]
        for char in text
    )


def markdown_cell(text: str) -> str:
    """Return a text for a cell of a Markdown table, where it reads as it is: no HTML, emphasis,
    link, image or further cell."""
    plain = visible(text, lines=True).translate(ENTITIES)
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", plain)


def csv_cell(value: Any) -> Any:
    """Return a value for a CSV file. Numbers stay; a text that a spreadsheet would compute gets an
    apostrophe in front, which spreadsheets take for "this is text"."""
    if value is None or isinstance(value, int | float):
        return value
    text = visible(str(value))
    begins = str(value).lstrip(" ")[:1]
    formula = bool(begins) and begins in FORMULA and not NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


def complain(line: Any) -> None:
    """Print one line on standard error, as the command that the user called."""
    print(f"launch.sh: {visible(str(line))}", file=sys.stderr, flush=True)


def say(text: str, file: Any = None) -> None:
    """Print lines on `file`, by default standard output."""
    print(visible(text, lines=True), flush=True, file=file)
