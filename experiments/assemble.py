"""How a rank gets its place (device, process group, run folder), its trainer and its batches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from costs import communication
from costs.standing import CallCounter
from experiments import environment
from experiments.config import Backend, Device, Nonfinite, TrainConfig
from experiments.environment import Rank, rendezvous
from experiments.meeting import meeting
from experiments.resume import goes_on_in, run_dir
from experiments.run_folder import Launched, make_folder, write_config
from experiments.run_weights import is_base, weights_of
from experiments.verdict import path_of
from experiments.weights_file import check_init, reader
from minigpt.corpus import Corpus
from minigpt.data import Batches
from minigpt.optimizer import learning_rate, set_learning_rate
from parallel.mesh import Mesh, join
from parallel.parallelize import parallelize
from parallel.passes import MicroBatch
from parallel.step import Trainer
from parallel.training import trainer_of
from parallel.weights import take_weights

SKIPPED_IN_A_ROW = 5  # steps, with nonfinite=skip: more of them are no accident


def join_ranks(config: TrainConfig, rank: Rank) -> torch.device:
    """Pick this rank's device and enter the process group. A single rank needs no group."""
    device = torch.device("cpu")
    if config.device == Device.cuda:
        # over gloo ranks may share one; init: else DeviceMesh picks the device by LOCAL_RANK
        device = torch.device("cuda", rank.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.cuda.init()
    if rank.world_size > 1:
        os.environ.update(rendezvous(rank.nodes))
        backend = config.backend.value
        if config.backend == Backend.gloo and device.type == "cpu":
            backend = communication.BACKEND  # gloo, and every call is recorded
        store = agent_store(config.timeout_s) if environment.restarts() else None
        with meeting(rank):
            join(backend, config.timeout_s, rank.rank, rank.world_size, store)
    return device


def agent_store(timeout_s: float) -> dist.Store:
    """Where ranks that were started again meet: torchrun's own store, under names of their own.

    What is left there of the dead would otherwise be taken for the living (torch 2.13: 14 of 32
    restarts failed, and none of 28 did so).
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    name = f"restart {environment.restarts()} of {os.environ['TORCHELASTIC_RUN_ID']}"
    return dist.PrefixStore(name, store)


def agree_on_folder(config: TrainConfig, launched: Launched, folder: Path | None) -> Path:
    """Rank 0's run folder, made by it where no parent did; all ranks must have the same config.

    Nodes that were started with different command lines would otherwise train different models
    and average their gradients.
    """
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    first = not dist.is_initialized() or dist.get_rank() == 0
    if folder is None and first:
        chosen = run_dir(config.resume, config.run.dir)
        folder = make_folder(chosen, config.layout, again=goes_on_in(config.resume, chosen))
        write_config(folder, config, launched)
    if not dist.is_initialized():
        assert folder is not None
        return folder
    said: list = [None] * dist.get_world_size()
    dist.all_gather_object(said, (hashlib.sha256(text.encode()).hexdigest(), str(folder or "")))
    other = next((i for i, (digest, _) in enumerate(said) if digest != said[0][0]), None)
    if other is not None:
        raise ValueError(f"rank {other} was started with another configuration than rank 0")
    return folder or Path(said[0][1])


def count_messages(folder: Path) -> None:
    """From now on, note in the run's folder how far this rank has come (costs/standing.py)."""
    path = path_of(folder, dist.get_rank() if dist.is_initialized() else 0, "calls")
    if dist.is_initialized() and path.parent.is_dir():  # a folder that this node does not see
        communication.meter.standing = CallCounter(path, os.getpid())


def make_trainer(config: TrainConfig, mesh: Mesh) -> Trainer:
    """The model under its layout, with its optimiser: the same initial weights for every layout."""
    seed_dropout(config, mesh, 0)
    replica = parallelize(config.model, mesh, config.options, config.seed)
    if is_base(config):
        base, _ = weights_of(Path(str(config.resume)), "resume")
        take_weights(replica, base.__getitem__)
    if config.init:
        check_init(Path(config.init), config.model)
        take_weights(replica, reader(Path(config.init)))
    trainer = trainer_of(replica, config.optimizer, config.options, config.clip)
    trainer.may_skip = SKIPPED_IN_A_ROW if config.nonfinite == Nonfinite.skip else 0
    return trainer


def dropout_seed(config: TrainConfig, mesh: Mesh) -> int:
    """Each share of the batch and each stage has masks of its own.

    Along tp activations are copies, and so must their masks be; sequence parallelism cuts them, and
    then each rank needs its own.
    """
    apart = ["pp", "dp_replicate", "dp_shard", *(["tp"] if config.sequence_parallel else [])]
    place = 0
    for axis in apart:
        place = place * getattr(config.layout, axis) + mesh.index(axis)
    return config.seed + place


def seed_dropout(config: TrainConfig, mesh: Mesh, first: int) -> None:
    """Start this rank's random stream. A run that goes on from step `first` must not draw the
    masks of its beginning again."""
    torch.manual_seed((dropout_seed(config, mesh) + first * 0x9E3779B97F4A7C15) % 2**63)


def make_batches(config: TrainConfig, corpus: Corpus) -> Batches:
    """The global batches of a run, a pure function of its seed and the step."""
    size, data = config.batch_size, config.data
    return Batches(corpus, config.seq_len, size, config.seed, data.ragged)


def set_step(trainer: Trainer, config: TrainConfig, step: int) -> float:
    """Give the optimiser the learning rate of `step`; returns it."""
    lr = learning_rate(config.optimizer, step, config.steps)
    set_learning_rate(trainer.optimizer, lr)
    return lr


def share_of_batch(
    batches: Batches, step: int, config: TrainConfig, mesh: Mesh
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of global batch `step`, each (B, T) inputs and targets.

    Rows go to micro-batches first, then to ranks, so that every layout of the same global batch
    size trains on the same rows.
    """
    for start in first_rows(config, mesh):
        yield sent_to(mesh.device, batches.rows(step, start, config.micro_batch_size))


def first_rows(config: TrainConfig, mesh: Mesh) -> Iterator[int]:
    """Of each of this rank's micro-batches of a global batch, the number of its first row."""
    size, ranks = config.micro_batch_size, config.layout.data_parallel
    for i in range(config.gradient_accumulation_steps):
        yield (i * ranks + mesh.data_rank) * size


def validation_share(batches: Batches, config: TrainConfig, mesh: Mesh) -> Iterator[MicroBatch]:
    """This rank's part of the held-out windows, which are the same for every layout and however a
    global batch is cut."""
    for i in range(config.validation.batches):
        for start in first_rows(config, mesh):
            rows = batches.validation_rows(i, start, config.micro_batch_size)
            yield sent_to(mesh.device, rows)


def sent_to(device: torch.device, batch: MicroBatch) -> MicroBatch:
    """On its way: from pinned memory a GPU copies while the host goes on."""
    if device.type != "cuda":
        return batch
    inputs, targets = (x.pin_memory().to(device, non_blocking=True) for x in batch)
    return inputs, targets


def is_validation_step(config: TrainConfig, step: int) -> bool:
    """After every `validation.every` steps, and after the last."""
    if config.validation.batches == 0:
        return False
    every, done = config.validation.every, step + 1
    return done == config.steps or (every > 0 and done % every == 0)
