"""Checkpoints of any layout, read by any other: torch.distributed.checkpoint over named tensors.

Each tensor is stored under the name that a single process gives it, and the optimizer's numbers
under the name of their weight. So a layout only says which piece of which tensor a rank has:

    model/NAME            a weight; a tied head once, as embedding.weight
    optimizer/NAME/KEY    what the optimizer keeps for it: step, exp_avg, ...
    random/RANK/DEVICE    the random state of a rank, for dropout; of use to the same layout only

Everything is a tensor: what torch would pickle, it would also run when it is loaded.
"""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel.checkpoint_index import read_index
from parallel.checkpoint_reader import read, reason_of
from parallel.mesh import Mesh
from parallel.moments import moments_of, owned, take_moments
from parallel.passes import NoMarks
from parallel.replica import Replica
from parallel.step import Trainer

# --- the state by name


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's tensors by their names in the checkpoint; not copied. Every rank calls it."""
    replica = trainer.replica
    named = [(n, p) for n, p in replica.named_parameters() if n not in replica.copies]
    state: dict[str, Tensor] = {f"model/{name}": p.detach() for name, p in named}
    moments = moments_of(trainer.optimizer)
    for name, parameter in named:
        for key, value in moments.get(parameter, {}).items():
            state[f"optimizer/{name}/{key}"] = value
    for device, numbers in random_states(replica.mesh).items():
        state[f"random/{replica.mesh.rank}/{device}"] = numbers
    return state


def random_states(mesh: Mesh) -> dict[str, Tensor]:
    """The state of each random stream that this rank's training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return states


def restore(trainer: Trainer, folder: Path, same_layout: bool) -> None:
    """Fill weights, optimizer and, for the same layout, random states from a checked checkpoint.

    Every rank calls it, and reads what it needs. The files must have been checked before: this
    trusts their bytes, though it runs none of them. Raises Damaged.
    """
    replica, index = trainer.replica, read_index(folder)
    settle_buckets(replica)
    moments = _moments_in(index)
    wanted: dict[str, Tensor] = {}
    again: list[tuple[Tensor, Tensor]] = []  # a rank with both ends of a V has a tied weight twice

    def want(name: str, tensor: Tensor) -> None:
        if name in wanted:
            again.append((tensor, wanted[name]))
        else:
            wanted[name] = tensor

    named: dict[Tensor, str] = {p: name for name, p in replica.named_parameters()}
    for parameter, name in named.items():
        want(f"model/{replica.stored_name(name)}", parameter.detach())
    kept: dict[Tensor, dict[str, Tensor]] = {}
    for parameter in owned(trainer.optimizer):
        stored = replica.stored_name(named[parameter])
        kept[parameter] = {
            key: _like(parameter, about) for key, about in moments.get(stored, {}).items()
        }
        for key, value in kept[parameter].items():
            want(f"optimizer/{stored}/{key}", value)
    states = random_states(replica.mesh) if same_layout else {}
    for device, numbers in states.items():
        want(f"random/{replica.mesh.rank}/{device}", numbers)
    read(folder, wanted)
    for tensor, source in again:
        tensor.copy_(source)
    take_moments(trainer.optimizer, kept)
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], replica.mesh.device)


def settle_buckets(replica: Replica) -> None:
    """Let DDP order its buckets as they are after a first step, by a backward of zeros.

    A ring adds the ranks' numbers in an order that depends on their place in the bucket, so from
    four ranks on the first step would else differ in the last bit from that of the run before.
    """
    if isinstance(getattr(replica.passes, "call", None), DistributedDataParallel):
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=replica.mesh.device)
        replica.passes.train([(tokens, tokens)], 0.0, NoMarks())
        for parameter in replica.parameters():
            parameter.grad = None


def _moments_in(index: Metadata) -> dict[str, dict[str, TensorStorageMetadata]]:
    """What is stored of the optimizer: weight's name -> key -> its record."""
    found: dict[str, dict[str, TensorStorageMetadata]] = {}
    for name, about in index.state_dict_metadata.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            weight, _, key = rest.rpartition("/")
            found.setdefault(weight, {})[key] = about  # type: ignore[assignment]
    return found


def _like(parameter: Tensor, about: TensorStorageMetadata) -> Tensor:
    """Room for one of the optimizer's tensors: a number, or as the weight is laid out."""
    dtype = about.properties.dtype
    if about.size == parameter.shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.zeros(about.size, dtype=dtype, device=parameter.device)


# --- writing


class Writer:
    """Writes checkpoints, now or beside the training that goes on.

    Its messages go over a gloo group of its own: one at work beside the steps must not be mixed up
    with theirs (torch 2.13 crashes or hangs), and is not to be counted as theirs.
    """

    def __init__(self, mesh: Mesh, asynchronous: bool) -> None:
        self.group = dist.new_group(backend="gloo") if mesh.axes_mesh else None
        self.first, self.asynchronous = mesh.rank == 0, asynchronous
        self.thread: threading.Thread | None = None
        self.failed: BaseException | None = None

    def write(self, state: dict[str, Tensor], folder: Path, publish: Callable[[], object]) -> None:
        """Write this rank's part into `folder`; then, when all have, rank 0 calls `publish`.

        Raises OSError, alike on all ranks, where a rank could not write. In the background it is
        raised by the next call, of `write` or of `wait`.
        """
        self.wait()
        if not self.asynchronous:
            self._write(state, folder, publish)
            return
        copies = {name: copied(tensor) for name, tensor in state.items()}
        self.thread = threading.Thread(target=self._guarded, args=(copies, folder, publish))
        self.thread.start()

    def wait(self) -> None:
        """Until the one in the background is published. Raises what it raised."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.failed:
            failed, self.failed = self.failed, None
            raise failed

    def _guarded(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:
            self.failed = error

    def _write(self, state: dict[str, Tensor], folder: Path, publish: Callable[[], object]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a single process is alone
                dcp.save(
                    dict(state),
                    storage_writer=FileSystemWriter(str(folder)),
                    process_group=self.group,
                    no_dist=self.group is None,
                )
        except CheckpointException as error:
            reason = f"{reason_of(error)} ({free_mb(folder):,.1f} MB free)"
            raise OSError(f"{folder} could not be written: {reason}") from error
        said: list[str | None] = [None]
        if self.first:
            try:
                publish()
            except OSError as error:
                said = [f"{folder} could not be published: {error.strerror or error}"]
        if self.group is not None:
            dist.broadcast_object_list(said, group=self.group, group_src=0)
        if said[0]:
            raise OSError(said[0])


def free_mb(folder: Path) -> float:
    """Room on its disk: of a full one torch says "unexpected pos 704 vs 598", and no more."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free / 1e6


def copied(tensor: Tensor) -> Tensor:
    """On the host, so that the next step may change the original."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    part = tensor.to_local().detach()
    if part.device.type != "cpu":
        return tensor.detach().cpu()
    same = tensor.device_mesh, tensor.placements
    return DTensor.from_local(
        part.clone(), *same, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
