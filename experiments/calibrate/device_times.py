"""How long one device takes for matrix products, copies and attention, by size and dtype.

The same on a core and on a GPU. A core's seconds are of the thread that computes, so that other
programs count for little; a GPU's are between two events on its stream, behind a wait that lets the
host run ahead, so that no launch is in them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from experiments.calibrate.operator_times import Sample, line_of
from experiments.calibrate.spread import Point, Spread, spread_of
from simulator.block_values import WIDE_NORM_BYTES, WIDE_RESIDUAL_BYTES
from simulator.estimate import BACKWARD_BYTES
from simulator.hardware import NARROW, WIDE, OperatorSpeed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Sizes(NamedTuple):
    """What is measured on a kind of device."""

    products: tuple[tuple[int, int, int], ...]  # rows, inner, columns
    copies: tuple[int, ...]  # bytes, up to far beyond the caches
    attention: tuple[tuple[int, int, int, int], ...]  # batch, heads, sequence, width of a head
    elementwise: tuple[tuple[int, int], ...] = ()  # tokens, width


CUBES = tuple((side, side, side) for side in (64, 128, 256, 512, 1024))
LARGE_CUBES = tuple((side, side, side) for side in (512, 1024, 2048, 4096, 8192))
SIZES = {
    "cpu": Sizes(
        (*CUBES, (2048, 384, 384), (512, 128, 2048), (256, 1024, 1024), (2048, 64, 512)),
        tuple(2**n for n in range(14, 29, 2)),
        (),  # operator_times.py has a core's
    ),
    "cuda": Sizes(
        (*LARGE_CUBES, (16384, 768, 3072), (8192, 4096, 1024), (4096, 128, 4096)),
        tuple(2**n for n in range(20, 32, 2)),
        ((16, 12, 1024, NARROW), (4, 32, 4096, WIDE)),
        ((16384, 1024),),
    ),
}
# "addmm_impl_cpu_" not implemented for 'Half'; CUBLAS_STATUS_NOT_SUPPORTED
LACKS = ("not implemented", "not_supported", "not supported")
FEWEST, MOST = 5, 40  # calls of each
ENOUGH_S = 0.1  # seconds for each, once there are FEWEST
TOO_LONG_S = 0.5  # for one product: a dtype without kernels of its own is slow
AHEAD = 1_000_000  # cycles that a GPU waits before what is timed: half a millisecond


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call on the device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3  # from ms
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def timed(call: Callable[[], Any], device: torch.device) -> Spread:
    """Of several calls, after one that sets the library up."""
    call()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() < begin + ENOUGH_S):
        found.append(seconds_of(call, device))
    return spread_of(found)


class Times(NamedTuple):
    """What one device was found to take."""

    products: dict[str, list[Sample]]  # by dtype
    copies: list[Sample]
    attention: list[Sample]  # forward and backward, in bf16 or fp16
    elementwise: list[Sample]  # the same


def measure(device: torch.device, sizes: Sizes | None = None) -> Times:
    """All of it: some seconds. A dtype in which this torch has no products there is left out."""
    sizes = sizes or SIZES[device.type]
    products = {}
    for name, dtype in DTYPES.items():
        try:
            products[name] = products_in(dtype, sizes.products, device)
        except RuntimeError as error:
            if not any(said in str(error).lower() for said in LACKS):
                raise
    return Times(
        products,
        [copy(size, device) for size in sizes.copies],
        [attention(shape, device) for shape in sizes.attention],
        [elementwise(shape, device) for shape in sizes.elementwise],
    )


def products_in(
    dtype: torch.dtype, shapes: tuple[tuple[int, int, int], ...], device: torch.device
) -> list[Sample]:
    """Those that take no longer than TOO_LONG_S, by the slowest so far."""
    found: list[Sample] = []
    for shape in shapes:
        slowest = max((one.seconds / one.flops for one in found), default=0.0)
        if 2 * math.prod(shape) * slowest < TOO_LONG_S:
            found.append(product(shape, dtype, device))
    return found


def product(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Sample:
    rows, inner, columns = shape
    # random numbers: equal ones toggle fewer bits, and a GPU at its power limit would run faster
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    out = a @ b
    taken = timed(lambda: torch.mm(a, b, out=out), device)
    moved = a.element_size() * (rows * inner + inner * columns + rows * columns)
    return Sample("product", 2 * rows * inner * columns, moved, shape, taken)


def copy(size: int, device: torch.device) -> Sample:
    """`size` bytes from one place to another: as many are read and as many written."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return Sample("copy", 0, 2 * size, (), timed(lambda: target.copy_(source), device))


