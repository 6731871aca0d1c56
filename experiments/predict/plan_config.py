"""What `simulate` and `search` take, checked on construction. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from omegaconf import MISSING

from experiments.config import TrainConfig
from minigpt.checks import PATH
from minigpt.config import FFN, ModelConfig, above, at_least, fraction, require
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    GradientSync,
    PipelineSchedule,
    Precision,
)
from parallel.rules import padded_vocab
from simulator.at_scale import Failures
from simulator.hardware import Cluster
from simulator.space import Space

SUFFIXES = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "B": 3, "T": 4}  # thousands


MOST_TOKENS, MOST_BATCH_TOKENS = 1e18, 1e12  # of a training run; of a step
MOST_RANK_TOKENS = 10**10  # of one rank and step: the bytes that it sends are counted in 64 bits
MOST_RANKS = 1_000_000_000
MOST_TRACED_RANKS = 2**16  # torch lists every rank of a mesh, of a million for minutes


def count_of(key: str, text: str, thousand: int = 1000, most: float = MOST_TOKENS) -> float:
    """A number with a suffix, at most `most`: 4M, 1.5T. Raises ValueError with the key."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)\s*([kKMGBT]?)\s*", str(text))
    if not match or not float(match[1]):
        raise ValueError(f"{key}={text}: must be a number above 0, as 4194304, 128K, 4M or 1.5T")
    value = float(match[1]) * thousand ** SUFFIXES[match[2]]
    require(value <= most, f"{key}={text}: must be a number above 0 and at most {most:g}")
    return value


def plain(node: Any) -> Any:
    """A checked configuration as a ledger keeps it: dictionaries, lists, names of enums."""
    if is_dataclass(node):
        return {field.name: plain(getattr(node, field.name)) for field in fields(node)}
    if isinstance(node, list | tuple):
        return [plain(item) for item in node]
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return node.name if isinstance(node, Enum) else node


class Method(str, Enum):
    formula = "formula"  # closed forms
    trace = "trace"  # the program itself, one rank of it, on fake tensors


@dataclass
class ScaleConfig:
    """A training run to its end. Without `tokens` it is left out."""

    tokens: str | None = None  # to train on, as 15T; chinchilla: 20 a parameter
    price: float | None = None  # of a device-hour
    failures: Failures = field(default_factory=Failures)

    def __post_init__(self) -> None:
        above("scale.price", self.price, 0)
        if self.tokens not in (None, "chinchilla"):
            count_of("scale.tokens", str(self.tokens))


@dataclass
class SimulateConfig(TrainConfig):
    """Everything `./launch.sh simulate` takes: a run's keys, a cluster, and how."""

    cluster: Cluster = MISSING
    method: Method = Method.formula
    rank: int | None = None  # the one to trace; null: the first
    gpus: int | None = None  # devices that an axis of -1 fills; null: one node of the cluster
    headroom: float = 0.0  # share of the device's memory that must stay free for a plan to fit
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        at_least("gpus", self.gpus, 1)
        if self.layout.open_axis or self.gpus is not None:
            self.layout = self.layout.resolve(self.gpus or self._devices)
        super().__post_init__()
        require(
            not self.finetune.on or self.method == Method.trace,
            "finetune=lora: method=formula is of full training; method=trace runs the program "
            "itself, and a run's own ledger has the closed forms of simulator/lora.py",
        )
        at_least("rank", self.rank, 0)
        fraction("headroom", self.headroom)
        size = self.layout.world_size
        require(
            size <= MOST_RANKS,
            f"layout: {size:,} ranks; a simulated world has 1 to {MOST_RANKS:,}: make an axis "
            "smaller",
        )
        require(
            self.method == Method.formula or size <= MOST_TRACED_RANKS,
            f"layout: {size:,} ranks; method=trace has 1 to {MOST_TRACED_RANKS:,}: make an axis "
            "smaller, or take method=formula",
        )
        tokens = self.micro_batch_size * self.gradient_accumulation_steps * self.seq_len
        require(
            tokens <= MOST_RANK_TOKENS,
            f"gradient_accumulation_steps={self.gradient_accumulation_steps}: with micro_batch_size"
            f"={self.micro_batch_size} and seq_len={self.seq_len} a rank has {tokens:,} tokens a "
            f"step; it may have 1 to {MOST_RANK_TOKENS:,}",
        )
        require(
            self.rank is None or self.rank < size,
            f"rank={self.rank}: the layout has {size} ranks, 0 to {size - 1}",
        )
        require(
            self.rank is None or self.method == Method.trace,
            f"rank={self.rank}: method=formula gives all ranks; method=trace gives one",
        )

    @property
    def _devices(self) -> int:
        """One node of the cluster, or more devices where the other axes already take more."""
        axis = self.layout.open_axis
        fixed = replace(self.layout, **{axis: 1}) if axis else self.layout
        return max(self.cluster.node_size, fixed.world_size)


