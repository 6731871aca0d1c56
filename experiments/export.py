"""A run's weights as one file, from a checkpoint of any layout, or of the run's end.

./launch.sh export run=runs/20261123-120000-dp_shard4 out=model.safetensors
./launch.sh export run=runs/.../step-200

`init=model.safetensors` starts a run from it. Where the run has checkpoints it is the newest.
Adapters are merged: the file is a plain model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.compose import run_hydra, to_config
from experiments.config import ExportConfig
from experiments.refused import Refused
from experiments.run_weights import check_source, tokenizer_of, weights_of
from experiments.warn import warning
from experiments.weights_file import write


def command(argv: list[str]) -> int:
    """Write the file, and say what is in it."""
    as_json = "--json" in argv
    composed: list[DictConfig] = []
    run_hydra("export", [a for a in argv if a != "--json"], composed.append)
    for job in composed:
        said = run(to_config(job, ExportConfig))
        text = f"{said['out']}: {said['tensors']} tensors, {said['parameters']:,} parameters, of "
        print(json.dumps(said) if as_json else text + said["from"])
    return 0


def run(config: ExportConfig) -> dict[str, Any]:
    """Read, write, and what --json says."""
    given, out = Path(config.run), Path(config.out)
    if not out.parent.is_dir():
        raise Refused(f"out={out}: {out.parent} is no folder")
    model, warnings = check_source(given, "run")
    for line in warnings:
        warning(line)
    weights, source = weights_of(given, "run")
    write(out, weights, {"model": model, "tokenizer": tokenizer_of(given, "run")})
    numbers = sum(weight.numel() for weight in weights.values())
    return {"out": str(out), "from": str(source), "tensors": len(weights), "parameters": numbers}
