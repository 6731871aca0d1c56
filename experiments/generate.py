"""Text from a trained run.

./launch.sh generate run=runs/20261123-120000-dp_replicate2
./launch.sh generate run=... prompt="class " tokens=300 temperature=0.8 top_k=40 seed=1
"""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from experiments.compose import Refused, run_hydra, to_config
from experiments.config import Device, GenerateConfig
from experiments.environment import gpu_count
from experiments.worker import read_config


def command(argv: list[str]) -> int:
    """Print the prompt and its continuation."""
    as_json = "--json" in argv
    composed: list[DictConfig] = []
    run_hydra("generate", [a for a in argv if a != "--json"], composed.append)
    for job in composed:
        config = to_config(job, GenerateConfig)
        text = run(config)
        said = {"run": config.run, "prompt": config.prompt, "text": text}
        print(json.dumps(said) if as_json else text)
    return 0


def run(config: GenerateConfig) -> str:
    """Load the run's weights on one device and continue the prompt."""
    folder = Path(config.run)
    for name in ("config.yaml", "launch.json", "model.pt"):
        if not (folder / name).is_file():
            raise Refused(f"run={folder}: no {name} there; train one with ./launch.sh")
    if config.device == Device.cuda and not gpu_count():
        raise Refused("device=cuda: torch sees no CUDA device here; device=cpu works")

    import torch  # after the checks: it takes seconds

    from experiments.sample import continue_text, load_model
    from minigpt.corpus import open_corpus

    use_cuda = config.device != Device.cpu and gpu_count() > 0
    device = torch.device("cuda" if use_cuda else "cpu")
    weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    model = load_model(read_config(folder).model, weights, device)
    corpus = open_corpus(Path(json.loads((folder / "launch.json").read_text())["corpus"]))
    sampling = (config.temperature, config.top_k, config.seed)
    return continue_text(model, corpus, config.prompt, config.tokens, *sampling)
