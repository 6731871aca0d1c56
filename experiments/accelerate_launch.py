"""Compares what `accelerate launch` asks for in environment variables with a run's own keys.

Accelerate's configuration file and options reach a program as environment variables only
(accelerate 1.15, utils/launch.py). The layout of a run comes from its keys, so a variable that asks
for something else is refused, with the keys that would do it. Variables that only say how FSDP
wraps, prefetches and loads change no result and are not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from experiments.config import TrainConfig
from parallel.layout import ActivationCheckpointing, Impl, Precision

ZERO_STAGE = {  # FSDP1's strategies, by name and by number (torch's ShardingStrategy)
    **dict.fromkeys(("FULL_SHARD", "HYBRID_SHARD", "1", "4"), 3),
    **dict.fromkeys(("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2", "2", "5"), 2),
    **dict.fromkeys(("NO_SHARD", "3"), 0),
}
HYBRID = ("HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "4", "5")
USES_KNOWN = ("CPU", "FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
USE = "ACCELERATE_USE_"


@dataclass(frozen=True)
class Wish:
    """One thing that Accelerate's configuration asks for and the run would not do."""

    asked: str  # the variable, as it is set
    keys: str | None  # the keys that do it or what comes nearest; None where none do
    accepted: bool = True  # with those keys; else it must go


