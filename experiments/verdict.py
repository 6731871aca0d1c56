"""Why a run failed: one line, from what its ranks have left in RUN/logs. No torch.

rank-N.error.json      the exception of a rank, where in its code, and who kept it waiting
rank-N.traceback.txt   the whole of it
rank-N.calls           its messages, counted (costs/standing.py): there even if it was killed
rank-N.stacks.txt      what each of its threads did when it was ended from outside
rank-0.unprinted       why standard output took no more (experiments/console.py: LastingOutput)
rank-0.stopped         all ranks stopped after a step, as a signal had asked them to
torchrun.log           how each process ended
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from costs.standing import Called, Kind, Standing, read
from experiments.memory_limit import lowest_limit
from experiments.outside_text import visible

HOUSE = Path(__file__).resolve().parents[1]
UNEVEN = ("all_to_all", "gather", "scatter")  # each rank may hand over another size
KEYS = {"start", "rank", "time", "error", "line", "unlike", "waited", "traceback"}
TIMED_OUT = "imed out"  # in what gloo and torch's stores say
FULL = 2**16  # bytes: a disk with less room cannot take what a rank would leave there
# in torchrun's log: its report at the end, and its line whenever it starts ranks again
REPORTED = re.compile(
    r"rank +: (?P<rank>\d+) \(local_rank: (?P<local>\d+)\)\n"
    r" +exitcode +: (?P<status>-?\d+) \(pid: (?P<process>\d+)\)"
)
STARTED_AGAIN = re.compile(
    r"failed \(exitcode: (?P<status>-?\d+)\) "
    r"local_rank: (?P<rank>(?P<local>\d+)) \(pid: (?P<process>\d+)\)"
)
ENDED_BY_TORCHRUN = re.compile(r"Sending process (\d+) closing signal")
TORCHRUN_ENDED_BY = re.compile(r"SignalException: Process \d+ got signal: (\d+)")
NODE_ENDED = re.compile(r"^node \d+: torchrun was ended by .*$", re.MULTILINE)  # of the lab
TRACEBACK = "Traceback (most recent call last):"
MESSAGE = re.compile(r"\[?[IWEF]\d{4} |=+$")  # of torch's own logs: not why something ended
NO_ERROR = "ChildFailedError"  # torchrun's own, which only says that a rank failed


def path_of(folder: Path, rank: int, what: str) -> Path:
    """One of the files above."""
    return folder / "logs" / f"rank-{rank}.{what}"


def clear(folder: Path) -> None:
    """Forget the last end of a run that is to go on."""
    for path in (folder / "logs").glob("rank-*.*"):
        path.unlink(missing_ok=True)


# --- written by a rank that fails


def write_error(folder: Path, rank: int, error: BaseException, start: int = 0) -> None:
    """Leave a rank's error where `failure` finds it, its traceback in a file of its own.

    `start`: how often the job has been started again.
    """
    lines = str(error).strip().splitlines() or ["no message"]
    path = path_of(folder, rank, "traceback.txt")
    ranks = standings(folder)
    said = {
        "start": start,
        "rank": rank,
        "time": time.time(),
        "error": f"{type(error).__name__}: {lines[0]}",
        "line": line_of(error.__traceback__),
        "unlike": next(mismatches(ranks), None),
        # ranks that a time-out finds behind are so for long; else they may be on their way
        "waited": waited_for(ranks, rank) if TIMED_OUT in lines[0] else None,
        "traceback": str(path),
    }
    try:
        # the one that the launcher needs comes first: there may be room for no more
        path_of(folder, rank, "error.json").write_text(json.dumps(said))
        path.write_text("".join(traceback.format_exception(error)))
    except OSError:  # a full disk: torchrun.log may still take the message
        with suppress(OSError):
            print(visible(str(said["error"])), file=sys.stderr, flush=True)


def line_of(tb: TracebackType | None) -> str | None:
    """The innermost line of ours in a traceback: minigpt/model.py:88."""
    ours = [
        f"{Path(frame.filename).relative_to(HOUSE)}:{frame.lineno}"
        for frame in traceback.extract_tb(tb)
        if Path(frame.filename).is_relative_to(HOUSE) and ".venv" not in frame.filename
    ]
    return ours[-1] if ours else None


def standings(folder: Path) -> dict[int, Standing]:
    """Where each rank stands, as far as it can be read here."""
    found = {}
    for path in (folder / "logs").glob("rank-*.calls"):
        standing = read(path)
        if standing:
            found[int(path.name.split(".")[0].partition("-")[2])] = standing
    return found


def mark_stopped(folder: Path, steps: int) -> None:
    """All ranks have stopped after so many steps, as they were asked to."""
    path_of(folder, 0, "stopped").write_text(f"{steps}\n")


def unprinted(folder: Path) -> str | None:
    """Return why rank 0 could not print any more, None if it could."""
    path = path_of(folder, 0, "unprinted")
    return path.read_text() if path.exists() else None


def was_stopped(folder: Path) -> bool:
    """Return whether all ranks stopped after the same step and saved it."""
    return path_of(folder, 0, "stopped").exists()


def steps_before_stop(folder: Path) -> int:
    """Return how many steps a run had done when it stopped (mark_stopped)."""
    return int(path_of(folder, 0, "stopped").read_text())


# --- who kept whom waiting


@dataclass(frozen=True)
class Wait:
    """A rank that has called what another has not."""

    waiting: int
    missing: int
    kind: Kind
    called: Called

    @property
    def what(self) -> str:
        axis = f" over {self.kind.axis}" if self.kind.axis else " of all ranks"
        if self.kind.peer is not None:
            axis = f" along {self.kind.axis or 'pp'}"
        collective = "recv" if self.kind.way == "send" else self.called.collective
        return f"{collective}{axis} ({self.called.payload_bytes:,} bytes)"


def waits(ranks: dict[int, Standing], sends: bool = False) -> Iterator[Wait]:
    """Every pair of ranks of which one is ahead of the other.

    `sends`: those count that nobody has asked for. They may be handed over long before.
    """
    for rank, standing in ranks.items():
        for kind, called in standing.called.items():
            if kind.way == "send" and not sends:
                continue
            others = [kind.peer] if kind.peer is not None else kind.ranks
            for other in others:
                if other is None or other == rank or other not in ranks:
                    continue
                back = "recv" if kind.way == "send" else "send"
                theirs = kind if kind.peer is None else Kind(kind.axis, kind.ranks, back, rank)
                there = ranks[other].called.get(theirs)
                if (there.calls if there else 0) < called.calls:
                    yield Wait(rank, other, kind, called)


def culprits(ranks: dict[int, Standing]) -> list[Wait]:
    """The ranks that others wait for and that wait for nobody; else, of those that wait for each
    other, the one that was silent first. One wait for each of them."""
    found = list(waits(ranks)) or list(waits(ranks, sends=True))
    waiting = {wait.waiting for wait in found}
    missing = {wait.missing for wait in found}
    roots = missing - waiting
    if not roots and missing:
        roots = {min(missing, key=lambda rank: _last_call(ranks[rank]))}
    first = sorted(found, key=lambda wait: wait.called.time)
    return [next(wait for wait in first if wait.missing == root) for root in sorted(roots)]


def is_stopped(process: int) -> bool:
    """Whether a process of this machine is stopped (SIGSTOP, a debugger)."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _last_call(standing: Standing) -> float:
    return max((called.time for called in standing.called.values()), default=0.0)


