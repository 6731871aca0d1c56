"""How much memory this process may use: the machine's, or less under a cgroup's limit. No torch.

docker -m, SLURM and Kubernetes limit a job's memory by a cgroup, and the kernel kills a process of
it that needs more, while the machine itself has plenty. Linux, cgroup v2 and v1 (kernel
documentation: admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc")
V2 = ("memory.max", "memory.current", "inactive_file", "memory.events")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control")


@dataclass(frozen=True)
class MemoryLimit:
    """The memory of the machine, or what a cgroup allows. Bytes."""

    total: int
    free: int
    source: str  # "this machine", or the cgroup and the file that says so

    def __str__(self) -> str:
        return f"{self.total / 1e9:.1f} GB, of {self.source}"


def memory_limits(proc: Path = PROC) -> list[MemoryLimit]:
    """Return the machine's memory and every lower limit of this process's cgroups.

    A limit of a parent binds as well as one of the cgroup itself. Memory that only caches files
    counts as free, for the kernel gives it back before it kills.
    """
    machine = psutil.virtual_memory()
    limits = [MemoryLimit(machine.total, machine.available, "this machine")]
    for folder, (limit, usage, cached, _) in cgroups(proc):
        total, used = _number(folder / limit), _number(folder / usage)
        if total is None or used is None or total >= machine.total:  # "max", or v1's 2**63
            continue
        used -= _field(folder / "memory.stat", cached)
        limits.append(MemoryLimit(total, max(0, total - used), f"cgroup {folder / limit}"))
    return limits


def lowest_limit(proc: Path = PROC) -> MemoryLimit:
    """Return the limit at which the kernel would kill first if only this process's job grew."""
    return min(memory_limits(proc), key=lambda limit: limit.total)


def least_free(proc: Path = PROC) -> MemoryLimit:
    """Return the limit that leaves least room now."""
    return min(memory_limits(proc), key=lambda limit: limit.free)


def oom_kills(proc: Path = PROC) -> int:
    """Return how many processes the kernel has killed so far for want of memory, in this process's
    cgroups and in the whole machine: it grows if that happens again."""
    counts = [_field(folder / events, "oom_kill") for folder, (*_, events) in cgroups(proc)]
    return sum(counts) + _field(proc / "vmstat", "oom_kill")


def cgroups(proc: Path = PROC) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield the folders of this process's memory cgroup and of its parents, and the names of their
    files. A container may see only a part of the tree, which is then mounted as its root."""
    for mount, root, names, controllers in _mounts(proc):
        own = _own(proc, controllers)
        if own is None:
            continue
        inside = Path(own).relative_to(root) if Path(own).is_relative_to(root) else Path()
        folders = [mount / inside, *(mount / inside).parents]
        for folder in folders[: len(inside.parts) + 1]:
            if folder.is_dir():
                yield folder, names


def _mounts(proc: Path) -> Iterator[tuple[Path, str, tuple[str, ...], str]]:
    """Yield the mounted trees that limit memory: where, which cgroup is at the top, the names of
    their files, and the controller as /proc/PID/cgroup names it."""
    for line in _lines(proc / "self" / "mountinfo"):
        fields, _, kind = line.partition(" - ")
        root, mount = fields.split()[3:5]
        filesystem, _, options = kind.split(maxsplit=2)
        if filesystem == "cgroup2":
            yield Path(mount), root, V2, ""
        elif filesystem == "cgroup" and "memory" in options.split(","):
            yield Path(mount), root, V1, "memory"


def _own(proc: Path, controllers: str) -> str | None:
    """Return this process's cgroup in the tree of a controller ("": v2's only tree)."""
    for line in _lines(proc / "self" / "cgroup"):
        _, names, path = line.split(":", 2)
        if controllers in names.split(","):
            return path
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no Linux, or hidden from this process
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _field(path: Path, name: str) -> int:
    """Return the number behind a name in a file of `name number` lines, 0 if it has none."""
    fields = (line.split() for line in _lines(path))
    return next((int(f[1]) for f in fields if len(f) == 2 and f[0] == name), 0)
