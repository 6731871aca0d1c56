"""The plainest correct torch code for tensor and pipeline parallelism, as yardstick.py
has it for the data axes: what a reader of torch's tutorials writes. Two ranks, fp32.

Plain is not naive: q, k and v are apart, for a fused projection is wrong under a column-wise plan;
clip_grad_norm_ refuses parameters of several meshes, so norms are taken apart and added up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from experiments.figures.yardstick import Shape

MICRO_BATCHES = 4


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D = shape.d_model
        self.width = D // shape.n_head
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        h = self.norm1(x)
        q, k, v = (
            p(h).view(B, T, -1, self.width).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stage(nn.Module):
    """Some of the blocks, with the ends that belong to them."""

    def __init__(self, shape: Shape, blocks: range, first: bool, last: bool) -> None:
        super().__init__()
        V, D = shape.vocab_size, shape.d_model
        self.embedding = nn.Embedding(V, D) if first else None
        self.positions = nn.Embedding(shape.seq_len, D) if first else None
        self.blocks = nn.ModuleList(Block(shape) for _ in blocks)
        self.norm = nn.LayerNorm(D, bias=False) if last else None
        self.head = nn.Linear(D, V, bias=False) if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None and self.positions is not None:
            x = self.embedding(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_strategy(kind: str, shape: Shape, text: Path) -> Callable[[], float]:
    """One step of plain tp or plain pp, to be called again and again; it returns the loss."""
    torch.manual_seed(0)
    group = dist.new_group(backend="gloo")
    make = plain_tp if kind == "plain tp" else plain_pp
    model, forward_backward = make(shape, group)
    pipeline = group if kind == "plain pp" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    data = np.memmap(text, dtype=np.uint8, mode="r")
    places = torch.Generator().manual_seed(0)  # all ranks read the same batch

    def step() -> float:
        starts = torch.randint(len(data) - shape.seq_len, (shape.batch,), generator=places).tolist()
        windows = [data[i : i + shape.seq_len + 1].astype(np.int64) for i in starts]
        batch = torch.stack([torch.from_numpy(window) for window in windows])
        loss = forward_backward(batch[:, :-1], batch[:, 1:].contiguous())
        clip(model, 1.0, pipeline)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def clip(model: nn.Module, most: float, pipeline: dist.ProcessGroup | None) -> None:
    """Norms of DTensors and of plain tensors apart, squares added, over stages too."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    squares = torch.zeros(())
    for kind in (True, False):
        same = [g for g in gradients if isinstance(g, DTensor) == kind]
        if same:
            norm = torch.nn.utils.get_total_norm(same)
            squares += (norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    if pipeline is not None:
        dist.all_reduce(squares, group=pipeline)
    factor = torch.clamp(most / (squares.sqrt() + 1e-6), max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor)


def plain_tp(
    shape: Shape, group: dist.ProcessGroup
) -> tuple[nn.Module, Callable[[Tensor, Tensor], float]]:
    """parallelize_module with each style as it comes."""
    mesh = DeviceMesh.from_group(group, "cpu")
    model = Stage(shape, range(shape.n_layer), first=True, last=True)
    rows = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, {"embedding": rows})
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    for block in model.blocks:
        widen = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
        parallelize_module(
            block, mesh, {**widen, "out": RowwiseParallel(), "down": RowwiseParallel()}
        )
    assert model.embedding is not None and model.head is not None
    model.head.weight = model.embedding.weight

    def forward_backward(inputs: Tensor, targets: Tensor) -> float:
        loss = mean_loss(model(inputs), targets)
        loss.backward()
        return loss.item()

    return model, forward_backward


def plain_pp(
    shape: Shape, group: dist.ProcessGroup
) -> tuple[nn.Module, Callable[[Tensor, Tensor], float]]:
    """Half of the blocks on each rank and torch's 1F1B. The head is not tied: it is elsewhere."""
    rank, half = dist.get_rank(group), shape.n_layer // 2
    blocks = range(half) if rank == 0 else range(half, shape.n_layer)
    model = Stage(shape, blocks, first=rank == 0, last=rank == 1)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=mean_loss)

    def forward_backward(inputs: Tensor, targets: Tensor) -> float:
        if rank == 0:
            schedule.step(inputs)
            return 0.0
        losses: list[Tensor] = []
        schedule.step(target=targets, losses=losses)
        return torch.stack(losses).mean().item()

    return model, forward_backward
