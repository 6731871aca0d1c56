"""A cluster profile as a file has it: where each number is from, what it was made of."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from experiments.calibrate.spread import Point, Spread, spread_of
from simulator.hardware import Cluster, Level, Link, numbers, tables

COMMAND = "./launch.sh calibrate"
FIXED = "set: the peaks and rates above are measured as they are had, nothing is lost of them"
Links = dict[str, dict[str, Link]]  # by level and collective


@dataclass(frozen=True)
class Calibration:
    """The profile, and all that was measured for it beside what the profile's curves say."""

    cluster: Cluster
    points: list[Point]


def yaml_of(cluster: Cluster) -> str:
    """A file of configs/cluster. What a device or an operator does not have is left out."""
    return OmegaConf.to_yaml(OmegaConf.create(_without_none(asdict(cluster))))


def _without_none(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_none(value) for key, value in node.items() if value is not None}


def levels(links: Links) -> tuple[Level, Level]:
    """In a node and between nodes; where one was not measured it is as the other one."""
    made = {}
    for level, by_name in links.items():
        plain = by_name["all_reduce"]
        made[level] = Level(plain.bandwidth, plain.latency, collectives=by_name)
    either = next(iter(made.values()), Level())
    return made.get("in_node", either), made.get("between_nodes", either)


def short(value: float) -> float:
    return float(f"{max(value, 0.0):.4g}")


def with_sources(
    cluster: Cluster, spreads: dict[str, Spread], points: list[Point], links: Links
) -> Cluster:
    """Each number with where it is from; a measured one with its quartiles, a table with how far
    its lines are from what was measured, a level without messages with what was assumed of it."""
    measured_here = f"measured: {COMMAND}, {datetime.date.today()}"
    sources = {key: FIXED if value in (0, 1) else measured_here for key, value in numbers(cluster)}
    sources |= {key: f"{measured_here}; {spread}" for key, spread in spreads.items()}
    for key in tables(cluster):
        level = key.partition(".")[0]
        mine = [
            abs(point.error)
            for point in points
            if point.name.startswith(level) or (level == "device" and point.kind == "operator")
        ]
        off = f"; its lines are off by {spread_of(mine)} (shares)" if mine else ""
        sources[key] = measured_here + off
    for level in {"in_node", "between_nodes"} - set(links):
        other = "it is as the other level" if links else "it is another cluster's"
        why = f"no message was measured there; {other}"
        of_it = [key for key in sources if key.startswith(f"{level}.")]
        sources |= dict.fromkeys(of_it, f"assumed: {why}")
    return replace(cluster, sources=sources)
