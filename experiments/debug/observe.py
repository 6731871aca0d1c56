"""What can be seen of a run on its own ranks. Nothing here knows which fault there is, if any."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.assemble import (
    make_batches,
    make_trainer,
    set_step,
    share_of_batch,
    validation_share,
)
from experiments.config import TrainConfig
from experiments.figures.parity import drift, mesh_of, trajectory
from minigpt.corpus import prepare
from minigpt.data import Batches
from parallel.gradients import local
from parallel.layout import Precision
from parallel.mesh import Mesh
from parallel.passes import MicroBatch
from parallel.step import NonFinite, Result, Trainer, evaluate
from parallel.weights import full_weights

Row = tuple[int, ...]  # the tokens of one sequence
Gradients = dict[str, Tensor]


@dataclass
class Seen:
    """One run, as rank 0 saw it. It ends early where a step's gradients are not finite."""

    losses: list[float] = field(default_factory=list)  # of each step
    rates: list[float] = field(default_factory=list)  # learning rates of the same
    ranges: list[dict[int, float]] = field(default_factory=list)  # largest |output| of each block
    # largest |gradient of that output|; a weight's gradient grows with what goes forward as well
    flows: list[dict[int, float]] = field(default_factory=list)
    dtype: str = ""  # of the products inside the blocks
    failed_step: int | None = None  # whose gradients are not finite, with no scaler to skip it
    failed_weights: dict[str, Tensor] = field(default_factory=dict)  # whole, as before that step
    updated: bool = False  # whether that step went on to its update
    start: dict[str, Tensor] = field(default_factory=dict)  # initial weights, whole
    drift: tuple[float, float] = (0.0, 0.0)  # of copies of weights, before and after the run
    rows: list[list[Row]] = field(default_factory=list)  # read in step 1 by each share of the batch
    held_out: tuple[float, float] = (0.0, 0.0)  # the held-out loss, twice on the same weights
    tie: float | None = None  # distance of head and embedding after the run, where they are one
    # by: do sequences have uneven token counts? Of one step, in fp32, without dropout
    gradients: dict[bool, Gradients] = field(default_factory=dict)


def watch(config: TrainConfig) -> Seen:
    """Train, and look on. Every rank calls it; what rank 0 returns is whole."""
    torch.set_num_threads(1)
    mesh, seen = mesh_of(config.layout), Seen()
    trainer, batches = make_trainer(config, mesh), make_batches(config, prepare(config.data))
    before = drift(trainer.replica)
    seen.start = full_weights(trainer.replica)
    seen.held_out = validated_twice(trainer, batches, config)
    seen.rows = rows_of_shares(list(share_of_batch(batches, 0, config, mesh)), mesh)
    follow(trainer, batches, config, seen)
    seen.drift = before, drift(trainer.replica)
    if config.model.tied:
        seen.tie = distance_of_tie(full_weights(trainer.replica))
    for uneven in (False, True):
        seen.gradients[uneven] = first_gradients(config, uneven)
    return seen


def follow(trainer: Trainer, batches: Batches, config: TrainConfig, seen: Seen) -> None:
    """The steps of the run."""
    mesh = trainer.replica.mesh
    ranges, flows = follow_activations(trainer, seen)
    for step in range(config.steps):
        seen.rates.append(set_step(trainer, config, step))
        micro_batches = list(share_of_batch(batches, step, config, mesh))
        saved = [local(p).detach().clone() for p in trainer.parameters]
        ranges.clear()
        flows.clear()
        result = run_step(trainer, micro_batches)
        skipped = result is not None and result.skipped
        everyone = mesh.from_all((dict(ranges), dict(flows), skipped or finite_gradients(trainer)))
        seen.losses.append(result.loss if result else math.nan)
        seen.ranges.append(largest_of([one[0] for one in everyone]))
        seen.flows.append(largest_of([one[1] for one in everyone]))
        if not all(one[2] for one in everyone):
            restore(trainer, saved)
            seen.failed_step, seen.updated = step, result is not None
            seen.failed_weights = full_weights(trainer.replica)
            return


