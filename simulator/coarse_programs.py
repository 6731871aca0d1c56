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
from simulator.event_times import EventTimes, replay_on
from simulator.hardware import Cluster
from simulator.plan_programs import Writer
from simulator.plan_times import PlanTimes
from simulator.programs import ACTION_OF_KIND, PHASE_OF_KIND, pipeline_programs
from simulator.timeline import Timeline

Known = dict[tuple, float]


def coarse_programs(
    model: ModelConfig, layout: Layout, options: Options, cluster: Cluster, clipped: bool = True
) -> tuple[dict[int, Program], Callable[[int], int]]:
    """As simulator.plan_programs.programs_of, whose events these add up, on a cluster.

    The plan must be one that parallel.rules lets pass.
    """
    stride = layout.world_size // layout.pp
    ranks = [place * stride for place in range(layout.pp)]
    times = PlanTimes(model, layout, options, cluster)
    known: Known = {}
    places = [
        Place(Writer(model, layout, options, clipped, place), rank, times, known)
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


def coarse_timeline(
    model: ModelConfig, layout: Layout, options: Options, cluster: Cluster, clipped: bool = True
) -> Timeline:
    """When each pass runs."""
    programs, like = coarse_programs(model, layout, options, cluster, clipped)
    return replay_on(programs, EventTimes(cluster), like)


class Place:
    """One pp rank: what its passes take. `known`: seconds that places have found, by what they
    hold, for most are alike."""

    def __init__(self, writer: Writer, rank: int, times: EventTimes, known: Known) -> None:
        self.writer, self.rank, self.times, self.known = writer, rank, times, known
        splits = writer.options.pipeline.splits_backward and writer.layout.pp > 1
        self.backward = "W" if splits else "B"
        count = writer.layout.pp * writer.options.pipeline.local_stages
        last = count - 1 if writer.layout.pp > 1 else 0
        self.holds = {
            stage: (blocks, stage == 0, stage == last) for stage, blocks in writer.blocks.items()
        }

    def work(self, kind: str, stage: int, i: int) -> Program:
        """One event for a pass."""
        key = (kind, self.holds[stage])
        if key not in self.known:
            self.known[key] = self._alone(self._events(kind, stage))
        phase, action = PHASE_OF_KIND[kind], ACTION_OF_KIND[kind]
        seconds = self.known[key]
        return [Work(phase, seconds=seconds, stage=stage, micro_batch=i, action=action)]

    def end(self) -> Work:
        """What the last backward of each stage leaves to wait for, and the optimizer."""
        key = ("end", tuple(self.holds.values()))
        if key not in self.known:
            self.known[key] = self._after()
        return Work("optimizer", seconds=self.known[key])

    def _after(self) -> float:
        """Seconds of the last backwards and of all that follows, less those of the backwards."""
        passes, tail = 0.0, []
        for stage in self.writer.blocks:
            passes += self._alone(self._events(self.backward, stage))
            # one before the end, so that this is the last one
            self.writer.backwards[stage] = self.writer.options.micro_batches - 1
            tail += self.writer.work(self.backward, stage, 0)
        return max(0.0, self._alone([*tail, *self.writer.end()]) - passes)

    def _events(self, kind: str, stage: int) -> Program:
        """Of a pass that is not the last: gradients are not sent yet."""
        self.writer.backwards[stage] = -self.writer.options.micro_batches
        return self.writer.work(kind, stage, 0)

    def _alone(self, program: Program) -> float:
        """Seconds of events with no other rank: its groups are as fast as it is."""
        return replay_on({self.rank: program}, self.times, lambda _: self.rank).total
