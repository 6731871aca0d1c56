"""docs/results/search.md and docs/results/search.png: what the search finds for runs that were
published.

./launch.sh python -m experiments.predict.search_report > docs/results/search.md        about two
minutes
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from experiments.compose import run_hydra, to_config
from experiments.console import human_bytes, human_seconds, share
from experiments.document import heading
from experiments.predict.plan_config import SearchConfig
from experiments.predict.score import ROWS, Scored, score
from experiments.predict.search import find, plan_of, said_of
from experiments.predict.search_picture import draw
from experiments.predict.search_tables import schedule_of
from simulator.at_scale import HOUR
from simulator.space import layout_at

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
COMMAND = "./launch.sh python -m experiments.predict.search_report > docs/results/search.md"
REPEATS = 3
PICTURE = "model=llama3_70b cluster=h100 gpus=512 global_batch_tokens=4M"
LLAMA = "model=llama3_405b cluster=h100 gpus=16384 global_batch_tokens=16M"
# 1,536 sequences of 2,048; the vocabulary is padded so that tp cuts it, as Megatron-LM does
GPT3 = "model=gpt3_175b model.vocab_size=51200 cluster=a100_80g gpus=1024 global_batch_tokens=3M"
# 1F1B's interleaved form is the newest schedule that either knew; at 8,192 tokens Llama 3 had no cp
CASES = [
    (
        "Llama 3 405B on 16,384 H100 (Llama team 2024, table 4)",
        LLAMA,
        "pp16-dp_shard128-tp8",
        "schedule=[1f1b,interleaved_1f1b] layout.cp=1 layout.dp_replicate=1",
        "llama3-002",
    ),
    (
        "GPT-3 175B on 1,024 A100 (Narayanan et al. 2021, section 5)",
        GPT3,
        "pp8-dp_replicate16-tp8",
        "schedule=[1f1b,interleaved_1f1b] layout.cp=1 layout.dp_shard=1 "
        "activation_checkpointing=[full]",
        "mega-008",
    ),
]
LAYOUTS_SHOWN = 4


def main() -> int:
    lines = [
        *heading("What the search finds", COMMAND).splitlines(),
        "",
        "All times and bytes are predictions (docs/results/score.md says how far they are from",
        "measurements); theirs is the best plan of the layout that was published.",
    ]
    scored = score(ROWS)
    for title, given, layout, had, row in CASES:
        lines += case(title, given, layout)
        lines += ["", by_their_program(scored, row, layout)]
        lines += with_what_they_had(given, had, layout)
    lines += ["", "## To the end, with failures", "", *to_the_end()]
    lines += ["", "## How long it takes", "", *timings()]
    config = configured(PICTURE)
    draw(find(config), config, DOCS / "search.png", svg_too=False)
    lines += ["", "## Memory against time", "", f"`./launch.sh search {PICTURE}`", ""]
    lines += ["![memory against time of all plans](search.png)"]
    print("\n".join(lines))
    return 0


def configured(given: str) -> SearchConfig:
    """What the command line would make of it."""
    composed: list[DictConfig] = []
    run_hydra("search", given.split(), composed.append)
    return to_config(composed[0], SearchConfig)


def case(title: str, given: str, layout: str) -> list[str]:
    """The search's own plan beside the published layout, part by part."""
    config = configured(f"{given} explain={layout}")
    said = said_of(config, find(config))
    best, theirs = said["plans"][0], said["explained"]["plan"]
    lines = [
        "",
        f"## {title}",
        "",
        f"`./launch.sh search {given} explain={layout}`: {said['predicted']:,} plans. "
        f"Theirs loses most by: {said['explained']['loses_by'] or 'nothing'}.",
        "",
        "| | the search's | theirs | theirs takes more |",
        "|---|--:|--:|--:|",
    ]
    rows = [("layout", "label"), ("schedule", "schedule"), ("stages a rank", "stages_per_rank")]
    rows += [("micro-batch", "micro_batch_size"), ("micro-batches", "gradient_accumulation_steps")]
    rows += [("checkpointing", "activation_checkpointing"), ("zero stage", "zero_stage")]
    rows.append(("gradients scattered each", "gradient_sync"))
    lines += [
        f"| {name} | {_or_dash(best[key])} | {_or_dash(theirs[key])} | |" for name, key in rows
    ]
    for part in ("step", *best["time_parts"]):
        a, b = (p["time_s"] if part == "step" else p["time_parts"][part] for p in (best, theirs))
        of_step = f"{100 * (b - a) / best['time_s']:+.1f} % of the step"
        name = part.replace("_", " ")
        lines.append(f"| {name} | {human_seconds(a)} | {human_seconds(b)} | {of_step} |")
    lines.append(f"| MFU | {share(best['mfu'], 1)} | {share(theirs['mfu'], 1)} | |")
    a, b = best["memory_bytes"], theirs["memory_bytes"]
    lines.append(f"| memory | {human_bytes(a)} | {human_bytes(b)} | {100 * (b / a - 1):+.1f} % |")
    return lines


