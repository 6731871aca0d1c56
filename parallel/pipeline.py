"""Pipeline parallelism: the depth is cut into stages, and micro-batches flow through them.

Bytes a step and boundary: each micro-batch's activations forward, B T D, and their gradients back.
The order of work is torch's (torch.distributed.pipelining): GPipe (Huang et al. 2019), 1F1B and
interleaved (Narayanan et al. 2021), breadth-first (Lamy-Poirier 2023), zero bubble and ZBV (Qi et
al. 2023, 2024), DualPipeV (DeepSeek-AI 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import get_schedule_class

from minigpt.config import ModelConfig
from minigpt.model import GPT
from parallel.gradients import align_gradients, local
from parallel.layout import Options
from parallel.marked_stage import MarkedStage
from parallel.mesh import Mesh
from parallel.passes import (
    Context,
    Marks,
    MicroBatch,
    NoMarks,
    Passes,
    loss_and_count,
    valid_tokens,
)
from parallel.stages import split_layers

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv_zero_bubble": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


def split_model(config: ModelConfig, mesh: Mesh, options: Options) -> dict[int, GPT]:
    """This rank's stages by their number, on the meta device."""
    ranks, pipeline = mesh.layout.pp, options.pipeline
    count = ranks * pipeline.local_stages
    split = pipeline.split or split_layers(config, count, options.seq_len)
    ends = [0]
    for blocks in split:
        ends.append(ends[-1] + blocks)
    spans = list(pairwise(ends))
    mine = pipeline.stages_of(mesh.index("pp"), ranks)
    return {i: stage_of(config, *spans[i], i == 0, i == count - 1) for i in mine}


def stage_of(config: ModelConfig, start: int, end: int, first: bool, last: bool) -> GPT:
    """Blocks start ... end - 1 under their global numbers; None for the ends that it lacks."""
    with torch.device("meta"):
        stage = GPT(config)
    for number in list(stage.blocks):
        if not start <= int(number) < end:
            del stage.blocks[number]
    if not first:
        stage.embedding = stage.positions = None
    if not last:
        stage.norm = stage.head = None
    return stage


class Pipeline(Passes):
    """Runs this rank's stages in the order of a schedule."""

    def __init__(
        self,
        stages: dict[int, GPT],
        mesh: Mesh,
        options: Options,
        activation: tuple[torch.dtype, tuple[int, ...]],
        autocast: Context,
        loss_context: Context,
    ) -> None:
        """`activation`: dtype and shape of what one stage sends to the next, on this rank."""
        self.stages, self.mesh, self.pipeline = stages, mesh, options.pipeline
        self.count = mesh.layout.pp * options.pipeline.local_stages
        self.dtype, self.shape = activation
        self.loss_context = loss_context
        self.sums: list[Tensor] = []  # one loss a micro-batch, on the rank of the last stage
        self.factor = 1.0
        self.marks: Marks = NoMarks()
        self.first, self.last = 0 in stages, self.count - 1 in stages
        for stage in stages.values():
            _autocast_forward(stage, autocast)
        self.tied = TiedHead(stages, mesh, self.pipeline.rank_of(self.count - 1, mesh.layout.pp))
        self.schedule = self._make_schedule(options.micro_batches)

    def train(self, micro_batches: Sequence[MicroBatch], factor: float, marks: Marks) -> Tensor:
        inputs = torch.cat([inputs for inputs, _ in micro_batches])
        targets = torch.cat([targets for _, targets in micro_batches])
        self.factor, self.marks = factor, marks
        self.sums.clear()
        given: dict[str, Any] = {"target": targets} if self.last else {}
        with self.loss_context():
            self.schedule.step(*([inputs] if self.first else []), return_outputs=False, **given)
        self.tied.add_gradients()
        return self._totals(targets)

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One micro-batch through all stages, forward only, in order."""
        x = inputs
        self.sums.clear()
        ranks = [self.pipeline.rank_of(i, self.mesh.layout.pp) for i in range(self.count)]
        group = self.mesh.group("pp")
        for number, stage in self.stages.items():
            if number > 0 and number - 1 not in self.stages:
                x = x.new_empty((len(inputs), *self.shape[1:]), dtype=self.dtype)
                dist.recv(x, group=group, group_src=ranks[number - 1])
            x = stage(x)
            if number < self.count - 1 and number + 1 not in self.stages:
                dist.send(x.contiguous(), group=group, group_dst=ranks[number + 1])
        if self.last:
            with self.loss_context():
                self.sums.append(loss_and_count(x, targets)[0].detach())
        return self._totals(targets)

    def _totals(self, targets: Tensor) -> Tensor:
        totals = torch.zeros(2, dtype=torch.float64, device=targets.device)
        if self.last:
            totals[0] = torch.stack(self.sums).double().sum()
            totals[1] = valid_tokens(targets)
        return totals

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What a schedule calls at the end of each micro-batch's forward."""
        with self.marks.action("loss", self.count - 1, len(self.sums)):
            loss, _ = loss_and_count(logits, targets)
        self.sums.append(loss.detach())
        return loss * self.factor

    def _make_schedule(self, micro_batches: int) -> Any:
        """torch's, over stages that are told what they take and give: it need not try that out."""
        between = torch.empty(self.shape, dtype=self.dtype, device="meta", requires_grad=True)
        tokens = torch.empty(self.shape[:2], dtype=torch.int64, device="meta")
        logits = torch.empty((*self.shape[:2], 1), device="meta", requires_grad=True)
        parts = [
            MarkedStage(
                lambda: self.marks,
                stage,
                number,
                self.count,
                self.mesh.device,
                input_args=tokens if number == 0 else between,
                output_args=logits if number == self.count - 1 else between,
                group=self.mesh.group("pp"),
            )
            for number, stage in self.stages.items()
        ]
        kind = get_schedule_class(SCHEDULES[self.pipeline.schedule.value])
        one = self.pipeline.one_stage_a_rank
        # gradients are of sums: nothing is to be divided by the number of micro-batches
        return kind(
            parts[0] if one else parts,
            n_microbatches=micro_batches,
            loss_fn=self._loss,
            scale_grads=False,
        )


