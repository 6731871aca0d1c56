"""How much memory a job may use: cgroup limits of both versions, of a job and of its parents."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from experiments import environment
from experiments.memory_limit import MemoryLimit, least_free, lowest_limit, memory_limits, oom_kills
from tests.configs import compose

GB = 10**9
UNLIMITED = 9223372036854771712  # what v1 writes if no limit was set


def tree(folder: Path, version: int, own: str, root: str = "/") -> tuple[Path, Path]:
    """Make a /proc with one memory tree, which a process is in at `own`; return it and the tree."""
    proc, mount = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    mount.mkdir()
    names, kind = (
        ("", "cgroup2 cgroup2 rw") if version == 2 else ("memory", "cgroup cgroup rw,memory")
    )
    (proc / "self" / "cgroup").write_text(f"12:pids:/other\n7:{names}:{own}\n")
    mounts = f"22 1 0:20 / /proc rw - proc proc rw\n30 22 0:28 {root} {mount} rw - {kind}\n"
    (proc / "self" / "mountinfo").write_text(mounts)
    return proc, mount


def limit(cgroup: Path, version: int, total: int | str, used: int, cached: int, kills: int) -> None:
    """Write the files of one cgroup."""
    cgroup.mkdir(parents=True, exist_ok=True)
    if version == 2:
        names = "memory.max", "memory.current", "inactive_file", "memory.events"
    else:
        names = (
            *("memory.limit_in_bytes", "memory.usage_in_bytes"),
            *("total_inactive_file", "memory.oom_control"),
        )
    (cgroup / names[0]).write_text(f"{total}\n")
    (cgroup / names[1]).write_text(f"{used}\n")
    (cgroup / "memory.stat").write_text(f"cache 7\n{names[2]} {cached}\n")
    (cgroup / names[3]).write_text(f"low 0\noom_kill {kills}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_limit_of_a_cgroup_and_its_parents_is_taken_and_named(
    version: int, tmp_path: Path
) -> None:
    """As SLURM nests them: the step's own has none, the job's has 2 GB, the user's 3 GB."""
    proc, mount = tree(tmp_path, version, "/uid_0/job_7/step_0")
    user, job = mount / "uid_0", mount / "uid_0" / "job_7"
    limit(mount, version, UNLIMITED, 0, 0, 0)
    limit(user, version, 3 * GB, 2 * GB, GB // 2, 1)
    limit(job, version, 2 * GB, GB, GB // 4, 2)
    limit(job / "step_0", version, "max" if version == 2 else UNLIMITED, GB, 0, 4)
    assert [one.total for one in memory_limits(proc)[1:]] == [2 * GB, 3 * GB]
    lowest = lowest_limit(proc)
    name = "memory.max" if version == 2 else "memory.limit_in_bytes"
    assert lowest == MemoryLimit(2 * GB, GB + GB // 4, f"cgroup {job / name}")
    assert str(lowest) == f"2.0 GB, of cgroup {job / name}"
    assert least_free(proc) == lowest, "cached files count as free"
    assert oom_kills(proc) == 7


DOCKER = "/docker/ab"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("own, root", [(DOCKER, DOCKER), ("/", "/"), ("/../x", DOCKER)])
def test_a_container_sees_its_own_cgroup_as_the_root(
    version: int, own: str, root: str, tmp_path: Path
) -> None:
    """docker -m: mounted from the container's cgroup on, or in a cgroup namespace of its own."""
    proc, mount = tree(tmp_path, version, own, root)
    limit(mount, version, GB, GB // 2, 0, 0)
    assert lowest_limit(proc).total == GB and least_free(proc).free == GB // 2


def test_without_cgroups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert memory_limits(tmp_path)[1:] == [] and oom_kills(tmp_path) == 0
    assert lowest_limit(tmp_path).total == psutil.virtual_memory().total
    assert str(lowest_limit(tmp_path)).endswith(" GB, of this machine")


def test_a_layout_that_a_limit_does_not_take_is_refused_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = MemoryLimit(2 * GB, GB, "cgroup /sys/fs/cgroup/job/memory.max")
    monkeypatch.setattr(environment, "least_free", lambda: small)
    config = environment.settle(compose("layout.dp_replicate=8"), None, 0)
    with pytest.raises(ValueError) as refused:
        environment.check_memory(config, 8)
    assert str(refused.value) == (
        "layout needs 8 ranks here, but the 1.0 GB of free memory take 2 "
        "(the limit is 2.0 GB, of cgroup /sys/fs/cgroup/job/memory.max)"
    )
    large = environment.settle(compose("model=gpt2", "layout.dp_replicate=1"), None, 0)
    with pytest.raises(
        ValueError, match=r"1\.0 GB are free \(the limit is 2\.0 GB, of cgroup /sys"
    ):
        environment.check_memory(large, 1)
