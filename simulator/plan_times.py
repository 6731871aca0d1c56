"""What an event of a plan's program costs, so that a block and the head take what the closed form
says of them (simulator/estimate.py): one price for a step's table and for its timeline.

Events share it by what each takes by itself (simulator/event_times.py).
"""

from __future__ import annotations

from costs.program import Work
from minigpt.config import ModelConfig
from parallel.layout import Layout, Options
from simulator.block_work import HEAD, BlockWork
from simulator.estimate import copy_seconds, passes
from simulator.event_times import EventTimes, replay_on
from simulator.hardware import Cluster
from simulator.plan_programs import programs_of
from simulator.plans import Plans
from simulator.programs import ACTION_OF_KIND
from simulator.shapes import Rank
from simulator.timeline import Timeline
from simulator.work import Work as Asked


class PlanTimes(EventTimes):
    """Seconds of the events that simulator/plan_programs.py writes."""

    def __init__(
        self, model: ModelConfig, layout: Layout, options: Options, cluster: Cluster
    ) -> None:
        super().__init__(cluster, layout.world_size)
        plan = Plans.of(model, layout, options)
        made = BlockWork(model, layout, options, int(Rank(plan).activation[0]))
        alone = EventTimes(cluster, layout.world_size)
        asked = Asked.of(plan)
        block, head = passes(asked, cluster)
        # what fully_shard copies for a block
        copies = copy_seconds(asked, cluster) / (asked.micro_batches * asked.mean_layers)
        whole = block["F"] + block["B"]
        self.block, self.head = dict[str, float](), dict[str, float]()
        for kind, action in ACTION_OF_KIND.items():
            own = sum(alone.work(event) for event in made.works(kind, 0, 0))
            share = block[kind] * (1 + copies / whole)
            self.block[action] = float(share[0]) / own
            self.head[action] = float(head[kind][0]) / alone.work(made.head(kind, 0, 0))

    def work(self, work: Work) -> float:
        """Seconds of one event, scaled by its kind of pass."""
        if work.phase == "optimizer" or work.seconds is not None:
            return super().work(work)
        shares = self.head if work.name == HEAD else self.block
        return super().work(work) * shares[work.action]


def timeline_of(
    model: ModelConfig, layout: Layout, options: Options, cluster: Cluster, clipped: bool = True
) -> Timeline:
    """A step of a plan, event by event: one rank of each pipeline place."""
    programs, like = programs_of(model, layout, options, clipped)
    return replay_on(programs, PlanTimes(model, layout, options, cluster), like)
