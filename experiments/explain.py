"""For each cost of a step: the formula that it should follow, its value, and what was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from costs.messages import payloads
from experiments.config import Device, TrainConfig
from experiments.metering import flops_per_token
from minigpt.attention import SCORES_THAT_FIT
from minigpt.config import Attention
from parallel.layout import ActivationCheckpointing, Impl, Precision
from simulator import lora
from simulator.explain import LETTERS, Case, Key, formulas
from simulator.flops import hardware_flops
from simulator.plans import Plans

OF_ALL = "weights that a token is multiplied with, L and T of the whole model and a whole sequence"
FLOPS_LETTERS = {"N": OF_ALL}


@dataclass(frozen=True)
class Explained:
    """One cost. What is not known is None, and `why` says the reason."""

    cost: str
    formula: str | None
    closed_form: float | None
    measured: float | None
    unit: str  # "B" or "FLOP"
    why: str | None = None

    @property
    def off(self) -> float | None:
        """Measured less closed form."""
        if self.closed_form is None or self.measured is None:
            return None
        return self.measured - self.closed_form


@dataclass(frozen=True)
class Explanation:
    """All costs of a run, and what the symbols in their formulas stand for."""

    rows: list[Explained]

    @property
    def letters(self) -> str:
        used = set(re.findall(r"\b[A-Za-z]\b", " ".join(row.formula or "" for row in self.rows)))
        meaning = {**FLOPS_LETTERS, **LETTERS}
        said = [f"{name}: {what}" for name, what in meaning.items() if used & set(name.split())]
        return "; ".join(said)


def explain(config: TrainConfig, ledger: dict[str, Any]) -> Explanation:
    """The messages of the rank that the ledger's step shows, and the flops of all ranks."""
    step, ranks = ledger["step"], ledger["ranks"]
    shown = next(i for i, r in enumerate(ranks) if r["communication"] == step["communication"])
    sent = messages(case_of(config, shown), step["communication"], config.impl)
    return Explanation(sent + flops(config, step["tokens"], [rank["flops"] for rank in ranks]))


def case_of(config: TrainConfig, rank: int) -> Case:
    """What `rank` of a run does, for its closed forms."""
    place = rank // (config.layout.world_size // config.layout.pp)
    return Case(config.model, config.layout, config.options, config.clip is not None, place)


def messages(case: Case, rows: list[dict[str, Any]] | None, impl: Impl) -> list[Explained]:
    """One for each (collective, axis, dtype) that a closed form has or a ledger's rows have."""
    measured = payloads(rows or [])
    closed, texts, why = dict[Key, int](), dict[Key, str](), case.unknown
    try:
        if case.options.finetune.on:
            closed, texts = of_lora(case)
        else:
            closed, texts = case.payload_bytes(), formulas(case)
    except ValueError as reason:
        why = str(reason)
    if case.options.zero_stage == 1 and impl == Impl.by_hand:
        why = "by hand: weights are gathered, padded (parallel/by_hand/zero1.py)"
    return [
        Explained(
            " ".join(key),
            texts.get(key),
            closed.get(key),
            None if rows is None else measured[key],
            "B",
            why if closed.get(key) != measured[key] else None,
        )
        for key in dict.fromkeys([*measured, *closed])
    ]


def of_lora(case: Case) -> tuple[dict[Key, int], dict[Key, str]]:
    """The same of a run with adapters. Raises ValueError where there is no closed form."""
    if why := lora.unknown(case.layout, case.options):
        raise ValueError(why)
    sent = lora.messages(case.model, case.layout, case.options, case.clipped)
    return {k: size for k, (size, _) in sent.items()}, {k: said for k, (_, said) in sent.items()}


def flops(config: TrainConfig, tokens: int, ranks: list[dict[str, Any]]) -> list[Explained]:
    """Of a step, of all ranks together."""
    hardware = [rank["hardware"] for rank in ranks]
    counted = None if None in hardware else sum(hardware)
    closed, why = hardware_flops_of(config), None
    attention = 14
    if keeps_scores(config):
        selective = config.activation_checkpointing == ActivationCheckpointing.selective
        attention = 16 if selective else 12
    formula = f"(6 N + {attention} L D T) tokens"
    if config.layout.cp > 1:
        formula = formula.replace("T)", f"T {config.layout.cp + 1} / {2 * config.layout.cp})")
    if config.activation_checkpointing in (
        ActivationCheckpointing.full,
        ActivationCheckpointing.offload,
    ):
        formula += " + forward of blocks"
    if closed is None:
        why = "each piece of a split backward runs checkpointed blocks again"
    of_model = "(6 N + 12 L D T) tokens"
    if config.finetune.on:
        closed, why = None, "finetune=lora: not where the first adapter's input has a gradient"
        of_model = "(4 N + 6 adapters + 12 L D T) tokens"
    model, said = flops_per_token(config) * tokens, sum(rank["model"] for rank in ranks)
    return [
        Explained("model flops", of_model, model, said, "FLOP"),
        Explained(
            "hardware flops",
            None if closed is None else formula,
            closed,
            counted,
            "FLOP",
            why,
        ),
    ]


def keeps_scores(config: TrainConfig) -> bool:
    """Whether attention keeps its T x T matrix, and backward need not make it again."""
    if config.layout.cp > 1:
        return False
    if config.model.attention != Attention.sdpa:
        return config.model.attention != Attention.by_hand_flash
    # torch's kernel has no dropout on a core; for low precision see minigpt/attention.py
    low = config.precision != Precision.fp32 and config.seq_len <= SCORES_THAT_FIT
    return config.model.dropout > 0 or (low and config.device == Device.cpu)


def hardware_flops_of(config: TrainConfig) -> int | None:
    """What all ranks together should run in a step, recomputation included.

    None where blocks are checkpointed and backward is split: each piece runs them again.
    """
    layout, mode = config.layout, config.activation_checkpointing
    split = layout.pp > 1 and config.pipeline.splits_backward
    if split and mode != ActivationCheckpointing.none:
        return None
    plan = Plans.of(config.model, layout, config.options, flash=not keeps_scores(config))
    of_places = [int(hardware_flops(plan, place)[0]) for place in range(layout.pp)]
    return sum(of_places) * (layout.world_size // layout.pp)
