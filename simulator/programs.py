"""Programs of pipelines: the steps of a schedule as events that the replay takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from costs.program import Message, Program, Wait
from parallel.layout import PipelineConfig
from simulator.pipeline_messages import Step, steps_of

# what a pipeline calls its actions (costs/trace.py)
ACTION_OF_KIND = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}
PHASE_OF_KIND = {"F": "forward", "B": "backward", "I": "backward", "W": "backward"}


def pipeline_programs(
    pipeline: PipelineConfig,
    ranks: Sequence[int],
    micro_batches: int,
    work: Callable[[str, int, int], Program],
    payload_bytes: int,
    dtype: str = "float32",
) -> dict[int, Program]:
    """What each rank of one pipeline does, from its first forward to its last backward.

    `ranks`: global, by place in the pipeline. `work`: the events of (kind, stage, micro-batch),
    kinds as in simulator/schedules.py; their messages must have negative numbers, for those of the
    pipeline count from 0. `payload_bytes` of a micro-batch between two stages, either way.
    """
    every = steps_of(pipeline, len(ranks), micro_batches)
    programs: dict[int, Program] = {}
    for place, steps in enumerate(every):
        program: Program = []
        numbers: dict[Step, int] = {}
        for step in steps:
            kind, stage, i = step
            if kind in PHASE_OF_KIND:
                program += work(kind, stage, i)
                continue
            phase = PHASE_OF_KIND[kind[-1]]
            if kind.startswith("WAIT_"):
                moved = (kind.removeprefix("WAIT_"), stage, i)
                program.append(Wait(numbers[moved], phase))
                continue
            numbers[step] = len(numbers)
            ends = _ends(pipeline, step, len(ranks))
            both = (ranks[ends[0]], ranks[ends[1]])
            side = "send" if kind.startswith("SEND") else "recv"
            program.append(
                Message(
                    numbers[step], side, "pp", both, dtype, payload_bytes, phase, None, stage, i
                )
            )
        programs[ranks[place]] = program
    return programs


def sent_by_the_device(program: Program) -> Program:
    """Return the program of a device that sends by itself, as a core does: each collective, and a
    ring's round of messages, is waited for where it is handed over, because the work of sending
    it takes the time of computing."""
    made: Program = []
    over: set[int] = set()
    ring: list[Wait] = []
    for event in program:
        if isinstance(event, Wait) and event.number in over:
            continue
        if isinstance(event, Message) and event.axis == "cp":
            ring.append(Wait(event.number, event.phase))
            over.add(event.number)
        else:
            made += ring
            ring = []
        made.append(event)
        if isinstance(event, Message) and event.collective not in ("send", "recv"):
            made.append(Wait(event.number, event.phase))
            over.add(event.number)
    return made + ring


def _ends(pipeline: PipelineConfig, step: Step, ranks: int) -> tuple[int, int]:
    """Places of the source and the destination of a message."""
    kind, stage, _ = step
    ahead = 1 if kind.endswith("F") else -1  # activations go on, gradients back
    own = pipeline.rank_of(stage, ranks)
    if kind.startswith("SEND"):
        return own, pipeline.rank_of(stage + ahead, ranks)
    return pipeline.rank_of(stage - ahead, ranks), own
