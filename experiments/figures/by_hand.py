"""Each piece of minigpt/by_hand/ beside torch's: error, time, memory. Prints
docs/results/by_hand.md:

./launch.sh python -m experiments.figures.by_hand > docs/results/by_hand.md

A case is forward and backward of one call, in fp32, on one thread. The error is the largest
difference of outputs and gradients, over the largest number of torch's. Memory is the peak of what
the call has made (costs/memory.py), its inputs and their gradients included.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from costs.memory import MemoryMeter
from minigpt.attention import sdpa
from minigpt.by_hand import layer_norm, mlp, multi_head, positions, softmax
from minigpt.by_hand.adamw import AdamW
from minigpt.by_hand.attention import attention
from minigpt.by_hand.cross_entropy import token_loss
from minigpt.by_hand.dropout import dropout
from minigpt.by_hand.flash import flash_attention
from minigpt.model import token_loss as token_loss_of_torch

LENGTHS = (256, 512, 1024, 2048, 4096)
WIDTH, HEADS, VOCABULARY = 64, 2, 512
REPEATS = 5


class Case(NamedTuple):
    """One piece: what is given, as shapes at length T, and the two that take it."""

    shapes: Callable[[int], list[tuple[int, ...]]]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]


def rotate(x: Tensor) -> Tensor:
    return positions.rotate(x, *positions.rotary_angles(torch.arange(x.shape[2]), x.shape[3], 1e4))


def rotate_complex(x: Tensor) -> Tensor:
    """Rotary positions as torch can say them: pairs are complex numbers, angles their factors."""
    frequency = 1e4 ** (-torch.arange(0, x.shape[3], 2) / x.shape[3])
    angle = torch.arange(x.shape[2])[:, None] * frequency
    y = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((y.real, y.imag), -1)


def heads_of_torch(x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
    weights = {"in_proj_weight": torch.cat((q, k, v)), "out_proj.weight": out}
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    given = {"attn_mask": hidden, "is_causal": True, "need_weights": False}
    return torch.func.functional_call(theirs, weights, (x, x, x), given)[0]


def updated(kind: type[torch.optim.Optimizer]) -> Callable[[Tensor], Tensor]:
    """Three updates of one weight, whose gradient is the weight itself."""

    def update(x: Tensor) -> Tensor:
        weight = torch.nn.Parameter(x.detach().clone())
        optimizer = kind([weight], lr=0.01, weight_decay=0.1)  # type: ignore[call-arg]
        for _ in range(3):
            weight.grad = weight.detach().clone()
            optimizer.step()
        return weight.detach() + 0 * x

    return update


def with_seed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Both draw the same numbers, so that both drop the same ones."""

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return function(x)

    return seeded


def dropout_of_torch(x: Tensor) -> Tensor:
    """torch.dropout draws otherwise, so the mask is drawn as ours is and the rest is torch's."""
    return torch.where(torch.rand_like(x) >= 0.1, x / 0.9, 0.0)


def targets(z: Tensor) -> Tensor:
    return torch.arange(z.shape[1])[None] % VOCABULARY


def qkv(T: int) -> list[tuple[int, ...]]:
    return [(1, HEADS, T, WIDTH // HEADS)] * 3


D, WIDE = WIDTH, 4 * WIDTH
CASES = {
    "attention": Case(qkv, attention, sdpa),
    "flash attention": Case(qkv, flash_attention, sdpa),
    "multi-head attention": Case(
        lambda T: [(1, T, D), *[(D, D)] * 4],
        lambda x, q, k, v, o: multi_head.multi_head_attention(x, q, k, v, o, HEADS, attention),
        heads_of_torch,
    ),
    "softmax": Case(lambda T: [(T, T)], softmax.softmax, lambda x: x.softmax(-1)),
    "cross-entropy": Case(
        lambda T: [(1, T, VOCABULARY)],
        lambda z: token_loss(z, targets(z))[0],
        lambda z: token_loss_of_torch(z, targets(z))[0],
    ),
    "LayerNorm": Case(
        lambda T: [(1, T, D), (D,), (D,)],
        lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, (D,), w, b),
    ),
    "GELU MLP": Case(
        lambda T: [(1, T, D), (WIDE, D), (D, WIDE)],
        lambda x, up, down: mlp.mlp(x, None, (up, None), (down, None)),
        lambda x, up, down: F.linear(F.gelu(F.linear(x, up)), down),
    ),
    "SwiGLU": Case(
        lambda T: [(1, T, D), (WIDE, D), (WIDE, D), (D, WIDE)],
        lambda x, g, u, d: mlp.mlp(x, (g, None), (u, None), (d, None)),
        lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),
    ),
    "dropout": Case(
        lambda T: [(T, D)], with_seed(lambda x: dropout(x, 0.1)), with_seed(dropout_of_torch)
    ),
    "rotary positions": Case(lambda T: qkv(T)[:1], rotate, rotate_complex),
    "AdamW, 3 steps": Case(lambda T: [(T, D)], updated(AdamW), updated(torch.optim.AdamW)),
}


