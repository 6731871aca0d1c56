"""One rank's operators against the roof of its core: FLOP/s by FLOPs for each byte moved.

Bytes are the least that an operator must move: each input read once, each output written once
(Williams et al. 2009, Roofline). Imports torch; run by experiments.ask.evidence.Evidence.probed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from costs.flops import measure_peak_flops

ITEM = 4  # bytes of fp32
REPEATS = 20
COPIED = 32 * 2**20  # numbers of 4 bytes: far beyond any cache
PEAK_S = 2.0
SENT = 2**22  # numbers of an all_reduce


def measure() -> dict[str, Any]:
    """Peak and bandwidths of this rank, and its operators; all ranks at the same time."""
    torch.set_num_threads(1)
    peak = measure_peak_flops(torch.device("cpu"), torch.float32, PEAK_S)
    source, target = torch.ones(COPIED), torch.empty(COPIED)
    copied = 2 * ITEM * COPIED / best(lambda: target.copy_(source), 10)
    operators = {name: _measured(*made) for name, made in _operators().items()}
    dist.barrier()
    message = torch.ones(SENT)
    n = dist.get_world_size()
    sent = best(lambda: dist.all_reduce(message), 10)
    return {
        # the best product found is the peak, whichever loop found it
        "peak_flops_per_s": max(peak, *(each["flops_per_s"] for each in operators.values())),
        "memory_bytes_per_s": copied,
        "network_bytes_per_s": 2 * (n - 1) * ITEM * SENT / n / sent,
        "operators": operators,
    }


def best(function: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of so many calls: the one that nothing else held up."""
    function()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _measured(run: Callable[[], Any], flops: float, moved: float) -> dict[str, float]:
    seconds = best(run, REPEATS)
    return {
        "flops": flops,
        "bytes": moved,
        "seconds": seconds,
        "flops_per_s": flops / seconds,
        "flops_per_byte": flops / moved,
    }


def _operators() -> dict[str, tuple[Callable[[], Any], float, float]]:
    """name -> (call, FLOPs, bytes): of a GPT's step, on 2,048 tokens of width 256."""
    tokens, width = 2048, 256
    x, y = torch.randn(tokens, width), torch.randn(tokens, width)
    size = x.numel()
    made: dict[str, tuple[Callable[[], Any], float, float]] = {}
    for n in (32, 128, 512, 1024):
        square = torch.randn(n, n)
        made[f"matmul_{n}"] = partial(torch.mm, square, square), 2.0 * n**3, 3.0 * ITEM * n * n
    weight = torch.randn(width, width)
    rows = 2.0 * tokens * width * width, ITEM * (2.0 * size + width * width)
    made["projection"] = (lambda: x @ weight), *rows
    vector = torch.randn(1, width)
    one = 2.0 * width * width, ITEM * (width * width + 2.0 * width)
    made["one_token"] = (lambda: vector @ weight), *one
    q = torch.randn(4, 4, 512, 64)
    attention = 4.0 * q.shape[0] * q.shape[1] * 512 * 512 * 64 / 2  # the mask leaves half
    made["attention"] = (
        (lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)),
        attention,
        4.0 * ITEM * q.numel(),
    )
    # FLOPs of a number: an add is 1; a norm's sums and scales about 8; exp and tanh count as 1
    made["add"] = (lambda: x + y), 1.0 * size, 3.0 * ITEM * size
    made["layernorm"] = (lambda: F.layer_norm(x, (width,))), 8.0 * size, 2.0 * ITEM * size
    made["gelu"] = (lambda: F.gelu(x, approximate="tanh")), 8.0 * size, 2.0 * ITEM * size
    made["softmax"] = (lambda: torch.softmax(x, -1)), 5.0 * size, 2.0 * ITEM * size
    made["adamw"] = _adamw(2**20)
    return made


def _adamw(count: int) -> tuple[Callable[[], Any], float, float]:
    """Reads weight, gradient and two moments, writes three of them."""
    weight = torch.randn(count, requires_grad=True)
    weight.grad = torch.randn(count)
    optimizer = torch.optim.AdamW([weight], fused=True)
    return optimizer.step, 14.0 * count, 7.0 * ITEM * count
