"""The ledger of a run: its schema, how it is written, read and checked. Standard library only.

schema        "worldsize.ledger/1"
source        "measured" | "traced" | "formula" | "replayed"
config        the resolved configuration
layout        {world_size, pp, dp_replicate, dp_shard, cp, tp, ep}
model         {parameters, flops_per_token}
environment   {device, backend, torch, cores, ...}
training      {steps, losses, validation_loss}; measured runs only
pipeline      {schedule, micro_batches, ideal_bubble, stages}; may be there where layout.pp > 1.
              stages: {rank, stages, bubble_s, bubble} of each rank. `bubble` is idle time over idle
              and busy time of forward and backward, as is `ideal_bubble`, the schedule's own
step          one optimiser step: times of the slowest rank, memory of the fullest, the mean HFU
ranks         the same `step` for each rank; of a simulated step, for one of each kind

Base units: bytes, seconds, FLOPs. A number that was not measured is null, never zero.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from costs.outside import read_json
from costs.program import PHASES

SCHEMA = "worldsize.ledger/1"
SOURCES = ("measured", "traced", "formula", "replayed")
TIME_PARTS = ("compute", "exposed_communication", "bubble", "optimizer", "other")
MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "communication", "other")
LAYOUT_KEYS = ("world_size", "pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
ROW_KEYS = (
    "collective",
    "axis",
    "group_size",
    "dtype",
    "calls",
    "payload_bytes",
    "wire_bytes",
    "time_s",
)
# phase: of costs.program.PHASES. backend_bytes: what the backend's own algorithm makes a rank send,
# on the average of the group, where that is known; wire_bytes are a ring's
ROW_MAY_HAVE = ("phase", "backend_bytes")
STEP_KEYS = (
    "tokens",
    "time_s",
    "memory_bytes",
    "communication",
    "flops",
    "tokens_per_s",
    "mfu",
    "hfu",
)
# control: {calls, payload_bytes} of barriers and objects within the step, and `outside_steps` the
# same of whatever the rank sent before the first, between two and after the last
# process_bytes: resident_peak, the high-water mark of the process, libraries included (at least
# memory_bytes.peak); allocator_peak, of the device's allocator in the step that was followed
PROCESS_KEYS = ("resident_peak", "allocator_peak")
STEP_MAY_HAVE = ("control", "process_bytes")
PIPELINE_KEYS = ("schedule", "micro_batches", "ideal_bubble", "stages")
PIPELINE_STAGE_KEYS = ("rank", "stages", "bubble_s", "bubble")
OPEN_SECTIONS = ("config", "environment", "training")  # may hold keys of their own
TIME_TOLERANCE = 1e-6  # relative: sums of floating-point seconds


def wire_bytes(collective: str, payload_bytes: int, group_size: int) -> int:
    """Bytes that one rank sends under a ring algorithm, rounded down.

    payload_bytes follows NCCL's convention: of all_gather the gathered output, of reduce_scatter
    the whole input. Source: NCCL tests, doc/PERFORMANCE.md; Thakur et al. 2005.
    """
    n, payload = group_size, payload_bytes
    if collective == "all_reduce":
        return 2 * (n - 1) * payload // n
    if collective in ("all_gather", "reduce_scatter", "all_to_all"):
        return (n - 1) * payload // n
    if collective in ("broadcast", "reduce", "gather", "scatter"):
        return (n - 1) * payload // n
    if collective == "send":
        return payload
    if collective in ("recv", "barrier"):
        return 0
    raise ValueError(f"{collective}: no such collective")


def step_of(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """A run's `step`: times of its slowest rank, memory of the fullest, messages of the busiest.
    MFU and HFU are means: one stage alone may be below MFU, which counts all stages alike."""

    def most(value: Callable[[dict[str, Any]], float | None]) -> dict[str, Any]:
        return max(ranks, key=lambda rank: value(rank) or 0)

    fullest = most(lambda rank: rank["memory_bytes"]["peak"])
    busiest = most(lambda rank: sum(row["wire_bytes"] for row in rank["communication"] or []))
    return {
        **most(lambda rank: rank["time_s"]["total"]),
        **{key: fullest[key] for key in ("memory_bytes", "process_bytes") if key in fullest},
        "communication": busiest["communication"],
        "flops": most(lambda rank: rank["flops"]["hardware"])["flops"],
        **{key: mean_known([rank[key] for rank in ranks]) for key in ("mfu", "hfu")},
    }


def mean_known(values: Iterable[float | None]) -> float | None:
    """Of those that are not null; null where none is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def write(path: Path, ledger: dict[str, Any]) -> None:
    """Check and write a ledger, whole or not at all."""
    check(ledger)
    text = json.dumps(ledger, indent=1, allow_nan=False)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Read and check a ledger. Raises ValueError, one line with the file's name."""
    try:
        ledger = read_json(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a ledger: {str(error).splitlines()[0]}") from error
    try:
        check(ledger)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return ledger


def check(ledger: Any) -> None:
    """Raise ValueError, one line with the place, where a ledger breaks its schema."""
    _need(isinstance(ledger, dict), "ledger", "must be an object")
    _need(ledger.get("schema") == SCHEMA, "schema", f"{ledger.get('schema')!r} is not {SCHEMA!r}")
    measured = ledger.get("source") == "measured"
    _need(ledger.get("source") in SOURCES, "source", f"must be one of {', '.join(SOURCES)}")
    sections = ["schema", "source", "config", "layout", "model", "environment", "step", "ranks"]
    sections += ["training"] if measured else []
    _keys(ledger, tuple(sections), "ledger", may=("pipeline",))
    for name in OPEN_SECTIONS:
        _need(isinstance(ledger.get(name, {}), dict), name, "must be an object")
    _keys(ledger["layout"], LAYOUT_KEYS, "layout")
    for key in LAYOUT_KEYS:
        _whole(ledger["layout"][key], f"layout.{key}", low=1, null=False)
    _keys(ledger["model"], ("parameters", "flops_per_token"), "model")
    _whole(ledger["model"]["parameters"], "model.parameters", low=1, null=False)
    _number(ledger["model"]["flops_per_token"], "model.flops_per_token")
    if measured:
        _check_training(ledger["training"])
    if "pipeline" in ledger:
        _check_pipeline(ledger["pipeline"])
    check_step(ledger["step"], "step")
    ranks, world_size = ledger["ranks"], ledger["layout"]["world_size"]
    _need(isinstance(ranks, list), "ranks", "must be a list")
    # a simulation has one of each kind
    right = len(ranks) == world_size or (not measured and 1 <= len(ranks) <= world_size)
    _need(right, "ranks", f"{len(ranks)} of {world_size} ranks")
    for i, step in enumerate(ranks):
        check_step(step, f"ranks[{i}]")


def _check_training(training: dict[str, Any]) -> None:
    for key in ("steps", "losses", "validation_loss"):
        _need(key in training, f"training.{key}", "is missing")
    _whole(training["steps"], "training.steps", null=False)
    _need(isinstance(training["losses"], list), "training.losses", "must be a list")
    for i, loss in enumerate(training["losses"]):
        # a long run has thousands, and a sweep a thousand runs
        if loss is not None and not (type(loss) is float and 0 <= loss < math.inf):
            _number(loss, f"training.losses[{i}]")
    _number(training["validation_loss"], "training.validation_loss")


def _check_pipeline(pipeline: Any) -> None:
    _keys(pipeline, PIPELINE_KEYS, "pipeline")
    _need(isinstance(pipeline["schedule"], str), "pipeline.schedule", "must be a name")
    _whole(pipeline["micro_batches"], "pipeline.micro_batches", low=1, null=False)
    _number(pipeline["ideal_bubble"], "pipeline.ideal_bubble")
    _need(isinstance(pipeline["stages"], list), "pipeline.stages", "must be a list")
    for i, rank in enumerate(pipeline["stages"]):
        where = f"pipeline.stages[{i}]"
        _keys(rank, PIPELINE_STAGE_KEYS, where)
        _whole(rank["rank"], f"{where}.rank", null=False)
        _need(isinstance(rank["stages"], list), f"{where}.stages", "must be a list")
        for key in ("bubble_s", "bubble"):
            _number(rank[key], f"{where}.{key}")


def check_step(step: Any, where: str) -> None:
    """One rank's costs of one step."""
    _keys(step, STEP_KEYS, where, STEP_MAY_HAVE)
    _whole(step["tokens"], f"{where}.tokens", null=False)
    time_s, memory = step["time_s"], step["memory_bytes"]
    _keys(time_s, ("total", *TIME_PARTS), f"{where}.time_s")
    for key in time_s:
        _number(time_s[key], f"{where}.time_s.{key}")
    _adds_up(time_s, "total", f"{where}.time_s", TIME_TOLERANCE)
    _keys(memory, ("peak", *MEMORY_PARTS), f"{where}.memory_bytes")
    for key in memory:
        _whole(memory[key], f"{where}.memory_bytes.{key}")
    _adds_up(memory, "peak", f"{where}.memory_bytes", 0.0)
    if "process_bytes" in step:
        _keys(step["process_bytes"], PROCESS_KEYS, f"{where}.process_bytes")
        for key in PROCESS_KEYS:
            _whole(step["process_bytes"][key], f"{where}.process_bytes.{key}")
    rows = step["communication"]
    _need(rows is None or isinstance(rows, list), f"{where}.communication", "must be a list")
    for i, row in enumerate(rows or []):
        _check_row(row, f"{where}.communication[{i}]")
    if step.get("control") is not None:
        _check_control(step["control"], f"{where}.control")
    _keys(step["flops"], ("model", "hardware"), f"{where}.flops")
    for key in ("model", "hardware"):
        _number(step["flops"][key], f"{where}.flops.{key}")
    for key in ("tokens_per_s", "mfu", "hfu"):
        _number(step[key], f"{where}.{key}")


def _check_control(control: Any, where: str) -> None:
    counts = ("calls", "payload_bytes")
    _keys(control, (*counts, "outside_steps"), where)
    _keys(control["outside_steps"], counts, f"{where}.outside_steps")
    for key in counts:
        _whole(control[key], f"{where}.{key}", null=False)
        _whole(control["outside_steps"][key], f"{where}.outside_steps.{key}", null=False)


def _check_row(row: Any, where: str) -> None:
    _keys(row, ROW_KEYS, where, ROW_MAY_HAVE)
    for key in ("collective", "axis", "dtype"):
        _need(isinstance(row[key], str) and bool(row[key]), f"{where}.{key}", "must be a name")
    phase = row.get("phase")
    known = phase is None or phase in PHASES
    _need(known, f"{where}.phase", f"{phase!r} is not one of {', '.join(PHASES)}")
    _whole(row.get("backend_bytes"), f"{where}.backend_bytes")
    _whole(row["group_size"], f"{where}.group_size", low=2, null=False)
    for key in ("calls", "payload_bytes", "wire_bytes"):
        _whole(row[key], f"{where}.{key}", null=False)
    _number(row["time_s"], f"{where}.time_s")
    most = wire_bytes(row["collective"], row["payload_bytes"], row["group_size"])
    # each call of a row rounds down on its own
    least = most - row["calls"]
    fits = least <= row["wire_bytes"] <= most
    _need(fits, f"{where}.wire_bytes", f"{row['wire_bytes']}, but a ring sends {most}")


def _adds_up(parts: dict[str, Any], whole: str, where: str, tolerance: float) -> None:
    """Parts that are null count as nothing, but a whole needs at least one part."""
    known = [value for key, value in parts.items() if key != whole and value is not None]
    total = parts[whole]
    if total is None:
        _need(not known, where, f"has parts, but its {whole} is null")
        return
    off = abs(math.fsum(known) - total)
    _need(off <= tolerance * total, where, f"parts sum to {math.fsum(known)}, {whole} is {total}")


def _keys(value: Any, keys: tuple[str, ...], where: str, may: tuple[str, ...] = ()) -> None:
    _need(isinstance(value, dict), where, "must be an object")
    for key in keys:
        _need(key in value, f"{where}.{key}", "is missing")
    for key in value:
        _need(key in keys or key in may, f"{where}.{key}", "is not in the schema")


def _number(value: Any, where: str) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _need(number and math.isfinite(value), where, f"{value!r} is not a finite number")
    _need(value >= 0, where, f"{value!r} is negative")


def _whole(value: Any, where: str, low: int = 0, null: bool = True) -> None:
    if value is None and null:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    _need(whole and value >= low, where, f"{value!r} is not a whole number of at least {low}")


def _need(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {what}")
