"""Does a plan train as a single process does? Losses, gradients and norms, side by side.

A loss alone hides a wrong gradient: AdamW forgives its scale. So the gradient of every parameter
after the first step is compared too, and the norm of every step. And rank 0 alone hides what the
others do: weights that are copies of one another must still be so, to the bit, after the last step.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiments.assemble import make_batches, make_trainer, set_step, share_of_batch
from experiments.config import Backend, Device, TrainConfig
from experiments.ranks import TIMEOUT_S, run_ranks
from minigpt.config import DataConfig, ModelConfig, OptimizerConfig, OptimizerName, Source
from minigpt.corpus import prepare
from minigpt.finetune import FinetuneConfig
from parallel.drift import Piece, pieces
from parallel.layout import ActivationCheckpointing, Layout
from parallel.mesh import Mesh, build_mesh
from parallel.replica import Replica
from parallel.weights import full_gradients

STEPS = 20
GLOBAL_BATCH = 16  # sequences, for every layout and every variant
LOSS_BOUND = 5e-6  # nats; five times what legitimate changes of order were seen to make
GRADIENT_BOUND = 1e-5  # relative, per parameter
NOISE = 1e-5  # of the norm of all gradients: what is smaller is compared with this instead
NORM_BOUND = 3e-5  # relative, per step
LOW_PRECISION_BOUNDS = (2e-2, 0.2, 2e-2)  # bf16 keeps 8 bits; a wrong factor would be seen still

# dotted keys as on the command line, on top of BASE
BASE: dict[str, Any] = {
    "model.n_layer": 4,
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
    drift: float = 0.0  # largest distance, after the last step, of weights that are copies


@dataclass(frozen=True)
class Difference:
    """How far two trajectories are apart, at their worst."""

    loss: float  # nats
    gradient: float  # relative, of one parameter
    norm: float | None  # relative; None where no norm was taken
    drift: float = 0.0  # of copies of a weight, between the run's own ranks

    def within(self, loss: float, gradient: float, norm: float) -> bool:
        """No further than that, which NaN is; and copies are equal, in any precision."""
        norm_holds = self.norm is None or self.norm <= norm
        near = self.loss <= loss and self.gradient <= gradient
        return near and norm_holds and self.drift == 0

    @property
    def holds(self) -> bool:
        """Within the bounds of fp32."""
        return self.within(LOSS_BOUND, GRADIENT_BOUND, NORM_BOUND)

    @property
    def is_near(self) -> bool:
        """Within the loose bounds of a lower precision."""
        return self.within(*LOW_PRECISION_BOUNDS)


def make_config(layout: Layout, changes: dict[str, Any]) -> TrainConfig:
    """BASE with `changes`, on `layout`, with micro-batches that keep the global batch."""
    groups: dict[str, dict[str, Any]] = {
        group: {} for group in ("", "model", "data", "optimizer", "finetune")
    }
    for key, value in {**BASE, **changes}.items():
        group, _, name = key.rpartition(".")
        groups[group][name] = value
    accumulation = groups[""].get("gradient_accumulation_steps", 1)
    return TrainConfig(
        model=ModelConfig(**groups["model"]),
        data=DataConfig(**groups["data"]),
        optimizer=OptimizerConfig(**groups["optimizer"]),
        finetune=FinetuneConfig(**groups["finetune"]),
        layout=layout,
        micro_batch_size=GLOBAL_BATCH // (accumulation * layout.data_parallel),
        global_batch_size=GLOBAL_BATCH,
        **groups[""],
    )


MESHES: dict[tuple[int, ...], Mesh] = {}


def mesh_of(layout: Layout) -> Mesh:
    """One mesh for all runs of a layout in this process: process groups are dear, and stay."""
    key = *layout.sizes, layout.ep
    if key not in MESHES:
        MESHES[key] = build_mesh(layout, torch.device("cpu"))
    return MESHES[key]


def trajectory(config: TrainConfig) -> Trajectory:
    """Train on this process's ranks; every rank calls it, rank 0 gets the gradients."""
    mesh = mesh_of(config.layout)
    trainer, batches = make_trainer(config, mesh), make_batches(config, prepare(config.data))
    done = Trajectory([], [], {})
    for step in range(config.steps):
        set_step(trainer, config, step)
        result = trainer.step(list(share_of_batch(batches, step, config, mesh)))
        done.losses.append(result.loss)
        done.norms.append(result.gradient_norm)
        if step == 0:
            done.gradients.update(full_gradients(trainer.replica))
    return replace(done, drift=drift(trainer.replica))


