"""What test_context_parallel.py runs on each rank: the ring beside the same on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from costs.communication import recorded
from costs.messages import Row, rows_of
from minigpt.attention import plain
from minigpt.config import ModelConfig
from minigpt.model import GPT, token_loss
from parallel.activation_checkpointing import apply_activation_checkpointing
from parallel.context_parallel import apply_context_parallel, local_part, ring_attention
from parallel.layout import ActivationCheckpointing, Precision
from parallel.precision import autocast

CPU = torch.device("cpu")


def each(function: Callable, cases: list[tuple]) -> list[Any]:
    """One start of the ranks for all cases: it takes longer than they do."""
    torch.set_num_threads(1)
    return [function(*case) for case in cases]


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def part_of(x: Tensor, dim: int) -> Tensor:
    return local_part(x, dist.get_rank(), dist.get_world_size(), dim)


def error(ours: Tensor, wanted: Tensor) -> float:
    """The largest absolute difference; never NaN, which max() in Python would lose."""
    assert ours.shape == wanted.shape and ours.isfinite().all() and wanted.isfinite().all()
    return float((ours.detach().float() - wanted.detach().float()).abs().max())


def attention_errors(
    heads: int, kv_heads: int, length: int, dtype: torch.dtype
) -> dict[str, float]:
    """Of the output here and of the three gradients here, against whole attention in fp32."""
    torch.manual_seed(0)
    shapes = [(2, n, length, 16) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, grad = (torch.randn(shape).to(dtype) for shape in shapes)
    whole = [x.to(torch.float32, copy=True).requires_grad_() for x in qkv]
    parts = [part_of(x, 2).requires_grad_() for x in qkv]
    wanted = plain(*whole)
    wanted.backward(grad.float())
    ours = ring_attention(*parts, world())
    ours.backward(part_of(grad, 2))
    assert ours.dtype == dtype
    errors = {"out": error(ours, part_of(wanted, 2))}
    for name, part, one in zip("qkv", parts, whole, strict=True):
        assert part.grad is not None and part.grad.dtype == dtype and one.grad is not None
        errors[name] = error(part.grad, part_of(one.grad, 2))
    return errors


def attention_errors_of_pair(heads: int, kv_heads: int, length: int) -> dict[str, float]:
    """The same where the ring is one of two pairs of ranks, not the whole world."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = pairs[dist.get_rank() % 2]
    rank = dist.get_rank(group)
    torch.manual_seed(dist.get_rank() % 2)
    q, *kv = (torch.randn(2, n, length, 16) for n in (heads, kv_heads, kv_heads))
    ours = ring_attention(*(local_part(x, rank, 2, 2) for x in (q, *kv)), group)
    return {"out": error(ours, local_part(plain(q, *kv), rank, 2, 2))}


def make(config: ModelConfig) -> GPT:
    model = GPT(config)
    model.init_weights(seed=0)
    return model


def model_errors(
    config: ModelConfig, length: int, mode: ActivationCheckpointing, precision: Precision
) -> dict[str, float]:
    """Of the logits of this part, and of the gradients added up over ranks."""
    whole, ours = make(config), make(config)
    apply_context_parallel(ours, world())
    apply_activation_checkpointing(ours.blocks, mode, dropout=False)
    torch.manual_seed(1)
    tokens, targets = torch.randint(config.vocab_size, (2, 2, length))
    with autocast(precision, CPU):
        wanted, logits = whole(tokens), ours(part_of(tokens, 1))
    token_loss(wanted, targets)[0].backward()
    token_loss(logits, part_of(targets, 1))[0].backward()
    errors = {"logits": error(logits, part_of(wanted, 1))}
    for (name, one), part in zip(whole.named_parameters(), ours.parameters(), strict=True):
        assert one.grad is not None and part.grad is not None
        dist.all_reduce(part.grad)
        errors[name] = error(part.grad, one.grad) / max(1.0, float(one.grad.abs().max()))
    return errors


def model_rows(
    config: ModelConfig, length: int, mode: ActivationCheckpointing, precision: Precision
) -> tuple[list[Row], list[Row]]:
    """What forward sends, and what backward does, for sequences (2, length)."""
    n = dist.get_world_size()
    model = make(config)
    apply_context_parallel(model, world())
    apply_activation_checkpointing(model.blocks, mode, dropout=False)
    tokens = part_of(torch.zeros(2, length, dtype=torch.int64), 1)
    with recorded() as meter:
        with autocast(precision, CPU):
            logits = model(tokens)
        sent = len(meter.calls)
        logits.float().sum().backward()
    axes = {frozenset(range(n)): "cp"}
    return rows_of(meter.calls[:sent], axes), rows_of(meter.calls[sent:], axes)
