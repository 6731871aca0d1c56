"""Text from a trained run.

./launch.sh generate run=runs/20261123-120000-dp_replicate2
./launch.sh generate run=... prompt="class " tokens=300 temperature=0.8 top_k=40 top_p=0.9 seed=1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from experiments.compose import configs_of
from experiments.config import GenerateConfig, TrainConfig
from experiments.environment import gpu_count, pick_device
from experiments.model_file import MODEL, check_model_file, read_about
from experiments.outside_text import visible
from experiments.refused import Refused
from experiments.run_folder import read_config
from experiments.same_tokenizer import check_tokenizer, recorded
from experiments.warn import warning
from minigpt.corpus import kind_of_tokens
from minigpt.tokenizer import BPE_FILE, WITH_FILE, make_tokenizer


def command(argv: list[str]) -> int:
    """Print the prompt and its continuation."""
    as_json = "--json" in argv
    for config in configs_of("generate", [a for a in argv if a != "--json"]):
        text = run(config)
        said = {"run": config.run, "prompt": config.prompt, "text": text}
        if sys.stdout.isatty():  # a model may write any byte, escape sequences too
            text = visible(text, lines=True)
        print(json.dumps(said) if as_json else text)
    return 0


def run(config: GenerateConfig) -> str:
    """Load the run's weights on one device and continue the prompt."""
    folder = Path(config.run)
    trained = check_run(config, folder)
    for line in check_model_file(folder, trained.model):
        warning(line)
    about = read_about(folder)
    if about and about.get("tokenizer"):
        said = f"run={folder}: {MODEL}"
        check_tokenizer(said, about["tokenizer"], recorded(folder, trained.data))
    # after the checks: torch takes seconds
    from experiments.sample import continue_text, read_model

    device = pick_device(config.device, gpu_count())
    model = read_model(folder, trained.model, device.value)
    tokenizer = make_tokenizer(kind_of_tokens(trained.data), trained.data.id_count or 0, folder)
    sampling = (config.temperature, config.top_k, config.top_p, config.seed)
    return continue_text(model, tokenizer, config.prompt, config.tokens, *sampling)


def check_run(config: GenerateConfig, folder: Path) -> TrainConfig:
    """The configuration of the run, if all that is needed is there."""
    pick_device(config.device, gpu_count())
    for name in ("config.yaml", "model.pt"):
        if not (folder / name).is_file():
            raise Refused(f"run={folder}: no {name} there; train one with ./launch.sh")
    trained = read_config(folder)
    if kind_of_tokens(trained.data) in WITH_FILE and not (folder / BPE_FILE).is_file():
        raise Refused(f"run={folder}: no {BPE_FILE} there")
    return trained
