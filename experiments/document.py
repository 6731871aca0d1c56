"""What the documents that a command writes have in common: who made them, and their tables."""

from __future__ import annotations

import time

from experiments import environment


def heading(title: str, command: str, on: str = "gloo") -> str:
    """The title, the command that stands beside the numbers, the day and the machine."""
    facts = environment.facts()
    return (
        f"# {title}\n\nMade by `{command}` on {time.strftime('%Y-%m-%d')}\n"
        f"({facts['processor']}, {facts['cores']} cores; torch {facts['torch']}, {on}).\n"
    )


def table(*cells: str) -> str:
    """One row of Markdown."""
    return f"| {' | '.join(cells)} |"


def marked(figure: str, missed: bool) -> str:
    """Bold where it is not within its bar."""
    return f"**{figure}**" if missed else figure


def rule(columns: int) -> str:
    return table(*["---"] * columns)
