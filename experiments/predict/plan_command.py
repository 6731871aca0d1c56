"""The command line that rebuilds a plan: `./launch.sh simulate KEY=VALUE ...`.

Every command that prints a plan takes it from here. It has the keys alone whose values are others
than those that simulate assumes, so that it is as short as it can be and leaves nothing out.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from experiments.compose import configs_of
from experiments.predict import clusters, models
from experiments.predict.plan_config import SearchConfig, SimulateConfig
from minigpt.config import ModelConfig
from parallel.layout import Layout, Options, PipelineConfig
from simulator.hardware import Cluster

SIMULATE = "./launch.sh simulate"
INDENT = "    "
WORD = re.compile(r"[\w.+\-/]+")  # Hydra reads these without quotes
GROUPS_OF = ("model", "cluster")
NOT_OF_THE_PLAN = ("run", "gpus")  # where the files go, and what the layout says already


def command_of(config: SimulateConfig) -> str:
    """The line that simulates `config`, one line without a line break."""
    values = {
        key: value
        for key, value in flat(config).items()
        if key.partition(".")[0] not in (*GROUPS_OF, *NOT_OF_THE_PLAN)
    }
    return simulate_command(config.model, config.cluster, values)


def command_of_plan(config: SearchConfig, layout: Layout, options: Options) -> str:
    """The line that simulates a plan of a search, with the search's own headroom."""
    values = {**plan_values(layout, options), "headroom": config.headroom}
    return simulate_command(config.searched_model, config.cluster, values)


def plan_values(layout: Layout, options: Options) -> dict[str, Any]:
    """The keys of a plan and their values; keys that mean nothing for the layout are left out."""
    pipeline = options.pipeline
    values: dict[str, Any] = {f"layout.{axis}": size for axis, size in layout.by_axis.items()}
    if layout.dp_shard > 1:
        values["zero_stage"] = options.zero_stage
    if layout.pp > 1:
        values["pipeline.schedule"] = pipeline.schedule
        if pipeline.local_stages != PipelineConfig(pipeline.schedule).local_stages:
            values["pipeline.stages_per_rank"] = pipeline.stages_per_rank
        values["pipeline.split"] = pipeline.split
    return values | {
        "gradient_sync": options.gradient_sync,
        "sequence_parallel": options.sequence_parallel and layout.tp > 1,
        "micro_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": options.micro_batches,
        "activation_checkpointing": options.activation_checkpointing,
        "precision": options.precision,
        "seq_len": options.seq_len,
    }


def simulate_command(model: ModelConfig, cluster: Cluster, values: dict[str, Any]) -> str:
    """The line that simulates `model` on `cluster` with `values`, by dotted key.

    A key is written only where its value is another one than simulate assumes for this model and
    this cluster, so a value that is left out of `values` is simulate's own.
    """
    first = (*_nearest("model", model), *_nearest("cluster", cluster))
    smallest = _assumed(()).get("data.vocab_size", 0)
    if model.vocab_size < smallest:  # the data of a simulation has no more ids than the model
        first = (*first, f"data.vocab_size={model.vocab_size}")
    assumed = _assumed(first)
    rest = [
        f"{key}={_written(values[key])}"
        for key, value in assumed.items()
        if key in values and values[key] != value
    ]
    return " ".join([SIMULATE, *map(shlex.quote, [*first, *rest])])


def wrapped(command: str, width: int) -> str:
    """The line broken before words so that no line is longer than `width`; a shell joins them."""
    lines = [""]
    for word in shlex.split(command):
        quoted = shlex.quote(word)
        longer = f"{lines[-1]} {quoted}" if lines[-1].strip() else lines[-1] + quoted
        if len(longer) + len(" \\") > width and lines[-1].strip():
            lines[-1] += " \\"
            longer = INDENT + quoted
            lines.append("")
        lines[-1] = longer
    return "\n".join(lines)


@cache
def _assumed(first: tuple[str, ...]) -> dict[str, Any]:
    """Return what simulate makes of an otherwise empty command line, by dotted key."""
    return flat(configs_of("simulate", list(first))[0])


def _nearest(group: str, wanted: ModelConfig | Cluster) -> list[str]:
    """The option of configs/GROUP that differs least from `wanted`, and the keys that differ."""
    target = _compared(wanted)
    if isinstance(wanted, Cluster) and target == _of_cluster(wanted.name):
        return [f"{group}={wanted.name}"]  # without the other clusters, which take long to read
    presets: dict[str, Any] = models.load_all() if group == "model" else _clusters()
    differs = {}
    for name, preset in presets.items():
        own = _compared(preset)
        differs[name] = {key: value for key, value in target.items() if own.get(key) != value}
    best = min(differs, key=lambda name: len(differs[name]))
    return [f"{group}={best}"] + [f"{group}.{k}={_written(v)}" for k, v in differs[best].items()]


@cache
def _clusters() -> dict[str, Cluster]:
    return clusters.load_all()


@cache
def _of_cluster(name: str) -> dict[str, Any]:
    return _compared(clusters.load(name)) if name in clusters.names() else {}


def _compared(node: ModelConfig | Cluster) -> dict[str, Any]:
    """The values that a prediction rests on; where a cluster's numbers are from is none."""
    return {key: value for key, value in flat(node).items() if key != "sources"}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a configuration by its dotted key."""
    found: dict[str, Any] = {}
    for item in fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            found |= flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def _written(value: Any) -> str:
    """A value as Hydra's grammar has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_written(v)}" for k, v in value.items()) + "}"
    if is_dataclass(value):
        return _written({k: v for k, v in flat(value).items()})
    text = str(value)
    if WORD.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
