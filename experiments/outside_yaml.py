"""Reads YAML that another run or person wrote: bounded before OmegaConf makes anything of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from costs.outside import MOST_DEPTH, read_bytes

MOST_BYTES = 2**20
MOST_VALUES = 100_000  # with what aliases stand for, which may grow by tens with every line


def load_yaml(path: Path) -> Any:
    """Return what OmegaConf makes of a YAML file. Raises ValueError, one line without the file's
    name, where it is too large, nested too deep or its aliases stand for too much; OSError,
    yaml.YAMLError and OmegaConf's own errors."""
    text = read_bytes(path, MOST_BYTES).decode()
    try:
        root = yaml.compose(text)
        if root is not None and _values(root, {}, 0) > MOST_VALUES:
            raise ValueError(f"has more than {MOST_VALUES:,} values once its aliases are followed")
        return OmegaConf.create(text)
    except RecursionError:
        raise ValueError(f"is nested more than {MOST_DEPTH} deep") from None


def _values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many values a node stands for. `known` has those of nodes that were met."""
    if depth > MOST_DEPTH:
        raise ValueError(f"is nested more than {MOST_DEPTH} deep")
    if id(node) in known:
        return known[id(node)]
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [one for pair in node.value for one in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[id(node)] = 1 + sum(_values(one, known, depth + 1) for one in inner)
    return known[id(node)]
