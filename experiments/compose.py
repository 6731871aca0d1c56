"""One composition: Hydra runs in the parent process only, and its errors become one line."""

from __future__ import annotations

import argparse
import copy
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from experiments import saved_config
from experiments.config import ExportConfig, GenerateConfig, TrainConfig
from experiments.free_text import ELEMENT, quoted, settle_text
from experiments.predict.plan_config import SearchConfig, SimulateConfig
from experiments.refused import Refused

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GROUPS = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
SAVED = "saved_run"  # the name of a primary configuration that begins with a file
ALL_KEYS = "--help lists all that there are"
# what each command takes: configs/NAME.yaml and its schema
SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "generate": GenerateConfig,
    "export": ExportConfig,
    "simulate": SimulateConfig,
    "search": SearchConfig,
}
Config = TypeVar("Config")


@cache
def store_schemas() -> None:
    """Where Hydra looks for them; once, for it makes a configuration of each."""
    store = ConfigStore.instance()
    for command, node in SCHEMAS.items():
        store.store(name=f"{command}_schema", node=node)
    OmegaConf.register_new_resolver("usual_precision", usual_precision, replace=True)


def usual_precision(asynchronous: bool) -> str:
    """Return the precision that `simulate` assumes: bf16 on accelerators, on cores train's own."""
    return "bf16" if asynchronous else TrainConfig.precision.value


def run_hydra(name: str, argv: list[str], job: Callable[[DictConfig], None]) -> None:
    """Compose configs/NAME.yaml with the overrides in `argv` and call `job` for each job of it.

    Hydra's own options (--help, --cfg, --multirun ...) do what its users expect.
    Raises Refused where a key, a value or a group is not there. `job` must not raise: Hydra would
    print a line of its own.
    """
    store_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand the exceptions over, do not print and exit
    schema = SCHEMAS[name]
    file, argv = saved_config.taken_out(argv)
    given = check_options(argv)
    argv = [as_list(quoted(one, schema, given.multirun), schema) for one in argv]
    given = check_options(argv)
    # nothing that Hydra itself is asked for
    plain = given.overrides == argv and not any("hydra" in override for override in argv)
    saved, sys.argv = sys.argv, ["launch.sh", *argv]
    try:
        if file is not None:
            name, job = begin_with(file, name, given), named(job, file)
        if plain:
            job(compose_once(name, argv))
        else:
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise Refused(one_line(error, argv, schema)) from error
    except YAMLError as error:
        raise Refused(f"configs/: {' '.join(str(error).split())}") from error
    finally:
        sys.argv = saved


