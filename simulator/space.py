"""Every plan that a number of devices allows for a model and a global batch, as arrays.

The rules are parallel/rules.py's own, so that nothing is searched that would be refused. They are
asked once for each combination of what they look at: far fewer than there are plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from minigpt.config import FFN, ModelConfig
from minigpt.finetune import FinetuneConfig
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)
from parallel.rules import check_plainly, takes
from simulator.plans import CHECKPOINTING, PRECISIONS, SCHEDULES, Array, Plans, distinct

# stages a rank that schedules with several are tried with: torch keeps three of them gathered
LOOPED = (2, 3)
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
ALL_OF_IT = FinetuneConfig()  # nothing is frozen


@dataclass(frozen=True)
class Space:
    """What is searched. `fixed`: axes whose size is given."""

    model: ModelConfig
    seq_len: int
    devices: int
    batch_size: int  # sequences of one optimiser step
    fixed: dict[str, int] = field(default_factory=dict)
    precisions: Iterable[Precision] = (Precision.bf16,)
    checkpointing: Iterable[ActivationCheckpointing] = (
        ActivationCheckpointing.none,
        ActivationCheckpointing.selective,
        ActivationCheckpointing.full,
    )
    schedules: Iterable[PipelineSchedule] = SCHEDULES
    zero_stages: Iterable[int] = (1, 2, 3)
    gradient_syncs: Iterable[GradientSync] = tuple(GradientSync)
    # with tp: it sends as many bytes and keeps fewer (Korthikanti et al. 2022), so not without
    sequence_parallel: Iterable[bool] = (True,)
    micro_batch_sizes: Iterable[int] = MICRO_BATCH_SIZES


def plans_of(space: Space) -> tuple[Plans, Counter[str]]:
    """The plans that the rules let pass, and how many they refuse, by the key that is at fault.

    Raises ValueError where no layout has so many devices, or none divides the batch.
    """
    layouts = layouts_of(space)
    if not len(layouts):
        given = " ".join(f"layout.{axis}={size}" for axis, size in space.fixed.items())
        raise ValueError(f"gpus={space.devices}: no layout has so many ranks with {given}")
    plans = _filled(space, layouts)
    if not len(plans):
        _, replicate, shard, *_ = layouts.T
        if np.any(space.batch_size % (replicate * shard * min(space.micro_batch_sizes)) == 0):
            raise ValueError(
                f"layout.pp: all layouts of {space.devices} ranks that divide the batch have more "
                f"stages than model.n_layer({space.model.n_layer})"
            )
        raise ValueError(
            f"global batch of {space.batch_size} sequences: no layout of {space.devices} ranks "
            "divides it into whole micro-batches"
        )
    return _allowed(plans)


def layouts_of(space: Space) -> Array:
    """(N, 6): sizes of MESH_AXES and ep, of every layout that has the devices."""
    model, found = space.model, []
    divisors = [n for n in range(1, space.devices + 1) if space.devices % n == 0]

    def sizes(axis: str, rest: int) -> list[int]:
        if axis in space.fixed:
            return [space.fixed[axis]] if rest % space.fixed[axis] == 0 else []
        most = {"pp": model.n_layer, "tp": model.kv_heads, "cp": space.seq_len // 2}.get(axis, rest)
        return [n for n in divisors if rest % n == 0 and n <= most]

    experts = [n for n in range(1, model.n_expert + 1) if model.n_expert % n == 0]
    for pp in sizes("pp", space.devices):
        for tp in sizes("tp", space.devices // pp):
            for cp in sizes("cp", space.devices // pp // tp):
                data = space.devices // pp // tp // cp
                for shard in sizes("dp_shard", data):
                    if data // shard not in sizes("dp_replicate", data // shard):
                        continue
                    for ep in experts if model.ffn == FFN.moe else [1]:
                        if data % ep == 0 and space.fixed.get("ep", ep) == ep:
                            found.append((pp, data // shard, shard, cp, tp, ep))
    return np.array(found, dtype=np.int64).reshape(-1, len(MESH_AXES) + 1)


def _filled(space: Space, layouts: Array) -> Plans:
    """Each layout with every combination of options that means something for it."""
    options = [
        (
            SCHEDULES.index(schedule),
            stages,
            CHECKPOINTING.index(checkpointing),
            PRECISIONS.index(precision),
            zero,
            sync == GradientSync.micro_batch,
            sequence,
            size,
        )
        for schedule in space.schedules
        for stages in stages_a_rank(schedule)
        for checkpointing in space.checkpointing
        for precision in space.precisions
        for zero in space.zero_stages
        for sync in space.gradient_syncs
        for sequence in space.sequence_parallel
        for size in space.micro_batch_sizes
    ]
    table = np.array(options, dtype=np.int64)
    schedule, stages, checkpointing, precision, zero, each, sequence, size = table.T
    pp, replicate, shard, _, tp, _ = (column[:, None] for column in layouts.T)
    accumulates = (space.batch_size > replicate * shard * size) & (pp == 1)
    scatters = accumulates & (shard > 1) & (zero > 1)
    # an option that changes nothing is tried once
    first = (schedule == schedule[0]) & (stages == stages[0])
    makes_sense = (
        ((pp > 1) | first)
        & ((shard > 1) | (zero == zero[0]))
        & (scatters | (each == each[0]))
        & ((tp > 1) | (sequence == sequence[0]))
        & (space.batch_size % (replicate * shard * size) == 0)
        & (pp * stages <= space.model.n_layer)
    )
    rows, columns = np.nonzero(makes_sense)
    chosen: dict[str, Any] = {name: layouts[rows, i] for i, name in enumerate((*MESH_AXES, "ep"))}
    own = {
        "schedule": schedule,
        "local_stages": stages,
        "checkpointing": checkpointing,
        "precision": precision,
        "zero_stage": zero,
        "micro_batch_size": size,
    }
    chosen |= {name: values[columns] for name, values in own.items()}
    chosen["syncs_each"] = (each[columns] == 1) & scatters[rows, columns]
    chosen["sequence_parallel"] = sequence[columns].astype(bool) & (chosen["tp"] > 1)
    chosen["local_stages"] = np.where(chosen["pp"] > 1, chosen["local_stages"], 1)
    ranks = chosen["dp_replicate"] * chosen["dp_shard"]
    chosen["micro_batches"] = space.batch_size // (ranks * chosen["micro_batch_size"])
    return Plans(space.model, space.seq_len, **chosen)


def stages_a_rank(schedule: PipelineSchedule) -> tuple[int, ...]:
    """What a schedule can be given."""
    pipeline = PipelineConfig(schedule=schedule)
    if pipeline.one_stage_a_rank:
        return (1,)
    return (2,) if pipeline.is_v_shaped else LOOPED


def _allowed(plans: Plans) -> tuple[Plans, Counter[str]]:
    """Those that parallel.rules lets pass.

    Of micro-batches the rules ask one thing only, so that is asked apart; and whether an axis is
    there, not how long it is, of the data axes where no experts are cut out of them, and of pp: no
    plan here has more stages than blocks.
    """
    there = [
        np.where(plans.ep > 1, axis, np.minimum(axis, 2))
        for axis in (plans.dp_replicate, plans.dp_shard)
    ]
    options = [plans.schedule, plans.local_stages, plans.checkpointing, plans.zero_stage]
    options.append(plans.syncs_each)
    stages = np.minimum(plans.pp, 2)
    shape = [stages, *there, plans.cp, plans.tp, plans.ep, plans.sequence_parallel, *options]
    filled = replace(plans, micro_batches=2 * plans.pp)  # which every schedule takes
    counts = [plans.pp, plans.schedule, plans.local_stages, plans.micro_batches]
    refused: Counter[str] = Counter()
    passed = np.ones(len(plans), dtype=bool)
    for asked, keys in ((filled, shape), (plans, counts)):
        judge = fault if asked is filled else _miscount
        faults = np.full(len(plans), "", dtype=object)
        for first, places in zip(*distinct(keys), strict=True):
            faults[places] = judge(asked, int(first))
        refused.update(Counter(faults[passed & (faults != "")].tolist()))
        passed &= faults == ""
    return plans[passed], refused


def fault(plans: Plans, i: int) -> str:
    """The key that the rules refuse plan `i` for; nothing where they let it pass. Besides: a split
    backward runs checkpointed blocks once for each weight, which no closed form of time knows, and
    nobody wants (experiments/warn.py)."""
    options = options_at(plans, i)
    try:
        check_plainly(plans.model, layout_at(plans, i), options)
    except ValueError as error:
        return str(error).partition("=")[0]
    again = options.activation_checkpointing != ActivationCheckpointing.none
    return "activation_checkpointing" if again and options.pipeline.splits_backward else ""


def _miscount(plans: Plans, i: int) -> str:
    pp, pipeline = int(plans.pp[i]), options_at(plans, i).pipeline
    good = pp == 1 or takes(pipeline, pp, int(plans.micro_batches[i]))
    return "" if good else "gradient_accumulation_steps"


def layout_at(plans: Plans, i: int) -> Layout:
    """The layout of plan `i`."""
    return Layout(**{axis: int(getattr(plans, axis)[i]) for axis in (*MESH_AXES, "ep")})


def options_at(plans: Plans, i: int) -> Options:
    """The options of plan `i`, as a run would be given them."""
    alone = int(plans.pp[i]) == 1
    pipeline = PipelineConfig() if alone else _pipeline(plans.schedule[i], plans.local_stages[i])
    return Options(
        precision=PRECISIONS[plans.precision[i]],
        activation_checkpointing=CHECKPOINTING[plans.checkpointing[i]],
        zero_stage=int(plans.zero_stage[i]),
        gradient_sync=GradientSync.micro_batch if plans.syncs_each[i] else GradientSync.step,
        sequence_parallel=bool(plans.sequence_parallel[i]),
        pipeline=pipeline,
        micro_batch_size=int(plans.micro_batch_size[i]),
        seq_len=plans.seq_len,
        micro_batches=int(plans.micro_batches[i]),
        finetune=ALL_OF_IT,
    )


@lru_cache(maxsize=256)
def _pipeline(schedule: int, stages: int) -> PipelineConfig:
    return PipelineConfig(SCHEDULES[schedule], int(stages))
