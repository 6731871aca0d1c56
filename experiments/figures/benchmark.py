"""docs/results/benchmarks.md: how fast it is beside plain torch loops, and how near to the closed
forms.

./launch.sh python -m experiments.figures.benchmark > docs/results/benchmarks.md  15 minutes, 2
cores

A ratio is the median of the ratios of neighbouring steps (experiments/figures/contest.py).
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from costs import ledger as ledgers
from costs.messages import payloads
from experiments import environment
from experiments.console import progress
from experiments.document import marked, rule, table
from experiments.figures import contest, parity
from experiments.figures.yardstick import Shape
from experiments.metering import flops_per_token
from experiments.ranks import ROOT
from minigpt.config import ModelConfig
from parallel.layout import Layout, Options
from simulator.communication import payload_bytes

SHAPES = {"S": Shape(4, 4, 128, 64, 12), "L": Shape(6, 6, 384, 256, 8)}
ROUNDS = {"S": 70, "L": 10}
BARS = {"S fp32": 1.05, "S bf16": 0.60, "L fp32": 1.05, "L bf16": 0.55}
WRAPPER_BAR = 1.05
DATA_LAYOUTS = [
    Layout(dp_replicate=2),
    Layout(dp_shard=2),
    Layout(dp_replicate=4),
    Layout(dp_shard=4),
    Layout(dp_replicate=2, dp_shard=2),
]
LAUNCHES = 3
COMMAND = "./launch.sh python -m experiments.figures.benchmark > docs/results/benchmarks.md"


def launch(*arguments: str, root: Path = ROOT) -> tuple[float, str]:
    """Run launch.sh as a user does: seconds and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        [str(root / "launch.sh"), *arguments], check=True, capture_output=True, text=True, cwd=root
    )
    return time.perf_counter() - start, done.stdout


def main_job() -> list[str]:
    return [*first_launch(), "", *later_launches()]


def first_launch() -> list[str]:
    """From a bare clone: set-up, then training. pip's cache is warm, PYTHON is not the .venv's."""
    progress("a bare clone")
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "worldsize"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds, _ = launch(root=clone)
    return [
        f"A bare clone's first `./launch.sh`, set-up included (warm pip cache): {seconds:.0f} s."
    ]


def later_launches() -> list[str]:
    """The default run: how long, how good, and what it says."""
    walls, ledgers_seen, said = [], [], ""
    with tempfile.TemporaryDirectory() as name:
        for number in range(LAUNCHES):
            progress(f"./launch.sh, {number + 1} of {LAUNCHES}")
            seconds, said = launch(f"run.dir={name}/{number}")
            walls.append(seconds)
            ledgers_seen.append(ledgers.read(Path(name) / str(number) / "ledger.json"))
        progress("./launch.sh precision=bf16")
        launch("precision=bf16", f"run.dir={name}/bf16")
        low = ledgers.read(Path(name) / "bf16" / "ledger.json")
    last = ledgers_seen[-1]
    startups = [ledger["training"]["startup_s"] for ledger in ledgers_seen]
    sample = said.partition("--- sample ---\n")[2].partition("\n-----")[0]
    entropy = last["environment"]["corpus"]["unigram_entropy"]
    return [
        f"After that (median of {LAUNCHES}): {statistics.median(walls):.1f} s, of which the first "
        f"step is done after {statistics.median(startups):.1f} s. Validation loss "
        f"{last['training']['validation_loss']:.3f} nats a byte; the corpus's unigram entropy is "
        f"{entropy:.3f}. The sample:",
        "",
        *[f"    {line}" for line in sample.splitlines()],
        "",
        "The same run in bf16 (`./launch.sh precision=bf16`), mean loss of ten steps:",
        "",
        *loss_curves({"fp32": last, "bf16": low}),
    ]


