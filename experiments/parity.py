"""Does a layout train as a single process does? Losses, gradients and norms, side by side.

./launch.sh python -m experiments.parity        ddp, fsdp and hsdp at 2 and 4 ranks, about a minute

A loss alone hides a wrong gradient: AdamW forgives its scale. So the gradient of every parameter
after the first step is compared too, and the norm of every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.assemble import make_batches, make_trainer, set_step, share_of_batch
from experiments.config import Backend, Device, TrainConfig
from experiments.ranks import run_ranks
from minigpt.config import DataConfig, ModelConfig, OptimizerConfig, OptimizerName, Source
from minigpt.corpus import prepare
from parallel.layout import ActivationCheckpointing, Layout
from parallel.mesh import build_mesh
from parallel.weights import full_gradients

STEPS = 20
GLOBAL_BATCH = 16  # sequences, for every layout and every variant
LOSS_BOUND = 5e-6  # nats; five times what legitimate changes of order were seen to make
GRADIENT_BOUND = 1e-5  # relative, per parameter
NOISE = 1e-5  # of the norm of all gradients: what is smaller is compared with this instead
NORM_BOUND = 3e-5  # relative, per step

# dotted keys as on the command line, on top of BASE
BASE: dict[str, Any] = {
    "model.n_layer": 3,
    "model.d_model": 64,
    "model.vocab_size": 96,
    "model.context": 32,
    "data.source": Source.generated,
    "data.vocab_size": 96,
    "data.tokens": 20_000,
    "optimizer.lr": 2e-3,
    "optimizer.warmup_steps": 4,
    "seq_len": 32,
    "clip": None,
    "steps": STEPS,
    "device": Device.cpu,
    "backend": Backend.gloo,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "clipping": {"clip": 0.5},  # below every norm of these runs
    "tied": {"model.tied": True},
    "uneven": {"data.ragged": True, "clip": 0.5, "gradient_accumulation_steps": 2},
    "sgd": {"optimizer.name": OptimizerName.sgd, "optimizer.lr": 0.1, "optimizer.momentum": 0.9},
    "full checkpointing": {"activation_checkpointing": ActivationCheckpointing.full},
    "selective checkpointing": {"activation_checkpointing": ActivationCheckpointing.selective},
    "experts": {"model.ffn": "moe", "model.n_expert": 4, "gradient_accumulation_steps": 2},
    "experts with a capacity": {
        "model.ffn": "moe",
        "model.n_expert": 4,
        "model.capacity_factor": 1.0,
        "model.balance": 1.0,
        "gradient_accumulation_steps": 2,
    },
    "gpt2": {
        "model.norm": "layernorm",
        "model.positions": "learned",
        "model.ffn": "gelu",
        "model.bias": True,
        "model.tied": True,
    },
}


@dataclass(frozen=True)
class Trajectory:
    """What a run did, step by step."""

    losses: list[float]
    norms: list[float | None]
    gradients: dict[str, Tensor]  # whole, after the first step, as the optimizer saw them


@dataclass(frozen=True)
class Difference:
    """How far two trajectories are apart, at their worst."""

    loss: float  # nats
    gradient: float  # relative, of one parameter
    norm: float | None  # relative; None where no norm was taken

    @property
    def holds(self) -> bool:
        """Within the bounds; NaN is not."""
        norm_holds = self.norm is None or self.norm <= NORM_BOUND
        return self.loss <= LOSS_BOUND and self.gradient <= GRADIENT_BOUND and norm_holds


def make_config(layout: Layout, changes: dict[str, Any]) -> TrainConfig:
    """BASE with `changes`, on `layout`, with micro-batches that keep the global batch."""
    groups: dict[str, dict[str, Any]] = {"": {}, "model": {}, "data": {}, "optimizer": {}}
    for key, value in {**BASE, **changes}.items():
        group, _, name = key.rpartition(".")
        groups[group][name] = value
    accumulation = groups[""].get("gradient_accumulation_steps", 1)
    return TrainConfig(
        model=ModelConfig(**groups["model"]),
        data=DataConfig(**groups["data"]),
        optimizer=OptimizerConfig(**groups["optimizer"]),
        layout=layout,
        micro_batch_size=GLOBAL_BATCH // (accumulation * layout.data_parallel),
        global_batch_size=GLOBAL_BATCH,
        **groups[""],
    )


def trajectory(config: TrainConfig) -> Trajectory:
    """Train on this process's ranks; every rank calls it, rank 0 gets the gradients."""
    mesh = build_mesh(config.layout, torch.device("cpu"))
    trainer, batches = make_trainer(config, mesh), make_batches(config, prepare(config.data))
    done = Trajectory([], [], {})
    for step in range(config.steps):
        set_step(trainer, config, step)
        result = trainer.step(list(share_of_batch(batches, step, config, mesh)))
        done.losses.append(result.loss)
        done.norms.append(result.gradient_norm)
        if step == 0:
            done.gradients.update(full_gradients(trainer.replica))
    return done