def check(config: TrainConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError, one line, where Accelerate's variables ask for another run than `config`,
    whose layout is settled."""
    wishes = [*_precision(config, environ), *_sharding(config, environ), *_rest(config, environ)]
    if not wishes:
        return
    asked = ", ".join(wish.asked for wish in wishes)
    keys = " ".join(dict.fromkeys(wish.keys for wish in wishes if wish.keys))
    foreign = ", ".join(wish.asked for wish in wishes if not (wish.keys and wish.accepted))
    ways = [f"give {keys}"] if keys else []
    ways += [f"take {foreign} out of Accelerate's configuration"] if foreign else []
    raise ValueError(
        f"accelerate launch asks for {asked}, but this run is {config.layout.label} in "
        f"{config.precision.value}: {', and '.join(ways)}"
    )


def _precision(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[Wish]:
    """`no` is what accelerate launch says when nobody has asked for anything."""
    wanted = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if wanted != "no" and wanted != config.precision.value:
        key = f"precision={wanted}" if wanted in Precision.__members__ else None
        if wanted == "fp16" and config.impl == Impl.accelerate:
            key = "impl=torch precision=fp16"
        yield Wish(f"ACCELERATE_MIXED_PRECISION={wanted}", key)
    backend = environ.get("ACCELERATE_FP8_BACKEND", "AO").upper()
    if wanted == "fp8" and backend not in ("AO", "TORCHAO", "AUTO"):
        yield Wish(f"ACCELERATE_FP8_BACKEND={backend}", None)


def _sharding(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[Wish]:
    if _is_set(environ, f"{USE}FSDP"):
        yield from _fsdp(config, environ)
    if _is_set(environ, f"{USE}DEEPSPEED"):
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        keys = {"0": "strategy=ddp", "1": "strategy=zero1", "2": "strategy=zero2"}
        yield Wish(f"{USE}DEEPSPEED=true", keys.get(stage, "strategy=fsdp"), accepted=False)
    if _is_set(environ, f"{USE}MEGATRON_LM"):
        tp, pp = (environ.get(f"MEGATRON_LM_{axis}_DEGREE", "1") for axis in ("TP", "PP"))
        yield Wish(f"{USE}MEGATRON_LM=true", f"layout.tp={tp} layout.pp={pp}", accepted=False)
    if _is_set(environ, f"{USE}PARALLELISM_CONFIG"):
        for axis in ("dp_replicate", "dp_shard", "tp", "cp", "sp"):
            name = f"PARALLELISM_CONFIG_{axis.upper()}_SIZE"
            size = environ.get(name, "1")
            if size != str(getattr(config.layout, axis, 1)):
                yield Wish(f"{name}={size}", None if axis == "sp" else f"layout.{axis}={size}")


def _fsdp(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[Wish]:
    """FSDP1 has a sharding strategy, FSDP2 says whether weights are freed after the forward."""
    if environ.get("FSDP_VERSION", "1") == "2":
        name = "FSDP_RESHARD_AFTER_FORWARD"
        given = environ.get(name, "true")
        stage = 2 if given.lower() in ("false", "0", "no") else 3
    else:
        name = "FSDP_SHARDING_STRATEGY"
        given = environ.get(name, "FULL_SHARD")
        stage = ZERO_STAGE.get(given.upper(), 3)
    hybrid = name == "FSDP_SHARDING_STRATEGY" and given.upper() in HYBRID
    layout = config.layout
    does = config.zero_stage if layout.dp_shard > 1 else 0
    differs = does != stage or (hybrid and layout.dp_replicate == 1)
    if differs and layout.world_size > 1:  # one rank has nobody to share with
        strategy = {0: "ddp", 2: "zero2", 3: "fsdp"}[stage]
        yield Wish(
            f"{USE}FSDP=true {name}={given}",
            f"strategy=hsdp zero_stage={stage}" if hybrid else f"strategy={strategy}",
        )
    if _is_set(environ, "FSDP_OFFLOAD_PARAMS"):
        yield Wish("FSDP_OFFLOAD_PARAMS=true", None)
    if environ.get("FSDP_IGNORED_MODULES"):
        yield Wish(f"FSDP_IGNORED_MODULES={environ['FSDP_IGNORED_MODULES']}", None)
    for name, mode in (
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", ActivationCheckpointing.offload),
        ("FSDP_ACTIVATION_CHECKPOINTING", ActivationCheckpointing.full),
    ):
        if _is_set(environ, name):
            if config.activation_checkpointing not in (mode, ActivationCheckpointing.offload):
                yield Wish(f"{name}=true", f"activation_checkpointing={mode.value}")
            return


def _rest(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[Wish]:
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and not (backend == "inductor" and config.compile):
        key = "compile=true" if backend == "inductor" else None
        yield Wish(f"ACCELERATE_DYNAMO_BACKEND={backend}", key)
    mode = environ.get("ACCELERATE_DYNAMO_MODE", "default")
    if backend != "no" and mode != "default":
        yield Wish(f"ACCELERATE_DYNAMO_MODE={mode}", None)
    for name, key, ours in (
        (
            "GRADIENT_ACCUMULATION_STEPS",
            "gradient_accumulation_steps",
            config.gradient_accumulation_steps,
        ),
        ("GRADIENT_CLIPPING", "clip", config.clip),
    ):
        given = environ.get(f"ACCELERATE_{name}", "auto")
        if given not in ("auto", "none") and not _same(given, ours):
            yield Wish(f"ACCELERATE_{name}={given}", f"{key}={given}")
    device = environ.get("ACCELERATE_TORCH_DEVICE", config.device.value).partition(":")[0]
    if device != config.device.value:
        yield Wish(f"ACCELERATE_TORCH_DEVICE={device}", f"device={device}")
    if _is_set(environ, "ACCELERATE_CPU_AFFINITY"):
        yield Wish("ACCELERATE_CPU_AFFINITY=1", None)
    for name in sorted(environ):
        known = name.removeprefix(USE) in USES_KNOWN
        if name.startswith(USE) and not known and _is_set(environ, name):
            yield Wish(f"{name}={environ[name]}", None)


def _same(given: str, ours: float | None) -> bool:
    try:
        return ours is not None and float(given) == ours
    except ValueError:
        return False


def _is_set(environ: Mapping[str, str], name: str) -> bool:
    """Return whether a flag is on, by Accelerate's own reading (str_to_bool)."""
    return environ.get(name, "").lower() in ("y", "yes", "t", "true", "on", "1")