def compose_once(name: str, overrides: list[str]) -> DictConfig:
    """What Hydra's own door gives to a single job. That one composes twice, to know its mode."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose(name, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    job = copy.copy(composed)  # HydraConfig holds the other
    with open_dict(job):
        del job["hydra"]
    return job


def begin_with(file: str, name: str, given: argparse.Namespace) -> str:
    """Store a primary configuration of a saved one and return its name. Raises Refused."""
    if name != "train":
        raise Refused(f"config={file}: a training run begins with a file; {name} takes keys")
    train, values = OmegaConf.load(CONFIGS / "train.yaml"), saved_config.read_saved(file)
    assert isinstance(train, DictConfig)
    chosen = dict.fromkeys((one.partition("=")[0] for one in given.overrides), "in the sweep")
    if not given.multirun:
        store_saved(saved_config.primary(train, values))
        compose_once(SAVED, given.overrides)
        chosen = dict(HydraConfig.get().runtime.choices)
    store_saved(saved_config.primary(train, saved_config.without_groups(values, chosen)))
    return SAVED


def store_saved(primary: dict[str, Any]) -> None:
    """Let Hydra find it under the name SAVED, in the place of an earlier one."""
    ConfigStore.instance().store(name=SAVED, node=primary)


def named(job: Callable[[DictConfig], None], file: str) -> Callable[[DictConfig], None]:
    """Return `job` with config=FILE among the overrides that Hydra tells it."""

    def with_file(config: DictConfig) -> None:
        overrides: Any = HydraConfig.get().overrides
        with read_write(overrides):
            overrides.task.insert(0, f"{saved_config.KEY}={file}")
        job(config)

    return with_file


def configs_of(name: str, argv: list[str]) -> list[Any]:
    """The checked configurations that a command line composes: none with --help and its like."""
    composed: list[DictConfig] = []
    for job in jobs_of(argv, name) or [argv]:
        run_hydra(name, job, composed.append)
    return [to_config(job, SCHEMAS[name]) for job in composed]


def jobs_of(argv: list[str], name: str = "train") -> list[list[str]] | None:
    """The command line of each job of a sweep (-m), in Hydra's own order; None for a single run.

    Hydra's sweeper would compose all jobs first and let one bad value end them all. It still does
    where a launcher or sweeper of Hydra's is asked for.
    """
    schema = SCHEMAS[name]
    files, argv = saved_config.taken_out(argv)
    given = check_options(argv)
    argv = [quoted(argument, schema, given.multirun) for argument in argv]
    given = check_options(argv)
    theirs = ("hydra/launcher=", "hydra/sweeper=")
    if not given.multirun or any(override.startswith(theirs) for override in given.overrides):
        return None
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        try:
            (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(given.overrides), None)
        except HydraException as error:
            raise Refused(one_line(error, argv, schema)) from error
    options = [a for a in argv if a not in given.overrides and a not in ("-m", "--multirun")]
    begins = [[f"{saved_config.KEY}={file}"] for file in ELEMENT.findall(files)] if files else [[]]
    return [[*begin, *options, *job] for begin in begins for job in jobs]


def as_list(argument: str, schema: type) -> str:
    """Return KEY=VALUE with VALUE in brackets where the key takes a list and VALUE is one value."""
    key, equals, value = argument.partition("=")
    single = equals and value and not value.startswith(("[", "$")) and value != "null"
    return f"{key}=[{value}]" if single and key in lists_of(schema) else argument


@cache
def lists_of(schema: type, prefix: str = "") -> frozenset[str]:
    """Return every key that takes a list, dotted."""
    found: set[str] = set()
    hints: dict[str, Any] = get_type_hints(schema)
    for item in fields(schema):
        hint = hints[item.name]
        if any(get_origin(kind) is list for kind in (hint, *get_args(hint))):
            found.add(prefix + item.name)
        elif is_dataclass(hint):
            found |= lists_of(hint, f"{prefix}{item.name}.")  # type: ignore[arg-type]
    return frozenset(found)


def check_options(argv: list[str]) -> argparse.Namespace:
    """Parse Hydra's options; refuse what it would answer with a page of usage or a traceback."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise Refused(f"{message}; --help lists what there is")

    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_args(argv)
    refuse_ignored(given)
    for override in given.overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if "_target_" in override:  # Hydra imports and calls what it names
            raise Refused(f"{override}: _target_ is not taken: no key may say what is to be run")
        if key == "hydra.run.dir":
            raise Refused(f"{override}: the folder of a run is run.dir=")
        if key in GROUPS and not_an_option(value):
            names = ", ".join(sorted(file.stem for file in (CONFIGS / key).glob("*.yaml")))
            raise Refused(f"{override}: {key} takes one option of {names}")
    return given


def not_an_option(value: str) -> bool:
    """Return whether Hydra reads the value of a group as a list, a table, null, a flag or a number,
    which name no file of configs/."""
    flag = re.fullmatch(r"null|true|false|[+-]?(\d+\.?\d*|\.\d+|inf|nan)", value, re.IGNORECASE)
    return flag is not None or value.startswith(("[", "{"))


def refuse_ignored(given: argparse.Namespace) -> None:
    """Refuse Hydra's flags that would do nothing here, or run what a file says."""
    if given.config_path or given.config_name or given.config_dir:
        raise Refused("--config-path and --config-name: write them out, or give config=FILE")
    if given.experimental_rerun:
        raise Refused("--experimental-rerun: it runs a pickle; config=RUN/config.yaml runs again")
    if (given.resolve or given.package) and not given.cfg:
        raise Refused(f"{'--resolve' if given.resolve else '--package'}: goes with --cfg job")


