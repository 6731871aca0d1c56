"""The models of configs/model, as checked dataclasses (minigpt/config.py). No torch."""

from __future__ import annotations

from functools import cache

from omegaconf import OmegaConf

from experiments.compose import CONFIGS
from minigpt.config import ModelConfig


@cache
def load_all() -> dict[str, ModelConfig]:
    """Every model of configs/model, by name."""
    found = {}
    for path in sorted((CONFIGS / "model").glob("*.yaml")):
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path))
        made = OmegaConf.to_object(merged)
        assert isinstance(made, ModelConfig)
        found[path.stem] = made
    return found
