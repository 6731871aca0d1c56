"""Configurations as the command line makes them."""

from __future__ import annotations

from omegaconf import DictConfig

from experiments.compose import run_hydra, to_config
from experiments.config import TrainConfig
from minigpt.config import ModelConfig


def compose(*overrides: str) -> TrainConfig:
    """What ./launch.sh makes of those overrides. Raises Refused or ValueError."""
    composed: list[DictConfig] = []
    run_hydra("train", list(overrides), composed.append)
    return to_config(composed[0], TrainConfig)


def model_of(name: str) -> ModelConfig:
    return compose(f"model={name}", "seq_len=16").model
