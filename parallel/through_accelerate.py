"""The same model through Hugging Face Accelerate: what its library does, and what stays ours.

Accelerate takes the process group that is there, wraps the model (DDP for dp_replicate, FSDP2 for
dp_shard) and runs the backward pass. Batches, the correction for token counts, clipping, the loss
and the optimizer are the project's own, so that losses and ledger compare with every other layout.
The optimizer is not wrapped: Accelerate would add a loss scaler, and skip the steps that it takes
for accumulation; the project does both.

The FSDP2 path has never run on GPUs: on CPU ranks Accelerate makes DDP of it without a word, so a
test tells it that they are GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch import Tensor, nn

from minigpt.model import GPT
from parallel.layout import Options, Precision
from parallel.mesh import Mesh
from parallel.passes import Marks, MicroBatch, Passes, loss_and_count
from parallel.precision import sharding_policy

READS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")  # beginnings of its own variables
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class ThroughAccelerate(Passes):
    """Each micro-batch forward, then backward, as a loop that is written for Accelerate has it."""

    accelerator: Accelerator
    model: nn.Module  # prepared: its forward casts by itself, and gives logits in fp32

    def train(self, micro_batches: Sequence[MicroBatch], factor: float, marks: Marks) -> Tensor:
        totals = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for i, (inputs, targets) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with marks.action("forward", 0, i):
                    loss, count = loss_and_count(self.model(inputs), targets)
                totals += torch.stack((loss.detach().double(), count.double()))
                scaled = loss * factor
                with marks.action("backward", 0, i), marks.backward(scaled):
                    self.accelerator.backward(scaled)
        return totals

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss, count = loss_and_count(self.model(inputs), targets)
        return torch.stack((loss.double(), count.double()))


def apply_accelerate(
    model: GPT, mesh: Mesh, options: Options, fill: Callable[[], None]
) -> ThroughAccelerate:
    """Prepare `model`, which is still on the meta device; `fill` gives it memory and weights."""
    accelerator = make_accelerator(model, mesh, options)
    if mesh.layout.dp_shard > 1:
        # It wants an optimizer, to point it at the shards; the real one is made from the shards.
        prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        fill()  # after the cut, so that no rank ever holds the whole model
    else:
        fill()
        prepared = accelerator.prepare(model)
    return ThroughAccelerate(accelerator, prepared)


def make_accelerator(model: GPT, mesh: Mesh, options: Options) -> Accelerator:
    """An Accelerator on the process group of `mesh`, set up by the project's options alone."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may train several models
    sharded = mesh.layout.dp_shard > 1
    with only_our_variables(mesh):
        accelerator = Accelerator(
            cpu=mesh.device.type == "cpu",
            mixed_precision="no"
            if options.precision == Precision.fp32
            else options.precision.value,
            # not gradient_accumulation_steps: the loss is divided before it gets here
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            fsdp_plugin=fsdp_plugin(model, options) if sharded else None,
            parallelism_config=mesh_sizes(mesh) if sharded else None,
            # as parallel/ddp.py has it: gradients exist once
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    got = (accelerator.num_processes, accelerator.device.type, accelerator.is_fsdp2)
    if got != (mesh.layout.world_size, mesh.device.type, sharded):
        raise RuntimeError(
            f"Accelerate has set up {accelerator.distributed_type.value} with {got[0]} ranks on "
            f"{got[1]}, not {mesh.layout.label} on {mesh.device.type}"
        )
    return accelerator


def fsdp_plugin(model: GPT, options: Options) -> FullyShardedDataParallelPlugin:
    """FSDP2 with the settings of parallel/fsdp.py: block by block, gradients summed in fp32."""
    block = next(iter(model.blocks.values()))
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=options.zero_stage == 3,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(block).__name__],
        mixed_precision_policy=sharding_policy(options.precision),
        activation_checkpointing=False,  # the project's own is on the blocks already
    )


def mesh_sizes(mesh: Mesh) -> ParallelismConfig:
    """The layout in Accelerate's words, of which it makes a mesh of its own."""
    layout = mesh.layout
    return ParallelismConfig(dp_replicate_size=layout.dp_replicate, dp_shard_size=layout.dp_shard)


@contextmanager
def only_our_variables(mesh: Mesh) -> Iterator[None]:
    """Hide what `accelerate launch` and `accelerate config` leave: some of it beats arguments.

    It learns this rank's place from torchrun's variables, which SLURM does not set; a single rank
    must have none, or Accelerate makes a process group of one. All is put back afterwards.
    """

    def read() -> dict[str, str]:
        return {k: v for k, v in os.environ.items() if k.startswith(READS) or k in PLACE}

    saved = read()
    for name in saved:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # where unset, it sets threads
    if mesh.axes_mesh:
        size = str(dist.get_world_size())
        # LOCAL_WORLD_SIZE: a smaller one makes it ask for an address, though the group is there
        os.environ.update(RANK=str(mesh.rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
    try:
        yield
    finally:
        for name in read():
            del os.environ[name]
        os.environ.update(saved)
