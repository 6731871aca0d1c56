"""config=FILE: a run's own config.yaml, or one of the same shape, as what a new run begins with.

./launch.sh config=runs/OLD/config.yaml steps=10      the same run again, but for its steps
./launch.sh --config-path=runs/OLD --config-name=config steps=10      the same, in Hydra's words

Keys and groups beside it win. A group replaces all that the file says of it: `model=small` the
model, `strategy=fsdp` the layout. What the old run was not told but settled for itself (the ranks
of a -1, device, learning rate: Launched.settled) is settled anew, and neither the old run's folder
nor what it went on from is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.config import TrainConfig
from experiments.free_text import path_in
from experiments.outside_yaml import load_yaml
from experiments.refused import Refused

KEY = "config"
FLAGS = {  # Hydra's own, by what they name
    "--config-path": "folder",
    "-cp": "folder",
    "--config-dir": "folder",
    "-cd": "folder",
    "--config-name": "name",
    "-cn": "name",
}
# what a group replaces; the others each replace the node of their own name
OF_STRATEGY = ("layout", "zero_stage", "sequence_parallel", "impl")
NOT_AGAIN = ("run.dir", "resume", "launch")  # they are of one run only


def taken_out(argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the file that a command line begins with, as it was typed, and the other arguments.

    Raises Refused where Hydra's flags name half of it, or there are two.
    """
    given: dict[str, str] = {}
    files, rest, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in FLAGS:
            given[FLAGS[name]] = value if equals else next(words, "")
        elif name.lstrip("+") == KEY and equals:
            files.append(value)
        else:
            rest.append(word)
    if given:
        folder, file = given.get("folder"), given.get("name")
        if not folder or not file:
            raise Refused(
                "--config-path and --config-name belong together, or config=FILE says both: "
                "config=RUN/config.yaml"
            )
        suffix = "" if file.endswith((".yaml", ".yml")) else ".yaml"
        files.append(f"{folder}/{file}{suffix}")
    if len(files) > 1:
        raise Refused(f"config={files[1]}: a run begins with one file, and config={files[0]} is it")
    return (files[0] if files else None), rest


def read_saved(typed: str) -> dict[str, Any]:
    """Return the values of a configuration file, without what is of one run only.

    Raises Refused, one line, where it is no such file.
    """
    path = path_in(typed) if typed else Path()
    if path.is_dir() and (path / "config.yaml").is_file():
        raise Refused(f"config={path}: is a folder; config={path / 'config.yaml'} is its file")
    try:
        loaded = load_yaml(path)
        if not isinstance(loaded, DictConfig):
            raise ValueError("is no table of keys")
        OmegaConf.merge(OmegaConf.structured(TrainConfig), loaded)
    except OSError as error:
        raise Refused(f"config={path}: {error.strerror}") from error
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise Refused(f"config={path}: no configuration of a run: {said}") from error
    for key, value in settled_by_itself(path).items():
        if OmegaConf.select(loaded, key) is not None:
            OmegaConf.update(loaded, key, value)
    for key in NOT_AGAIN:
        node, _, name = key.rpartition(".")
        holder = OmegaConf.select(loaded, node) if node else loaded
        if holder is not None and name in holder:
            del holder[name]
    values: Any = OmegaConf.to_container(loaded)
    return values


def settled_by_itself(path: Path) -> Mapping[str, Any]:
    """Return what the run beside a config.yaml was not told but settled, as it was before."""
    if path.name != "config.yaml" or not (path.parent / "launch.json").is_file():
        return {}
    try:
        from experiments.run_folder import read_launched  # only a run's own file needs it

        return read_launched(path.parent).settled
    except ValueError as error:
        raise Refused(f"config={path}: {error}") from error


def without_groups(saved: dict[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved values but for those that a group, chosen beside the file, replaces."""
    groups = {group for group, option in chosen.items() if option}
    gone = groups | set(OF_STRATEGY if "strategy" in groups else ())
    return {key: value for key, value in saved.items() if key not in gone}


def primary(train: DictConfig, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a primary configuration for Hydra: the saved values, over which every group may be
    chosen. `train` is configs/train.yaml, whose groups and Hydra settings it has."""
    entries: list[Any] = OmegaConf.to_container(train.defaults)  # type: ignore[assignment]
    options = [entry for entry in entries if isinstance(entry, dict)]
    hydras = [entry for entry in options if next(iter(entry)).startswith("override ")]
    nulls = [{name: None} for entry in options if entry not in hydras for name in entry]
    defaults = ["train_schema", "_self_", *nulls, *hydras]
    own = OmegaConf.to_container(train.hydra)
    return {"defaults": defaults, "hydra": own, **saved}
