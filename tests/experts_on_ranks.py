"""What test_experts.py and test_expert_parallel.py share: small models, alone or on real ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from costs.communication import recorded
from costs.messages import rows_of
from minigpt.config import FFN, ModelConfig
from minigpt.experts import MoE
from minigpt.model import initial_value
from parallel.experts import apply_expert_parallel
from parallel.gradients import local

CAPACITIES = [None, 0.5, 1.25]
SMALL: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "d_model": 16,
    "d_ff": 24,
    "ffn": FFN.moe,
    "n_expert": 4,
    "experts_per_token": 2,
    "balance": 0.5,
}


def close(ours: Any, theirs: Any, far: float = 1e-6) -> None:
    torch.testing.assert_close(ours, theirs, atol=far, rtol=1e-5)


def make_moe(**changes: Any) -> MoE:
    """A layer far from even routing, and with weights that are large enough to see."""
    return fill(MoE(ModelConfig(**{**SMALL, **changes})))


@torch.no_grad()
def fill(moe: MoE) -> MoE:
    for name, parameter in moe.named_parameters():
        value = 15 * initial_value(name, parameter.shape, moe.config, 0)
        part = local(parameter)
        if part.shape != value.shape:  # this rank's experts
            value = value.chunk(dist.get_world_size())[dist.get_rank()]
        part.copy_(value)
    return moe


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Activations (B, 16, D), and the gradient of the result."""
    stream = torch.Generator().manual_seed(1)
    x, target = (torch.randn(batch, 16, 16, generator=stream) for _ in range(2))
    return x.requires_grad_(), target


@dataclass(frozen=True)
class Outcome:
    """One forward and backward; the experts' gradients are of those that this rank holds."""

    y: Tensor
    x_gradient: Tensor
    router: Tensor
    experts: dict[str, Tensor]
    payload_bytes: dict[str, int]  # of all_to_alls, by dtype
    evaluated: Tensor  # the result in eval mode


def train_once(capacity: float | None, x: Tensor, target: Tensor, spread: bool = False) -> Outcome:
    """`spread`: over all ranks, from the meta device as a large model would be."""
    config = ModelConfig(**{**SMALL, "capacity_factor": capacity})
    with torch.device("meta" if spread else "cpu"):
        moe = MoE(config)
    if spread:
        apply_expert_parallel(moe, init_device_mesh("cpu", (dist.get_world_size(),)))
        moe.to_empty(device="cpu")
    moe = fill(moe)
    x = x.detach().requires_grad_()
    with recorded() as meter:
        y = moe(x)
        (y * target).sum().backward()
    rows = rows_of(meter.calls, {})
    assert all(row["collective"] == "all_to_all" for row in rows)
    return Outcome(
        y.detach(),
        _gradient(x),
        _gradient(moe.router.weight),
        {name: _gradient(weight) for name, weight in moe.experts.named_parameters()},
        {row["dtype"]: row["payload_bytes"] for row in rows},
        moe.eval()(x).detach(),
    )


def _gradient(value: Tensor) -> Tensor:
    assert value.grad is not None
    return local(value.grad).clone()


def expert_parallel(capacities: list[float | None], batch: int) -> list[Outcome]:
    """This rank's share of the batch, once for each capacity."""
    torch.set_num_threads(1)
    n, rank = dist.get_world_size(), dist.get_rank()
    x, target = (whole.chunk(n)[rank] for whole in inputs(batch))
    return [train_once(capacity, x, target, spread=True) for capacity in capacities]


def refused() -> str:
    """What is said of three experts on two ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    try:
        apply_expert_parallel(make_moe(n_expert=3), mesh)
    except ValueError as error:
        return str(error)
    return "nothing"