@dataclass(frozen=True)
class Pair:
    """A number of ours beside torch's."""

    ours: float
    theirs: float


class Inputs:
    """What the memory meter counts as parameters."""

    def __init__(self, case: Case, T: int) -> None:
        torch.manual_seed(0)
        self.tensors = [torch.randn(shape, requires_grad=True) for shape in case.shapes(T)]
        for weight in self.tensors[1:]:
            if weight.ndim == 2:
                weight.data /= math.sqrt(weight.shape[1])  # outputs of scale 1

    def parameters(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def buffers(self) -> Iterator[Tensor]:
        return iter(())


def run(function: Callable[..., Tensor], inputs: Inputs) -> list[Tensor]:
    """Forward and backward: the output and the gradients, which stay in `.grad` as well."""
    for tensor in inputs.tensors:
        tensor.grad = None
    y = function(*inputs.tensors)
    y.sum().backward() if y.ndim == 0 else y.backward(torch.ones_like(y) * y.detach())
    return [y.detach(), *(t.grad for t in inputs.tensors if t.grad is not None)]


def error_of(name: str, T: int) -> float:
    """The largest difference, relative to the largest number."""
    case, inputs = CASES[name], Inputs(CASES[name], T)
    ours, theirs = run(case.ours, inputs), run(case.theirs, inputs)
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def memory_of(name: str, T: int) -> Pair:
    """Peak bytes of forward and backward."""
    case, peaks = CASES[name], []
    for function in (case.ours, case.theirs):
        inputs = Inputs(case, T)
        meter = MemoryMeter(inputs, {})
        with meter:
            run(function, inputs)
        peaks.append(meter.result()["peak"])
    return Pair(*peaks)


def time_of(name: str, T: int) -> Pair:
    """Median seconds, the two taking turns."""
    case, inputs = CASES[name], Inputs(CASES[name], T)
    spent: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(REPEATS + 1):
        for i, function in enumerate((case.ours, case.theirs)):
            start = time.perf_counter()
            run(function, inputs)
            spent[i].append(time.perf_counter() - start)
    return Pair(*(statistics.median(times[1:]) for times in spent.values()))


def slope(lengths: list[int], values: list[float]) -> float:
    """The power of T with which values grow: least squares of their logarithms."""
    return statistics.linear_regression(
        [math.log(T) for T in lengths], [math.log(value) for value in values]
    ).slope


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    torch.set_num_threads(1)
    rows, slopes = [], []
    for name in CASES:
        memory = [memory_of(name, T) for T in LENGTHS]
        for T, peak in zip(LENGTHS, memory, strict=True):
            seconds = time_of(name, T)
            rows.append(
                [
                    name,
                    str(T),
                    f"{error_of(name, T):.1e}",
                    f"{seconds.ours / seconds.theirs:.2f}",
                    f"{peak.ours / 1e6:.2f}",
                    f"{peak.theirs / 1e6:.2f}",
                ]
            )
        grows = [
            slope(list(LENGTHS), [getattr(p, who) for p in memory]) for who in Pair.__annotations__
        ]
        slopes.append([name, *(f"{power:.2f}" for power in grows)])
    print(
        TEXT.format(machine=f"{platform.system()} {platform.machine()}, torch {torch.__version__}")
    )
    print(table(["piece", "power of T, ours", "torch"], slopes))
    print(f"\n## Error, time, memory\n\n{ABOUT}\n")
    print(table(["piece", "T", "error", "time ratio", "peak, MB", "torch, MB"], rows))


TEXT = f"""# Written out by hand

Made by `./launch.sh python -m experiments.figures.by_hand > docs/results/by_hand.md`
({{machine}}, one thread, fp32; width {WIDTH}, {HEADS} heads, vocabulary {VOCABULARY}).

Each file of [minigpt/by_hand/](../../minigpt/by_hand) is one piece, forward and backward. A run
takes
them by `model.impl=by_hand` (LayerNorm, MLP, dropout, cross-entropy),
`model.attention=by_hand_plain` or `by_hand_flash`, `optimizer.name=by_hand_adamw` and
`data.tokenizer=by_hand_bpe`, and its ledger shows what they cost. Positions, heads, schedule and
sampling have one implementation, which is there and which every run uses. k-means serves no run.
`tests/test_written_out.py` holds outputs and gradients to torch's within 1e-5, and each backward to
its forward by `gradcheck` in double. [lora.md](lora.md) has LoRA, [debug.md](debug.md) the runs
that are broken on purpose.

## How the peak memory grows with T

The slope of log(peak) over log(T), T = {LENGTHS[0]} ... {LENGTHS[-1]}: 1 is linear, 2 quadratic.
Attention that holds the scores should be quadratic, flash attention linear at most: the temporaries
of a tile are as large at any T, so over short T its slope is below 1. Softmax is given T x T
numbers.
"""
ABOUT = (
    "Forward and backward of one call, against torch's own. Time is ours over torch's, the median "
    f"of {REPEATS}."
)


if __name__ == "__main__":
    main()
