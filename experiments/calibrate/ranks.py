"""What each rank of ./launch.sh calibrate does, and how the ranks are had."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from costs import communication
from experiments.calibrate import device_times, message_times, operator_times
from experiments.calibrate.message_times import Timed as Message
from experiments.calibrate.models import PATIENCE_S, SHAPES, SMALLEST, WHOLE, config_of
from experiments.calibrate.operator_times import Steps
from experiments.calibrate.spread import Spread
from experiments.config import Device
from experiments.environment import Rank, physical_cores, rendezvous
from experiments.ranks import run_ranks
from parallel.mesh import join, leave


@dataclass(frozen=True)
class Alone:
    """What a rank found while the others did nothing."""

    times: device_times.Times
    # of a core a step of WHOLE, of a GPU's host an operator of SMALLEST; seconds
    step: Spread
    about: tuple[str, float]  # the device's name, and its bytes of memory


@dataclass(frozen=True)
class Found:
    """What one rank found while the others did the same, and rank 0 alone."""

    messages: list[Message]
    steps: dict[str, Steps]  # by name in SHAPES; none on a GPU
    alone: Alone | None


def on_this_machine(device: Device, ranks: int) -> list[Found]:
    """Start a rank a device, and let it measure."""
    backend = "nccl" if device == Device.cuda else None
    task = (device.value, ranks)
    return run_ranks(ranks, measure_rank, *task, timeout_s=PATIENCE_S, backend=backend)


def in_a_world(rank: Rank, device: Device) -> tuple[list[Found], int]:
    """Be one rank of those that torchrun or SLURM have started. All get what all found, and how
    many are on a node."""
    os.environ.update(rendezvous(rank.nodes))
    if device == Device.cuda:
        torch.cuda.set_device(rank.local_rank)
    backend = "nccl" if device == Device.cuda else communication.BACKEND
    join(backend, PATIENCE_S, rank.rank, rank.world_size)
    node_size = rank.world_size // rank.nodes
    mine = measure_rank(device.value, node_size)
    found: list = [None] * rank.world_size
    dist.all_gather_object(found, mine)
    leave()
    return found, node_size


def measure_rank(kind: str, node_size: int) -> Found:
    """What one rank finds; all call it at once."""
    torch.set_num_threads(1)
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    alone = measure_alone(device) if dist.get_rank() == 0 else None
    dist.barrier()
    messages = message_times.measure(device, node_size)
    steps = {}
    if kind == "cpu":
        steps = {name: operator_times.watch(config_of(name)) for name in SHAPES}
    return Found(messages, steps, alone)


def measure_alone(device: torch.device) -> Alone:
    """While the others wait for this rank, which they do asleep."""
    times = device_times.measure(device)
    if device.type == "cpu":
        about = (
            f"one core of {platform.machine()}",
            psutil.virtual_memory().total // physical_cores(),
        )
        return Alone(times, operator_times.step_alone(config_of(WHOLE)), about)
    about = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    return Alone(times, operator_times.launches(config_of(SMALLEST), device), about)