def loss_curves(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Losses at a few places of each run, side by side."""
    count = len(next(iter(runs.values()))["training"]["losses"])
    ends = [10, *range(50, count + 1, 50)]
    lines = [table("steps", *[f"{end - 9}-{end}" for end in ends], "validation")]
    lines.append(rule(len(ends) + 2))
    for name, ledger in runs.items():
        losses = ledger["training"]["losses"]
        means = [statistics.mean(losses[end - 10 : end]) for end in ends]
        lines.append(table(name, *[f"{m:.3f}" for m in [*means, validation(ledger)]]))
    return lines


def validation(ledger: dict[str, Any]) -> float:
    return ledger["training"]["validation_loss"]


def speed() -> list[str]:
    """Ratios of neighbouring steps, and the share of the GEMM peak at each shape."""
    lines = [
        table("shape", "step", "ms", "plain ms", "ratio", "quartiles", "bar", "steps"),
        rule(8),
    ]
    shares = []
    for size, shape in SHAPES.items():
        progress(f"one process, {size}")
        kinds = ["plain", contest.TUNED, "fp32", "bf16", "gemm"]
        times = contest.hold(kinds, 1, shape, ROUNDS[size])
        for name in (contest.TUNED, "fp32", "bf16"):
            lines.append(ratio_row(size, name, times, "plain", BARS.get(f"{size} {name}")))
        shares.append(gemm_share(size, shape, times))
    for size, shape in SHAPES.items():
        progress(f"two ranks, {size}")
        times = contest.hold(["plain ddp", "ddp", "plain fsdp", "fsdp"], 2, shape, ROUNDS[size])
        for name in ("ddp", "fsdp"):
            lines.append(ratio_row(size, name, times, f"plain {name}", WRAPPER_BAR))
    return [*lines, "", *shares]


def ratio_row(
    size: str, name: str, times: dict[str, list[float]], against: str, bar: float | None
) -> str:
    """One line of the table of ratios."""
    ratios = [a / b for a, b in zip(times[name], times[against], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    mine, theirs = statistics.median(times[name]), statistics.median(times[against])
    spread = f"{low:.3f} - {high:.3f}"
    ms = (f"{mine * 1e3:.1f}", f"{theirs * 1e3:.1f}")
    return table(
        size,
        name,
        *ms,
        marked(f"{middle:.3f}", bar is not None and middle > bar),
        spread,
        f"<= {bar:.2f}" if bar else "",
        str(len(ratios)),
    )


def gemm_share(size: str, shape: Shape, times: dict[str, list[float]]) -> str:
    """Model flops of an fp32 step over what the best matrix product of the same run would do."""
    config = contest.our_config(shape, Layout(), steps=1)
    peak = 2 * contest.GEMM_SIZE**3 / min(times["gemm"])
    flops = flops_per_token(config) * shape.batch * shape.seq_len
    share = flops / statistics.median(times["fp32"]) / peak
    best = f"a thread's best matrix product in the same run, {peak / 1e9:.0f} GFLOP/s"
    return f"- {size}, fp32: {share:.1%} of {best}."


def agreement() -> list[str]:
    """The worst of each layout over all variants of experiments/figures/parity.py."""
    lines = [table("layout", "loss, nats", "gradient, relative", "norm, relative"), rule(4)]
    for layout in DATA_LAYOUTS:
        progress(f"parity of {layout.label}")
        plan = parity.Plan(layout.label, layout, {})
        far = [
            cell
            for cell in parity.differences([plan], parity.VARIANTS).values()
            if isinstance(cell, parity.Difference)
        ]
        norms = [cell.norm for cell in far if cell.norm is not None]
        worst = (max(c.loss for c in far), max(c.gradient for c in far), max(norms))
        lines.append(table(layout.label, *[f"{number:.1e}" for number in worst]))
    return lines


def bytes_sent() -> list[str]:
    """Measured payloads of short runs against simulator/communication.py."""
    head = ("layout", "collective", "axis", "dtype", "measured", "closed form", "difference")
    lines = [table(*head), rule(len(head))]
    for layout in DATA_LAYOUTS:
        progress(f"bytes of {layout.label}")
        axes = [f"layout.{a}={getattr(layout, a)}" for a in ("dp_replicate", "dp_shard")]
        with tempfile.TemporaryDirectory() as name:
            quick = ("steps=7", "sample.tokens=0", "validation.batches=0", "run.save=false")
            launch(*axes, *quick, f"run.dir={name}/run")
            rows = ledgers.read(Path(name) / "run" / "ledger.json")["step"]["communication"]
        wanted = payload_bytes(ModelConfig(), layout, Options())
        measured = payloads(rows or [])
        for key in sorted(wanted.keys() | measured.keys()):
            found, expected = measured.get(key, 0), wanted.get(key, 0)
            numbers = (f"{found:,}", f"{expected:,}", f"{found - expected:,}")
            lines.append(table(layout.label, *key, *numbers))
    return lines


PARTS = (
    ("The main job", "`./launch.sh` on this machine: two ranks, DDP.", main_job),
    (
        "Speed",
        "Against the plain loop of experiments/figures/yardstick.py (nanoGPT's way, fp32; for two "
        "ranks torch's wrappers with nothing set), one thread a rank, our meters on. Each "
        "contestant has processes of its own and they take turns; `plain, tuned` is the same loop "
        "with what launch.sh sets for its ranks: glibc keeps freed memory. S is 4 layers x "
        "width 128 x 64 tokens x 12 sequences, L is 6 x 384 x 256 x 8. A ratio is the median of "
        "the ratios of neighbouring steps; bf16 is held to plain fp32.",
        speed,
    ),
    (
        "Agreement with a single process",
        "The worst over 20 steps and over the variants of experiments/figures/parity.py "
        "(accumulation, clipping, a tied head, uneven token counts, SGD, checkpointing ...), fp32. "
        "Bars: 5e-6, 1e-5, 3e-5. docs/results/parity.md has every strategy.",
        agreement,
    ),
    (
        "Bytes",
        "Payloads of one step of the default model, measured and by simulator/communication.py.",
        bytes_sent,
    ),
)


def main() -> None:
    facts = environment.facts()
    machine = f"{facts['processor']}, {facts['cores']} cores, {facts['platform']}"
    versions = f"Python {facts['python']}, torch {facts['torch']}"
    print(f"# Benchmarks\n\nMade by `{COMMAND}` on {time.strftime('%Y-%m-%d')}")
    print(f"({machine}; {versions}; one thread a rank).")
    for title, intro, measure in PARTS:
        print(f"\n## {title}\n\n{intro}\n\n" + "\n".join(measure()), flush=True)


if __name__ == "__main__":
    main()
