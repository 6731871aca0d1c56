"""Mixture of experts on one process, against loops over tokens and experts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.config import FFN, ModelConfig
from minigpt.experts import MoE, set_loss_factor
from minigpt.generate import KVCache, generate
from minigpt.model import GPT, initial_value, token_loss
from parallel.activation_checkpointing import apply_activation_checkpointing
from parallel.layout import ActivationCheckpointing
from tests.configs import model_of
from tests.experts_on_ranks import CAPACITIES, SMALL, close, inputs, make_moe


def naive(moe: MoE, x: Tensor, capacity: int | None) -> Tensor:
    """One token, one choice and one expert after another; all first choices before any second."""
    rows = []
    weights = (moe.experts.gate, moe.experts.up, moe.experts.down)
    for sequence in x:
        best, chosen = (sequence @ moe.router.weight.T).softmax(-1).topk(2)
        y, taken = [torch.zeros(x.shape[-1]) for _ in sequence], [0] * moe.config.n_expert
        for choice in range(2):
            for t, token in enumerate(sequence):
                e = int(chosen[t, choice])
                taken[e] += 1
                if capacity is None or taken[e] <= capacity:
                    gate, up, down = (w[e] for w in weights)
                    out = down @ (F.silu(gate @ token) * (up @ token))
                    y[t] = y[t] + best[t, choice] / best[t].sum() * out
        rows.append(torch.stack(y))
    return torch.stack(rows)


def naive_balance(moe: MoE, x: Tensor) -> Tensor:
    """Fedus et al. 2021, eq. 4, for each sequence; with the share of choices for that of tokens."""
    total = torch.zeros(())
    for sequence in x:
        probabilities = (sequence @ moe.router.weight.T).softmax(-1)
        chosen = probabilities.topk(2).indices
        for e in range(moe.config.n_expert):
            f = (chosen == e).sum() / chosen.numel()
            total = total + moe.config.n_expert * f * probabilities[:, e].mean() * len(sequence)
    return total


def gradients(moe: MoE, objective: Tensor, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(objective, [x, *moe.parameters()]))


@pytest.mark.parametrize("capacity_factor", CAPACITIES)
def test_results_and_gradients_are_those_of_a_loop_over_tokens(
    capacity_factor: float | None,
) -> None:
    moe, (x, target) = make_moe(capacity_factor=capacity_factor), inputs(3)
    slots = None if capacity_factor is None else moe.config.expert_slots(x.shape[1])
    y, wanted = moe(x), naive(moe, x, slots)
    close(y, wanted)
    objective = (wanted * target).sum() + 0.3 * moe.config.balance * naive_balance(moe, x)
    set_loss_factor([moe], 0.3)
    close(gradients(moe, (moe(x) * target).sum(), x), gradients(moe, objective, x), 1e-5)


def test_routing_picks_the_likeliest_and_their_weights_add_up_to_one() -> None:
    moe, (x, _) = make_moe(), inputs(2)
    probabilities, routing = moe.router(x), moe.route(x)
    assert routing.chosen.shape == routing.weights.shape == (2, 16, 2)
    close(routing.weights.sum(-1), torch.ones(2, 16))
    best, other = probabilities.gather(-1, routing.chosen).unbind(-1)
    assert (best >= other).all()
    assert torch.equal(best, probabilities.max(-1).values)
    assert torch.equal(routing.choices.sum(1), torch.tensor([32, 32]))
    one_hot = F.one_hot(routing.chosen, 4).sum((1, 2))
    assert torch.equal(routing.choices, one_hot)


def test_the_balance_loss_is_one_a_token_when_even_and_e_when_one_expert_gets_all() -> None:
    moe, x = make_moe(n_expert=4, experts_per_token=1), torch.ones(3, 16, 16)
    torch.nn.init.zeros_(moe.router.weight)
    close(moe.route(x).balance, torch.tensor(3 * 16.0))  # P is even, whatever f is
    with torch.no_grad():
        moe.router.weight[2] = 100.0
    close(moe.route(x).balance, torch.tensor(4 * 3 * 16.0))


@pytest.mark.parametrize("capacity_factor", CAPACITIES)
def test_a_batch_is_the_sum_of_its_sequences(capacity_factor: float | None) -> None:
    moe, (x, target) = make_moe(capacity_factor=capacity_factor), inputs(2)
    whole = moe(x)
    together = gradients(moe, (whole * target).sum(), x)
    parts = [moe(x[i : i + 1]) for i in range(2)]
    close(torch.cat(parts), whole)
    apart = [gradients(moe, (part * target[i]).sum(), x) for i, part in enumerate(parts)]
    close([a + b for a, b in zip(*apart, strict=True)], together, 1e-5)


def test_capacity_drops_the_latest_second_choices_first() -> None:
    """Every token wants expert 0 first and expert 1 second; each has room for 3."""
    moe = make_moe(capacity_factor=3 * 4 / (16 * 2))
    assert moe.config.expert_slots(16) == 3
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([3.0, 2.0, 0.0, 0.0])[:, None].expand(4, 16))
    x = torch.rand(2, 16, 16) + 0.5
    served = moe(x).abs().sum(-1) > 0
    assert torch.equal(served, (torch.arange(16) < 3).expand(2, 16))
    # half of the tokens now want 1 first: their first choices leave its room to no second one
    x = torch.cat((-x[:, :8], x[:, 8:]), 1)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None].expand(4, 16))
    served = moe(x).abs().sum(-1) > 0
    wanted = torch.tensor([0, 1, 2, 8, 9, 10])
    assert torch.equal(served.nonzero()[:, 1].unique(), wanted)


def test_slots_are_the_even_share_times_the_factor_and_never_more_than_tokens() -> None:
    config = ModelConfig(ffn=FFN.moe, capacity_factor=1.25)
    assert config.expert_slots(128) == 40  # 1.25 * 128 * 2 / 8
    assert config.expert_slots(1) == 1
    assert ModelConfig(ffn=FFN.moe, capacity_factor=100.0).expert_slots(7) == 7


def test_room_for_all_drops_nothing() -> None:
    (x, _), roomy = inputs(2), make_moe(capacity_factor=4.0)
    close(roomy(x), make_moe()(x))


def test_eval_mode_drops_nothing_and_attaches_nothing() -> None:
    moe, (x, target) = make_moe(capacity_factor=0.5, balance=10.0).eval(), inputs(2)
    close(moe(x), make_moe()(x))
    with_balance = gradients(moe, (moe(x) * target).sum(), x)
    close(with_balance, gradients(moe, (naive(moe, x, None) * target).sum(), x), 1e-5)


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_gradients_are_the_slopes(capacity_factor: float | None) -> None:
    """Central differences along the gradient, where the step is too short to change a choice."""
    moe, (x, target) = make_moe(capacity_factor=capacity_factor, balance=0.0), inputs(2)
    for value in (x, *moe.parameters()):
        (slope,) = torch.autograd.grad((moe(x) * target).sum(), value)
        direction, step = slope / slope.norm(), 1e-2
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                value.add_(sign * step * direction)
                ends.append((moe(x) * target).sum().item())
                value.sub_(sign * step * direction)
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope.norm().item(), rel=2e-2)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_checkpointed_blocks_give_the_same_gradients(
    mode: str, capacity_factor: float | None
) -> None:
    """The routing is computed again, and so is the balance loss, which is attached once only."""
    changes = {"capacity_factor": capacity_factor, "balance": 1.0, "dropout": 0.1}
    found = []
    for kind in (ActivationCheckpointing.none, ActivationCheckpointing(mode)):
        model, (tokens, targets) = make_gpt(**changes)
        apply_activation_checkpointing(model.blocks, kind, dropout=True)
        torch.manual_seed(5)
        loss, _ = token_loss(model(tokens), targets)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    close(found[1], found[0])


def make_gpt(**changes: Any) -> tuple[GPT, tuple[Tensor, Tensor]]:
    model = GPT(ModelConfig(**{**SMALL, "vocab_size": 40, "context": 16, **changes}))
    model.init_weights(2)
    torch.manual_seed(3)
    tokens = torch.randint(40, (2, 17))
    return model, (tokens[:, :-1], tokens[:, 1:])


def test_the_cache_gives_the_logits_of_a_full_pass() -> None:
    model, (tokens, _) = make_gpt(capacity_factor=0.5)
    model.eval()
    cache, parts = KVCache(16), []
    for chunk in tokens.split([5, 1, 1, 6, 3], dim=1):
        parts.append(model(chunk, cache=cache))
        cache.length += chunk.shape[1]
    close(torch.cat(parts, 1), model(tokens), 1e-5)
    made = generate(model, [1, 2, 3], 20, temperature=0)
    assert len(made) == 20 and made == generate(model, [1, 2, 3], 20, temperature=0)


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_bf16_stays_near_fp32_and_routes_in_fp32(capacity_factor: float | None) -> None:
    moe, (x, target) = make_moe(capacity_factor=capacity_factor), inputs(2)
    wanted = gradients(moe, (moe(x) * target).sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moe.experts(x.new_zeros(4, 2, 16)).dtype == torch.bfloat16
        assert moe.router(x).dtype == torch.float32
        y = moe(x)
    for low, full in zip(gradients(moe, (y * target).sum(), x), wanted, strict=True):
        assert (low - full).norm() < 0.03 * full.norm()


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    """Not none: ranks must agree on which gradients there are."""
    moe = make_moe(balance=0.0)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([3.0, 2.0, 0.0, 0.0])[:, None].expand(4, 16))
    moe(torch.rand(1, 4, 16)).sum().backward()
    gradient = moe.experts.up.grad
    assert gradient is not None
    assert gradient[:2].abs().sum() > 0 and gradient[2:].abs().sum() == 0


def test_experts_start_as_an_mlp_does() -> None:
    config = model_of("tiny_moe")
    assert (config.n_expert, config.experts_per_token, config.ff_dim) == (4, 2, 384)
    for name, std in {"gate": 0.02, "up": 0.02, "down": 0.02 / math.sqrt(2 * 4)}.items():
        shape = config.block_shapes[f"mlp.experts.{name}"]
        value = initial_value(f"blocks.0.mlp.experts.{name}", shape, config, 0)
        assert value.std().item() == pytest.approx(std, rel=0.02)
