"""./launch.sh calibrate [to=FILE.yaml] [device=auto|cpu|cuda]: this machine as a cluster profile.

Two minutes at most. Without `to` the YAML is printed; with it there are also FILE.png, what was
measured beside the profile's curves, and FILE.csv, the same as numbers with their quartiles.
Between nodes: start it on all of them, a rank a device, as torchrun or srun do for training
(docs/nodes.md).

A device is a GPU, or one core of the processor, as the launcher starts ranks on it. One measures
alone (device_times.py), and then all at the same time, for they share the memory, and maybe more. A
core's operators are timed where they run, in training steps of small models (operator_times.py),
messages one by one (message_times.py). The few numbers that the closed forms take, which know no
operator by its name, follow from the same steps. What a GPU's profile has is in gpu.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments import environment
from experiments.arguments import key_values
from experiments.calibrate.profile import Calibration, yaml_of
from experiments.config import Device as Kind
from experiments.process import end
from experiments.refused import Refused
from simulator.hardware import Cluster

MOST_RANKS = 8  # cores that are measured at the same time


def command(argv: list[str]) -> int:
    """Measure, and print or write the profile. Of a world's ranks the first one does."""
    status = calibrate(argv)
    if environment.given_rank():
        end(status)  # as every rank does: torch may abort in an ordinary exit
    return status


def calibrate(argv: list[str]) -> int:
    """See command. Raises Refused."""
    _, given = key_values("calibrate", "to=FILE and device=auto, cpu or cuda", argv)
    path = Path(given["to"]) if "to" in given else None
    if path and path.suffix != ".yaml":
        raise Refused(f"to={path}: must end with .yaml, as every cluster's file does")
    if path and not path.parent.is_dir():
        raise Refused(f"to={path}: no such folder as {path.parent}")
    name = given.get("device", "auto")
    if name not in list(Kind):
        raise Refused(f"device={name}: must be auto, cpu or cuda")
    found = measure(Kind(name))
    if found is None:
        return 0
    if path is None:
        print(yaml_of(found.cluster), end="")
        return 0
    from experiments.calibrate.picture import draw, write  # matplotlib takes a second

    path.write_text(yaml_of(replace(found.cluster, name=path.stem)))  # as a cluster's file must
    write(found.points, path.with_suffix(".csv"))
    draw(found, path.with_suffix(".png"))
    print(f"wrote {path}, and {path.stem}.png and {path.stem}.csv beside it")
    return 0


def measured() -> Cluster:
    """This machine's cores as a cluster."""
    found = measure(Kind.cpu)
    assert found
    return found.cluster


def measure(wanted: Kind) -> Calibration | None:
    """This machine's devices, or those of all nodes where torchrun or SLURM have started a rank on
    each; None on the ranks that are not the first. Raises ValueError for a device that is not
    there."""
    gpus = environment.gpu_count()
    device = environment.pick_device(wanted, gpus)
    rank = environment.given_rank()
    from experiments.calibrate import ranks  # it and what follows import torch

    if rank is not None and rank.world_size > 1:
        found, node_size = ranks.in_a_world(rank, device)
        if rank.rank:
            return None
    else:
        node_size = (
            gpus if device == Kind.cuda else max(2, min(environment.physical_cores(), MOST_RANKS))
        )
        found = ranks.on_this_machine(device, node_size)
    if device == Kind.cuda:
        from experiments.calibrate.gpu import calibration_of_gpus

        return calibration_of_gpus(found, node_size)
    from experiments.calibrate.cores import calibration_of_cores

    return calibration_of_cores(found, node_size)
