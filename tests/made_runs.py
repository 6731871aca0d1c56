"""Folders of runs as a real one leaves them, with costs that a test chooses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from costs import ledger as ledgers
from costs.ledger import MEMORY_PARTS, TIME_PARTS

CONFIG: dict[str, Any] = {
    "model": {"n_layer": 4, "d_model": 128},
    "data": {"source": "stdlib"},
    "layout": {"pp": 1, "dp_replicate": 2, "dp_shard": 1, "cp": 1, "tp": 1, "ep": 1},
    "optimizer": {"name": "adamw", "lr": 0.004},
    "run": {"dir": None, "save": True},
    "logging": {"to": "none", "group": None},
    "steps": 40,
    "seed": 0,
    "precision": "fp32",
    "zero_stage": 3,
    "compile": False,
    "device": "cpu",
    "trace": False,
}
FACTS = {
    "device": "cpu",
    "torch": "2.13.0",
    "processor": "AMD",
    "cores": 2,
    "corpus": {"source": "stdlib", "sha256": "ab" * 32, "unigram_entropy": 3.1},
}
JITTER = (0.0, 0.01, -0.01, 0.02, -0.02)  # relative, of one step after the other


def a_run(
    folder: Path,
    settings: dict[str, Any] | None = None,
    *,
    step_s: float = 0.1,
    exposed_s: float = 0.02,
    activations: int = 1000,
    messages: dict[tuple[str, str], int] | None = None,
    losses: list[float] | None = None,
    source: str = "measured",
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write a run and return its folder. `settings`: dotted keys; `messages`: payload by collective
    and axis, of two ranks."""
    folder.mkdir(parents=True)
    config = copy.deepcopy(CONFIG)
    for key, value in (settings or {}).items():
        *sections, last = key.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    rows = [
        row(collective, axis, size)
        for (collective, axis), size in (messages or {("all_reduce", "dp_replicate"): 4000}).items()
    ]
    losses = losses or [5.0 - 0.05 * i + 0.01 * (-1) ** i for i in range(config["steps"])]
    step = a_step(step_s, exposed_s, activations, rows)
    training = {"steps": len(losses), "losses": losses, "validation_loss": losses[-1] + 0.1}
    measured = source == "measured"
    ledger = {
        "schema": ledgers.SCHEMA,
        "source": source,
        "config": config,
        "layout": {"world_size": 2, **config["layout"]},
        "model": {"parameters": 1000, "flops_per_token": 6000},
        "environment": {**FACTS, **(facts or {})} if measured else facts or {},
        **({"training": training} if measured else {}),
        "step": step,
        "ranks": [step, step],
    }
    ledgers.write(folder / "ledger.json", ledger)
    if measured:
        jitter = (JITTER[i % len(JITTER)] for i in range(len(losses)))
        seconds = [step_s * (1 + j) for j in jitter]
        lines = ({"loss": x, "step_s": s} for x, s in zip(losses, seconds, strict=True))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def a_step(total: float, exposed: float, activations: int, rows: list[dict]) -> dict[str, Any]:
    times = {**dict.fromkeys(TIME_PARTS, 0.0), "exposed_communication": exposed}
    times["compute"] = total - exposed
    held = {**dict.fromkeys(MEMORY_PARTS, 100), "activations": activations}
    return {
        "tokens": 2048,
        "time_s": {"total": total, **times},
        "memory_bytes": {"peak": sum(held.values()), **held},
        "communication": rows,
        "flops": {"model": 1e9, "hardware": 1e9},
        "tokens_per_s": 2048 / total,
        "mfu": 0.05 / total,
        "hfu": None,
    }


def row(collective: str, axis: str, payload: int) -> dict[str, Any]:
    return {
        "collective": collective,
        "axis": axis,
        "group_size": 2,
        "dtype": "float32",
        "calls": 1,
        "payload_bytes": payload,
        "wire_bytes": ledgers.wire_bytes(collective, payload, 2),
        "time_s": 0.001,
    }
