"""docs/results/gpu.md: GPT-2 124M on one GPU, beside a plain nanoGPT-like loop and beside
predictions.

./launch.sh python -m experiments.figures.gpu_report > docs/results/gpu.md    4 minutes at most; a
CUDA GPU

Predictions know nothing of these runs: they are the closed forms on what the same GPU was found to
take for products, copies and attention (experiments/calibrate/device_times.py).
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from costs.flops import measure_peak_flops
from costs.moments import wait_for
from experiments.assemble import make_batches, make_trainer
from experiments.calibrate.gpu import calibration_of_gpus
from experiments.calibrate.ranks import Found, measure_alone
from experiments.config import TrainConfig
from experiments.console import progress
from experiments.document import heading, marked, rule, table
from experiments.environment import gpu_count
from experiments.figures.yardstick import Shape, plain_gpu_loop
from experiments.metering import Meters, flops_per_token, utilisation
from experiments.overrides import composed
from experiments.train import train_step
from minigpt.corpus import prepare
from parallel.mesh import build_mesh
from simulator.estimate import step_seconds
from simulator.formula_ledger import formula_steps
from simulator.habits import COMPILED
from simulator.hardware import Cluster
from simulator.plans import Plans
from simulator.work import Work

COMMAND = "./launch.sh python -m experiments.figures.gpu_report > docs/results/gpu.md"
EAGER_STEPS, WARMUP, ROUNDS, TURN = 20, 10, 8, 10
PEAK_S = 2.0
MEMORY_BAR, TIME_BAR, SPEED_BAR = 0.03, 0.10, 1.0
Step = Callable[[], object]


@dataclass(frozen=True)
class Figures:
    """Seconds are of a step, bytes of memory at its peak."""

    device: str
    peak: float  # FLOP/s of the best matrix product
    tokens: int  # of a step
    flops: float  # model flops of a step
    ours_s: list[float]  # compiled, by turn
    plain_s: list[float]
    compiled_bytes: int | None  # of the allocator
    eager_s: float
    eager_bytes: int  # of the meters
    allocator_bytes: int | None
    predicted: dict[str, Any]  # the closed form's step, not compiled
    predicted_compiled_s: float

    @property
    def speedup(self) -> float:
        """Of ours over the plain loop's, by the medians."""
        return statistics.median(self.plain_s) / statistics.median(self.ours_s)


def gpt2(sequences: int = 16) -> TrainConfig:
    """configs/model/gpt2.yaml without biases and with the vocabulary in whole tiles of 64, as
    nanoGPT has it; the model compiled as one graph, and the loss."""
    keys = "model=gpt2 model.bias=false model.vocab_size=50304 data=random data.vocab_size=50257 "
    keys += f"optimizer.lr=6e-4 precision=bf16 micro_batch_size={sequences} seq_len=1024 "
    keys += "compile=true device=cuda strategy=single"
    return composed("train", tuple(keys.split()))


def measure(config: TrainConfig, device: torch.device) -> Figures:
    """All of it. `device`: a GPU; a test takes a core, which has no allocator to be asked."""
    progress("what this device takes for products, copies, attention")
    cluster = calibration_of_gpus([Found([], {}, measure_alone(device))], 1).cluster
    peak = measure_peak_flops(device, torch.bfloat16, PEAK_S)
    progress("operator by operator, for memory")
    eager = replace(config, compile=False, steps=EAGER_STEPS)
    meters, step = our_loop(eager, device)
    for _ in range(EAGER_STEPS):
        step()
    found = meters.costs()
    del meters, step  # before the next is measured: what is held would be held beside it
    gc.collect()  # a trainer and its meters hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    progress("compiled, and the plain loop")
    longer = replace(config, steps=WARMUP + ROUNDS * TURN)
    meters, ours = our_loop(longer, device)
    for _ in range(WARMUP):
        ours()
    plain = plain_gpu_loop(shape_of(config), device, config.compile)
    for _ in range(WARMUP):
        plain()
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):  # they take turns: a chip that gets warm slows both
        times["ours"].append(turn(ours, device))
        times["plain"].append(turn(plain, device))
    return Figures(
        device=cluster.device.name,
        peak=peak,
        tokens=config.batch_size * config.seq_len,
        flops=flops_per_token(config) * config.batch_size * config.seq_len,
        ours_s=times["ours"],
        plain_s=times["plain"],
        compiled_bytes=meters.allocator_peak,
        eager_s=found["time_s"]["total"],
        eager_bytes=found["memory_bytes"]["peak"],
        allocator_bytes=found["process_bytes"]["allocator_peak"],
        predicted=formula_steps(config.model, config.layout, config.options, cluster)[0],
        predicted_compiled_s=compiled_seconds(config, cluster),
    )


