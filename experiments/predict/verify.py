"""--verify: the winner of a search scaled down, traced, and trained where its ranks fit.

The twin has the winner's layout, schedule, sharding and checkpointing, and a model that is tiny.
Its trace is the program itself; where that sends what the closed form says, the bytes that the
search predicted for the winner come from a formula that holds for this layout.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from minigpt.config import ModelConfig
from parallel.layout import Layout, Options, Precision
from parallel.rules import takes
from simulator.communication import Key, payload_bytes
from simulator.search import Found
from simulator.space import layout_at, options_at

MOST_RANKS = 8  # that are started here
STEPS = 5
HEAD_DIM, VOCABULARY = 8, 96


@dataclass(frozen=True)
class Twin:
    """The winner with a tiny model."""

    model: ModelConfig
    layout: Layout
    options: Options

    @property
    def ranks(self) -> list[int]:
        """Whose traces are compared: the first and the last, which hold different stages."""
        return sorted({0, self.layout.world_size - 1})

    def expected(self, rank: int) -> dict[Key, int]:
        """Payload bytes of the closed form."""
        place = rank // (self.layout.world_size // self.layout.pp)
        return payload_bytes(self.model, self.layout, self.options, place=place)


def verify_winner(found: Found) -> dict[str, Any]:
    """Trace the winner's twin and train it. `holds`: nothing differs; `says`: what was verified.

    Raises ValueError where no plan fits.
    """
    order = found.order
    if not len(order):
        raise ValueError("--verify: no plan fits, so there is none to verify")
    i = int(order[0])
    twin = twin_of(
        found.predicted.plans.model, layout_at(found.predicted.plans, i), options_at_twin(found, i)
    )
    traced = compare_bytes(twin)
    trained = train_twin(twin) if twin.layout.world_size <= MOST_RANKS else None
    holds = not traced["differ"] and (trained is None or trained["holds"])
    said = [_said_of_trace(twin, traced), _said_of_training(twin, trained)]
    said.append("not verified: seconds and peak memory of the whole model, and its own messages.")
    return {"holds": holds, "says": "\n".join(said), "traced": traced, "trained": trained}


def options_at_twin(found: Found, i: int) -> Options:
    """The winner's options with as few micro-batches as its schedule takes, and short sequences."""
    plans = found.predicted.plans
    layout, options = layout_at(plans, i), options_at(plans, i)
    most = options.micro_batches
    counts = range(min(most, max(2, 2 * layout.pp if layout.pp > 1 else 2)), most + 1)
    count = next(n for n in counts if layout.pp == 1 or takes(options.pipeline, layout.pp, n))
    # two chunks for each cp rank, each cut by tp
    part = 2 * layout.cp * layout.tp
    return replace(
        options,
        seq_len=part * math.ceil(16 / part),
        micro_batches=count,
        micro_batch_size=min(options.micro_batch_size, 2),
    )


def twin_of(model: ModelConfig, layout: Layout, options: Options) -> Twin:
    """A model of one or two blocks a stage, and widths that tp cuts; of the same kinds."""
    tp, stages = layout.tp, layout.pp * options.pipeline.local_stages if layout.pp > 1 else 1
    grouped = model.kv_heads < model.n_head
    kv_heads = tp * math.ceil(2 / tp)
    heads = 2 * kv_heads if grouped else kv_heads
    tiny = replace(
        model,
        n_layer=stages * (1 if stages > 8 else 2),
        n_head=heads,
        n_kv_head=kv_heads if grouped else None,
        d_model=heads * HEAD_DIM,
        d_ff=2 * heads * HEAD_DIM,
        vocab_size=tp * math.ceil(VOCABULARY / tp),
        pad_vocab_to=None,
        context=options.seq_len,
        dropout=0.0,
    )
    return Twin(tiny, layout, options)


def compare_bytes(twin: Twin) -> dict[str, Any]:
    """Payloads by collective, axis and dtype, as traced and as the closed form has them."""
    differ = []
    total = kinds = 0
    for rank, traced in zip(twin.ranks, traces([(twin, rank) for rank in twin.ranks]), strict=True):
        expected = twin.expected(rank)
        total, kinds = total + sum(traced.values()), kinds + len(traced)
        differ += [
            {
                "rank": rank,
                **dict(zip(("collective", "axis", "dtype"), key, strict=True)),
                "traced": traced.get(key, 0),
                "closed_form": expected.get(key, 0),
            }
            for key in sorted(traced.keys() | expected.keys())
            if traced.get(key, 0) != expected.get(key, 0)
        ]
    free = twin.layout.ep > 1 and twin.model.capacity_factor is None
    return {
        "ranks": twin.ranks,
        "payload_bytes": total,
        "kinds": kinds,
        "differ": differ,
        "even_experts": free,  # tokens choose freely, and even shares are assumed in both
    }


