"""A run's weights as one file, from a checkpoint of any layout, or of the run's end.

./launch.sh export run=runs/20261123-120000-dp_shard4 out=model.safetensors
./launch.sh export run=runs/.../step-200

`init=model.safetensors` starts a run from it. Where the run has checkpoints it is the newest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.checkpoints import Damaged, check, steps_of
from experiments.compose import Refused, run_hydra, to_config
from experiments.config import ExportConfig
from experiments.resume import named_checkpoint, run_of
from experiments.run_folder import read_config, settings_of


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
    model = read_config(run_of(given)).model
    if given != run_of(given) or steps_of(given):
        source = named_checkpoint(given, "run")
        try:
            check(source)
        except Damaged as error:
            raise Refused(f"run={given}: {error}") from error
        from parallel.checkpoint_reader import read_whole  # torch takes seconds

        weights = read_whole(source, "model")
    else:
        source = given / "model.pt"
        if not source.is_file():
            raise Refused(f"run={given}: no checkpoint and no model.pt there")
        from experiments.sample import read_model

        weights = dict(read_model(given, model, "cpu").named_parameters())
    from experiments.weights_file import write

    kept = {name: weight.detach() for name, weight in weights.items()}
    settings = settings_of(read_config(run_of(given)))
    write(out, kept, settings["model"])
    numbers = sum(weight.numel() for weight in kept.values())
    return {"out": str(out), "from": str(source), "tensors": len(kept), "parameters": numbers}
