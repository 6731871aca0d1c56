"""What the playground shows for one position of its controls. No page, no torch.

The numbers are those of `./launch.sh simulate`; the timeline is the replay engine's, one event for
a pass of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from costs.ledger import MEMORY_PARTS, step_of
from experiments.ask.words import model_configs
from experiments.overrides import composed
from experiments.predict import clusters
from experiments.predict.plan_command import plan_values, simulate_command
from experiments.predict.plan_config import SimulateConfig
from minigpt.config import DataConfig, ModelConfig
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)
from simulator.coarse_programs import coarse_timeline
from simulator.formula_ledger import formula_steps
from simulator.memory import memory
from simulator.plans import Plans
from simulator.timeline import Timeline
from simulator.verdict import verdict

MOST_PASSES = 3000  # of all ranks: a step with more is shown without its timeline


@dataclass(frozen=True)
class Controls:
    """Where the sliders stand. Named as the keys of the command line are."""

    model: str = "llama3_8b"
    cluster: str = "h100"
    pp: int = 4
    dp_replicate: int = 1
    dp_shard: int = 4
    cp: int = 1
    tp: int = 2
    seq_len: int = 4096
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    schedule: str = "1f1b"
    precision: str = "bf16"
    activation_checkpointing: str = "none"
    zero_stage: int = 2
    gradient_sync: str = "step"
    sequence_parallel: bool = True

    @property
    def layout(self) -> Layout:
        return Layout(**{axis: getattr(self, axis) for axis in MESH_AXES})

    @property
    def sequence(self) -> bool:
        return self.sequence_parallel and self.tp > 1

    @property
    def command(self) -> str:
        """The command line that simulates what is shown, to copy."""
        staged = PipelineConfig(PipelineSchedule(self.schedule))
        options = Options(
            precision=Precision(self.precision),
            activation_checkpointing=ActivationCheckpointing(self.activation_checkpointing),
            zero_stage=self.zero_stage,
            gradient_sync=GradientSync(self.gradient_sync),
            sequence_parallel=self.sequence,
            pipeline=staged,
            micro_batch_size=self.micro_batch_size,
            seq_len=self.seq_len,
            micro_batches=self.gradient_accumulation_steps,
        )
        values = plan_values(self.layout, options)
        return simulate_command(model_configs()[self.model], cluster_of(self.cluster), values)

    def config(self) -> SimulateConfig:
        """What the command composes, in microseconds. Raises ValueError where it is refused."""
        staged = PipelineConfig(PipelineSchedule(self.schedule))
        return SimulateConfig(
            model=model_configs()[self.model],
            data=data(),
            cluster=cluster_of(self.cluster),
            layout=self.layout,
            pipeline=staged if self.pp > 1 else PipelineConfig(),
            zero_stage=self.zero_stage if self.dp_shard > 1 else SimulateConfig.zero_stage,
            gradient_sync=GradientSync(self.gradient_sync),
            sequence_parallel=self.sequence,
            precision=Precision(self.precision),
            activation_checkpointing=ActivationCheckpointing(self.activation_checkpointing),
            seq_len=self.seq_len,
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
        )


# to compose a model or a cluster that was not shown before takes a third of a second


@cache
def data() -> DataConfig:
    """What simulate composes where no data is asked for."""
    return composed("simulate", ()).data


cluster_of = cache(clusters.load)


def read_all() -> None:
    """Whatever a control may ask for, so that no answer waits for it."""
    data()
    for name in clusters.names():
        cluster_of(name)
    view(Controls())


def choices() -> dict[str, list[str]]:
    """What the lists offer."""
    return {
        "model": list(model_configs()),
        "cluster": clusters.names(),
        "schedule": [schedule.value for schedule in PipelineSchedule],
        "precision": [precision.value for precision in Precision],
        "activation_checkpointing": [kind.value for kind in ActivationCheckpointing],
        "zero_stage": ["1", "2", "3"],
        "gradient_sync": [each.value for each in GradientSync],
    }


@dataclass(frozen=True)
class View:
    """What is shown. `refused`: why there is nothing more."""

    controls: Controls
    devices: int
    refused: str | None = None
    step: dict[str, Any] | None = None  # as of a ledger
    verdict: str = ""
    device_memory: float = 0.0  # bytes
    timeline: Timeline | None = None  # None: too many passes to draw

    @property
    def fits(self) -> bool:
        return self.step is not None and self.memory["peak"] <= self.device_memory

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the fullest device: peak, and its parts."""
        assert self.step
        return self.step["memory_bytes"]

    @property
    def time(self) -> dict[str, float]:
        """Seconds of a step: total, and those of its parts that are modelled."""
        assert self.step
        return {part: s for part, s in self.step["time_s"].items() if s is not None}

    def parts(self) -> list[tuple[str, int]]:
        return [(part, self.memory[part]) for part in MEMORY_PARTS]


def shown_places(model: ModelConfig, layout: Layout, options: Options) -> list[int]:
    """Return the pp ranks that are looked at: the first, the fullest and the last.

    With several stages a rank any of them may be the fullest, so the peaks of all are compared.
    """
    every = np.arange(layout.pp)
    peaks = memory(Plans.of(model, layout, options)[np.zeros_like(every)], every).peak
    return sorted({0, int(np.argmax(peaks)), layout.pp - 1})


def view(controls: Controls) -> View:
    """Predict one position of the controls."""
    devices = controls.layout.world_size
    try:
        config = controls.config()
    except ValueError as error:
        return View(controls, devices, refused=str(error))
    plan = (config.model, config.layout, config.options)
    steps = formula_steps(*plan, config.cluster, places=shown_places(*plan))
    limit = config.cluster.device.memory_bytes
    said = verdict(steps, config.layout, config.options, limit)
    passes = config.layout.pp * config.options.pipeline.local_stages * 2
    timeline = None
    if passes * config.options.micro_batches <= MOST_PASSES:
        timeline = coarse_timeline(*plan, config.cluster)
    return View(controls, devices, None, step_of(steps), said, limit, timeline)
