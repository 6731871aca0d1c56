"""Floating-point operations: what ran, and what this device can do.

Model flops are what the mathematics asks for; hardware flops are what ran, recomputation included.
MFU and HFU are their shares of the peak (Chowdhery et al. 2022, PaLM, appendix B). The closed form
of model flops is simulator/flops.py's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from costs.moments import wait_for

aten = torch.ops.aten


def _cpu_attention(query: tuple, key: tuple, *_args: Any, **_kwargs: Any) -> int:
    """Forward: q k^T and weights v, 2 flops a multiply-add. torch's counter misses this kernel."""
    batch, heads, queries, width = query
    return 2 * (2 * batch * heads * queries * key[2] * width)


def _cpu_attention_backward(_gradient: tuple, query: tuple, key: tuple, *_a: Any, **_k: Any) -> int:
    """Backward: four products for the gradients, and q k^T again, which a flash kernel never kept.

    The convention of torch's counter for the CUDA kernels (sdpa_backward_flop_count).
    """
    return 5 * _cpu_attention(query, key) // 2


def _register() -> None:
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    }
    for operator, formula in formulas.items():
        try:
            register_flop_formula(operator)(formula)  # type: ignore[arg-type]
        except RuntimeError:  # a later torch counts it by itself
            continue


_register()


class NoModules:
    """In place of torch's ModuleTracker, whose hooks break a backward that a schedule has split
    (zero bubble), and of which only the total is wanted."""

    parents = frozenset({"Global"})  # the name under which torch's counter keeps the total

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Count the flops of what this rank runs inside: `.get_total_flops()` afterwards.

    An operator of DTensors has the shapes of the whole; its local operators come one by one, and
    those are what ran. An operator with a kernel of its own is left whole: torch's counter would
    run silu's backward in pieces, which round otherwise, and a run that goes on would differ.
    Fake tensors compute nothing, so their operators are not counted: DTensor runs each operator on
    some of them, of the whole shapes, the first time that it meets it (sharding propagation).
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()  # type: ignore[assignment]
    with counter:
        whole: Any = counter.mode

        class LocalOnly(type(whole)):  # type: ignore[misc]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
            ) -> Any:
                if any(issubclass(kind, DTensor) for kind in types):
                    return NotImplemented
                if any(issubclass(kind, FakeTensor) for kind in types):
                    return func(*args, **(kwargs or {}))
                if func._overloadpacket not in counter.flop_registry and _has_kernel(func):
                    return func(*args, **(kwargs or {}))
                return super().__torch_dispatch__(func, types, args, kwargs)

        whole.__class__ = LocalOnly
        yield counter


def _has_kernel(func: torch._ops.OpOverload) -> bool:
    """Return whether an operator runs as itself on a CPU or a GPU, and is not made of others.

    Some operators of TorchScript (prim::device) are unknown to the dispatcher and have no kernel.
    """
    name, has = func.name(), torch._C._dispatch_has_kernel_for_dispatch_key
    known = torch._C._dispatch_has_kernel(name)
    return known and any(has(name, device) for device in ("CPU", "CUDA"))


def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the best square matrix product found in about `seconds`: a measured peak."""
    sizes = (512, 1024) if device.type == "cpu" else (4096, 8192)
    best, deadline = 0.0, time.perf_counter() + seconds
    operands = {n: torch.randn(n, n, device=device, dtype=torch.float32).to(dtype) for n in sizes}
    for a in operands.values():
        _product_s(a)  # the first call of a shape sets the library up
    while True:  # once at least: a busy machine may have spent the time on setting up
        for n, a in operands.items():
            best = max(best, 2 * n**3 / _product_s(a))
        if time.perf_counter() >= deadline:
            return best


def _product_s(a: torch.Tensor) -> float:
    wait_for(a.device)
    start = time.perf_counter()
    torch.mm(a, a)
    wait_for(a.device)
    return time.perf_counter() - start
