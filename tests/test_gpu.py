"""What only a GPU can show: NCCL, its allocator, its dtypes and kernels, its own clock.

Skipped where torch sees no CUDA device. One GPU is enough: strategies take those there are, up to
four, over NCCL, and where there are too few their ranks share one over gloo.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from costs import ledger as ledgers
from costs.timing import StepTimer
from experiments.environment import gpu_count
from experiments.predict import clusters
from minigpt.attention import sdpa
from parallel.attention_kernels import kernels_for
from tests.launching import SMALL, launch

GPUS = gpu_count()
RANKS = 4 if GPUS >= 4 else 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not GPUS, reason="torch sees no CUDA device"),
]
BATCH = 8  # sequences of a step, whatever the layout
STRATEGIES: dict[str, tuple[int, tuple[str, ...]]] = {  # ranks that share the batch, and overrides
    "ddp": (RANKS, (f"layout.dp_replicate={RANKS}",)),
    "zero1": (RANKS, ("strategy=zero1", f"layout.dp_shard={RANKS}")),
    "zero2": (RANKS, ("strategy=zero2", f"layout.dp_shard={RANKS}")),
    "fsdp": (RANKS, ("strategy=fsdp", f"layout.dp_shard={RANKS}")),
    "tp": (1, ("strategy=tp", f"layout.tp={RANKS}")),
    "tp_sp": (1, ("strategy=tp_sp", f"layout.tp={RANKS}")),
    "cp": (1, ("strategy=cp", f"layout.cp={RANKS}")),
    "pp": (1, ("strategy=pp", f"layout.pp={RANKS}", "gradient_accumulation_steps=4")),
}
OF_FOUR: dict[str, tuple[int, tuple[str, ...]]] = {
    "hsdp": (4, ("strategy=hsdp", "layout.dp_replicate=2", "layout.dp_shard=2")),
    "fsdp_tp": (2, ("strategy=fsdp_tp", "layout.dp_shard=2", "layout.tp=2")),
    "pp_fsdp": (
        2,
        ("strategy=pp_fsdp", "layout.pp=2", "layout.dp_shard=2", "gradient_accumulation_steps=4"),
    ),
}
MODEL = ("model.n_layer=4", "model.d_model=128", "model.n_head=4", "steps=12")


def train(
    folder: Path, *overrides: str, sequences: int = BATCH, device: str = "cuda"
) -> dict[str, Any]:
    """A run's ledger."""
    sizes = (f"micro_batch_size={sequences}", f"device={device}")
    own = (*SMALL, *MODEL, *sizes, *overrides)
    done = launch(*own, "run.dir=run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return ledgers.read(folder / "run" / "ledger.json")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """fp32 on one GPU."""
    return train(tmp_path_factory.mktemp("alone"), "strategy=single")


def test_one_gpu_trains_as_a_core_does(alone: dict[str, Any], tmp_path: Path) -> None:
    """The host of a GPU reads what a step came to when the next one is on its way."""
    found = train(tmp_path, "strategy=single", device="cpu")["training"]
    assert alone["training"]["losses"] == pytest.approx(found["losses"], abs=1e-3)
    assert alone["training"]["validation_loss"] == pytest.approx(found["validation_loss"], abs=1e-3)


OVER_GLOO = ("ddp", "zero1", "zero2")  # which sends no other kind of message from a GPU (2.11)


@pytest.mark.parametrize("name", [*STRATEGIES, *OF_FOUR])
def test_each_strategy_trains_on_gpus_as_one_does(
    name: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    ranks = 4 if name in OF_FOUR else RANKS
    shares, overrides = {**STRATEGIES, **OF_FOUR}[name]
    pieces = 4 if "gradient_accumulation_steps=4" in overrides else 1
    backend = "nccl" if ranks <= GPUS else "gloo"
    if backend == "gloo" and name not in OVER_GLOO:
        pytest.skip(f"there are {GPUS} GPUs, and gloo cannot send what it sends")
    given = (*overrides, f"backend={backend}")
    found = train(tmp_path, *given, sequences=BATCH // shares // pieces)
    assert found["environment"]["backend"] == backend
    assert found["layout"]["world_size"] == ranks
    assert found["training"]["losses"] == pytest.approx(alone["training"]["losses"], abs=1e-3)


def test_memory_is_what_the_allocator_says(tmp_path: Path) -> None:
    """The meter counts storages. The allocator rounds each up, and holds what cuBLAS works in: of a
    model that is large enough that is little."""
    shape = ("model=gpt2", "seq_len=512", "micro_batch_size=8", "steps=6", "data=generated")
    less = ("validation.batches=0", "sample.tokens=0", "run.save=false", "run.dir=run", "--json")
    done = launch(*shape, *less, "strategy=single", "device=cuda", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (step,) = ledgers.read(tmp_path / "run" / "ledger.json")["ranks"]
    said = step["process_bytes"]["allocator_peak"]
    assert step["memory_bytes"]["peak"] == pytest.approx(said, rel=0.03)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_low_precision_stays_near_fp32(
    precision: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    if precision == "fp8" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    found = train(tmp_path, "strategy=single", f"precision={precision}")
    losses = found["training"]["losses"]
    assert losses != alone["training"]["losses"], "something was rounded"
    assert losses == pytest.approx(alone["training"]["losses"], abs=0.1)


def test_a_compiled_step_learns_the_same(alone: dict[str, Any], tmp_path: Path) -> None:
    found = train(tmp_path, "strategy=single", "compile=true")
    assert found["training"]["losses"] == pytest.approx(alone["training"]["losses"], abs=1e-3)
    (step,) = found["ranks"]
    assert step["memory_bytes"]["peak"] is None, "its operators are not seen"
    assert step["process_bytes"]["allocator_peak"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_in_pieces_is_flash_attention(dtype: torch.dtype) -> None:
    """The kernels that ring attention calls by name, against the fused operator."""
    torch.manual_seed(0)
    shape = (2, 4, 256, 64)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
    forward, backward = kernels_for(q)
    out, lse = forward(q, k, v, True)
    gradients = backward(grad, q, k, v, out, lse, True)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*inputs, is_causal=True)
    wanted.backward(grad)
    most = 2e-2 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(out, wanted.detach(), atol=most, rtol=most)
    for found, x in zip(gradients, inputs, strict=True):
        torch.testing.assert_close(found, x.grad, atol=3 * most, rtol=3 * most)


def test_the_models_attention_can_be_the_flash_kernel() -> None:
    """sdpa_kernel raises where that kernel cannot take what it is given."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no flash kernel")
    q, k, v = torch.randn(3, 2, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert sdpa(q, k, v).isfinite().all()


def test_a_step_is_timed_on_the_device() -> None:
    """The host hands over a wait of the device's and goes on; the phases have it all the same."""
    cycles = 50_000_000
    timer = StepTimer(torch.device("cuda", 0), None)
    torch.cuda._sleep(cycles)  # once, so that the kernel is loaded
    with timer.step():
        with timer.phase("data"):
            pass
        with timer.phase("forward_backward"), timer.action("forward", 0, 0):
            torch.cuda._sleep(cycles)
        with timer.phase("optimizer"):
            torch.cuda._sleep(cycles // 4)
    timer.settle()
    parts = timer.record.parts([], metered=True)
    compute, optimizer = parts["compute"], parts["optimizer"]
    assert compute and optimizer and parts["total"]
    assert compute / optimizer == pytest.approx(4, rel=0.25)
    assert compute + optimizer == pytest.approx(parts["total"], rel=0.1)
    (action,) = timer.record.actions
    assert action.end - action.start == pytest.approx(compute, rel=0.1)


def test_a_trace_has_the_kernels(tmp_path: Path) -> None:
    train(tmp_path, "strategy=single", "trace=true")
    assert (tmp_path / "run" / "trace.json.gz").is_file()
    with gzip.open(tmp_path / "run" / "kernels-0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)


def test_calibrate_measures_the_gpus(tmp_path: Path) -> None:
    done = launch("calibrate", "to=mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cluster = clusters.read(tmp_path / "mine.yaml")
    assert cluster.device.name == torch.cuda.get_device_name(0) and cluster.node_size == GPUS
    assert cluster.device.flops("bf16") > cluster.device.flops("fp32")
    assert bool(cluster.in_node.collectives) == (GPUS > 1)
    assert {path.suffix for path in tmp_path.glob("mine.*")} == {".yaml", ".png", ".csv"}
