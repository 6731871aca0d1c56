"""Twice the sequence or the replicas never make a step faster, and twice the micro-batches never
make the bubble a larger share of it, whatever the plan; but for the exceptions named below, each
with its reason and its bound.

A replica reads micro-batches of its own, so that a rank's work stays. Twice the dp_shard is no
such pair: each rank then updates half the weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.predict import clusters
from minigpt.config import FFN, ModelConfig
from parallel.layout import (
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)
from parallel.rules import fits
from simulator import order_times
from simulator.estimate import idle_seconds, step_seconds
from simulator.plans import Array, Plans
from simulator.shapes import Rank, stage_blocks
from simulator.work import Work

NAMES = ("h100", "a100_40g", "gb200_nvl72", "v100", "mi300x", "tpu_v5p", "ethernet_10g", "laptop")
CLUSTERS = {name: clusters.load(name) for name in (*NAMES, "h200_measured")}
ROUNDING = 1 + 1e-9
# schedules that go round their virtual stages, or fill bubbles with gradients of weights
IN_TURNS = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")


class Case(NamedTuple):
    """One plan on a cluster."""

    cluster: str
    model: ModelConfig
    layout: Layout
    options: Options

    @property
    def plan(self) -> Plans:
        """The plan as arrays of one entry."""
        return Plans.of(self.model, self.layout, self.options)

    @property
    def allowed(self) -> bool:
        """Whether the rules let the plan pass."""
        return fits(self.model, self.layout, self.options)


def doubled(case: Case) -> dict[str, Case]:
    """Return the plans with twice of one thing, by what that is."""
    options, layout = case.options, case.layout
    replicas = replace(layout, dp_replicate=2 * layout.dp_replicate)
    longer = replace(options, seq_len=2 * options.seq_len)
    more = replace(options, micro_batches=2 * options.micro_batches)
    return {
        "sequence": case._replace(options=longer),
        "replicas": case._replace(layout=replicas),
        "micro-batches": case._replace(options=more),
    }


def starts_a_precision_policy(once: Plans, twice: Plans) -> bool:
    """Return whether the first replica brings torch's mixed-precision policy with it.

    tp and pp without any data axis run under autocast, which keeps residuals in fp32 and sends
    them so. With one, the policy of fully_shard or replicate casts weights, and all activations
    are low (parallel/precision.py): half the bytes over tp and pp, so at least half the seconds.
    """
    return bool(Rank(once).has_policy[0] != Rank(twice).has_policy[0])


def splits_otherwise(once: Plans, twice: Plans) -> bool:
    """Return whether a longer sequence divides the blocks over stages in another way.

    They are divided by flops, of which the head has a smaller share the longer the sequence is.
    Where the host's launches set the pace each block takes the same time whatever its flops, and
    the split that is even in flops for the longer sequence may be the more even one in blocks. No
    step gets faster by more than the stage that gives away most of its blocks.
    """
    return not np.array_equal(stage_blocks(once), stage_blocks(twice))


def launches_ahead(case: Case) -> bool:
    """Return whether the host of a pipeline with data axes launches blocks ahead during the head.

    The host sets the pace of blocks, but not of those that it launches while the device is at the
    head: their backward is shorter, and fewer gradients hide behind it. A longer sequence leaves
    less to launch ahead, so that more hides; if the stage of the head does not set the pace, then
    nothing else takes longer. 0.5 % of a step was seen.
    """
    if case.layout.pp == 1 or case.layout.data_parallel * case.layout.cp == 1:
        return False
    return bool(idle_seconds(Work.of(case.plan), CLUSTERS[case.cluster])[0] > 0)


MOST_AHEAD = 0.02  # of a step


def waits_in_turns(case: Case) -> bool:
    """Return whether stages, or halves of a backward, wait for their turn in torch's order.

    It is fixed whatever they take. The first round of an interleaved or zero bubble schedule hides
    what uneven stages wait for, and the next may not: simulator.order_times.walk shows that with
    no messages at all, by up to 7.6 points of 1,000 random durations a schedule, pp and m.
    """
    return case.layout.pp > 1 and case.options.pipeline.schedule.value in IN_TURNS


MOST_IN_TURNS = 0.1  # of a step, which its share of bubble may grow by


def goes_on_in_a_line(case: Case) -> bool:
    """Return whether the schedule is walked through for fewer micro-batches than the plan has.

    The rest then goes on in a straight line (simulator.order_times.bases), which is short where
    hops and uneven stages have not settled by then: 0.9 % of a step was seen.
    """
    pipeline, pp, m = case.options.pipeline, case.layout.pp, case.options.micro_batches
    return pp > 1 and len(order_times.bases(pipeline.schedule, pp, m)) > 1


MOST_OF_A_LINE = 0.02  # of a step


def judge(case: Case) -> Counter[str]:
    """Assert what must hold of each pair of `case` that the rules let pass, and count the pairs and
    those that only a named exception lets pass."""
    others = {name: other for name, other in doubled(case).items() if other.allowed}
    seconds = _priced([case, *others.values()], case.cluster)
    counts: Counter[str] = Counter()
    for i, (name, other) in enumerate(others.items(), start=1):
        pair = {part: each[[0, i]] for part, each in seconds.items()}
        reason = _reason(name, case, other, pair)
        if reason is None and (goes_on_in_a_line(case) or goes_on_in_a_line(other)):
            with patch.object(order_times, "bases", lambda schedule, pp, m: (m,)):
                whole = _priced([case, other], case.cluster)
            near = np.abs(pair["total"] / whole["total"] - 1) <= MOST_OF_A_LINE
            reason = _reason(name, case, other, whole)
            reason = "straight line" if reason is not None and near.all() else None
        assert reason is not None, f"{name} x 2: {case}: {pair}"
        counts[name] += 1
        if reason:
            counts[f"{name}: {reason}"] += 1
    return counts


def _priced(plans: list[Case], cluster: str) -> dict[str, Array]:
    """Return the seconds of a step of each plan, by part."""
    return step_seconds(Work.joined([Work.of(each.plan) for each in plans]), CLUSTERS[cluster])


def _reason(name: str, case: Case, other: Case, pair: dict[str, Array]) -> str | None:
    """Return the exception that a pair needs ("": none), or None where none lets it pass."""
    if name == "micro-batches":
        return _bubble(case, *pair["total"], *pair["bubble"])
    return _seconds(case, other, *pair["total"])


def _seconds(case: Case, other: Case, once: float, twice: float) -> str | None:
    """Return `_reason` of twice the sequence or the replicas."""
    if twice * ROUNDING >= once:
        return ""
    plans, low = (case.plan, other.plan), case.options.precision != Precision.fp32
    if low and starts_a_precision_policy(*plans):
        return "precision policy" if twice * ROUNDING >= once / 2 else None
    if splits_otherwise(*plans):
        before, after = (stage_blocks(plan) for plan in plans)
        fewest = (after / before).min()
        return "another split" if twice * ROUNDING >= fewest * once else None
    if case.options.seq_len < other.options.seq_len and launches_ahead(case):
        return "launches ahead" if twice >= (1 - MOST_AHEAD) * once else None
    return None


def _bubble(case: Case, once: float, twice: float, idle: float, idles: float) -> str | None:
    """Return `_reason` of the share of bubble.

    What is paid once a step (gradients, the optimizer) is a smaller share of the longer one, and
    all others grow: so the bubble may at most double, and its share by no more than that.
    """
    tiny = 1e-9 * twice
    if idles / twice <= idle / once + 1e-9:
        return ""
    if idles <= 2 * idle + tiny:
        return "paid once a step" if twice <= 2 * once * ROUNDING else None
    if waits_in_turns(case):
        return "turns" if idles / twice - idle / once <= MOST_IN_TURNS else None
    return None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any model, cluster, layout, schedule, precision and recomputation that the rules let pass."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    ffn, heads = pick(FFN.swiglu, FFN.gelu, FFN.moe), pick(8, 16, 32)
    experts = {"n_expert": 8} if ffn == FFN.moe else {}
    model = ModelConfig(
        n_layer=pick(8, 16, 24, 32),
        n_head=heads,
        n_kv_head=pick(None, 8),
        d_model=heads * pick(64, 128),
        vocab_size=pick(32000, 50304, 131072),
        context=2**17,
        ffn=ffn,
        tied=pick(False, True),
        **experts,
    )
    alone = ffn == FFN.moe
    shard, replicate = pick(1, 1, 2, 8), pick(1, 1, 2, 4)
    layout = Layout(
        pp=pick(1, 2, 4, 8),
        tp=1 if alone else pick(1, 2, 8),
        cp=1 if alone else pick(1, 1, 2, 4),
        dp_shard=shard,
        dp_replicate=replicate,
        ep=pick(1, max(shard, 1 if shard > 1 else replicate)) if alone else 1,
    )
    options = Options(
        precision=pick(*Precision),
        activation_checkpointing=pick(*ActivationCheckpointing),
        zero_stage=pick(2, 3),
        gradient_sync=pick(*GradientSync) if shard > 1 and layout.pp == 1 else GradientSync.step,
        sequence_parallel=layout.tp > 1 and pick(False, True),
        pipeline=PipelineConfig(pick(*PipelineSchedule)) if layout.pp > 1 else PipelineConfig(),
        micro_batch_size=pick(1, 2, 4),
        micro_batches=pick(1, 2, 4, 8, 16, 32),
        seq_len=pick(512, 1024, 2048, 4096, 8192, 16384),
    )
    return Case(pick(*CLUSTERS), model, layout, options)


@settings(max_examples=150, deadline=None)
@given(cases().filter(lambda case: case.allowed))
def test_twice_as_much_never_takes_less(case: Case) -> None:
    judge(case)