def traces(jobs: Sequence[tuple[Twin, int]]) -> list[dict[Key, int]]:
    """In a process of its own: the world that a trace makes is global."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(trace_all, list(jobs)).result()


def trace_all(jobs: list[tuple[Twin, int]]) -> list[dict[Key, int]]:
    """Payload bytes of each (twin, rank)."""
    from costs.messages import payloads  # torch takes seconds
    from simulator.trace import trace

    found = []
    for twin, rank in jobs:
        found.append(dict(payloads(trace(twin.model, twin.layout, twin.options, rank).rows)))
    return found


def train_twin(twin: Twin) -> dict[str, Any]:
    """On real gloo ranks, against a single process on the same sequences; in fp32, where equal
    means equal."""
    from experiments.figures.parity import compare, trajectories, trajectory  # torch takes seconds
    from experiments.ranks import run_ranks

    config = run_of(twin)
    alone = replace(
        config,
        layout=Layout(),
        micro_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        sequence_parallel=False,
        activation_checkpointing=Options().activation_checkpointing,
        pipeline=Options().pipeline,
        zero_stage=3,
    )
    run = run_ranks(twin.layout.world_size, trajectories, [config])[0][0]
    difference = compare(run, trajectory(alone))
    return {
        "ranks": twin.layout.world_size,
        "steps": config.steps,
        "holds": difference.holds,
        "loss": difference.loss,
        "gradient": difference.gradient,
        "norm": difference.norm,
        "drift": difference.drift,
    }


def run_of(twin: Twin) -> Any:
    """The twin as a run."""
    from experiments.config import Backend, Device, TrainConfig
    from minigpt.config import DataConfig, OptimizerConfig, Source

    options, size = twin.options, twin.model.vocab_size
    return TrainConfig(
        model=twin.model,
        data=DataConfig(source=Source.generated, vocab_size=size, tokens=20_000),
        layout=twin.layout,
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=2),
        steps=STEPS,
        micro_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.micro_batches,
        seq_len=options.seq_len,
        precision=Precision.fp32,
        activation_checkpointing=options.activation_checkpointing,
        zero_stage=options.zero_stage,
        gradient_sync=options.gradient_sync,
        sequence_parallel=options.sequence_parallel,
        pipeline=options.pipeline,
        device=Device.cpu,
        backend=Backend.gloo,
    )


def _said_of_trace(twin: Twin, traced: dict[str, Any]) -> str:
    ranks = " and ".join(map(str, traced["ranks"]))
    size = f"{twin.model.n_layer} blocks of width {twin.model.d_model}"
    if traced["differ"]:
        rows = [
            f"  rank {row['rank']} {row['collective']} over {row['axis']}, {row['dtype']}: traced "
            f"{row['traced']:,} bytes, closed form {row['closed_form']:,}"
            for row in traced["differ"]
        ]
        return "\n".join([f"DIFFERS: {twin.layout.label}, a twin of {size}, traced:", *rows])
    experts = " (tokens spread evenly over the experts)" if traced["even_experts"] else ""
    if not traced["kinds"]:
        return f"verified: a twin of {size} sends nothing, as the closed form says."
    return (
        f"verified: {twin.layout.label}, a twin of {size}, traced: ranks {ranks} send "
        f"{traced['payload_bytes']:,} bytes in {traced['kinds']} kinds of message, to the byte "
        f"what the closed form says{experts}."
    )


def _said_of_training(twin: Twin, trained: dict[str, Any] | None) -> str:
    if trained is None:
        return (
            f"not verified: training, which would need {twin.layout.world_size:,} ranks (at most "
            f"{MOST_RANKS} are started here)."
        )
    said = f"the twin trained {trained['steps']} steps on {trained['ranks']} gloo ranks in fp32"
    off = f"loss {trained['loss']:.1e} nats, gradients {trained['gradient']:.1e} relative"
    if trained["holds"]:
        return f"verified: {said}, as a single process does (at most {off} apart)."
    return f"DIFFERS: {said}, not as a single process does: {off}, copies {trained['drift']:.1e}."
