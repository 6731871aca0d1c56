"""docs/results/parity.md: every strategy and combination against a single process.

./launch.sh python -m experiments.figures.matrix > docs/results/parity.md   more than an hour on
two cores
./launch.sh python -m experiments.figures.matrix cp4 "fsdp2 x tp2"    only those, to the screen
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from experiments.document import heading
from experiments.figures.parity import (
    GLOBAL_BATCH,
    STEPS,
    VARIANTS,
    Difference,
    Plan,
    differences,
)
from experiments.ranks import RankFailed
from parallel.layout import (
    ActivationCheckpointing,
    GradientSync,
    Impl,
    Layout,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)

COMMAND = "./launch.sh python -m experiments.figures.matrix > docs/results/parity.md"
PATIENCE_S = 3600.0  # of all plans that run together
TOGETHER = 8  # plans
COLUMNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation 4": VARIANTS["accumulation"],
    "clipping": VARIANTS["clipping"],
    "tied": VARIANTS["tied"],
    "checkpointing": {"activation_checkpointing": ActivationCheckpointing.full},
    "selective": {"activation_checkpointing": ActivationCheckpointing.selective},
    "uneven tokens": VARIANTS["uneven"],
    "SGD": VARIANTS["sgd"],
    "bf16": {"precision": Precision.bf16, "clip": 0.5},
}
FILLED = {"gradient_accumulation_steps": 4}  # micro-batches of a pipeline
EXPERTS = {"model.ffn": "moe", "model.n_expert": 4, "model.d_ff": 64}
# With seed 0 one token's choice hangs on a probability 3e-8 above another, below fp32's rounding
CAPPED = {**EXPERTS, "model.capacity_factor": 1.0, "seed": 2}
SEQUENCE = {"sequence_parallel": True}
KEPT = {"zero_stage": 2}
EACH = {**FILLED, "gradient_sync": GradientSync.micro_batch}
HAND = {"impl": Impl.by_hand}


def schedule(name: str) -> dict[str, Any]:
    return {**FILLED, "pipeline": PipelineConfig(schedule=PipelineSchedule(name))}


def plan(name: str, changes: dict[str, Any] | None = None, **axes: int) -> Plan:
    return Plan(name, Layout(**axes), changes or {})


PLANS = [
    # alone
    plan("ddp2", dp_replicate=2),
    plan("zero1 2", {"zero_stage": 1}, dp_shard=2),
    plan("zero2 2", KEPT, dp_shard=2),
    plan("fsdp2", dp_shard=2),
    plan("zero2 2, each scatters", {**EACH, **KEPT}, dp_shard=2),
    plan("fsdp2, each scatters", EACH, dp_shard=2),
    plan("tp2", tp=2),
    plan("tp2 sequence", SEQUENCE, tp=2),
    *[plan(f"pp2 {s.value}", schedule(s.value), pp=2) for s in PipelineSchedule],
    plan("pp2, 3 + 1 blocks", {**FILLED, "pipeline": PipelineConfig(split=[3, 1])}, pp=2),
    plan("cp2", cp=2),
    plan("ep2 of ddp2", EXPERTS, dp_replicate=2, ep=2),
    plan("ep2 of fsdp2", EXPERTS, dp_shard=2, ep=2),
    plan("ddp4", dp_replicate=4),
    plan("zero1 4", {"zero_stage": 1}, dp_shard=4),
    plan("zero2 4", KEPT, dp_shard=4),
    plan("fsdp4", dp_shard=4),
    plan("tp4", tp=4),
    plan("tp4 sequence", SEQUENCE, tp=4),
    plan("pp4 1f1b", FILLED, pp=4),
    plan("pp4 gpipe", schedule("gpipe"), pp=4),
    plan("cp4", cp=4),
    plan("ep4 of fsdp4, capacity", CAPPED, dp_shard=4, ep=4),
    # the same written out by hand, and through Accelerate
    plan("ddp2 by hand", HAND, dp_replicate=2),
    plan("zero1 2 by hand", {**HAND, "zero_stage": 1}, dp_shard=2),
    plan("fsdp2 by hand", HAND, dp_shard=2),
    plan("tp2 by hand", HAND, tp=2),
    plan("tp2 sequence by hand", {**HAND, **SEQUENCE}, tp=2),
    plan("pp2 by hand", {**HAND, **FILLED}, pp=2),
    plan("ddp2 through accelerate", {"impl": Impl.accelerate}, dp_replicate=2),
    # pairs
    plan("hsdp 2 x 2", dp_replicate=2, dp_shard=2),
    plan("hsdp 2 x 2, each scatters", EACH, dp_replicate=2, dp_shard=2),
    plan("ddp2 x tp2", dp_replicate=2, tp=2),
    plan("fsdp2 x tp2", dp_shard=2, tp=2),
    plan("fsdp2 x tp2 sequence", SEQUENCE, dp_shard=2, tp=2),
    plan("fsdp2 x tp2 sequence, each scatters", {**EACH, **SEQUENCE}, dp_shard=2, tp=2),
    plan("pp2 x ddp2", FILLED, pp=2, dp_replicate=2),
    plan("pp2 x fsdp2", FILLED, pp=2, dp_shard=2),
    plan("pp2 x zero2 2", {**FILLED, **KEPT}, pp=2, dp_shard=2),
    plan("pp2 zero bubble x zero2 2", {**schedule("zbv_zero_bubble"), **KEPT}, pp=2, dp_shard=2),
    plan("pp2 interleaved x ddp2", schedule("interleaved_1f1b"), pp=2, dp_replicate=2),
    plan("pp2 x tp2", FILLED, pp=2, tp=2),
    plan("pp2 x tp2 sequence", {**FILLED, **SEQUENCE}, pp=2, tp=2),
    plan("cp2 x ddp2", cp=2, dp_replicate=2),
    plan("cp2 x fsdp2", cp=2, dp_shard=2),
    plan("cp2 x tp2", cp=2, tp=2),
    plan("cp2 x tp2 sequence", SEQUENCE, cp=2, tp=2),
    plan("pp2 x cp2", FILLED, pp=2, cp=2),
    plan("fsdp4, ep2", EXPERTS, dp_shard=4, ep=2),
    plan("fsdp4, two experts", {**EXPERTS, "model.n_expert": 2}, dp_shard=4),
    plan("fsdp4, ep2, two experts", {**EXPERTS, "model.n_expert": 2}, dp_shard=4, ep=2),
    plan("ddp4, ep2, capacity", CAPPED, dp_replicate=4, ep=2),
    plan("fsdp4, ep2, each scatters", {**EACH, **EXPERTS}, dp_shard=4, ep=2),
    plan("hsdp 2 x 2, ep2", EXPERTS, dp_replicate=2, dp_shard=2, ep=2),
    plan("hsdp 2 x 2, ep2, each scatters", {**EACH, **EXPERTS}, dp_replicate=2, dp_shard=2, ep=2),
    plan("pp2 x fsdp2, ep2", {**FILLED, **EXPERTS}, pp=2, dp_shard=2, ep=2),
    # three and more
    plan("pp2 x fsdp2 x tp2", FILLED, pp=2, dp_shard=2, tp=2),
    plan("pp2 x zero2 2 x tp2 sequence", {**FILLED, **KEPT, **SEQUENCE}, pp=2, dp_shard=2, tp=2),
    plan("pp2 x ddp2 x tp2", FILLED, pp=2, dp_replicate=2, tp=2),
    plan("hsdp 2 x 2 x tp2", dp_replicate=2, dp_shard=2, tp=2),
    plan("fsdp2 x cp2 x tp2", dp_shard=2, cp=2, tp=2),
    plan("pp2 x fsdp2 x cp2", FILLED, pp=2, dp_shard=2, cp=2),
    plan("pp2 x cp2 x tp2", FILLED, pp=2, cp=2, tp=2),
]


def plan_named(name: str) -> Plan:
    """One of PLANS."""
    return next(plan for plan in PLANS if plan.name == name)


Row = dict[str, Difference | str]


def measure(plans: list[Plan]) -> Iterator[tuple[Plan, Row]]:
    """Each plan's cells; a plan that fails says so in each of them.

    Neighbours of the same world size share their processes, which take long to start; where one of
    them fails they are tried one by one.
    """
    for _, group in itertools.groupby(plans, key=lambda one: one.layout.world_size):
        same = list(group)
        for i in range(0, len(same), TOGETHER):
            yield from _measure_together(same[i : i + TOGETHER])


def _measure_together(plans: list[Plan]) -> Iterator[tuple[Plan, Row]]:
    print(", ".join(one.name for one in plans), file=sys.stderr, flush=True)
    try:
        cells = differences(plans, COLUMNS, PATIENCE_S)
    except RankFailed as failed:
        if len(plans) > 1:
            for one in plans:
                yield from _measure_together([one])
            return
        reason = f"FAILED: {str(failed).splitlines()[-1]}"
        cells = {(plans[0].name, variant): reason for variant in COLUMNS}
    for one in plans:
        yield one, {variant: cells[one.name, variant] for variant in COLUMNS}


def shown(variant: str, cell: Difference | str, reasons: list[str]) -> str:
    """A cell of the table. What is refused points to its reason."""
    if isinstance(cell, str):
        if cell not in reasons:
            reasons.append(cell)
        return f"refused [{reasons.index(cell) + 1}]"
    holds = cell.is_near if variant == "bf16" else cell.holds
    norm = "-" if cell.norm is None else f"{cell.norm:.0e}"
    return f"{cell.loss:.0e} {cell.gradient:.0e} {norm}" + ("" if holds else " **NO**")


INTRO = f"""
Each cell: the largest difference to a single process over {STEPS} steps of the loss (nats), of any
parameter's gradient after the first step (relative), and of the gradient norm (relative; - where
none was taken). fp32, {GLOBAL_BATCH} sequences a step for every layout, dealt in the same order.
Bounds: 5e-6, 1e-5, 3e-5; for bf16, against fp32: 2e-2, 0.2, 2e-2. **NO** would mark a cell that
is not within them. Plans with experts are compared with a single process with experts.
"""


def main(names: list[str]) -> None:
    """Print the document, or the rows that are asked for."""
    print(heading("Parity", COMMAND), end="")
    print(INTRO)
    print(f"| layout | ranks | {' | '.join(COLUMNS)} |")
    print(f"|---|--:|{'---|' * len(COLUMNS)}")
    reasons: list[str] = []
    for one, row in measure([p for p in PLANS if not names or p.name in names]):
        cells = " | ".join(shown(variant, cell, reasons) for variant, cell in row.items())
        print(f"| {one.name} | {one.layout.world_size} | {cells} |", flush=True)
    for number, reason in enumerate(reasons, 1):
        print(f"\n[{number}] {reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
