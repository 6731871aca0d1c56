"""The plainest correct training loops, which the benchmark holds the project's own step to.

nanoGPT's way (Karpathy 2022, model.py and train.py): a fused q, k, v projection, the loss inside
forward, torch's sdpa, AdamW, clipping, batches from a memory map; for two ranks torch's wrappers
with nothing set. Shapes as in minigpt/model.py. Nothing else in the project uses this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_


@dataclass(frozen=True)
class Shape:
    """What is trained; `batch` sequences in all, whatever the ranks."""

    n_layer: int
    n_head: int
    d_model: int
    seq_len: int
    batch: int
    vocab_size: int = 256


class PlainBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        D = shape.d_model
        self.n_head = shape.n_head
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        heads = self.qkv(self.norm1(x)).split(D, dim=2)
        q, k, v = (h.view(B, T, self.n_head, D // self.n_head).transpose(1, 2) for h in heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.seq_len, shape.d_model)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.n_layer))
        self.norm = nn.LayerNorm(shape.d_model, bias=False)
        self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def plain_loop(shape: Shape, text: Path, wrapper: str | None = None) -> Callable[[], float]:
    """One step of the plain loop, to be called again and again; it returns the loss.

    `wrapper` is None, ddp or fsdp: torch's own over a plain gloo group of all ranks.
    """
    torch.manual_seed(0)
    ranks = dist.get_world_size() if wrapper else 1
    model: nn.Module = PlainGPT(shape)
    if wrapper:
        group = dist.new_group(backend="gloo")
        if wrapper == "ddp":
            model = DistributedDataParallel(model, process_group=group)
        else:
            mesh = DeviceMesh.from_group(group, "cpu")
            for block in model.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    data = np.memmap(text, dtype=np.uint8, mode="r")

    def step() -> float:
        places = torch.randint(len(data) - shape.seq_len, (shape.batch // ranks,)).tolist()
        windows = [data[i : i + shape.seq_len + 1].astype(np.int64) for i in places]
        batch = torch.stack([torch.from_numpy(window) for window in windows])
        loss = model(batch[:, :-1], batch[:, 1:].contiguous())
        learn(loss, model, optimizer)
        return loss.item()

    return step


def learn(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def plain_gpu_loop(shape: Shape, device: torch.device, compiled: bool) -> Callable[[], Tensor]:
    """nanoGPT's step on one GPU (train.py): autocast to bf16, the whole model compiled, fused
    AdamW, pinned batches. It returns the loss on the device; the host does not wait for it.

    Batches are random tokens: reading text is no part of what is compared. On a core a test's.
    """
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    model: Any = PlainGPT(shape).to(device)
    if compiled:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu
    )
    tokens = torch.randint(shape.vocab_size, (1_000_000,))

    def step() -> Tensor:
        places = torch.randint(len(tokens) - shape.seq_len, (shape.batch,)).tolist()
        batch = torch.stack([tokens[i : i + shape.seq_len + 1] for i in places])
        if on_gpu:
            batch = batch.pin_memory().to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(batch[:, :-1], batch[:, 1:].contiguous())
        learn(loss, model, optimizer)
        return loss.detach()

    return step