def _autocast_forward(stage: nn.Module, autocast: Context) -> None:
    """Autocast inside the stage: a schedule's own context would be around backward too."""
    forward = stage.forward

    def cast_forward(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return forward(*args, **kwargs)

    stage.forward = cast_forward


class TiedHead:
    """A tied head whose embedding lies on another stage: two copies of one weight.

    They start alike, and stay alike because each gets the sum of both gradients.
    Bytes a step: one all_reduce of V D between first and last stage (Narayanan et al. 2021).
    """

    def __init__(self, stages: dict[int, GPT], mesh: Mesh, last_rank: int) -> None:
        self.weights: list[nn.Parameter] = []
        self.group: dist.ProcessGroup | None = None
        if not next(iter(stages.values())).config.tied:
            return
        for stage in stages.values():
            for module in (stage.embedding, stage.head):
                if module is not None and all(module.weight is not w for w in self.weights):
                    self.weights.append(module.weight)  # type: ignore[arg-type]
        if last_rank != 0:
            self.group = _ends_of_pipeline(mesh, last_rank)

    def add_gradients(self) -> None:
        """Give every copy the sum of all copies' gradients."""
        align_gradients(self.weights)
        gradients = [local(w.grad) for w in self.weights if w.grad is not None]
        if not gradients:
            return
        total = gradients[0]
        for other in gradients[1:]:  # a V-shaped pipeline has both on one rank
            total += other
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        for other in gradients[1:]:
            other.copy_(total)


def _ends_of_pipeline(mesh: Mesh, last_rank: int) -> dist.ProcessGroup | None:
    """The group of this rank's pipeline's first and last rank; None on the ranks between."""
    assert mesh.axes_mesh is not None
    pipelines = mesh.axes_mesh.mesh.movedim(0, -1).reshape(-1, mesh.layout.pp)
    own = None
    for ranks in pipelines.tolist():
        pair = [ranks[0], ranks[last_rank]]
        # a group must be made by all ranks, members or not; it is described as one of the axis
        group = dist.new_group(pair, group_desc="mesh_pp")
        if dist.get_rank() in pair:
            own = group
    return own
