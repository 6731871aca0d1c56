"""minigpt/by_hand/: each piece equals torch's, each backward is the derivative of its forward."""

from __future__ import annotations

import inspect
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from minigpt.attention import plain, sdpa
from minigpt.by_hand import bpe, positions, sampling
from minigpt.by_hand.adamw import AdamW
from minigpt.by_hand.attention import attention
from minigpt.by_hand.cross_entropy import IGNORE, CrossEntropy, token_loss
from minigpt.by_hand.dropout import dropout
from minigpt.by_hand.flash import flash_attention
from minigpt.by_hand.kmeans import kmeans
from minigpt.by_hand.layer_norm import layer_norm
from minigpt.by_hand.mlp import mlp
from minigpt.by_hand.multi_head import multi_head_attention
from minigpt.by_hand.softmax import softmax
from minigpt.config import OptimizerConfig, OptimizerName
from minigpt.model import token_loss as token_loss_of_torch
from minigpt.optimizer import build_optimizer, learning_rate
from minigpt.tokenizer import train_bpe, train_bpe_by_hand

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def floats(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [x.detach().float().requires_grad_() for x in doubles(*shapes)]


def same(ours, theirs, *inputs: Tensor) -> None:
    """Outputs and all gradients, with a random gradient from above."""
    results = []
    for function in (ours, theirs):
        y = function(*inputs)
        torch.manual_seed(1)
        results.append([y, *torch.autograd.grad(y, inputs, torch.randn_like(y))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_softmax() -> None:
    same(softmax, partial(torch.softmax, dim=-1), *floats((3, 7)))
    assert gradcheck(softmax, doubles((3, 5)))
    assert softmax(torch.tensor([1e4, 0.0])).tolist() == [1.0, 0.0]
    nothing = torch.full((2,), -math.inf)
    assert softmax(nothing).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias: bool) -> None:
    shapes = [(2, 3, 8), (8,), *([(8,)] if bias else [])]

    def ours(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return layer_norm(x, w, b, 1e-5)

    def theirs(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.layer_norm(x, (8,), w, b, 1e-5)

    same(ours, theirs, *floats(*shapes))
    assert gradcheck(ours, doubles(*shapes))


def test_cross_entropy() -> None:
    (logits,) = floats((2, 4, 11))
    targets = torch.tensor([[1, IGNORE, 3, 10], [IGNORE, 0, 0, 5]])
    same(lambda z: token_loss(z, targets)[0], lambda z: token_loss_of_torch(z, targets)[0], logits)
    assert token_loss(logits, targets)[1] == token_loss_of_torch(logits, targets)[1] == 6
    (wide,) = doubles((4, 5))
    assert gradcheck(lambda z: CrossEntropy.apply(z, torch.tensor([0, IGNORE, 4, 2])), (wide,))
    assert float(CrossEntropy.apply(torch.tensor([[1e4, 0.0]]), torch.tensor([1]))) == 1e4


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp(gated: bool, bias: bool) -> None:
    D, width = 4, 6
    shapes = [(2, 3, D), (width, D), (width, D), (D, width)]
    biases = [(width,), (width,), (D,)] if bias else []

    def parts(gate: Tensor, up: Tensor, down: Tensor, *b: Tensor):
        b = b or (None, None, None)  # type: ignore[assignment]
        return (gate, b[0]), (up, b[1]), (down, b[2])

    def ours(x: Tensor, *rest: Tensor) -> Tensor:
        gate, up, down = parts(*rest)
        return mlp(x, gate if gated else None, up, down) + 0 * sum(
            r.sum() for r in gate if r is not None
        )

    def theirs(x: Tensor, *rest: Tensor) -> Tensor:
        gate, up, down = parts(*rest)
        hidden = (
            F.silu(F.linear(x, *gate)) * F.linear(x, *up) if gated else F.gelu(F.linear(x, *up))
        )
        return F.linear(hidden, *down) + 0 * sum(r.sum() for r in gate if r is not None)

    same(ours, theirs, *floats(*shapes, *biases))
    assert gradcheck(ours, doubles(*shapes, *biases))


def test_dropout_keeps_the_mean_and_repeats_its_mask_in_backward() -> None:
    x = torch.ones(20_000, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.25)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert set(y.tolist()) == {0.0, float(torch.tensor(1 / 0.75))} and torch.equal(dx, y.detach())
    # the standard error of the mean is 0.004
    assert abs(float(y.detach().mean()) - 1) < 0.016
    assert dropout(x, 0.25, training=False) is x and dropout(x, 0.0) is x


@pytest.mark.parametrize("queries", [1, 5, 12])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("attend", [attention, plain, partial(flash_attention, size=4)])
def test_attention_equals_torchs(attend, kv_heads: int, queries: int) -> None:
    same(attend, sdpa, *floats((2, 4, queries, 8), (2, kv_heads, 12, 8), (2, kv_heads, 12, 8)))


@pytest.mark.parametrize("attend", [attention, partial(flash_attention, size=2)])
def test_attentions_backward_is_its_derivative(attend) -> None:
    assert gradcheck(attend, doubles((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)))


def test_a_query_sees_no_padding() -> None:
    q, k, v = floats((2, 2, 6, 4), (2, 2, 6, 4), (2, 2, 6, 4))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = padding[1, :2] = True  # behind one text, before the other
    seen = torch.ones(6, 6, dtype=torch.bool).tril() & ~padding[:, None, None, :]

    def theirs(*qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*qkv, attn_mask=seen)

    ours = partial(attention, padding=padding)
    real = ~padding[:, None, :, None]
    same(lambda *x: ours(*x) * real, lambda *x: theirs(*x).nan_to_num() * real, q, k, v)
    assert ours(q, k, v)[1, :, :2].abs().max() == 0


def test_dropout_in_attention_drops_weights() -> None:
    q, k, v = torch.zeros(1, 1, 400, 2), torch.zeros(1, 1, 400, 2), torch.ones(1, 1, 400, 2)
    torch.manual_seed(0)
    y = attention(q, k, v, 0.5)[0, 0, 200:, 0]  # each an average of 200 and more weights
    assert y.std() > 0 and abs(float(y.mean()) - 1) < 0.02


def test_multi_head_attention() -> None:
    D, heads = 8, 2
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(D, heads, bias=False, batch_first=True)
    x = torch.randn(3, 5, D)
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wanted, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    weights = *theirs.in_proj_weight.chunk(3), theirs.out_proj.weight
    for attend in (attention, flash_attention, sdpa):
        torch.testing.assert_close(
            multi_head_attention(x, *weights, heads, attend), wanted, **CLOSE
        )


def test_rotary_is_a_product_of_complex_numbers() -> None:
    (x,) = floats((2, 3, 10, 8))
    at = torch.arange(10)
    turned = positions.rotate(x, *positions.rotary_angles(at, 8, 10000.0))
    frequency = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(10, 4), at[:, None] * frequency)
    wanted = torch.complex(*x.chunk(2, -1)) * turn
    torch.testing.assert_close(turned, torch.cat((wanted.real, wanted.imag), -1), **CLOSE)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    optimizers = AdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for _ in range(10):
        gradient = torch.randn(5, 3)
        for weight, optimizer in zip((ours, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    config = OptimizerConfig(name=OptimizerName.by_hand_adamw, lr=0.1)
    assert isinstance(build_optimizer([("w", ours)], config), AdamW)


def test_the_schedule_is_torchs() -> None:
    steps, warmup = 25, 5
    config = OptimizerConfig(lr=1.0, warmup_steps=warmup, min_lr_ratio=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1 - warmup, 0.1)
    torchs = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [warmup])
    for step in range(steps):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            learning_rate(config, step, steps), abs=1e-9
        )
        optimizer.step()
        torchs.step()


def test_top_k_and_nucleus_keep_what_they_say() -> None:
    logits = torch.tensor([0.1, 0.5, 0.05, 0.2, 0.15]).log()

    def kept(z: Tensor) -> list[int]:
        return z.isfinite().nonzero().flatten().tolist()

    assert kept(sampling.keep_top_k(logits, 2)) == [1, 3]
    assert kept(sampling.keep_top_k(logits, 9)) == [0, 1, 2, 3, 4]
    assert kept(sampling.keep_nucleus(logits, 0.45)) == [1]
    assert kept(sampling.keep_nucleus(logits, 0.6)) == [1, 3]
    assert kept(sampling.keep_nucleus(logits, 0.8)) == [1, 3, 4]
    assert kept(sampling.keep_nucleus(logits, 1e-9)) == [1]
    assert kept(sampling.keep_nucleus(logits, 1.0)) == [0, 1, 2, 3, 4]


def test_draws_follow_the_probabilities() -> None:
    logits, stream = torch.tensor([0.2, 0.0, 0.5, 0.3]).log(), torch.Generator().manual_seed(0)
    drawn = torch.tensor([sampling.draw(logits, stream) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(share, logits.exp(), atol=0.03, rtol=0)
    assert share[1] == 0


def test_bpe_learns_what_the_rust_library_learns() -> None:
    text = inspect.getsource(bpe) + inspect.getsource(positions) + inspect.getsource(sampling)
    text += "aaaa aaaaa na\u00efve caf\u00e9  \n\n  don't 1234 __init__ \u20ac"
    text += "x" * 200 + "\n" + "=-" * 50 + " " * 150 + "end"  # longer than a piece may be
    lines = text.splitlines(keepends=True)
    ours, theirs = (vocabulary(train(lines, 600)) for train in (train_bpe_by_hand, train_bpe))
    assert ours == theirs


def vocabulary(tokenizer_json: str) -> tuple:
    model = json.loads(tokenizer_json)["model"]
    return model["vocab"], model["merges"]


def test_kmeans_finds_clusters_and_never_gets_worse() -> None:
    torch.manual_seed(0)
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (middles[:, None] + torch.randn(3, 50, 2)).flatten(0, 1)
    found = kmeans(points, 3, seed=1)
    assert all(len(set(group.tolist())) == 1 for group in found.nearest.split(50))
    scattered = kmeans(torch.randn(200, 3), 7)
    assert scattered.costs == sorted(scattered.costs, reverse=True)
    # where it stops: every point is nearest to its centre, every centre the mean of its points
    points, nearest = torch.randn(200, 3), None
    done = kmeans(points, 7)
    nearest = torch.cdist(points, done.centres).argmin(1)
    assert torch.equal(nearest, done.nearest)
    means = torch.stack([points[nearest == i].mean(0) for i in range(7)])
    torch.testing.assert_close(done.centres, means, **CLOSE)
    assert kmeans(torch.ones(5, 2), 3).costs[-1] == 0
