"""trace=true: one step of all ranks as trace.json.gz, timeline.png/.svg and memory.png/.svg.

The step is the one that the ledger shows. Every step is recorded as much as this needs, so that
tracing slows none; only memory is from a step of its own, laid over this one action by action.
On GPUs each rank also leaves kernels-RANK.json.gz: every operator and kernel of its last step of
warm-up, as torch's profiler saw them, for Perfetto.
"""

from __future__ import annotations

from pathlib import Path

from costs import trace as traces
from costs.timeline import Labels, program_of, slices_of, warped
from costs.timing import StepRecord, length
from costs.trace import MemorySample, Trace
from experiments.metering import Meters


def make_trace(meters: Meters) -> Trace | None:
    """What all ranks did; rank 0 gets it. All ranks call it, after Meters.costs()."""
    mine = meters.records[meters.mesh.rank]
    warp = warped(meters.memory_record, mine)
    samples = meters.followed.timeline() if meters.followed else []
    memory = meters.mesh.from_all([(warp(moment), held) for moment, held in samples])
    if meters.mesh.rank:
        return None
    zero = min(record.start for record in meters.records)
    both = list(enumerate(zip(meters.records, meters.transfers, strict=True)))
    layout = meters.config.layout
    return Trace(
        slices=[s for rank, (record, own) in both for s in slices_of(rank, record, own, zero)],
        programs={rank: program_of(rank, record, own) for rank, (record, own) in both},
        memory=[
            MemorySample(rank, moment - zero, held)
            for rank, samples in enumerate(memory)
            for moment, held in samples
        ],
        about={
            "layout": layout.label,
            "world_size": layout.world_size,
            "schedule": meters.config.pipeline.schedule.value if layout.pp > 1 else None,
            "seconds": {str(rank): seconds_by_phase(record) for rank, (record, _) in both},
            "memory": f"followed in step {meters.memory_step}, laid over this one",
        },
    )


def seconds_by_phase(record: StepRecord) -> dict[str, float]:
    """How long a rank was in each phase, waits included."""
    spent = {name: length(intervals) for name, intervals in record.phases.items()}
    whole = spent.pop("forward_backward")
    actions = Labels(record).actions
    forward = [(a.start, a.end) for a in actions if a.kind in ("forward", "loss")]
    backward = [(a.start, a.end) for a in actions if a.kind.startswith("backward")]
    parts = {"forward": length(forward), "backward": length(backward)}
    between = whole - sum(parts.values())
    return {**spent, **parts, "between_actions": between, "total": record.total}


def write_trace(meters: Meters, folder: Path) -> None:
    """Write and draw the trace of a run that is over. All ranks call it."""
    if meters.kernels and folder.is_dir():  # another node may not see it
        meters.kernels.export_chrome_trace(str(folder / f"kernels-{meters.mesh.rank}.json.gz"))
    trace = make_trace(meters)
    if trace is None:
        return
    from experiments.pictures import draw_memory, draw_timeline  # matplotlib takes a second

    traces.write(folder / "trace.json.gz", trace)
    title = f"one step of {trace.about['layout']}"
    if trace.about["schedule"]:
        title += f", {trace.about['schedule']}"
    draw_timeline(trace.slices, folder / "timeline", title)
    if trace.memory:
        draw_memory(trace.memory, trace.slices, folder / "memory", title)
