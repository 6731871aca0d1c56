"""Every key of a training run, given what it does not take, is refused in one line."""

from __future__ import annotations

import copy
import random
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.__main__ import main
from experiments.compose import (
    GROUPS,
    as_list,
    check_options,
    compose_once,
    keys_of,
    lists_of,
    one_line,
    store_schemas,
    to_config,
)
from experiments.config import TrainConfig
from experiments.free_text import free_keys, quoted
from experiments.refused import Refused

VALUES = ("x y", "", "null", "[1,2]", "{a: 1}", "true", "1.5")
KEYS = keys_of(TrainConfig)
PAIRS = [(key, value) for key in KEYS for value in VALUES if key not in GROUPS]
GROUP_PAIRS = [(key, value) for key in ("model", "strategy", "experiment") for value in VALUES]
BELOW_ONE = {"model.dropout", "data.validation_fraction", "optimizer.momentum"}
BELOW_ONE |= {"optimizer.beta1", "optimizer.beta2", "optimizer.min_lr_ratio"}
BELOW_ONE |= {"sample.top_p"}


@cache
def of_defaults() -> DictConfig:
    store_schemas()
    return compose_once("train", [])


def composed(argument: str) -> TrainConfig:
    """Return what `compose` of tests/configs.py does, in 15 ms: Hydra reads configs/ once, and
    its own function puts each override on a copy of that."""
    argument = as_list(quoted(argument, TrainConfig), TrainConfig)
    check_options([argument])
    config = copy.deepcopy(of_defaults())
    try:
        overrides = OverridesParser.create().parse_overrides([argument])
        ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
    except (HydraException, OmegaConfBaseException) as error:
        raise Refused(one_line(error, [argument], TrainConfig)) from error
    return to_config(config, TrainConfig)


def hint_of(key: str) -> Any:
    """Return the type that the schema states."""
    schema: Any = TrainConfig
    for part in key.split("."):
        schema = get_type_hints(schema)[part]
    return schema


def takes(key: str, value: str) -> bool:
    """Return whether a value is of the key's type, read off the schema."""
    hint = hint_of(key)
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    text = free_keys(TrainConfig).get(key)
    if value == "null":
        return type(None) in kinds or (text is not None and text.prose)
    if text is not None:
        return value != ""
    if value == "[1,2]":
        return list[int] in kinds
    return (value == "true" and bool in kinds) or (value == "1.5" and float in kinds)


@pytest.mark.parametrize("key", [key for key in KEYS if key not in GROUPS])
def test_a_value_of_another_type_is_one_line(key: str) -> None:
    for value in VALUES:
        try:
            composed(f"{key}={value}")
        except (Refused, ValueError) as error:
            said = str(error)
            assert "\n" not in said and key in said and len(said) < 400, (value, said)
            assert not any(name in said for name in ("DictConfig with", "Union", "0x")), said
            own_rule = key in BELOW_ONE or key.startswith("pipeline.")
            assert own_rule or not takes(key, value), (value, said)
        else:
            assert takes(key, value), f"{key}={value} was taken"


@pytest.mark.parametrize("group", sorted(GROUPS & {*KEYS, "strategy", "experiment"}))
def test_a_group_takes_one_option(group: str) -> None:
    for value in ("null", "[1,2]", "{a: 1}", "true", "1.5"):
        with pytest.raises(Refused, match=rf"^{group}=.*: {group} takes one option of \w+"):
            composed(f"{group}={value}")


def test_the_door_says_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    """A seeded sample, through all that a command line goes through."""
    refused = GROUP_PAIRS + [(k, v) for k, v in PAIRS if not takes(k, v)]
    for key, value in random.Random(8).sample(refused, 20):
        assert main([f"{key}={value}", "launch=dry"]) == 2, (key, value)
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1, said
        assert said.err.startswith("launch.sh: ") and key in said.err, said.err


def test_no_type_of_the_schema_is_unknown_here() -> None:
    """A type that takes() does not know would be expected to refuse all values."""
    for key in KEYS:
        hint = hint_of(key)
        for kind in get_args(hint) or (hint,):
            known = kind in (bool, int, float, str, type(None), list[int])
            enum = isinstance(kind, type) and issubclass(kind, Enum)
            section = any(other.startswith(f"{key}.") for other in KEYS)
            assert known or enum or section or key in lists_of(TrainConfig), (key, kind)
