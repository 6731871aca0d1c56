"""The pictures of README.md: a measured step of a pipeline, and who holds what by strategy.

./launch.sh python -m experiments.figures.readme_pictures       under two minutes on two cores

docs/results/step.png is the memory.png of a run of this machine (COMMAND below): four gloo ranks in
the order 1F1B. docs/results/who_holds_what.png is computed by the closed forms that the tests hold
to real ranks (simulator/memory.py).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from costs.ledger import MEMORY_PARTS
from experiments.overrides import composed
from experiments.pictures import MEMORY_COLOURS
from simulator.formula_ledger import formula_steps

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
COMMAND = (
    "strategy=pp layout.pp=4 pipeline.schedule=1f1b gradient_accumulation_steps=8 "
    "micro_batch_size=4 model.n_layer=8 steps=20 trace=true data=generated validation.batches=0 "
    "sample.tokens=0"
)
RANKS = 4
SHARED = "model=llama3_8b cluster=h200 seq_len=4096 precision=bf16 micro_batch_size=1"
PANELS = {  # title, what simulate is asked for
    "DDP: every rank holds everything": f"layout.dp_replicate={RANKS}",
    "FSDP: shards, and one gathered block": f"layout.dp_shard={RANKS}",
    "TP: a slice of every matmul": f"layout.tp={RANKS} sequence_parallel=true",
    "PP: some blocks, up to 4 micro-batches in flight": (
        f"layout.pp={RANKS} pipeline.schedule=1f1b gradient_accumulation_steps=8"
    ),
}


def measured_step(path: Path) -> None:
    """Train COMMAND and copy its picture of memory over a step to `path`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        line = [str(ROOT / "launch.sh"), *shlex.split(COMMAND), f"run.dir={run}"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        shutil.copyfile(run / "memory.png", path)


def ranks_of(overrides: str) -> list[dict[str, int]]:
    """Return `memory_bytes` at the peak of each of the RANKS ranks of a simulated plan."""
    config: Any = composed("simulate", tuple(shlex.split(f"{SHARED} {overrides}")))
    plan = (config.model, config.layout, config.options, config.cluster)
    steps = formula_steps(*plan)  # one for each pipeline rank; other ranks hold the same
    return [steps[rank * len(steps) // RANKS]["memory_bytes"] for rank in range(RANKS)]


def draw_holdings(path: Path) -> None:
    """Draw what each rank holds at its peak, by category, one panel for each of PANELS."""
    figure = Figure(figsize=(12.0, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Peak memory of each of {RANKS} ranks, by what fills it: Llama 3 8B, sequences of 4,096, "
        "bf16 (by formula)",
        ha="left",
        x=0.01,
        fontsize=11,
    )
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (title, overrides) in zip(panels, PANELS.items(), strict=True):
        _draw_ranks(axes, title, ranks_of(overrides))
    panels[0].set_ylabel("GB")
    panels[0].set_ylim(top=1.1 * panels[0].get_ylim()[1])
    patches = [Patch(color=MEMORY_COLOURS[part], label=part) for part in MEMORY_PARTS]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=130)


def _draw_ranks(axes: Axes, title: str, ranks: list[dict[str, int]]) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    for rank, held in enumerate(ranks):
        below = 0.0
        for part in MEMORY_PARTS:
            height = held[part] / 1e9
            axes.bar(rank, height, bottom=below, color=MEMORY_COLOURS[part], width=0.8)
            below += height
        axes.text(rank, below, f"{below:.0f}", ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))], fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> int:
    """Draw both pictures."""
    draw_holdings(RESULTS / "who_holds_what.png")
    measured_step(RESULTS / "step.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
