"""What tests run on real ranks: functions of a module, so that a rank can find them by name."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from costs.communication import recorded
from costs.messages import Key, Row, control_of, rows_of
from experiments.assemble import make_batches, make_trainer, share_of_batch
from experiments.config import TrainConfig
from experiments.figures.parity import mesh_of
from experiments.figures.short_runs import run_of
from experiments.metering import Meters
from experiments.train import train_step
from minigpt.corpus import prepare
from parallel.step import Trainer, evaluate
from parallel.weights import full_weights
from simulator.trace import no_collector


def make(config: TrainConfig) -> tuple[Trainer, list]:
    """A trainer and its micro-batches of step 0."""
    torch.set_num_threads(1)
    mesh = mesh_of(config.layout)
    batches = make_batches(config, prepare(config.data))
    return make_trainer(config, mesh), list(share_of_batch(batches, 0, config, mesh))


def payloads(configs: list[TrainConfig]) -> list[dict[Key, int]]:
    """Payload bytes of a step of each run, by collective, axis and dtype."""
    return [{key: size for key, (_, size) in sent.items()} for sent in messages(configs)]


def messages(configs: list[TrainConfig]) -> list[dict[Key, tuple[int, int]]]:
    """Calls and payload bytes of a step of each run, by collective, axis and dtype: of the third
    where DDP must agree on its buckets, which it does in the second."""
    measured = []
    for config in configs:
        trainer, micro_batches = make(config)
        buckets = config.layout.dp_replicate > 1 or config.zero_stage == 1
        for _ in range(2 if buckets else 0):
            trainer.step(micro_batches)
        with recorded() as meter:
            trainer.step(micro_batches)
        rows = rows_of(meter.calls, trainer.replica.mesh.axis_of_ranks())
        calls, sent = Counter[Key](), Counter[Key]()
        for row in rows:  # an axis may have groups of several sizes
            key = row["collective"], row["axis"], row["dtype"]
            calls[key] += row["calls"]
            sent[key] += row["payload_bytes"]
        measured.append({key: (calls[key], sent[key]) for key in sent})
    return measured


def every_collective(numbers: int) -> list[Row]:
    """Each kind of message once, with a payload of `numbers` fp32 by NCCL's convention."""
    n, rank = dist.get_world_size(), dist.get_rank()
    whole, part = torch.ones(numbers), torch.ones(numbers // n)
    parts = list(whole.chunk(n))
    with recorded() as meter:
        dist.all_reduce(whole)
        dist.broadcast(whole, 0)
        dist.reduce(whole, 0)
        dist.all_gather(parts, part)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter(part, parts)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_to_all_single(torch.empty(numbers), whole)
        dist.gather(part, parts if rank == 0 else None, 0)
        dist.scatter(part, parts if rank == 0 else None, 0)
        other = (rank + 1) % n
        work = dist.isend(whole, other) if rank % 2 == 0 else dist.irecv(whole, (rank - 1) % n)
        assert work is not None
        work.wait()
        dist.barrier()
        done = dist.all_reduce(whole, async_op=True)
        assert done is not None
        done.wait()
    return rows_of(meter.calls, {frozenset(range(n)): "world"})


def memory_bytes(configs: list[TrainConfig]) -> list[dict[str, int]]:
    """No more than `memory_bytes` of that. Without Python's garbage collector: now and then one of
    tp4's ranks would reach its peak at another moment (5 of 24, where it ran often)."""
    found = []
    for config in configs:
        with no_collector():
            meter = run_of(config).followed
        assert meter is not None
        found.append(meter.result())
    return found


def rows_and_flops(configs: list[TrainConfig]) -> list[tuple[list[Row], list[Row], int | None]]:
    """This rank's rows of the first and of the third step of each run, and the flops of a step."""
    found = []
    for config in configs:
        trainer, _ = make(config)
        meters, batches = Meters(config, trainer), make_batches(config, prepare(config.data))
        rows = []
        for step in range(3):
            train_step(step, config, trainer, batches, meters)
            assert meters.last is not None
            rows.append(rows_of(meters.last.calls, trainer.replica.mesh.axis_of_ranks()))
        found.append((rows[0], rows[2], meters.hardware_flops))
    return found


def weights_and_validation(configs: list[TrainConfig]) -> list[tuple[dict, float]]:
    """Initial weights, whole, and a held-out loss."""
    results = []
    for config in configs:
        trainer, micro_batches = make(config)
        weights = full_weights(trainer.replica)
        results.append((weights, evaluate(trainer.replica, micro_batches)))
    return results


def random_numbers(config: TrainConfig) -> list[float]:
    """What dropout would draw on this rank once its trainer is made."""
    make(config)
    return torch.rand(4).tolist()


def control_traffic() -> tuple[dict[str, tuple[int, int]], list[Row]]:
    """Calls and bytes of a barrier, and of two objects beside a tensor; and the rows of those."""
    with recorded() as meter:
        dist.barrier()
    barrier = control_of(meter.calls)
    with recorded() as meter:
        objects: list = [None] * dist.get_world_size()
        dist.all_gather_object(objects, "x" * 100)
        dist.broadcast_object_list([{"a key": "y" * 100}], 0)
        dist.all_reduce(torch.ones(3))
    said = control_of(meter.calls)
    rows = rows_of(meter.calls, {})
    counts = {"barrier": barrier, "objects": said}
    return {name: (c.calls, c.payload_bytes) for name, c in counts.items()}, rows
