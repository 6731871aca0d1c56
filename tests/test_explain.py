"""The formulas that a run is told, read as arithmetic, against the closed forms' values."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from experiments.config import TrainConfig
from experiments.figures.matrix import PLANS
from parallel.layout import ActivationCheckpointing, Precision
from simulator.explain import LETTERS, Case, formulas
from simulator.shapes import padded, weights_of

CHANGES: list[dict[str, Any]] = [
    {},
    {"clip": 1.0, "gradient_accumulation_steps": 4},
    {"clip": 1.0, "model.tied": True, "model.norm": "layernorm", "model.n_kv_head": 2},
    {"activation_checkpointing": ActivationCheckpointing.full},
    {"precision": Precision.bf16, "clip": 1.0},
]


def letters(case: Case) -> dict[str, int]:
    """Numbers for the symbols, from the shapes of what this rank has."""
    model, layout, options, rank = case.model, case.layout, case.options, case.rank
    plans, one = rank.plans, np.ones(1, dtype=np.int64)
    rest, layers = rank.of_outer(rank.weight_shards)[0], rank.layers[0]
    blocks = layers * rank.of_block(rank.weight_shards)[0]
    of_norms = [w for w in rank.block_weights if "norm" in w.name]
    outer_norms = [w for w in weights_of(model.outer_shapes) if w.name.startswith("norm")]
    norms = layers * padded(of_norms, plans, one) + rank.last * padded(outer_norms, plans, one)
    experts = layers * rank.of_experts(rank.expert_shards)[0]
    return {
        "P": rest + blocks,
        "R": rest,
        "W": blocks,
        "E": experts,
        "G": norms[0],
        "L": layers,
        "m": options.micro_batches,
        "B": options.micro_batch_size,
        "T": options.seq_len // layout.cp,
        "D": model.d_model,
        "K": model.kv_heads // layout.tp,
        "H": model.head_dim,
        "V": model.vocab_size // layout.tp,
        "S": model.n_expert * model.expert_slots(options.seq_len) if model.capacity_factor else 0,
        "A": model.experts_per_token,
        "X": model.n_expert,
        "n": layout.cp,
    }


def value(formula: str, of: dict[str, int]) -> int:
    """Named terms, added up: "gradients 4 P + norm 4". A space between two factors multiplies."""
    bare = re.sub(r"\b(?!\d)[a-z]{2,}\b ?", "", formula)
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", bare)
    result = eval(product, {"__builtins__": {}}, of)
    assert result == int(result), formula
    return int(result)


def test_a_formula_is_read_as_it_is_written() -> None:
    assert value("gradients 4 P + norm 4", {"P": 10}) == 44
    assert value("keys and values 4 (2 L + 1) m / 2", {"L": 3, "m": 2}) == 28


def cases() -> list[tuple[str, TrainConfig]]:
    found = []
    for plan in PLANS:
        for change in CHANGES if "impl" not in plan.changes else []:
            with suppress(ValueError):  # what the rules refuse
                found.append((plan.name, plan.config(change)))
    return found


@pytest.mark.parametrize("name", sorted({name for name, _ in cases()}))
def test_every_message_has_a_formula_and_it_has_the_closed_forms_value(name: str) -> None:
    """On every rank of a pipeline."""
    for _, config in (case for case in cases() if case[0] == name):
        for rank in range(config.layout.pp):
            clipped = config.clip is not None
            case = Case(config.model, config.layout, config.options, clipped, rank)
            closed = case.payload_bytes()
            said = formulas(case)
            assert said.keys() == closed.keys(), config
            for key, formula in said.items():
                if "schedule" in formula:  # no arithmetic: simulator/schedules.py follows its order
                    continue
                assert value(formula, letters(case)) == closed[key], (key, formula, config)


def test_every_letter_is_explained() -> None:
    explained = set(re.findall(r"\b[A-Za-z]\b", " ".join(LETTERS)))
    explained |= set(re.findall(r"\b([A-Z]):", " ".join(LETTERS.values())))
    used: set[str] = set()
    for _, config in cases():
        case = Case(config.model, config.layout, config.options, config.clip is not None)
        used |= set(re.findall(r"\b[A-Za-z]\b", " ".join(formulas(case).values())))
    assert used <= explained
    assert used >= {"P", "W", "L", "m", "K", "S"}
