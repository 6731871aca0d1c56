"""Published measurements as plans: one row of a CSV is one configuration on one cluster.

experiments/published/README.md explains the columns. What a row leaves open (micro-batch size,
recomputation) is a list of candidates: who publishes a number has tuned it, so the fastest that
fits is taken. A row that this program has no words for is Unknown, with the reason.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigpt.config import FFN, ModelConfig
from simulator.candidates import Candidate, candidates_of, model_of
from simulator.cells import Cells, Unknown, number, whole
from simulator.hardware import Cluster

# a name in the column gpu starts with -> file of configs/cluster. The longest that fits is taken.
GPUS = {
    "V100": "v100",
    "A100-40GB": "a100_40g",
    "A100": "a100_80g",
    "H100": "h100",
    "H100-96GB-HBM2e-500W": "h100_96g_500w",
    "H200": "h200",
    "GH200": "gh200",
    "B200": "b200",
    "GB200": "gb200_nvl72",
    "B300": "b300",
    "GB300": "gb300_nvl72",
    "MI300X": "mi300x",
    "TPU v5p": "tpu_v5p",
}
REQUIRED = ("id", "gpu", "n_gpus", "n_layer", "d_model", "n_head", "seq_len", "global_batch_seqs")
GIB = 2**30
V100_16GB = 16160 * 2**20  # what nvidia-smi says of the smaller of two sizes


@dataclass(frozen=True)
class Row:
    """One published configuration, and what was measured."""

    name: str
    source: str
    cluster: str  # file of configs/cluster
    changes: dict[str, float]  # of the cluster: what this row says of its network
    candidates: list[Candidate]
    seconds: float | None
    memory_bytes: float | None
    out_of_memory: bool


def read(path: Path, clusters: dict[str, Cluster]) -> tuple[list[Row], dict[str, str]]:
    """Rows of a CSV to score on, and why the others of them have no plan, by id.

    Rows whose `use` is stated and not primary are left out. `clusters` by the names that GPUS has.
    Raises ValueError, one line, where the file is no such CSV.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"rows={path}: not a CSV: {error}") from error
    missing = [key for key in REQUIRED if not table or key not in table[0]]
    if missing:
        raise ValueError(f"rows={path}: no column {', '.join(missing)}, or no rows")
    rows, unknown = [], {}
    for line, cells in enumerate(table, 2):
        # a cell may hold line ends, and what quotes it is one line
        texts = {k: v or "" for k, v in cells.items() if isinstance(v, str | None) and k}
        values = {key: " ".join(text.split()) for key, text in texts.items()}
        name = values["id"] or f"line {line}"
        if values.get("use", "primary") not in ("primary", ""):
            continue
        try:
            row = row_of(name, values, clusters)
            for candidate in row.candidates:  # so that what is impossible about it is known here
                assert np.isfinite(candidate.memory_bytes)
        except (Unknown, ValueError) as error:
            unknown[name] = str(error)
        except (ArithmeticError, AssertionError, IndexError) as error:
            unknown[name] = f"no plan: {type(error).__name__} {error}".strip()
        else:
            rows.append(row)
    return rows, unknown


def row_of(name: str, cells: Cells, clusters: dict[str, Cluster]) -> Row:
    """The plan of a row. Raises Unknown, or ValueError where the model or layout is impossible."""
    status = cells.get("status") or "ok"
    if status not in ("ok", "oom"):
        raise Unknown(f"status={status}: must be ok or oom")
    cluster, changes = _cluster(cells)
    model = model_of(cells, whole(cells, "seq_len"))
    candidates = candidates_of(cells, model)
    memory = number(cells, "peak_mem_gib")
    return Row(
        name,
        name.partition("-")[0],
        cluster,
        changes,
        candidates,
        _seconds(cells, model, clusters[cluster].device.flops("bf16")),
        memory * GIB if memory else None,
        status == "oom",
    )


def _cluster(cells: Cells) -> tuple[str, dict[str, float]]:
    """The cluster's file, and what the row says of it: node size, network between nodes."""
    gpu = cells["gpu"]
    fitting = [name for name in GPUS if gpu.upper().startswith(name.upper())]
    if not fitting:
        raise Unknown(f"gpu={gpu}: not in configs/cluster")
    name, changes = GPUS[max(fitting, key=len)], {}
    if not name.endswith("nvl72") and cells.get("gpus_per_node"):
        changes["node_size"] = float(whole(cells, "gpus_per_node"))
    memory = re.search(r"-(\d+)GB", gpu)
    if memory and name == "v100":
        changes["device.memory_bytes"] = float(memory[1]) / 16 * V100_16GB
    node = changes.get("node_size", 8)
    rate = network_rate(cells.get("interconnect_inter", ""), int(node))
    if rate:
        changes["between_nodes.bandwidth"] = rate
    return name, changes


def network_rate(text: str, node_size: int) -> float | None:
    """Bytes/s a device of what the column interconnect_inter says: 8x200Gb HDR IB/node."""
    found = re.search(r"(?:(\d+)x ?)?(\d+\.?\d*) ?([GT])b", text)
    if not found:
        return None
    rate = int(found[1] or 1) * float(found[2]) * {"G": 1e9, "T": 1e12}[found[3]] / 8
    return rate if "/GPU" in text else rate / node_size


def _seconds(cells: Cells, model: ModelConfig, peak: float) -> float | None:
    """A step's seconds: measured, derived in the file, or from the FLOP rate or the MFU where only
    that was published: 6 N + 12 L D T flops a token (Chowdhery et al. 2022, appendix B)."""
    for key in ("step_time_s", "step_time_derived_s"):
        value = number(cells, key)
        if value:
            return value
    tera, mfu = number(cells, "tflops_per_gpu"), number(cells, "mfu_pct")
    rate = 1e12 * tera if tera else peak * mfu / 100 if mfu else None
    counted = cells.get("flops_convention") == "model" and model.ffn != FFN.moe
    if rate is None or not counted:
        return None
    seq_len, ranks = whole(cells, "seq_len"), whole(cells, "n_gpus")
    weights = model.parameters - (0 if model.tied else model.vocab_size * model.d_model)
    flops = 6 * weights + 12 * model.n_layer * model.d_model * seq_len
    return flops * whole(cells, "global_batch_seqs") * seq_len / (ranks * rate)
