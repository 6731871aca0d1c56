"""The update rule, which weights decay, and the learning rate of each step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt.config import ModelConfig, OptimizerConfig, OptimizerName, Schedule
from minigpt.model import GPT
from minigpt.optimizer import build_optimizer, learning_rate, set_learning_rate


def test_matrices_decay_and_vectors_never_do() -> None:
    model = GPT(ModelConfig(n_layer=1, d_model=16, bias=True))
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(lr=1.0))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.ndim == 2 else 0.0), name
    assert len(decay) == len(list(model.parameters()))


def test_adamw_is_the_papers_update() -> None:
    """Loshchilov 2019, algorithm 2, two steps by hand."""
    config = OptimizerConfig(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.2)
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer([("w", weight)], config)
    value, m, v = weight.detach().clone(), torch.zeros(1, 2), torch.zeros(1, 2)
    for t in (1, 2):
        gradient = torch.tensor([[0.3, -0.7]]) * t
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        value = value - 0.1 * 0.2 * value
        value = value - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach(), value)


def test_sgd_with_momentum() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    config = OptimizerConfig(name=OptimizerName.sgd, lr=0.1, momentum=0.5)
    optimizer = build_optimizer([("w", weight)], config)
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.1 * 1 - 0.1 * 1.5)


def test_frozen_parameters_are_left_out() -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    free = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([("a", frozen), ("b", free)], OptimizerConfig(lr=1.0))
    assert [p for group in optimizer.param_groups for p in group["params"]] == [free]


@given(
    warmup=st.integers(0, 50),
    steps=st.integers(1, 300),
    lowest=st.floats(0, 1),
    lr=st.floats(1e-6, 1),
)
def test_the_rate_rises_then_falls_within_its_bounds(
    warmup: int, steps: int, lowest: float, lr: float
) -> None:
    config = OptimizerConfig(lr=lr, warmup_steps=warmup, min_lr_ratio=lowest)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    top = min(warmup, steps)
    assert all(rate > 0 for rate in rates[:top])
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) <= lr * (1 + 1e-12)
    assert all(rate >= lowest * lr * (1 - 1e-12) for rate in rates[top:])


def test_the_rate_at_its_corners() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 25) for step in range(25)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.55), "half way down the cosine"
    assert rates[24] == pytest.approx(0.1), "the last step has the lowest"
    flat = OptimizerConfig(lr=1.0, warmup_steps=2, schedule=Schedule.constant)
    assert [learning_rate(flat, step, 9) for step in (2, 8)] == [1.0, 1.0]


def test_every_group_gets_the_rate() -> None:
    model = GPT(ModelConfig(n_layer=1, d_model=16))
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(lr=1.0))
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lr": 0.0}, "optimizer.lr=0.0"),
        ({"lr": math.inf}, "optimizer.lr=inf"),
        ({"beta2": 1.0}, "optimizer.beta2=1.0"),
        ({"min_lr_ratio": 2.0}, "optimizer.min_lr_ratio=2.0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
    ],
)
def test_bad_numbers_are_refused_by_name(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OptimizerConfig(**changes)