def to_config(config: DictConfig, schema: type[Config]) -> Config:
    """The checked dataclass of a composed configuration. Raises Refused."""
    keys = keys_of(schema)
    unknown = next((key for key in _keys_in(config) if key not in keys), None)
    if unknown:  # Hydra's +key=value adds what no schema knows
        raise Refused(no_such_key(unknown, unknown, schema))
    try:
        settle_text(config, schema)
        refuse_nested(config, schema)
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise Refused(one_line(error, [], schema)) from error
    except ValueError as error:
        raise Refused(str(error)) from error
    assert isinstance(made, schema)
    return made


def refuse_nested(config: DictConfig, schema: type) -> None:
    """Raise Refused where an element of a list is itself a list or a table.

    OmegaConf checks the type of elements that are single values only.
    """
    for key in sorted(lists_of(schema)):
        elements = OmegaConf.select(config, key)
        for element in elements or ():
            if OmegaConf.is_config(element):
                raise Refused(f"{key}={elements}: {element} is no single value; give {key}=[A,B]")


def _keys_in(config: DictConfig, prefix: str = "") -> list[str]:
    """Every key of a composed configuration, dotted."""
    keys: list[str] = []
    for key in map(str, config):
        keys.append(prefix + key)
        node = config._get_node(key)
        # what has no schema of its own is a table whose keys are free: a cluster's sources
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
            keys += _keys_in(node, f"{prefix}{key}.")
    return keys


def one_line(error: Exception, argv: list[str], schema: type) -> str:
    """Hydra's messages span up to ten lines: keep the key, the value and what is allowed."""
    text = str(error)
    if isinstance(error, MissingConfigException):
        options = re.findall(r"^\t(.+)$", text.partition("Config search path")[0], re.MULTILINE)
        group, _, value = str(error.missing_cfg_file).partition("/")
        allowed = ", ".join(sorted(options)) or "nothing of that name"
        reason = "no such option"
        if value and Path(value).is_file():
            reason = f"is a file, and {group} takes the name of one in configs/{group}"
        return f"{group}={value}: {reason}; allowed: {allowed}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read; write KEY=VALUE"
    cause = error.__cause__ or error
    key = getattr(cause, "full_key", None) or _key_in(text)
    if isinstance(cause, MissingMandatoryValue):
        return f"{key} is not set: give it as {key}=..."
    names = [(a, a.lstrip("+~").partition("=")[0]) for a in reversed(argv)]
    given = next((a for a, name in names if name == key or name.startswith(f"{key}.")), key)
    if not given and len(argv) == 1:
        given = argv[0]
    said = str(cause).splitlines()
    # "... raised while composing config:", and on the next line what
    reason = said[0 if not said[0].endswith(":") or len(said) == 1 else 1].rstrip(".")
    if re.search(r"not in (struct|'\w+')|Could not override", reason):
        return no_such_key(given or "", key or "", schema)
    inside = [name for name in keys_of(schema) if name.startswith(f"{key}.")]
    if key and inside:  # in OmegaConf's words: "str is not a subclass of Layout"
        return f"{given}: {key} is a section; set its keys: {', '.join(inside)}"
    if key in lists_of(schema) and "ListConfig" in reason:
        return f"{given}: a list is needed; give {key}=[A,B]"
    return f"{given}: {reason}" if given else reason


def no_such_key(given: str, key: str, schema: type) -> str:
    """Name the keys that the user may have meant."""
    keys, leaf = keys_of(schema), key.rpartition(".")[2]
    near = [k for k in keys if k.endswith(f".{leaf}")] or difflib.get_close_matches(key, keys, n=3)
    return f"{given}: no such key; " + (f"did you mean {', '.join(near)}?" if near else ALL_KEYS)


def _key_in(text: str) -> str | None:
    found = re.search(r"Could not override '([^']+)'", text) or re.search(r"full_key: (\S+)", text)
    return found.group(1) if found else None


def keys_of(schema: type, prefix: str = "") -> list[str]:
    """Every key that a schema takes, dotted."""
    keys: list[str] = []
    hints: dict[str, Any] = get_type_hints(schema)
    for field in fields(schema):
        keys.append(prefix + field.name)
        if is_dataclass(hints[field.name]):
            keys += keys_of(hints[field.name], f"{prefix}{field.name}.")
    return keys
