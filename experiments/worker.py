"""One rank of a run: torchrun --nproc-per-node 2 -m experiments.worker RUN_FOLDER

It reads the frozen config of the run folder, joins the others, trains, and leaves without a trace:
an error becomes one small file that the parent reads, and no rank outlives its parent.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.outside_text import complain
from experiments.process import die_with_parent, end, end_stopped_siblings, hear_requests

if __name__ == "__main__":  # at once: the imports below take time, in which the parent may die
    die_with_parent()

from experiments import environment
from experiments.run_folder import read_config, read_launched
from experiments.verdict import path_of, write_error


@contextmanager
def last_act(rank: int, folder: Path | None) -> Iterator[None]:
    """Around all that a rank does: it ends the process, and leaves word of an error.

    `folder` is None where no parent reads it: the error goes to the terminal.
    """
    try:
        yield
    except BaseException as error:
        if folder:
            write_error(folder, rank, error, environment.restarts())
            end_stopped_siblings()
        elif type(error).__name__ == "NotMet":  # its module imports torch
            complain(error)
        else:
            traceback.print_exception(error)
        end(1)
    end(0)


def tell_stacks(folder: Path, rank: int) -> None:
    """Write what every thread is doing when this process is ended by SIGTERM, or crashes.

    torchrun sends it to a rank that hangs, once the others have given up; the file is written by a
    handler in C, whatever Python is doing.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the user's caller may ignore it: torchrun asks
    file = open(path_of(folder, rank, "stacks.txt"), "a")  # noqa: SIM115
    faulthandler.enable(file)
    faulthandler.register(signal.SIGTERM, file, all_threads=True, chain=True)


def main(folder: Path) -> None:
    """Train as the rank that the environment says."""
    rank = environment.given_rank() or environment.Rank(0, 0, 1)
    with last_act(rank.rank, folder):
        hear_requests(signal.SIGUSR1)
        tell_stacks(folder, rank.rank)
        config, launched = read_config(folder), read_launched(folder)

        from experiments.train import train  # torch takes seconds: a bad folder is told before

        if launched.fault is None:
            train(config, launched, folder, rank)
        else:
            from experiments.debug.faults import planted

            planted(launched.fault, train, config, launched, folder, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
