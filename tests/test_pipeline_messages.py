"""Where a pipeline's messages go, against torch's schedule objects; and the bubbles that follow."""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.pipelining import schedules as of_torch

from parallel.layout import PipelineConfig, PipelineSchedule
from parallel.rules import takes
from simulator.pipeline_messages import Steps, steps_of
from tests.pipeline_orders import nobody, schedule_of

LOOPED = [s for s in PipelineSchedule if s.value not in ("gpipe", "1f1b")]


def of_kind(steps: Steps, *kinds: str) -> Steps:
    return [step for step in steps if step[0] in kinds]


def lowered_by_torch(schedule: Any, rank: int) -> Steps:
    """Work and messages; what overlaps one after the other."""
    actions = schedule.pipeline_order_with_comms[rank]
    flat = [part for action in actions for part in action.sub_actions or (action,)]
    skipped = (of_torch.UNSHARD, of_torch.RESHARD, of_torch.REDUCE_GRAD)
    return [
        (a.computation_type.value, a.stage_index, a.microbatch_index)
        for a in flat
        if a.computation_type not in skipped
    ]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("schedule", LOOPED, ids=lambda s: s.value)
def test_work_and_messages_come_in_torchs_order(schedule: PipelineSchedule, ranks: int) -> None:
    """Each rank's work, its sends, and its recvs from each rank."""
    pipeline = PipelineConfig(schedule)
    with nobody(ranks):
        for n in (n for n in range(1, 10) if takes(pipeline, ranks, n)):
            theirs = schedule_of(pipeline, ranks, n)
            for rank, ours in enumerate(steps_of(pipeline, ranks, n)):
                torchs = lowered_by_torch(theirs, rank)
                work, sends = ("F", "B", "I", "W"), ("SEND_F", "SEND_B")
                assert of_kind(ours, *work) == of_kind(torchs, *work)
                assert of_kind(ours, *sends) == of_kind(torchs, *sends)
                for neighbour in range(ranks):
                    pair = [
                        [
                            step
                            for step in of_kind(steps, "RECV_F", "RECV_B")
                            if came_from(step, pipeline, ranks) == neighbour
                        ]
                        for steps in (ours, torchs)
                    ]
                    assert pair[0] == pair[1]


def came_from(step: tuple[str, int, int], pipeline: PipelineConfig, ranks: int) -> int:
    """The rank that sends what a RECV_ takes."""
    kind, stage, _ = step
    return pipeline.rank_of(stage - 1 if kind == "RECV_F" else stage + 1, ranks)


class RecordedStage:
    """In the place of torch's stage: notes what a schedule does with it, and moves nothing."""

    def __init__(self, stage_index: int, count: int, steps: Steps) -> None:
        self.stage_index, self.last, self.steps = stage_index, stage_index == count - 1, steps

    def _ops(self, kind: str, wanted: bool, i: int) -> Steps:
        return [(kind, self.stage_index, i)] if wanted else []

    def get_fwd_recv_ops(self, i: int) -> Steps:
        return self._ops("RECV_F", self.stage_index > 0, i)

    def get_fwd_send_ops(self, i: int) -> Steps:
        return self._ops("SEND_F", not self.last, i)

    def get_bwd_recv_ops(self, i: int) -> Steps:
        return self._ops("RECV_B", not self.last, i)

    def get_bwd_send_ops(self, i: int) -> Steps:
        return self._ops("SEND_B", self.stage_index > 0, i)

    def forward_one_chunk(self, i: int, *_: Any, **__: Any) -> None:
        self.steps.append(("F", self.stage_index, i))

    def backward_one_chunk(self, i: int, **_: Any) -> None:
        self.steps.append(("B", self.stage_index, i))

    def perform_reduce_grad(self, _factor: int) -> None:
        pass


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_stage_a_rank_does_what_torchs_code_does(
    name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those two schedules are code and no list: it runs, with a stage that only takes notes."""
    steps: Steps = []

    def handed_over(ops: Steps, desc: str | None = None) -> Steps:
        steps.extend(ops)
        return [("WAIT_" + kind, *rest) for kind, *rest in ops]  # type: ignore[misc]

    monkeypatch.setattr(of_torch, "_batch_p2p", handed_over)
    monkeypatch.setattr(
        of_torch, "_sorted_batch_p2p", lambda ops, desc: {0: handed_over(ops)} if ops else {}
    )
    monkeypatch.setattr(of_torch, "_wait_batch_p2p", steps.extend)
    pipeline = PipelineConfig(PipelineSchedule(name))
    with nobody(ranks):
        for n in (n for n in range(1, 10) if takes(pipeline, ranks, n)):
            for rank, ours in enumerate(steps_of(pipeline, ranks, n)):
                schedule = schedule_of(pipeline, ranks, n)
                assert schedule is not None
                steps.clear()
                schedule._stage = RecordedStage(rank, ranks, steps)
                for hook in ("_initialize_stage", "_maybe_compute_loss", "_maybe_get_loss"):
                    monkeypatch.setattr(schedule, hook, lambda *_: None)
                monkeypatch.setattr(schedule, "_update_losses", lambda *_: None)
                schedule._step_microbatches()
                assert ours == steps
