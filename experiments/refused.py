"""Input that is refused. A file of its own: compare and report start without Hydra."""

from __future__ import annotations


class Refused(Exception):
    """The input was refused: one clear line, exit status 2, whatever it quotes."""

    def __init__(self, message: str) -> None:
        shown = (char if char.isprintable() else repr(char)[1:-1] for char in message)
        super().__init__("".join(shown))