@dataclass
class FixedAxes:
    """Axes of which the size is given; null: searched."""

    pp: int | None = None
    dp_replicate: int | None = None
    dp_shard: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None

    def __post_init__(self) -> None:
        for axis in (*MESH_AXES, "ep"):
            at_least(f"layout.{axis}", getattr(self, axis), 1)

    @property
    def given(self) -> dict[str, int]:
        sizes = {axis: getattr(self, axis) for axis in (*MESH_AXES, "ep")}
        return {axis: size for axis, size in sizes.items() if size is not None}


@dataclass
class SearchConfig:
    """Everything `./launch.sh search` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: Cluster = MISSING
    gpus: int = 8
    seq_len: int = 1024
    global_batch_tokens: str = "4M"  # of one optimiser step; k and M are powers of 1024 here
    layout: FixedAxes = field(default_factory=FixedAxes)
    # what is tried, of each option
    precision: list[Precision] = field(default_factory=lambda: list(Space.precisions))
    activation_checkpointing: list[ActivationCheckpointing] = field(
        default_factory=lambda: list(Space.checkpointing)
    )
    schedule: list[PipelineSchedule] = field(default_factory=lambda: list(Space.schedules))
    zero_stage: list[int] = field(default_factory=lambda: list(Space.zero_stages))
    gradient_sync: list[GradientSync] = field(default_factory=lambda: list(Space.gradient_syncs))
    micro_batch_size: list[int] = field(default_factory=lambda: list(Space.micro_batch_sizes))
    headroom: float = 0.1  # share of the device's memory that must stay free
    tensor_parallel_in_node: bool = True  # only plans whose tp ranks share a node
    top: int = 10  # plans that are shown
    explain: str | None = None  # a layout, as tp8-pp4-dp_shard16: why it is not the best
    # where the picture of memory against time goes
    plot: str | None = field(default=None, metadata=PATH)
    scale: ScaleConfig = field(default_factory=ScaleConfig)

    def __post_init__(self) -> None:
        at_least("gpus", self.gpus, 1)
        require(self.gpus <= MOST_RANKS, f"gpus={self.gpus}: must be 1 to {MOST_RANKS:,}")
        at_least("seq_len", self.seq_len, 1)
        at_least("top", self.top, 1)
        fraction("headroom", self.headroom)
        lists: dict[str, list[Any]] = {
            "precision": self.precision,
            "activation_checkpointing": self.activation_checkpointing,
            "schedule": self.schedule,
            "zero_stage": self.zero_stage,
            "gradient_sync": self.gradient_sync,
            "micro_batch_size": self.micro_batch_size,
        }
        for key, values in lists.items():
            require(bool(values), f"{key}=[]: at least one value is needed")
        for size in self.micro_batch_size:
            at_least("micro_batch_size", size, 1)
        for stage in self.zero_stage:
            require(stage in (1, 2, 3), f"zero_stage={stage}: must be 1, 2 or 3")
        require(
            self.seq_len <= self.model.context,
            f"seq_len={self.seq_len}: longer than model.context={self.model.context}",
        )
        if self.explain is not None:
            axes_of(self.explain)
        require(self.batch_size >= 1, f"global_batch_tokens={self.global_batch_tokens}: too few")

    @property
    def odd_tensor_parallel(self) -> list[int]:
        """The sizes of tp that would do but for the vocabulary, which they do not divide."""
        model = self.model
        if model.pad_vocab_to is not None or model.ffn == FFN.moe:
            return []
        most = self.cluster.node_size if self.tensor_parallel_in_node else self.gpus
        given = self.layout.tp
        return [
            tp
            for tp in range(2, min(most, self.gpus, model.kv_heads) + 1)
            if self.gpus % tp == 0 and given in (None, tp) and model.vocab_size % tp
            if not (model.n_head % tp or model.kv_heads % tp or model.ff_dim % tp)
        ]

    @property
    def searched_model(self) -> ModelConfig:
        """The model, its vocabulary padded where some tp does not divide it (Megatron-LM pads)."""
        odd = self.odd_tensor_parallel
        return (
            replace(self.model, pad_vocab_to=padded_vocab(self.model, *odd)) if odd else self.model
        )

    @property
    def batch_size(self) -> int:
        """Sequences of one optimiser step: as many as fit into the tokens."""
        tokens = count_of("global_batch_tokens", self.global_batch_tokens, 1024, MOST_BATCH_TOKENS)
        return int(tokens / self.seq_len)


def axes_of(label: str) -> dict[str, int]:
    """Axes of a layout's label (parallel.layout.Layout.label); what is left out is 1."""
    sizes = dict.fromkeys((*MESH_AXES, "ep"), 1)
    for part in label.split("-") if label != "single" else []:
        match = re.fullmatch(r"([a-z_]+)(\d+)", part)
        if not match or match[1] not in sizes or not int(match[2]):
            known = ", ".join(sizes)
            raise ValueError(f"explain={label}: {part} is no axis with its size; axes are {known}")
        sizes[match[1]] = int(match[2])
    return sizes
