"""The slow half of simulate: the program itself on fake tensors, and pictures. Imports torch."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from costs import trace as traces
from costs.ledger import TIME_PARTS
from costs.trace import Trace
from experiments.metering import flops_per_token, utilisation
from experiments.predict.plan_config import SimulateConfig
from simulator.event_times import EventTimes, replay_on
from simulator.plans import PRECISIONS
from simulator.search import peak_flops
from simulator.timeline import Timeline
from simulator.trace import Traced, trace

Step = dict[str, Any]


def traced_steps(config: SimulateConfig, folder: Path) -> tuple[str, list[Step]]:
    """The source and the steps of a ledger: of `rank`, without times; or of the first rank of each
    pp place, with the times that a replay of them gives."""
    layout = config.layout
    stride = layout.world_size // layout.pp
    ranks = [place * stride for place in range(layout.pp)] if config.rank is None else [config.rank]
    found = dict(zip(ranks, trace_ranks(config, ranks), strict=True))
    if config.rank is not None:
        return "traced", [step(config, found[config.rank], dict.fromkeys(("total", *TIME_PARTS)))]
    programs = {rank: one.program for rank, one in found.items()}
    times = EventTimes(config.cluster, layout.world_size)
    timeline = replay_on(programs, times, lambda rank: rank // stride * stride)
    if config.trace:
        draw(config, folder, timeline)
    parts: dict[int, dict[str, Any]] = {**timeline.time_s}
    return "traced", [step(config, found[rank], parts[rank]) for rank in ranks]


def trace_ranks(config: SimulateConfig, ranks: list[int]) -> list[Traced]:
    """One here, for another process would import torch once more; several each in a process of its
    own, for the world of a trace is global."""
    if len(ranks) == 1:
        return [trace_rank(config, ranks[0])]
    count = min(len(ranks), os.cpu_count() or 1)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        return list(pool.map(trace_rank, [config] * len(ranks), ranks))


def trace_rank(config: SimulateConfig, rank: int) -> Traced:
    """In the process that traces."""
    plan = (config.model, config.layout, config.options, rank)
    return trace(*plan, config.optimizer, config.clip, gpu=config.cluster.device.asynchronous)


def step(config: SimulateConfig, one: Traced, time_s: dict[str, Any]) -> Step:
    """A ledger's step of one traced rank."""
    tokens = config.batch_size * config.seq_len
    model = flops_per_token(config) * tokens / config.layout.world_size
    peak = float(peak_flops(np.array(PRECISIONS.index(config.precision)), config.cluster))
    total = time_s["total"]
    return {
        "tokens": tokens,
        "time_s": {key: time_s.get(key) for key in ("total", *TIME_PARTS)},
        "memory_bytes": one.memory_bytes,
        "communication": one.rows,
        "flops": {"model": model, "hardware": one.flops},
        "tokens_per_s": tokens / total if total else None,
        "mfu": utilisation(model, total, peak),
        "hfu": utilisation(one.flops, total, peak),
    }


def draw(config: SimulateConfig, folder: Path, timeline: Timeline) -> None:
    """Write trace.json.gz and timeline.png/.svg."""
    from experiments.pictures import draw_timeline  # matplotlib takes a second

    slices = [piece for rank in sorted(timeline.programs) for piece in timeline.slices(rank)]
    about = {"layout": config.layout.label, "cluster": config.cluster.name}
    traces.write(folder / "trace.json.gz", Trace(slices, timeline.programs, about=about))
    title = f"one step of {config.layout.label}, simulated on {config.cluster.name}"
    draw_timeline(slices, folder / "timeline", title)
