"""Programs with one event for each pass of a stage: a timeline in milliseconds, for who plays.

A pass is replayed once on its own, with the messages in it, and stands for all of its kind; so does
what follows the last passes: gradients that are still under way, sums and the update. So a rank
that runs ahead of its tp, cp or data neighbours is not seen; ranks of one pipeline place behave
alike anyway.
"""

from __future__ import annotations

from collections.abc import Callable

from costs.program import Program, Work
from minigpt.config import ModelConfig
from parallel.layout import Layout, Options
from simulator.event_times import EventTimes
from simulator.hardware import Cluster
from simulator.plan_programs import Writer
from simulator.programs import PHASE_OF_KIND, pipeline_programs
from simulator.replay import replay


def coarse_programs(
    model: ModelConfig, layout: Layout, options: Options, cluster: Cluster, clipped: bool = True
) -> tuple[dict[int, Program], Callable[[int], int]]:
    """As simulator.plan_programs.programs_of, whose events these add up, on a cluster.

    The plan must be one that parallel.rules lets pass.
    """
    stride = layout.world_size // layout.pp
    ranks = [place * stride for place in range(layout.pp)]
    times = EventTimes(cluster)
    places = [
        Place(Writer(model, layout, options, clipped, place), rank, times)
        for place, rank in enumerate(ranks)
    ]
    if layout.pp == 1:
        steps = [(k, 0, i) for i in range(options.micro_batches) for k in ("F", "B")]
        programs = {0: [event for step in steps for event in places[0].work(*step)]}
    else:
        held = {stage: place for place in places for stage in place.writer.blocks}
        writer = places[0].writer
        programs = pipeline_programs(
            options.pipeline,
            ranks,
            options.micro_batches,
            lambda kind, stage, i: held[stage].work(kind, stage, i),
            writer.between_stages,
            writer.between,
        )
    made = {rank: [*programs[rank], place.end()] for rank, place in zip(ranks, places, strict=True)}
    return made, lambda rank: rank // stride * stride


class Place:
    """One pp rank: what its passes take."""

    def __init__(self, writer: Writer, rank: int, times: EventTimes) -> None:
        self.writer, self.rank, self.times = writer, rank, times
        self.known: dict[tuple[str, int], float] = {}
        splits = writer.options.pipeline.splits_backward and writer.layout.pp > 1
        self.backward = "IW" if splits else "B"

    def work(self, kind: str, stage: int, i: int) -> Program:
        """One event for a pass."""
        key = (kind, stage)
        if key not in self.known:
            self.known[key] = self._alone(self._events(kind, stage))
        phase = PHASE_OF_KIND[kind]
        return [Work(phase, seconds=self.known[key], stage=stage, micro_batch=i)]

    def end(self) -> Work:
        """What the last backward of each stage leaves to wait for, and the optimizer."""
        writer, last = self.writer, self.backward[-1]
        passes = after = 0.0
        tail: Program = []
        for stage in writer.blocks:
            passes += self._alone(self._events(last, stage))
            # one before the end, so that this is the last one
            writer.backwards[stage] = writer.options.micro_batches - 1
            tail += writer.work(last, stage, 0)
        after = self._alone([*tail, *writer.end()])
        return Work("optimizer", seconds=max(0.0, after - passes))

    def _events(self, kind: str, stage: int) -> Program:
        """Of a pass that is not the last: gradients are not sent yet."""
        self.writer.backwards[stage] = -self.writer.options.micro_batches
        return self.writer.work(kind, stage, 0)

    def _alone(self, program: Program) -> float:
        """Seconds of events with no other rank: its groups are as fast as it is."""
        one = {self.rank: program}
        found = replay(one, self.times.work, self.times.message, lambda _: self.rank)
        return found.total
