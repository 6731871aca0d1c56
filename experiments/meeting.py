"""Ranks that no launcher of ours started, and that wait for each other.

Variables that are left over in a shell, or those of an interactive srun, make a process a rank
although nobody started the others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from experiments.environment import Rank, meeting_place, others_may_be_missing, say_waiting

SILENT_S = 3.0  # so long may a rank come after the other without a word being said


class NotMet(RuntimeError):
    """The ranks did not meet: one line."""


@contextmanager
def meeting(rank: Rank) -> Iterator[None]:
    """Surround the entry into the process group: say whom this rank waits for if that takes long.

    Raises NotMet if the others do not come.
    """
    notice = threading.Timer(SILENT_S, say_waiting, [rank])
    notice.daemon = True
    if rank.rank and others_may_be_missing(rank):  # rank 0 has said it already
        notice.start()
    try:
        yield
    except dist.DistError as error:
        said = (str(error).strip().splitlines() or ["no message"])[0]
        raise NotMet(
            f"{rank} did not meet the other ranks at {meeting_place(rank)}: {said}"
        ) from error
    finally:
        notice.cancel()
