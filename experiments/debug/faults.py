"""The broken runs of the lab: each fault is put into the program from outside (patches.py).

A diagnosis never sees this file: it gets a FaultyProgram as a Patient (diagnose.py), and asks that.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from experiments import assemble
from experiments.config import TrainConfig
from experiments.debug.patches import (
    Bug,
    Scale,
    instead,
    large_value,
    mean_of_a_micro_batch,
    merged_without_transpose,
    never_warms_up,
    rows_of_another_seed,
    scale_grown_too_far,
    tie_unless_cut,
    together,
    weights_of_another_seed,
    without_mask,
)
from experiments.ranks import run_ranks
from experiments.refused import Refused
from minigpt import model
from minigpt.config import Pieces
from minigpt.model import GPT
from parallel import parallelize, passes
from parallel.layout import Impl, Precision
from parallel.mesh import Mesh
from parallel.replica import Replica

# a small model on made-up text, which a run learns in seconds; a fault's settings come on top
LAB = (
    "model.n_layer=3",
    "model.d_model=64",
    "model.context=64",
    "data=generated",
    "data.tokens=100000",
    "steps=40",
    "optimizer.warmup_steps=10",
    "validation.batches=2",
    "sample.tokens=0",
    "device=cpu",
    "backend=gloo",
)


@dataclass(frozen=True)
class Fault:
    """`says` is what a person would see of it; `settings` are overrides on top of LAB.

    `needs` says what of a configuration must hold for the fault to be one, and whether it does.
    """

    name: str
    says: str
    settings: tuple[str, ...]
    bug: Bug
    needs: tuple[str, Callable[[TrainConfig], bool]] = ("", lambda config: True)

    def overrides(self, given: list[str]) -> list[str]:
        """The settings, but for those that the user has given; a strategy brings its layout."""
        keys = {override.lstrip("+~").partition("=")[0] for override in given}
        own = {s.partition("=")[0]: s for s in (*LAB, *self.settings)}
        if "strategy" in keys:
            own = {key: s for key, s in own.items() if not key.startswith("layout.")}
        return [*(s for key, s in own.items() if key not in keys), *given]

    def check(self, config: TrainConfig) -> None:
        """Raise Refused where the fault would hurt nothing. Needs a resolved layout."""
        what, holds = self.needs
        if not holds(config):
            raise Refused(f"debug {self.name}: without effect here; it needs {what}")


NAN = re.compile(r"nan-after-(\d{1,5})")


def nan_after(step: int) -> Fault:
    return Fault(
        f"nan-after-{step}",
        f"fp16 without a scaler: after {step} steps gradients overflow unseen, and the loss is NaN",
        (
            "strategy=single",
            "precision=fp16",
            "clip=null",
            f"steps={step + 20}",
            "model.d_model=32",  # a CPU takes its time in fp16
            "micro_batch_size=2",
        ),
        scale_grown_too_far(step),
        ("precision=fp16", lambda config: config.precision == Precision.fp16),
    )


FAULTS = [
    nan_after(200),
    Fault(
        "exploding-gradients",
        "norms that do not normalise, and large first weights: gradients grow from block to block",
        ("strategy=single", "model.n_layer=6"),
        together(
            instead(model, "make_norm", Scale),
            instead(model, "initial_value", large_value),
            instead(parallelize, "initial_value", large_value),
        ),
        ("model.n_layer above 2", lambda config: config.model.n_layer > 2),
    ),
    Fault(
        "missing-causal-mask",
        "attention sees what it should predict: the loss is too good",
        ("strategy=single",),
        without_mask,
        ("layout.cp=1: a ring has its own mask", lambda config: config.layout.cp == 1),
    ),
    Fault(
        "heads-merged-wrongly",
        "the results of the heads are put side by side without the transpose: it learns, badly",
        ("strategy=single",),
        instead(model, "merge_heads", merged_without_transpose),
        ("two heads a rank", lambda config: config.model.n_head > config.layout.tp),
    ),
    Fault(
        "no-warm-up",
        "the first steps have the full learning rate: the loss jumps up",
        ("strategy=single", "optimizer.lr=0.08", "optimizer.warmup_steps=40", "steps=80"),
        instead(assemble, "learning_rate", never_warms_up),
        ("optimizer.warmup_steps above 0", lambda config: config.optimizer.warmup_steps > 0),
    ),
    Fault(
        "mean-of-means",
        "each micro-batch's mean loss counts alike, however many tokens it has",
        (
            "strategy=single",
            "micro_batch_size=2",
            "gradient_accumulation_steps=4",
            "data.ragged=true",
        ),
        instead(passes, "token_loss", mean_of_a_micro_batch),
        (
            "several micro-batches, model.impl=torch, and impl=torch with layout.tp",
            lambda config: (
                config.batch_size > config.micro_batch_size
                and config.model.impl == Pieces.torch
                and (config.layout.tp == 1 or config.impl == Impl.torch)
            ),
        ),
    ),
    Fault(
        "rank-with-another-seed",
        "rank 1 begins with other weights and reads other text, and nobody broadcasts",
        ("strategy=ddp", "layout.dp_replicate=2", "impl=by_hand", "micro_batch_size=4"),
        together(
            instead(assemble, "parallelize", weights_of_another_seed),
            instead(assemble, "Batches", rows_of_another_seed),
        ),
        ("two ranks", lambda config: config.layout.world_size > 1),
    ),
    Fault(
        "data-overlap",
        "all ranks read the same sequences: twice the work for one rank's data",
        ("strategy=fsdp", "layout.dp_shard=2", "micro_batch_size=4"),
        instead(Mesh, "data_rank", 0),
        (
            "layout.dp_replicate or layout.dp_shard above 1",
            lambda config: config.layout.data_parallel > 1,
        ),
    ),
    Fault(
        "validation-in-train-mode",
        "dropout stays on while validating: the held-out loss is too high, and never the same",
        ("strategy=single", "model.dropout=0.2"),
        instead(Replica, "train", lambda self, on: None),
        ("model.dropout above 0", lambda config: config.model.dropout > 0),
    ),
    Fault(
        "tied-head-lost",
        "tensor parallelism cuts a tied head and its embedding apart: another model is trained",
        ("strategy=tp", "layout.tp=2", "model.tied=true"),
        instead(GPT, "tie", tie_unless_cut),
        (
            "layout.tp above 1 and model.tied=true",
            lambda config: config.layout.tp > 1 and config.model.tied,
        ),
    ),
]
NONE = Fault("none", "nothing is planted: for a program that you have changed", (), nullcontext)


def fault_of(name: str) -> Fault:
    """By name; nan-after-N with any N. Raises Refused."""
    if found := NAN.fullmatch(name):
        return nan_after(int(found.group(1)))
    by_name = {fault.name: fault for fault in (*FAULTS, NONE)}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        raise Refused(f"debug {name}: no such fault; there are {', '.join(near or by_name)}")
    return by_name[name]


def planted(name: str, function: Callable, *args: Any) -> Any:
    """Call `function` in the program that has that fault."""
    with fault_of(name).bug():
        return function(*args)


class FaultyProgram:
    """A program with a fault in it, or none, as a diagnosis gets it."""

    def __init__(self, fault: str, config: TrainConfig) -> None:
        self.config, self.__fault = config, fault

    def on_ranks(self, function: Callable, *args: Any) -> Any:
        """What rank 0 of the layout returns; every rank calls `function`, one of a module."""
        ranks = self.config.layout.world_size
        if ranks == 1:
            return self.alone(function, *args)
        return run_ranks(ranks, planted, self.__fault, function, *args)[0]

    def alone(self, function: Callable, *args: Any) -> Any:
        """The same in this process, without others."""
        return planted(self.__fault, function, *args)