def drift(replica: Replica) -> float:
    """Largest distance between weights that are copies of one another: 0, if all is well.

    A gradient that is averaged too early, or a copy that learns alone, shows on no single rank.
    Every rank must call it.
    """
    if replica.mesh.axes_mesh is None:
        return 0.0
    held = replica.mesh.from_all(list(pieces(replica)))
    first: dict[Piece, Tensor] = {}
    apart = [
        float((weight - first.setdefault(piece, weight)).norm())
        for piece, weight in itertools.chain.from_iterable(held)
    ]
    return _worst(apart)


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
    worst_norm = _worst(norms) if norms else None
    return Difference(_worst(losses), _worst(gradients), worst_norm, run.drift)


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


@dataclass(frozen=True)
class Plan:
    """A layout and the options that make it a strategy."""

    name: str
    layout: Layout
    changes: dict[str, Any]

    def config(self, variant: dict[str, Any]) -> TrainConfig:
        """This plan with a variant. Raises ValueError where it is refused, with the reason.

        A pipeline needs micro-batches to fill it, so it takes the larger of both numbers.
        """
        merged = {**variant, **self.changes}
        key = "gradient_accumulation_steps"
        merged[key] = max(variant.get(key, 1), self.changes.get(key, 1))
        return make_config(self.layout, merged)

    def alone(self, variant: dict[str, Any]) -> dict[str, Any]:
        """What a single process is given to do the same."""
        changes = {**variant, **self.changes}
        return {k: v for k, v in changes.items() if k.startswith(WHAT_IS_LEARNED) or k == "clip"}


# Keys that change what is learned; all others change only how, and a single process goes without
WHAT_IS_LEARNED = ("model.", "data.", "optimizer.", "finetune.", "seq_len", "steps", "seed")


REFERENCES: dict[str, Trajectory] = {}  # of a single process, which many plans are compared with


def differences(
    plans: list[Plan], variants: dict[str, dict[str, Any]], timeout_s: float = TIMEOUT_S
) -> dict[tuple[str, str], Difference | str]:
    """By (plan's name, variant): each plan against a single process on the same batches.

    A plan that a variant's rules refuse has the reason instead. All plans must have the same world
    size: they run one after the other on the same ranks.
    """
    configs: dict[tuple[str, str], TrainConfig] = {}
    cells: dict[tuple[str, str], Difference | str] = {}
    wanted: dict[tuple[str, str], str] = {}
    for plan, variant in itertools.product(plans, variants):
        cell = plan.name, variant
        try:
            configs[cell] = plan.config(variants[variant])
        except ValueError as error:
            cells[cell] = str(error)
            continue
        alone = plan.alone(variants[variant])
        wanted[cell] = str(sorted(alone.items()))
        if wanted[cell] not in REFERENCES:
            REFERENCES[wanted[cell]] = trajectory(make_config(Layout(), alone))
    ranks = plans[0].layout.world_size
    runs = run_ranks(ranks, trajectories, list(configs.values()), timeout_s=timeout_s)[0]
    for cell, run in zip(configs, runs, strict=True):
        cells[cell] = compare(run, REFERENCES[wanted[cell]])
    return {cell: cells[cell] for cell in itertools.product([p.name for p in plans], variants)}
