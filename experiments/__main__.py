"""The one door behind launch.sh: python -m experiments [VERB] [--json] [OVERRIDES]

Exit status: 0 done, 1 the run failed, 2 the input was refused.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys

from experiments.outside_text import complain
from experiments.process import Stopped
from experiments.refused import Refused
from experiments.start import make_ready

# verb -> the module and function that take the rest of the command line; imported when asked for
VERBS = {
    "train": ("experiments.commands", "train"),
    "generate": ("experiments.generate", "command"),
    "replay": ("experiments.predict.replay", "command"),
    "simulate": ("experiments.predict.simulate", "command"),
    "search": ("experiments.predict.search", "command"),
    "score": ("experiments.predict.score", "command"),
    "compare": ("experiments.compare.command", "command"),
    "report": ("experiments.compare.report", "command"),
    "calibrate": ("experiments.calibrate.command", "command"),
    "lab": ("experiments.lab.command", "command"),
    "check": ("experiments.calibrate.check", "command"),
    "debug": ("experiments.debug.command", "command"),
    "ask": ("experiments.ask.command", "command"),
    "playground": ("experiments.playground.command", "command"),
    "export": ("experiments.export", "command"),
}

COMPOSED = ("train", "generate", "simulate", "search", "export")  # Hydra prints their help


def main(argv: list[str]) -> int:
    """Run one verb; without one, train."""
    verb = argv[0] if argv and argv[0] in VERBS else None
    rest = argv[1:] if verb else argv
    try:
        if verb is None and rest and rest[0].isidentifier():
            known = ", ".join((*VERBS, "test"))
            raise Refused(f"{rest[0]}: no such command; there are {known}, or KEY=VALUE to train")
        name, function = VERBS[verb or "train"]
        module = importlib.import_module(name)
        if verb and verb not in COMPOSED and {"--help", "-h"} & set(rest):
            print((module.__doc__ or "").strip(), flush=True)
            return 0
        status: int = getattr(module, function)(rest)
        sys.stdout.flush()
        return status
    except (Refused, ValueError) as error:
        complain(error)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            return 128 + signal.SIGPIPE
        what = error.filename or ("standard output" if output_fails() else "this machine")
        complain(f"{what}: {error.strerror}")
        return 1
    except Stopped as stopped:
        name = signal.Signals(stopped.number).name
        complain(f"stopped by {name}: {stopped}")
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 130


def output_fails() -> bool:
    """Return whether standard output takes nothing (its disk is full); then it is dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def reader_left() -> bool:
    """Whether nobody reads what is printed any more (`| head`); then nothing more is."""
    out, looking = sys.stdout.fileno(), select.poll()
    looking.register(out, 0)
    left = any(seen & select.POLLERR for _, seen in looking.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return left


if __name__ == "__main__":
    make_ready()
    sys.exit(main(sys.argv[1:]))
