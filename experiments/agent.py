"""torchrun, which listens on the loopback alone where its ranks are all on this machine.

python -m experiments.agent --rdzv-backend=loopback --nproc-per-node=2 -m experiments.worker FOLDER

torch's own rendezvous binds the store at which ranks meet to every interface (2.13), whatever
address it is told: who can reach the port could read it and write to it. A store takes a socket
that listens already, and that is bound to 127.0.0.1 here. Ranks that were asked to end have
GRACE_S for it, not half a minute. Any number of ranks can write to files while one keeps the
terminal (`Logs`). All else is torchrun's.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from torch.distributed import TCPStore, run
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from experiments.process import GRACE_S, ON_LOOPBACK, PARENT, die_with_parent

ADDRESS = "127.0.0.1"
TIMEOUT_S = 600  # torchrun's own for a rendezvous, and for the store's answers


class Loopback(StaticTCPRendezvous):
    """One node's rendezvous, at a free port of the loopback."""

    def __init__(self, run_id: str) -> None:
        listening = socket.create_server((ADDRESS, 0))
        port = listening.getsockname()[1]
        super().__init__(ADDRESS, port, 0, 1, run_id, TIMEOUT_S)
        number = listening.detach()
        self._store = TCPStore(ADDRESS, port, 1, True, self.timeout, master_listen_fd=number)

    def get_backend(self) -> str:
        return ON_LOOPBACK


class Logs(DefaultLogsSpecs):
    """The files that the ranks' output goes to, with --redirects=3.

    A rank that --local-ranks-filter names keeps the terminal. torchrun's own way to say so,
    --redirects=1:3,2:3, takes one digit a rank (2.13), so that ten ranks would be its limit.
    """

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the file of each stream; an empty name leaves the stream as it is."""
        logs = super().reify(envs)
        for rank in self._local_ranks_filter or ():
            logs.stdouts[rank] = logs.stderrs[rank] = ""
        return logs


def meet(parameters: RendezvousParameters) -> RendezvousHandler:
    """What torchrun asks for by --rdzv-backend=loopback."""
    return Loopback(parameters.run_id)


def with_grace(options: list[str]) -> list[str]:
    """Torchrun's options with its --shutdown-timeout, where this torch has it (2.11 has not)."""
    names = ("--shutdown-timeout", "--shutdown_timeout")
    given = any(option.startswith(names) for option in options)
    has = names[0] in run.get_args_parser().format_usage()
    return options if given or not has else [f"{names[0]}={GRACE_S}", *options]


def begin() -> None:
    """Prepare this process to start ranks: it ends with the launcher, and they with it."""
    if PARENT in os.environ:  # else a user started it, whose shell may end before
        die_with_parent()
    os.environ[PARENT] = str(os.getpid())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # inherited: see hear_requests


if __name__ == "__main__":
    begin()
    rendezvous_handler_registry.register(ON_LOOPBACK, meet)
    run.DefaultLogsSpecs = Logs  # type: ignore[misc]  # its --logs-specs wants an installed package
    run.main(with_grace(sys.argv[1:]))
