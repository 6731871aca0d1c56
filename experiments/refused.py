"""Input that is refused. A file of its own: compare and report start without Hydra."""

from __future__ import annotations

from experiments.outside_text import visible


class Refused(Exception):
    """The input was refused: one clear line, exit status 2, whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))