def by_their_program(scored: Scored, name: str, layout: str) -> str:
    """The same layout as a program of its time runs it, which is a published row."""
    i = next(i for i, row in enumerate(scored.rows) if row.name == name)
    measured, predicted = scored.rows[i].seconds, float(scored.seconds[i])
    plan = scored.rows[i].candidates[0].plan
    sequences = int(plan.tokens[0]) // plan.seq_len
    assert measured
    return (
        f"Plans of a search run this program: weights, gradients and optimizer in fp32, messages "
        f"of tp in the open. {layout} as its own program ran it, with bf16 weights and messages "
        f"behind compute, is row {name} of docs/results/score.md ({sequences:,} sequences of "
        f"{plan.seq_len:,} a step): {human_seconds(measured)} measured, "
        f"{human_seconds(predicted)} predicted ({100 * (predicted / measured - 1):+.1f} %)."
    )


def to_the_end() -> list[str]:
    """Llama 3's pre-training beside what was published of it. How long its checkpoints took was
    not: weights and optimizer at 14 bytes a parameter, at the 2 TB/s of its storage."""
    lines = [
        "Published (Llama team 2024, section 3.3.4): more than 90 % effective time, 419 unexpected "
        "interruptions in 54 days, which is where the devices' mean time between failures is from.",
        "Restarts are assumed to take ten minutes.",
        "",
        "| a checkpoint takes | goodput | a checkpoint every | failures in 54 days |",
        "|--:|--:|--:|--:|",
    ]
    for seconds, why in ((30.0, "the default"), (405e9 * 14 / 2e12, "14 B a parameter at 2 TB/s")):
        given = f"{LLAMA} scale.tokens=15.6T scale.failures.checkpoint_s={seconds:.3g}"
        config = configured(given)
        run = said_of(config, find(config))["to_the_end"]
        in_54_days = run["failures"] * 54 * 24 * HOUR / run["time_s"]
        cells = (
            f"{human_seconds(seconds)} ({why})",
            share(run["goodput"], 1),
            human_seconds(run["checkpoint_interval_s"]),
            f"{in_54_days:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def with_what_they_had(given: str, had: str, layout: str) -> list[str]:
    """The best layouts of a smaller space, each with its best plan, and the place of theirs."""
    found = find(configured(f"{given} {had}"))
    places: dict[str, list[int]] = {}
    for i in found.order.tolist():
        places.setdefault(layout_at(found.predicted.plans, i).label, []).append(i)
    plans = [plan_of(found, found.best_of(np.array(own))) for own in places.values()]
    best = {p["label"]: p for p in sorted(plans, key=lambda p: p["time_s"]) if p["fits"]}
    names = list(best)
    shown = names[:LAYOUTS_SHOWN] + [n for n in names[LAYOUTS_SHOWN:] if n == layout]
    lines = [
        "",
        f"With what they had, `{had}`, the best of {len(names)} layouts:",
        "",
        "| | layout | schedule | batch | checkpointing | step | MFU | memory |",
        "|--:|---|---|---|---|--:|--:|--:|",
    ]
    for name in shown:
        plan = best[name]
        size, count = plan["micro_batch_size"], plan["gradient_accumulation_steps"]
        cells = [
            str(names.index(name) + 1),
            f"**{name}**" if name == layout else name,
            schedule_of(plan),
            f"{size} x {count}",
            plan["activation_checkpointing"],
            human_seconds(plan["time_s"]),
            share(plan["mfu"], 1),
            human_bytes(plan["memory_bytes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def timings() -> list[str]:
    """CPU seconds of a search, after start-up."""
    lines = [f"CPU time after start-up, median of {REPEATS}.", ""]
    lines += ["| search | plans | seconds |", "|---|--:|--:|"]
    for given in (PICTURE, LLAMA):
        config, taken, plans = configured(given), [], 0
        for _ in range(REPEATS):
            start = time.process_time()
            plans = len(find(config).predicted)
            taken.append(time.process_time() - start)
        lines.append(f"| `{given}` | {plans:,} | {statistics.median(taken):.2f} |")
    return lines


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