def trajectories(configs: list[TrainConfig]) -> list[Trajectory]:
    """Several runs one after another on the same ranks: starting ranks is what takes time."""
    torch.set_num_threads(1)
    return [trajectory(config) for config in configs]


def compare(run: Trajectory, reference: Trajectory) -> Difference:
    """Largest differences. A missing gradient or a number that is not finite is infinitely far."""
    losses = [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]
    norms = [
        abs(a - b) / b
        for a, b in zip(run.norms, reference.norms, strict=True)
        if a is not None and b is not None
    ]
    gradients = _gradient_errors(run.gradients, reference.gradients)
    return Difference(_worst(losses), _worst(gradients), _worst(norms) if norms else None)


def _gradient_errors(run: dict[str, Tensor], reference: dict[str, Tensor]) -> list[float]:
    """Relative error of each parameter's gradient.

    Some gradients are zero but for rounding (that of the bias of k: a softmax forgets a shift), so
    none is held to more than NOISE of the norm of all.
    """
    if run.keys() != reference.keys():
        return [math.inf]
    whole = math.sqrt(sum(float(g.norm()) ** 2 for g in reference.values()))
    floor = NOISE * whole
    return [
        float((run[name] - g).norm()) / max(float(g.norm()), floor) for name, g in reference.items()
    ]


def _worst(differences: list[float]) -> float:
    """max() would swallow a NaN."""
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def differences(
    layouts: list[Layout], variants: dict[str, dict[str, Any]]
) -> dict[tuple[str, str], Difference]:
    """By (layout's label, variant): each layout against a single process on the same batches.

    All layouts must have the same world size.
    """
    cells = [(layout, name) for layout in layouts for name in variants]
    single = {"gradient_accumulation_steps": 1}
    alone = [make_config(Layout(), {**variants[name], **single}) for name in variants]
    references = dict(zip(variants, trajectories(alone), strict=True))
    configs = [make_config(layout, variants[name]) for layout, name in cells]
    runs = run_ranks(layouts[0].world_size, trajectories, configs)[0]
    pairs = zip(cells, runs, strict=True)
    return {(layout.label, name): compare(run, references[name]) for (layout, name), run in pairs}


DATA_LAYOUTS = {
    2: [Layout(dp_replicate=2), Layout(dp_shard=2)],
    4: [Layout(dp_replicate=4), Layout(dp_shard=4), Layout(dp_replicate=2, dp_shard=2)],
}


def main() -> None:
    """Print the table as Markdown."""
    print("| layout | variant | loss | gradient | norm | holds |\n|---|---|--:|--:|--:|---|")
    for layouts in DATA_LAYOUTS.values():
        for (label, variant), far in differences(layouts, VARIANTS).items():
            norm = "-" if far.norm is None else f"{far.norm:.1e}"
            row = f"{far.loss:.1e} | {far.gradient:.1e} | {norm} | {'yes' if far.holds else 'NO'}"
            print(f"| {label} | {variant} | {row} |", flush=True)


if __name__ == "__main__":
    main()