def our_loop(config: TrainConfig, device: torch.device) -> tuple[Meters, Step]:
    """The project's own step, metered as in every run."""
    trainer = make_trainer(config, build_mesh(config.layout, device))
    batches, meters = make_batches(config, prepare(config.data)), Meters(config, trainer)
    numbers = iter(range(config.steps))
    return meters, lambda: train_step(next(numbers), config, trainer, batches, meters)


def shape_of(config: TrainConfig) -> Shape:
    model = config.model
    sizes = (model.n_layer, model.n_head, model.d_model, config.seq_len, config.batch_size)
    return Shape(*sizes, vocab_size=model.vocab_size)


def turn(step: Step, device: torch.device) -> float:
    """Seconds of a step, of TURN in a row: the host may run ahead in between."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(TURN):
        step()
    wait_for(device)
    return (time.perf_counter() - start) / TURN


def compiled_seconds(config: TrainConfig, cluster: Cluster) -> float:
    """The closed form's step of a model that is one graph (simulator.habits.COMPILED)."""
    plans = Plans.of(config.model, config.layout, config.options)
    work = Work.of(plans, compiled=True, habits=COMPILED)
    return float(step_seconds(work, cluster)["total"][0])


def document(found: Figures) -> str:
    ours = statistics.median(found.ours_s)
    speedup = marked(f"{found.speedup:.3f}", found.speedup < SPEED_BAR)
    lines = [
        heading("GPT-2 124M on one GPU", COMMAND, f"one {found.device}"),
        f"GPT-2's 124M parameters without biases, {found.tokens:,} tokens a step of 1,024 each, "
        "bf16, AdamW, gradients clipped. The plain loop is nanoGPT's way "
        "(experiments/figures/yardstick.py)"
        f", compiled whole. Speeds are medians of {ROUNDS} turns of {TURN} steps; MFU is the share "
        f"of the best matrix product measured on this chip, {found.peak / 1e12:.0f} TFLOP/s.\n",
        table("loop", "step, ms", "of turns", "tokens/s", "MFU"),
        rule(5),
        row("worldsize, compiled", found.ours_s, found),
        row("plain, compiled", found.plain_s, found),
        row("worldsize, operator by operator", [found.eager_s], found),
        "",
        f"worldsize is {speedup} times as fast as the plain loop (bar: {SPEED_BAR:.1f}; bold, here "
        "and below, is not within).",
        "",
        table("", "measured", "predicted", "error", "bar"),
        rule(5),
        held("step, operator by operator, ms", 1e3 * found.eager_s, predicted_ms(found), TIME_BAR),
        held("step, compiled, ms", 1e3 * ours, 1e3 * found.predicted_compiled_s, TIME_BAR),
        *memory_rows(found),
    ]
    return "\n".join(lines)


def predicted_ms(found: Figures) -> float:
    return 1e3 * found.predicted["time_s"]["total"]


def memory_rows(found: Figures) -> list[str]:
    """Peaks in GiB: of the meters and, where there is one, of the allocator."""
    predicted = found.predicted["memory_bytes"]["peak"] / 2**30
    peaks = {
        "peak memory by the meters, GiB": found.eager_bytes,
        "peak memory by the allocator, GiB": found.allocator_bytes,
    }
    rows = [held(n, b / 2**30, predicted, MEMORY_BAR) for n, b in peaks.items() if b is not None]
    if found.compiled_bytes is not None:
        size = f"{found.compiled_bytes / 2**30:.2f}"
        rows.append(table("the same, compiled, GiB", size, "-", "-", "-"))
    return rows


def row(name: str, seconds: list[float], found: Figures) -> str:
    step = statistics.median(seconds)
    mfu = utilisation(found.flops, step, found.peak)
    span = f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}"
    return table(name, f"{1e3 * step:.1f}", span, f"{found.tokens / step:,.0f}", f"{mfu:.1%}")


def held(what: str, measured: float, predicted: float, bar: float) -> str:
    error = predicted / measured - 1
    off = marked(f"{error:+.1%}", abs(error) > bar)
    return table(what, f"{measured:.2f}", f"{predicted:.2f}", off, f"{bar:.0%}")


def main() -> int:
    if not gpu_count():
        print("gpu_report: torch sees no CUDA device here; it needs one", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    print(document(measure(gpt2(), device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
