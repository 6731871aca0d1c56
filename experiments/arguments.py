"""KEY=VALUE arguments of the commands that have no configuration of Hydra's behind them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from experiments.refused import Refused


def key_values(verb: str, takes: str, argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command line, and its KEY=VALUE arguments; --json is neither.

    `takes` is what the line that refuses an argument says, such as "RUN, cluster=NAME, --json": its
    keys are those that are taken, and words are where it begins with one. A word may hold "=" if it
    has a slash or a file has that name, and the value of a FILE or DIR may begin with ~. Raises
    Refused for another key, a key without a value or twice, and a word where there are none.
    """
    kinds = dict(re.findall(r"(\w+)=(\S+?)(?=,|\s|$)", takes))
    words: list[str] = []
    given: dict[str, str] = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if argument == "--json" and "--json" in takes:
            continue
        is_word = not equals or "/" in key or Path(argument).exists()
        if is_word and takes[0].isupper() and not argument.startswith("-"):
            words.append(argument)
        elif value and key in kinds and key not in given:
            is_path = kinds[key].endswith(("FILE", "DIR"))
            given[key] = os.path.expanduser(value) if is_path else value
        else:
            raise Refused(f"{argument}: {verb} takes {takes}")
    return words, given