def run_step(trainer: Trainer, micro_batches: Sequence[MicroBatch]) -> Result | None:
    """None where the trainer itself gave up."""
    try:
        return trainer.step(micro_batches)
    except NonFinite:
        return None


def finite_gradients(trainer: Trainer) -> bool:
    """Whether this rank's parts of them are."""
    gradients = [local(p.grad) for p in trainer.parameters if p.grad is not None]
    return math.isfinite(float(torch.stack(torch._foreach_norm(gradients)).sum()))


@torch.no_grad()
def restore(trainer: Trainer, saved: list[Tensor]) -> None:
    for parameter, value in zip(trainer.parameters, saved, strict=True):
        local(parameter).copy_(value)


def validated_twice(trainer: Trainer, batches: Batches, config: TrainConfig) -> tuple[float, float]:
    """The held-out loss, and once more: nothing has changed in between."""
    some = replace(config, validation=replace(config.validation, batches=2))
    share = list(validation_share(batches, some, trainer.replica.mesh))
    first, again = (evaluate(trainer.replica, share) for _ in range(2))
    return first, again


Largest = dict[int, float]  # by layer


def follow_activations(trainer: Trainer, seen: Seen) -> tuple[Largest, Largest]:
    """Two dicts that fill with the largest number of each block's output, and of its gradient."""
    ranges, flows = Largest(), Largest()

    def look_at(layer: int) -> Any:
        def look(_module: Any, _inputs: Any, output: Tensor) -> None:
            keep_largest(ranges, layer, output)
            if output.requires_grad:
                output.register_hook(partial(keep_largest, flows, layer))

        return look

    def look_inside(_module: Any, _inputs: Any, output: Tensor) -> None:
        seen.dtype = str(output.dtype).removeprefix("torch.")

    for stage in trainer.replica.stages:
        for layer, block in stage.blocks.items():
            block.register_forward_hook(look_at(int(layer)))
            block.attention.q.register_forward_hook(look_inside)  # type: ignore[union-attr]
    return ranges, flows


def keep_largest(of_layers: Largest, layer: int, tensor: Tensor) -> None:
    largest = float(local(tensor).detach().abs().max())
    # max() would swallow a NaN
    largest = largest if math.isfinite(largest) else math.inf
    of_layers[layer] = max(of_layers.get(layer, 0.0), largest)


def largest_of(ranks: Sequence[Largest]) -> Largest:
    """The same of all ranks, whichever blocks they hold."""
    layers = sorted({layer for one in ranks for layer in one})
    return {layer: max(one.get(layer, 0.0) for one in ranks) for layer in layers}


def rows_of_shares(micro_batches: Sequence[MicroBatch], mesh: Mesh) -> list[list[Row]]:
    """The sequences of a step that each share of the batch holds.

    Ranks along tp, cp and pp read the same share: the first of each speaks for it.
    """
    mine = [tuple(row) for inputs, _ in micro_batches for row in inputs.tolist()]
    first = all(mesh.index(axis) == 0 for axis in ("pp", "cp", "tp"))
    return [rows for rows in mesh.from_all(mine if first else None) if rows is not None]


def distance_of_tie(weights: dict[str, Tensor]) -> float | None:
    """None on other ranks than 0."""
    if not weights:
        return None
    return float((weights["embedding.weight"] - weights["head.weight"]).norm())


def first_gradients(config: TrainConfig, uneven: bool) -> Gradients:
    """Of one step: in fp32, for rounding is no fault, and without dropout, whose masks no other
    layout would draw. Empty where they are not finite."""
    model, data = replace(config.model, dropout=0.0), replace(config.data, ragged=uneven)
    plain = replace(
        config, model=model, data=data, steps=1, precision=Precision.fp32, compile=False
    )
    try:
        return trajectory(plain).gradients
    except NonFinite:
        return {}
