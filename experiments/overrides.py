"""Configurations by the hundred: what a command line composes, without Hydra for each of them."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from experiments.compose import GROUPS, configs_of, no_such_key
from experiments.refused import Refused

FIRST = ("model.", "data.")  # other keys are derived from these, or checked against them


@cache
def _base(command: str, overrides: tuple[str, ...]) -> Any:
    """What Hydra makes of them, checked."""
    return configs_of(command, list(overrides))[0]


@cache
def composed(command: str, overrides: tuple[str, ...]) -> Any:
    """The configuration that a command line makes, checked. Raises Refused or ValueError.

    Hydra composes groups and the model once, which takes a tenth of a second; what nothing else is
    derived from is put on top of that, as often as there are plans.
    """
    groups: tuple[str, ...] = FIRST
    if any(o.startswith(("strategy=", "experiment=")) for o in overrides):
        groups = (*FIRST, "layout.", "gpus")  # a preset's -1 is what the other axes leave
    first = tuple(o for o in overrides if _comes_first(o.partition("=")[0], groups))
    rest = [o for o in overrides if o not in first]
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(rest))
    return changed(_base(command, first), values)


def _comes_first(key: str, others: tuple[str, ...]) -> bool:
    return key in GROUPS or key.startswith(others)


def changed(node: Any, values: dict[str, Any]) -> Any:
    """A dataclass with other values, by nested keys. Enums are given by name. Raises Refused."""
    hints, made = get_type_hints(type(node)), {}
    for key, value in values.items():
        if key not in hints:
            raise Refused(no_such_key(key, key, type(node)))
        old = getattr(node, key)
        if is_dataclass(old):
            made[key] = changed(old, value)
        else:
            made[key] = _typed(hints[key], value)
    return replace(node, **made)


def _typed(hint: Any, value: Any) -> Any:
    """What a schema's field takes."""
    if get_origin(hint) is list and not isinstance(value, list):
        value = [value]
    kind = next((a for a in (hint, *get_args(hint)) if isinstance(a, type)), None)
    if kind is not None and issubclass(kind, Enum) and value is not None:
        values = value if isinstance(value, list) else [value]
        made = [kind(str(one)) for one in values]
        return made if isinstance(value, list) else made[0]
    return float(value) if hint in (float, float | None) and value is not None else value
