"""Text from trained weights, on one device: after training, and for `generate`."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.config import TrainConfig
from minigpt.config import ModelConfig
from minigpt.corpus import Corpus
from minigpt.generate import generate
from minigpt.model import GPT
from minigpt.tokenizer import make_tokenizer


def load_model(config: ModelConfig, weights: dict[str, Tensor], device: torch.device) -> GPT:
    """A GPT on one device with those weights, ready to generate."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.tie()
    model.load_state_dict(weights)
    return model.eval()


def sample_text(config: TrainConfig, corpus: Corpus, weights: dict[str, Tensor]) -> str:
    """What a run shows of its model when it ends."""
    model = load_model(config.model, weights, torch.device("cpu"))
    how = config.sample
    text = continue_text(
        model, corpus, how.prompt, how.tokens, how.temperature, how.top_k, config.seed
    )
    return f"--- sample ---\n{text}\n--------------"


def continue_text(
    model: GPT,
    corpus: Corpus,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> str:
    """The prompt and `tokens` more tokens, as text."""
    tokenizer = make_tokenizer(corpus.tokenizer, corpus.vocab_size, corpus.folder)
    ids = tokenizer.encode(prompt)
    made = generate(model, ids, tokens, temperature=temperature, top_k=top_k, seed=seed)
    return tokenizer.decode([*ids, *made])
