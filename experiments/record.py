"""The files of a run: metrics.jsonl while it trains, and ledger.json when it is done."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from costs import ledger as ledgers
from experiments import environment
from experiments.config import TrainConfig
from experiments.metering import Meters
from experiments.run_folder import settings_of
from experiments.step_log import read_metrics
from minigpt.corpus import Corpus
from parallel.mesh import Mesh
from parallel.step import Result
from simulator.order_times import ideal_bubble

SMOOTHING = 0.9  # of the tokens/s that the user sees


class Record:
    """What one run writes. Only rank 0 touches the disk; every rank keeps the losses."""

    def __init__(
        self, config: TrainConfig, folder: Path, mesh: Mesh, corpus: Corpus, started: float
    ) -> None:
        self.config, self.folder, self.mesh, self.corpus = config, folder, mesh, corpus
        self.settings = settings_of(config)
        self.losses: list[float | None] = []
        self.first = 0  # the step with which this process begins
        self.earlier: list[str] = []  # lines of the steps before this process
        self.skipped_steps = 0
        self.validation_loss: float | None = None  # null on a line: none was taken after that step
        self.last: dict[str, Any] = {}
        self.tokens_per_s = 0.0
        self.startup_s: float | None = None
        self.started = started  # time.time() of the user's command

    def __enter__(self) -> Record:
        path = self.folder / "metrics.jsonl" if self.mesh.rank == 0 else Path(os.devnull)
        if self.mesh.rank == 0:
            # whole or not at all: of a run that goes on, this is all that tells its beginning
            part = path.with_suffix(".part")
            part.write_text("".join(self.earlier))
            part.replace(path)
        self.metrics = open(path, "a", buffering=1)  # a line a step: a killed run keeps them
        return self

    def go_on(self, run: Path, first: int) -> None:
        """Take over what a run has recorded of its steps before `first`.

        A run may have gone beyond its checkpoint: those lines are dropped, for their steps come
        again. A line that is lost leaves a null among the losses.
        """
        self.first = first
        lines = {line["step"]: line for line in read_metrics(run / "metrics.jsonl")}
        kept = [lines.get(step) for step in range(first)]
        self.losses = [line["loss"] if line else None for line in kept]
        self.skipped_steps = sum(line["skipped"] for line in kept if line)
        self.earlier = [json.dumps(line) + "\n" for line in kept if line]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.metrics.close()

    def add_validation(self, loss: float) -> None:
        """The held-out loss after the step whose line comes next."""
        self.validation_loss = loss

    def add_step(self, step: int, result: Result, lr: float, step_s: float) -> None:
        """Write the line of one step."""
        if self.startup_s is None:
            self.startup_s = time.time() - self.started
        self.losses.append(result.loss)
        self.skipped_steps += result.skipped
        speed = result.tokens / step_s
        blend = SMOOTHING if step > self.first + 1 else 0.0  # the first step is warm-up
        self.tokens_per_s = blend * self.tokens_per_s + (1 - blend) * speed
        self.last = {
            "step": step,
            "loss": result.loss,
            "validation_loss": self.validation_loss,
            "gradient_norm": result.gradient_norm,
            "lr": lr,
            "tokens": result.tokens,
            "step_s": step_s,
            "tokens_per_s": speed,
            "skipped": result.skipped,
        }
        self.validation_loss = None
        self.metrics.write(json.dumps({k: _finite(v) for k, v in self.last.items()}) + "\n")

    def finish(self, meters: Meters, validation_loss: float | None) -> dict[str, Any] | None:
        """Collect every rank's costs and write the ledger. All ranks call it; rank 0 gets it."""
        own = meters.costs()
        ranks: list = [own]
        if dist.is_initialized():
            ranks = [None] * self.config.layout.world_size
            dist.all_gather_object(ranks, own)
        if self.mesh.rank:
            return None
        ledger = self._ledger(meters, ranks, validation_loss)
        ledgers.write(self.folder / "ledger.json", ledger)
        return ledger

    def _ledger(
        self, meters: Meters, ranks: list[dict[str, Any]], validation_loss: float | None
    ) -> dict[str, Any]:
        layout, config = self.config.layout, self.config
        staged = {"pipeline": pipeline_of(config, ranks)} if layout.pp > 1 else {}
        return {
            "schema": ledgers.SCHEMA,
            "source": "measured",
            "config": self.settings,
            "layout": {"world_size": layout.world_size, **layout.by_axis},
            "model": {
                "parameters": config.parameters,
                "flops_per_token": meters.flops_per_token,
            },
            "environment": {
                "device": config.device.value,
                "device_name": meters.device_name,
                "backend": config.backend.value if layout.world_size > 1 else None,
                **environment.facts(),
                "threads": torch.get_num_threads(),
                "peak_flops_per_s": meters.peak_flops,
                "corpus": {
                    "source": config.data.source.value,
                    "sha256": self.corpus.sha256,
                    "unigram_entropy": self.corpus.unigram_entropy,
                },
            },
            "training": {
                "steps": len(self.losses),
                "trainable_parameters": config.finetune.trainable(config.model),
                "losses": [_finite(loss) for loss in self.losses],
                "validation_loss": _finite(validation_loss),
                "skipped_steps": self.skipped_steps,
                "startup_s": self.startup_s,
            },
            **staged,
            "step": ledgers.step_of(ranks),
            "ranks": ranks,
        }

    def headline(self) -> str:
        """One line on what is about to be trained."""
        config, layout = self.config, self.config.layout
        tokens = config.batch_size * config.seq_len
        trainable = config.finetune.trainable(config.model)
        trained = f" ({trainable:,} trained)" if config.finetune.on else ""
        ranks = "rank" if layout.world_size == 1 else "ranks"
        parts = config.gradient_accumulation_steps
        accumulated = f", {parts} micro-batches" if parts > 1 else ""
        return (
            f"{config.parameters:,} parameters{trained}, {layout.label} on {layout.world_size} "
            f"{ranks} ({config.device.value}), "
            f"{config.precision.value}: {config.steps} steps of {tokens:,} tokens "
            f"({config.micro_batch_size} x {config.seq_len} a rank{accumulated})"
        )


def pipeline_of(config: TrainConfig, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The bubble of each rank beside the ideal of its schedule."""
    pipeline, pp = config.pipeline, config.layout.pp
    stages = []
    for rank, step in enumerate(ranks):
        idle, busy = step["time_s"]["bubble"], step["time_s"]["compute"]
        mine = pipeline.stages_of(rank // (len(ranks) // pp), pp)  # pp is the outermost axis
        share = None if idle is None else idle / (idle + busy)
        stages.append({"rank": rank, "stages": mine, "bubble_s": idle, "bubble": share})
    micro_batches = config.gradient_accumulation_steps
    return {
        "schedule": pipeline.schedule.value,
        "micro_batches": micro_batches,
        "ideal_bubble": ideal_bubble(pipeline, pp, micro_batches),
        "stages": stages,
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: a skipped fp16 step's loss or norm is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