def attention(shape: tuple[int, int, int, int], device: torch.device) -> Sample:
    """torch's fused causal kernel, forward and backward, which is two and a half times as much.
    FLOPs are counted in full, as torch counts them (costs/flops.py). Heads lie side by side, as
    projections leave them."""
    batch, heads, sequence, width = shape
    made: dict[str, Any] = {"device": device, "dtype": low_dtype(device)}
    lying = batch, sequence, heads, width
    q, k, v = (torch.randn(lying, **made).transpose(1, 2).requires_grad_() for _ in "qkv")
    gradient = torch.ones(lying, **made).transpose(1, 2)

    def call() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), gradient)

    flops = 14 * batch * heads * sequence * sequence * width
    sides = (sequence, width, sequence)
    return Sample("scaled_dot_product", flops, 0, sides, timed(call, device))


def low_dtype(device: torch.device) -> torch.dtype:
    old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if old else torch.bfloat16


def elementwise(shape: tuple[int, int], device: torch.device) -> Sample:
    """A norm, a GELU and a residual as under autocast, operator by operator, forward and backward:
    bytes as the closed forms count them (simulator/work.py, simulator/estimate.py)."""
    tokens, width = shape
    dtype = low_dtype(device)
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = torch.ones(width, device=device, requires_grad=True)
    gradient = torch.ones_like(x)

    def call() -> None:
        low = F.layer_norm(x, (width,), weight).to(dtype)
        torch.autograd.grad(x + F.gelu(low), (x, weight), gradient)

    forward = tokens * width * (WIDE_NORM_BYTES + 2 * dtype.itemsize + WIDE_RESIDUAL_BYTES // 2)
    moved = int(forward * (1 + BACKWARD_BYTES))
    return Sample("elementwise", 0, moved, (), timed(call, device))


def elementwise_share(times: Times) -> Spread:
    """Of the bandwidth of copies."""
    (one,) = times.elementwise
    return one.taken.rate(one.bytes).over(bandwidth(times).middle)


def bandwidth(times: Times) -> Spread:
    """Bytes/s, read and written, of the largest copy, which no cache holds."""
    largest = max(times.copies, key=lambda one: one.bytes)
    return largest.taken.rate(largest.bytes)


def peak(products: list[Sample]) -> Spread:
    """FLOP/s of the fastest shape."""
    fastest = max(products, key=lambda one: one.flops / one.seconds)
    return fastest.taken.rate(fastest.flops)


def lines(times: Times) -> dict[str, OperatorSpeed]:
    """The curve of each dtype's products."""
    return {name: line_of(found) for name, found in times.products.items()}


def points(times: Times) -> list[Point]:
    """Everything measured beside its curve."""
    found = []
    for name, line in lines(times).items():
        for one in times.products[name]:
            size = len(one.sides) / sum(1 / side for side in one.sides)
            fitted = line.seconds(one.flops, one.bytes, one.sides)
            found.append(Point("product", name, 1, size, one.flops, one.taken, fitted))
    rate = bandwidth(times).middle
    for one in times.copies:
        fitted = one.bytes / rate
        found.append(Point("memory", "copy", 1, one.bytes, one.bytes, one.taken, fitted))
    return found