def mismatches(ranks: dict[int, Standing]) -> Iterator[str]:
    """Calls that meet and are not alike: the ranks of one group, each with another collective."""
    kinds = {kind for standing in ranks.values() for kind in standing.called if kind.peer is None}
    for kind in sorted(kinds, key=lambda kind: (kind.ranks, kind.axis or "")):
        there = {r: s.called[kind] for r, s in sorted(ranks.items()) if kind in s.called}
        if len({called.calls for called in there.values()}) != 1:
            continue
        alike: dict[tuple, list[int]] = {}
        for rank, called in there.items():
            size = 0 if called.collective in UNEVEN else called.payload_bytes
            alike.setdefault((called.collective, size), []).append(rank)
        if len(alike) > 1:
            fewest = sorted(alike.items(), key=lambda item: len(item[1]))
            said = [
                f"{_ranks(who)} called {name} ({there[who[0]].payload_bytes:,} bytes)"
                for (name, _), who in fewest
            ]
            yield f"{', and '.join(said)} over {kind.axis or 'all ranks'} at the same time"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def waited_for(ranks: dict[int, Standing], own: int) -> str | None:
    """Who holds up rank `own`, as the files of all say now; None: nobody that is seen."""
    said = []
    for wait in culprits(ranks):
        if wait.missing == own:
            continue
        standing = ranks[wait.missing]
        how = "is stopped" if is_stopped(standing.process) else "stands still"
        said.append(
            f"rank {wait.missing} {how}{_in_step(standing)}: it never came to {wait.what}, where "
            f"rank {wait.waiting} waited"
        )
    if not said:  # it was stopped inside a call, so that all have come as far
        for rank, standing in ranks.items():
            if rank != own and is_stopped(standing.process):
                said.append(f"rank {rank} is stopped{_in_step(standing)}, and others wait for it")
    return "; ".join(said) or None


def _in_step(standing: Standing) -> str:
    return f" in step {standing.step}" if standing.step >= 0 else ""


# --- read by the launcher, and by ranks that are started again


