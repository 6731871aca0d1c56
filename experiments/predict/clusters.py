"""The clusters of configs/cluster, as checked dataclasses (simulator/hardware.py)."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.compose import CONFIGS
from experiments.outside_yaml import load_yaml
from experiments.refused import Refused
from simulator.hardware import Cluster

FOLDER = CONFIGS / "cluster"


def names() -> list[str]:
    """Every cluster that configs/cluster has."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Cluster:
    """One of them. Raises Refused, one line, for a name or a number that is not allowed."""
    if name not in names():
        raise Refused(f"cluster={name}: no such option; allowed: {', '.join(names())}")
    return read(FOLDER / f"{name}.yaml")


def named_or_file(text: str, key: str = "cluster") -> Cluster:
    """A cluster by its name, or one in a file; `key` is what the command calls it. Raises Refused,
    one line."""
    if text in names():
        return load(text)
    path = Path(text).expanduser()
    if not path.is_file():
        known = f"{', '.join(names())}, or a file (./launch.sh calibrate to=FILE writes one)"
        raise Refused(f"{key}={text}: no such option; allowed: {known}")
    return read(path)


def read(path: Path) -> Cluster:
    """A cluster's file. Raises Refused, one line with the file's name."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Cluster), load_yaml(path))
        made = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, OSError, ValueError, YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(
            f"{path.name}: not a cluster's profile: {reason}; ./launch.sh calibrate to=FILE "
            "writes one"
        ) from error
    assert isinstance(made, Cluster)
    return made


def load_all() -> dict[str, Cluster]:
    """All of them, by name."""
    return {name: load(name) for name in names()}
