"""What the machine and the scheduler give: devices, memory, ranks. No torch without a GPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import psutil

from experiments.config import Backend, Device, TrainConfig
from experiments.memory_limit import least_free
from minigpt.config import require
from parallel.layout import ActivationCheckpointing, Impl, Layout, Precision

# gloo must not look for this machine's name on a network
SINGLE_NODE = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
# glibc gives freed memory back and takes it again at every step, page by page: 2,800 faults and
# 6 of 40 ms in a bf16 step of width 128. This keeps it, as CUDA's caching allocator does.
KEEP_FREED_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TOP_PAD_": str(2**26),
}
LAPTOP_RANKS = 2  # what -1 means where nothing else says how many ranks there are
BYTES_OF_A_RANK = 350e6  # resident memory of a Python process with torch imported and a small model
BYTES_OF_A_PARAMETER = 16  # fp32 weight, gradient and two moments of AdamW


@dataclass(frozen=True)
class Rank:
    """Who this process is, where torchrun or SLURM started it."""

    rank: int
    local_rank: int
    world_size: int
    nodes: int = 1
    given_by: str = field(default="", compare=False)  # RANK=1 WORLD_SIZE=4

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} ({self.given_by})"

    @property
    def as_launcher(self) -> str:
        """The command that starts all ranks itself, whatever variables are set."""
        names = [pair.partition("=")[0] for pair in self.given_by.split()]
        return " ".join(["env", *(f"-u {name}" for name in names), "./launch.sh ..."])


def given_rank(environ: Mapping[str, str] = os.environ) -> Rank | None:
    """Return the rank that torchrun's variables, or srun's, give this process; None if none do.

    A batch script is no rank, although SLURM numbers it too: only srun makes a step of several
    tasks. One task is none either: it calls the launcher, as a user would.
    `accelerate launch --cpu` starts one process, whatever number it was told, and says nothing of
    the number: where that was one, so be it, else the launcher starts what the layout says.
    Raises ValueError, one line, for variables that are set in part, or to what is no rank.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        # GROUP: of torchrun's agents, one a node
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE")
    elif _whole(environ, "SLURM_STEP_NUM_TASKS", least=1, default=1) > 1:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")
    elif "ACCELERATE_USE_CPU" in environ and "MASTER_ADDR" not in environ:
        return Rank(0, 0, 1)  # accelerate launch --num_processes 1
    else:
        return None
    rank, world_size = names[0], names[2]
    given_by = " ".join(f"{name}={environ[name]}" for name in (rank, world_size) if name in environ)
    needs = [rank, world_size]
    number, size = _whole(environ, rank), _whole(environ, world_size, least=1, default=0)
    if rank == "RANK" and size > 1:  # torchrun sets all of them, and SLURM none
        needs += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needs if name not in environ]
    require(
        not missing,
        f"{given_by}: makes this process a rank, but {' and '.join(missing)} "
        f"{'is' if len(missing) == 1 else 'are'} not set; set what is missing, or unset {rank} "
        f"{world_size} to let the launcher start the ranks",
    )
    _whole(environ, "MASTER_PORT", least=0)
    require(
        number < size,
        f"{rank}={number}: must be below {world_size}={size}, for ranks count from 0",
    )
    local_rank, nodes = _whole(environ, names[1]), _whole(environ, names[3])
    return Rank(number, local_rank, size, max(1, nodes), given_by)


def _whole(environ: Mapping[str, str], name: str, least: int = 0, default: int = 0) -> int:
    """Return the number that a variable is set to. Raises ValueError, one line, for any other."""
    text = environ.get(name)
    if text is None:
        return default
    right = text.isascii() and text.isdigit() and int(text) >= least
    require(
        right,
        f"{name}={text}: must be a whole number from {least} on, as torchrun and SLURM set it; "
        f"unset {name} if neither started this process",
    )
    return int(text)