def failure(
    folder: Path, status: int = 1, oom_killed: bool = False, log: Path | None = None
) -> str:
    """Return one line: who failed first and how, and where more is.

    `status` is the exit status of torchrun, negative for the signal that ended it; `oom_killed`
    says that the kernel has killed a process for want of memory meanwhile. `log` is torchrun's, if
    it is not that of the first node.
    """
    log = log or folder / "logs" / "torchrun.log"
    errors = list(_errors(folder))
    last = max((error["start"] for error in errors), default=0)
    errors = sorted((e for e in errors if e["start"] == last), key=lambda error: error["time"])
    timed_out = any(TIMED_OUT in error["error"] for error in errors)
    unlike = next((e["unlike"] for e in errors if e["unlike"]), None)
    killed = None if timed_out else _killed(log, status, oom_killed, bool(errors))
    if not errors:
        unlike = next(mismatches(standings(folder)), None)
        full = _full_disk(folder)
        silent = None if killed or full else _silent(log)
        return "; ".join(filter(None, (unlike, killed, full, silent)))
    first = errors[0]
    line = f" at {first['line']}" if first["line"] else ""
    said = f"rank {first['rank']}: {first['error']}{line} (traceback: {first['traceback']})"
    waited = None if unlike else first["waited"]
    if waited:
        waited += _stacks(folder, waited)
    return "; ".join(filter(None, (unlike, killed, waited, said)))


def _stacks(folder: Path, waited: str) -> str:
    """Where the stacks of the rank are that is named first, if it could still tell them."""
    rank = re.search(r"rank (\d+)", waited)
    path = path_of(folder, int(rank[1]), "stacks.txt") if rank else None
    return f" (its stacks: {path})" if path and path.exists() and path.stat().st_size else ""


def _errors(folder: Path) -> Iterator[dict]:
    for path in (folder / "logs").glob("rank-*.error.json"):
        try:
            error = json.loads(path.read_text())
            if isinstance(error, dict) and error.keys() >= KEYS:
                yield error
        except (OSError, ValueError):  # the disk was full: half a file says nothing
            continue


def _report(log: Path) -> str:
    """Return torchrun's log, as far as it can be read."""
    try:
        return log.read_text(errors="replace")
    except OSError:
        return ""


def _ended_ranks(report: str) -> list[re.Match]:
    """Return the ranks that torchrun says have failed, in the last start of the run."""
    return list(REPORTED.finditer(report)) or list(STARTED_AGAIN.finditer(report))[-1:]


def _killed(log: Path, status: int, oom_killed: bool, has_errors: bool) -> str | None:
    """Return who was ended by a signal that torchrun did not send: torchrun itself, or a rank."""
    report = _report(log)
    if status < 0:
        return f"torchrun was {_ended_by(-status, oom_killed)}"
    if node := NODE_ENDED.search(report):
        return f"{node[0]} (see {log})"
    if signalled := TORCHRUN_ENDED_BY.search(report):
        return f"torchrun was {_ended_by(int(signalled[1]), oom_killed)} (see {log})"
    by_torchrun = ENDED_BY_TORCHRUN.findall(report)
    for found in _ended_ranks(report):
        number = -int(found["status"])
        # of a log without these lines (LOGLEVEL=ERROR) nobody knows who sent a SIGTERM
        own = found["process"] in by_torchrun or (has_errors and not by_torchrun)
        if number > 0 and not (number == signal.SIGTERM and own):
            return f"rank {found['rank']} was {_ended_by(number, oom_killed)} (see {log})"
    return None


def _ended_by(number: int, oom_killed: bool = False) -> str:
    """Return what is known of a process that a signal ended."""
    said = f"ended by {signal.Signals(number).name}"
    if number == signal.SIGKILL and oom_killed:
        return f"{said}, for the kernel ran out of memory: the limit is {lowest_limit()}"
    if number == signal.SIGKILL:
        limit = lowest_limit()
        return f"{said}, from outside or for want of memory (the limit is {limit})"
    return f"{said}, from outside" if number == signal.SIGTERM else said


def _full_disk(folder: Path) -> str | None:
    """Return that no rank could have left a word, if the disk is full."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return None
    room = f"run.dir={folder}: {free:,} bytes are left on its disk"
    return f"{room}, too few for a rank to leave its error" if free < FULL else None


def _silent(log: Path) -> str:
    """Return what can be said if no rank left an error: what Python wrote before it ended."""
    report = _report(log)
    for found in _ended_ranks(report):
        files = log.parent.glob(f"*/attempt_*/{found['local']}/stderr.log")
        own = max(files, key=lambda path: path.stat().st_mtime, default=log)
        own = own if own.stat().st_size else log  # a rank that keeps the terminal has none
        said = last_error(own.read_text(errors="replace"))
        if said:
            return f"rank {found['rank']}: {said} (see {own})"
    said = last_error(report)
    return f"torchrun: {said} (see {log})" if said else f"a rank died without a word; see {log}"


def last_error(text: str) -> str | None:
    """Return the line of the last Python exception in a log, or the last line if it has none."""
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in text.splitlines()]
    for start in reversed([i for i, line in enumerate(lines) if line == TRACEBACK]):
        after = [line.rstrip() for line in lines[start + 1 :] if line and not line[0].isspace()]
        if after and NO_ERROR not in after[0]:
            # a message may begin on a line of its own
            return " ".join(after[:2] if after[0].endswith(":") else after[:1])
    if TRACEBACK in lines:
        return None
    words = (line.strip() for line in reversed(lines) if not MESSAGE.match(line))
    return next(filter(None, words), None)
