"""./launch.sh compare RUN RUN... [KEY=VALUE] [--format csv|json|markdown]: runs side by side.

./launch.sh compare runs/ddp runs/fsdp            two runs
./launch.sh compare runs/sweep-20261125-081500    all of a sweep; a pattern in quotes does too
./launch.sh compare runs/ddp runs/predicted       a measured run beside a simulation of it
./launch.sh compare runs/* sort=memory out=pictures

RUN is a run's folder, a ledger, a folder of runs, or a pattern. The first run is what the others
are compared with. A ledger that is missing or damaged is one line, and the others go on; the exit
status is 2 where all of a RUN is.
sort=tokens (default), time, memory, bytes, loss, given; out=DIR: pictures, as .png and .svg.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.compare.comparison import ORDERS, Comparison, compared
from experiments.compare.sheets import sheets_of
from experiments.console import make_console
from experiments.outside_text import complain, visible
from experiments.refused import Refused
from experiments.sheets import Sheet

FORMATS = ("csv", "json", "markdown")
MOST_ROWS = 40  # of a table on a terminal
MOST_CHANGES = 4  # differences that get a table of their own


@dataclass
class Asked:
    """A command line."""

    runs: list[str]
    format: str | None = None
    sort: str = "tokens"
    out: Path | None = None


def command(argv: list[str]) -> int:
    """Compare, and print tables or what --format asks for."""
    asked = asked_for(argv)
    comparison = compared(asked.runs, asked.sort)
    for line in comparison.problems:
        complain(line)
    for line in comparison.warnings:
        print(f"warning: {visible(line)}", file=sys.stderr)
    if asked.format == "json":
        print(json.dumps(comparison.to_json(), indent=1))
    elif asked.format == "csv":
        print(comparison.to_csv(), end="")
    elif asked.format == "markdown":
        print("\n\n".join(sheet.to_markdown() for sheet in shown(comparison)))
    else:
        show(comparison)
    if asked.out:
        from experiments.compare.pictures import draw  # matplotlib takes a second

        files = draw(comparison, asked.out)
        if asked.format is None:
            print(f"pictures {', '.join(map(str, files))}")
    return 2 if comparison.unread else 0


def asked_for(argv: list[str], verb: str = "compare") -> Asked:
    """Read the command line of this command or of report. Raises Refused, one line."""
    asked = Asked([])
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--json":
            asked.format = "json"
        elif name == "--format":
            asked.format = value if equals else next(words, "")
            if asked.format not in FORMATS:
                raise Refused(f"--format={asked.format}: must be one of {', '.join(FORMATS)}")
        elif name == "sort":
            asked.sort = value
            if value not in (*ORDERS, "given"):
                raise Refused(f"sort={value}: must be one of {', '.join((*ORDERS, 'given'))}")
        elif name == "out" and value:
            asked.out = Path(value).expanduser()
        elif word.startswith("-") or (equals and not Path(word).exists()):
            raise Refused(f"{word}: {verb} takes RUN..., sort=, out=, --format, --json")
        else:
            asked.runs.append(word)
    if not asked.runs:
        raise Refused(f"{verb} takes at least one run: {verb} RUN RUN...")
    return asked


def shown(comparison: Comparison) -> list[Sheet]:
    """The tables for a reader: of many differences only the one that has a row for each."""
    few = len(comparison.differences.elementary) <= MOST_CHANGES
    return sheets_of(comparison, with_changes=few)


def show(comparison: Comparison) -> None:
    """Tables on the terminal."""
    console = make_console()
    for sheet in shown(comparison):
        console.print(sheet.to_rich(MOST_ROWS))
        console.print()
    for group in comparison.differences.repeats:
        numbers = ", ".join(str(comparison.runs[i].number) for i in group)
        console.print(f"no key differs between runs {numbers}: their spread widens the noise")