def meeting_place(rank: Rank, environ: Mapping[str, str] = os.environ) -> str:
    """Return HOST:PORT of rank 0's store, at which the ranks meet."""
    variables = {**environ, **rendezvous(rank.nodes, environ)}
    return f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}"


def others_may_be_missing(rank: Rank, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the variables of a rank may be left over in a shell: torchrun, which has one
    of its own, starts all ranks."""
    return rank.world_size > 1 and "TORCHELASTIC_RUN_ID" not in environ


def say_waiting(rank: Rank) -> None:
    """Say on standard error whom a rank waits for, why, and what else would do."""
    print(
        f"launch.sh: {rank} waits for the other ranks at {meeting_place(rank)}; if nobody starts "
        f"them: {rank.as_launcher}",
        file=sys.stderr,
        flush=True,
    )


def restarts(environ: Mapping[str, str] = os.environ) -> int:
    """How often torchrun --max-restarts has started this rank's job anew."""
    return _whole(environ, "TORCHELASTIC_RESTART_COUNT")


def rendezvous(nodes: int = 1, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of MASTER_ADDR and MASTER_PORT is missing: SLURM sets neither.

    One node needs no name that can be looked up.
    """
    if {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        return {}
    job = _whole(environ, "SLURM_JOB_ID")
    wanted = {"MASTER_PORT": str(15000 + job % 20000)}
    if nodes > 1:
        wanted["MASTER_ADDR"] = first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    else:
        wanted |= {"MASTER_ADDR": "127.0.0.1", **SINGLE_NODE}
    return {name: value for name, value in wanted.items() if name not in environ}


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[003-007,9],login` is gpu003."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]


def of_a_rank(nodes: int = 1, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that a rank needs on top of the user's own, which win. One thread a rank."""
    wanted = {"OMP_NUM_THREADS": "1", **KEEP_FREED_MEMORY, **(SINGLE_NODE if nodes == 1 else {})}
    return {name: value for name, value in wanted.items() if name not in environ}


def physical_cores() -> int:
    """Of this machine: two threads of one core share its units."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def gpu_count() -> int:
    """CUDA devices that torch can use. Asks torch only where a driver is loaded: it is slow."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":  # accelerate launch --cpu
        return 0
    nvidia, amd = Path("/proc/driver/nvidia/gpus"), Path("/dev/kfd")
    if not (nvidia.exists() or amd.exists()) or "+cpu" in metadata.version("torch"):
        return 0
    import torch

    return torch.cuda.device_count()


def pick_device(wanted: Device, gpus: int) -> Device:
    """cpu or cuda; auto is a GPU where there is one. Raises ValueError where there is none."""
    require(
        wanted != Device.cuda or gpus > 0,
        "device=cuda: torch sees no CUDA device here; device=cpu works",
    )
    if wanted == Device.auto:
        return Device.cuda if gpus else Device.cpu
    return wanted


def settle(
    config: TrainConfig,
    world_size: int | None,
    gpus: int,
    nodes: int = 1,
    ranks_a_node: int | None = None,
) -> TrainConfig:
    """Put device, backend and layout in the place of auto and -1, or refuse them.

    `world_size` is what a scheduler gave, None where the layout decides; then `ranks_a_node` is
    what -1 fills, None: every GPU, or two ranks on a laptop.
    """
    device = pick_device(config.device, gpus)
    backend = config.backend
    if backend == Backend.auto:
        backend = Backend.nccl if device == Device.cuda else Backend.gloo
    require(
        backend != Backend.nccl or device == Device.cuda,
        "backend=nccl: needs a CUDA device; backend=gloo works here",
    )
    if world_size is None:
        world_size = _wanted_ranks(config, (ranks_a_node or gpus or LAPTOP_RANKS) * nodes)
    layout = config.layout.resolve(world_size)
    if device == Device.cuda:
        require(
            world_size <= gpus * nodes or backend == Backend.gloo,
            f"layout needs {world_size} ranks, but there are {gpus} CUDA devices on each of "
            f"{nodes} node(s); with backend=gloo ranks share a device, which NCCL refuses",
        )
    _check_device(config, device)
    if config.impl == Impl.accelerate:
        _check_accelerate(layout, device)
    return replace(config, layout=layout, device=device, backend=backend)


def _check_device(config: TrainConfig, device: Device) -> None:
    """Refuse what this device lacks."""
    on_gpu = device == Device.cuda
    require(
        not config.compile or on_gpu or _has_compiler(),
        "compile=true: needs a C++ compiler (c++, g++ or clang++) on a CPU; compile=false works",
    )
    require(
        config.activation_checkpointing != ActivationCheckpointing.offload or on_gpu,
        "activation_checkpointing=offload: moves activations from a GPU to the host, and "
        "device=cpu is the host; full keeps as little",
    )
    require(
        config.precision != Precision.bf16 or not on_gpu or _gpu_has_bf16(),
        "precision=bf16: this GPU has no bf16 (compute capability 8.0 or newer has); fp16 works",
    )
    if config.precision == Precision.fp8:
        _check_float8(on_gpu)


def _check_float8(on_gpu: bool) -> None:
    """What torchao's products in fp8 need; the rest is in parallel/rules.py."""
    require(
        on_gpu and gpu_has_fp8(),
        "precision=fp8: needs a GPU with units for it (compute capability 8.9 or newer has); "
        "bf16 works",
    )
    require(
        is_installed("torchao"),
        "precision=fp8: the package is not installed; pip install torchao, into .venv where "
        "./launch.sh made one; bf16 works",
    )


def gpu_has_fp8() -> bool:
    import torch

    return torch.cuda.get_device_capability() >= (8, 9)


def _gpu_has_bf16() -> bool:
    import torch

    return torch.cuda.is_bf16_supported(including_emulation=False)


def _check_accelerate(layout: Layout, device: Device) -> None:
    """What Accelerate cannot do on this machine; the rest is in parallel/rules.py."""
    require(
        is_installed("accelerate"),
        "impl=accelerate: the package is not installed; pip install 'accelerate>=1.15,<2', or let "
        "./launch.sh strategy=accelerate make its .venv",
    )
    require(
        layout.dp_shard == 1 or device == Device.cuda,
        f"impl=accelerate: layout.dp_shard={layout.dp_shard} needs device=cuda: on CPU ranks "
        "Accelerate's FSDP becomes DDP without a word; impl=torch shards there",
    )


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _wanted_ranks(config: TrainConfig, there_are: int) -> int:
    """The product of the axes, with all ranks there are in the place of -1."""
    layout = config.layout
    if layout.open_axis is None:
        return layout.world_size
    fixed = replace(layout, **{layout.open_axis: 1}).world_size
    return max(there_are, fixed)


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def check_memory(config: TrainConfig, local_ranks: int) -> None:
    """Refuse what would only be found out by the machine running out of memory."""
    if config.device == Device.cuda:
        return
    limit = least_free()
    there_is = limit.free
    most = int(there_is // BYTES_OF_A_RANK)
    require(
        local_ranks <= most,
        f"layout needs {local_ranks} ranks here, but the {there_is / 1e9:.1f} GB of free memory "
        f"take {most} (the limit is {limit})",
    )
    layout = config.layout
    shards = layout.dp_shard * layout.cp if layout.dp_shard > 1 and config.zero_stage > 1 else 1
    parts = layout.pp * layout.tp * shards
    state = BYTES_OF_A_PARAMETER * config.model.parameters * local_ranks / parts
    require(
        state + local_ranks * BYTES_OF_A_RANK <= there_is,
        f"model: {config.model.parameters:,} parameters need {state / 1e9:,.1f} GB for weights, "
        f"gradients and optimizer on {local_ranks} ranks of {config.layout.label}, but "
        f"{there_is / 1e9:.1f} GB are free (the limit is {limit})",
    )


def facts() -> dict[str, object]:
    """What a ledger says about the machine."""
    return {
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    """The processor's name; platform.processor() is empty on most Linux machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
