"""What tests of parallel/by_hand/ run on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from costs.communication import recorded
from experiments.config import TrainConfig
from experiments.figures.parity import Trajectory, trajectories
from experiments.figures.short_runs import step_costs
from parallel.by_hand import ddp
from parallel.by_hand.pipeline import Pipeline
from tests.on_ranks import Key, make, payloads, weights_and_validation


def everything(
    trained: list[TrainConfig], sent: list[TrainConfig], kept: list[TrainConfig]
) -> dict[str, Any]:
    """Trajectories, payloads and memory of different runs: starting ranks is what takes time."""
    runs: list[Trajectory] = trajectories(trained)
    bytes_sent: list[dict[Key, int]] = payloads(sent)
    memory = [costs["memory_bytes"] for costs in step_costs(kept)]
    return {"runs": runs, "payloads": bytes_sent, "memory": memory}


def in_small_buckets(config: TrainConfig, limit: int) -> dict[str, Any]:
    """DDP with buckets of `limit` bytes: the messages of one step, and a trajectory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddp, "BUCKET_BYTES", limit)
        trainer, micro_batches = make(config)
        with recorded() as meter:
            trainer.step(micro_batches)
        sizes = [c.payload_bytes for c in meter.calls if c.dtype == "float32"]
        parameters = list(trainer.replica.parameters())
        whole = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
        return {"sizes": sizes, "storages": len(whole), "run": trajectories([config])[0]}


def where_weights_are(configs: list[TrainConfig]) -> list[dict[str, list[int]]]:
    """Bytes of a whole weight in each of FSDP's blocks: after forward, a step, an evaluation."""
    return [_where_weights_are(config) for config in configs]


def _where_weights_are(config: TrainConfig) -> dict[str, list[int]]:
    trainer, micro_batches = make(config)
    model = trainer.replica.stages[0]

    def held() -> list[int]:
        weights = [block.mlp.up.__dict__["weight"] for block in model.blocks.values()]  # type: ignore
        return [weight.untyped_storage().nbytes() for weight in weights]

    seen: dict[str, list[int]] = {}
    hook = model.register_forward_hook(lambda *_: seen.update(forward=held()))
    trainer.step(micro_batches)
    hook.remove()
    seen["step"] = held()
    with torch.no_grad():
        model(micro_batches[0][0])
    seen["evaluation"] = held()
    return seen


def beginnings(configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """Initial weights, a held-out loss, and how many micro-batches a pipeline had in flight."""
    seen = []
    for config, (weights, loss) in zip(configs, weights_and_validation(configs), strict=True):
        trainer, micro_batches = make(config)
        passes, most = trainer.replica.passes, 0
        if isinstance(passes, Pipeline):
            forward = passes.forward

            def counted(*args: Any, pipeline: Pipeline = passes, forward: Any = forward) -> Any:
                nonlocal most
                y = forward(*args)
                most = max(most, len(pipeline.in_flight))
                return y

            passes.forward = counted  # type: ignore[method-assign]
        trainer.step(micro_batches)
        seen.append({"weights": weights, "loss": loss, "in_flight": most})
    return seen
