"""Text from trained weights, on one device: after training, and for `generate`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from experiments.config import TrainConfig
from minigpt.config import ModelConfig
from minigpt.generate import generate
from minigpt.model import GPT
from minigpt.tokenizer import TextTokenizer


def load_model(config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> GPT:
    """A GPT on one device with those weights, ready to generate."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.tie()
    model.load_state_dict(weights)
    return model.eval()


def read_model(folder: Path, config: ModelConfig, device: str) -> GPT:
    """Return the GPT of a run folder whose model.pt was checked (experiments/model_file.py).

    Raises ValueError, one line, where it is damaged all the same or does not fit `config`.
    """
    path = folder / "model.pt"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # runs nothing of it
        return load_model(config, weights, torch.device(device))
    except Exception as error:  # torch raises many kinds, of many lines
        raise ValueError(f"{path}: is damaged, or does not fit config.yaml beside it") from error


def sample_text(config: TrainConfig, weights: dict[str, Tensor], tokenizer: TextTokenizer) -> str:
    """What a run shows of its model when it ends."""
    model = load_model(config.model, weights, torch.device("cpu"))
    how = config.sample
    sampling = (how.temperature, how.top_k, how.top_p, config.seed)
    try:
        text = continue_text(model, tokenizer, how.prompt, how.tokens, *sampling)
    except ValueError as error:  # with nonfinite=skip a run goes on to its end all the same
        text = f"none: {error}"
    return f"--- sample ---\n{text}\n--------------"


def continue_text(
    model: GPT,
    tokenizer: TextTokenizer,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> str:
    """The prompt and `tokens` more tokens, as text."""
    ids = tokenizer.encode(prompt)
    made = generate(model, ids, tokens, temperature, top_k, top_p, seed)
    return tokenizer.decode([*ids, *made])
