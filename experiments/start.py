"""python experiments/start.py MODULE [ARGUMENTS]: run a module of this checkout, like `python -m`.

`python -m` looks in the current folder first, where another checkout or a random.py may lie; before
Python 3.11 PYTHONSAFEPATH does not change that. This looks beside itself instead, and only then
where Python looks. Imports nothing before that.
"""

from __future__ import annotations

import os
import sys

HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def make_ready() -> None:
    """Give this process three open streams, and UTF-8 as the encoding of files and streams.

    Python decides both while it starts, so it is started again, in the same process, if need be.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for _ in closed:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    if 1 in closed:
        said = "launch.sh: warning: standard output is closed: what would be printed there is lost"
        os.write(2, f"{said}\n".encode())
    if closed or not sys.flags.utf8_mode:
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
        arguments = sys.orig_argv[1:]
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *arguments])


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def main() -> None:
    """Run the module that the command line names."""
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # this file's own folder, in which modules have other names
    if HOUSE not in sys.path:
        sys.path.insert(0, HOUSE)
    make_ready()
    import runpy

    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
