"""How a step is spread and run: ranks on each mesh axis, and the options of every strategy.

Standard library only: the launcher and the simulator read layouts without importing torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from minigpt.finetune import FinetuneConfig

# Mesh axes, outermost first: neighbours on the last are neighbours in rank, so tp stays in a node.
MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
LEFT_OVER = -1


@dataclass
class Layout:
    """Ranks on each axis. -1 on one axis stands for what is left over of the world size.

    `ep` is carved out of the data axes, so it is no factor of the world size.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in (*MESH_AXES, "ep"):
            size = getattr(self, axis)
            if size < 1 and size != LEFT_OVER:
                raise ValueError(
                    f"layout.{axis}={size}: must be at least 1, or -1 for what is left over"
                )
        open_axes = [axis for axis in MESH_AXES if getattr(self, axis) == LEFT_OVER]
        if len(open_axes) > 1:
            first, second = open_axes[:2]
            raise ValueError(f"layout.{first}=-1 and layout.{second}=-1: only one can be left over")
        if self.ep == LEFT_OVER:
            raise ValueError("layout.ep=-1: ep is carved out of the data axes and must be given")

    @property
    def world_size(self) -> int:
        """The number of ranks. Needs a resolved layout."""
        assert not self.open_axis, f"layout.{self.open_axis}=-1 is not resolved"
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks on each of MESH_AXES, in that order."""
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def by_axis(self) -> dict[str, int]:
        """Ranks on each of MESH_AXES, and ep."""
        return {axis: getattr(self, axis) for axis in (*MESH_AXES, "ep")}

    @property
    def open_axis(self) -> str | None:
        """The axis that is -1, if any."""
        return next((axis for axis in MESH_AXES if getattr(self, axis) == LEFT_OVER), None)

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def label(self) -> str:
        """Short name, outermost axis first: pp2-dp_shard4, or single."""
        named = [
            f"{axis}{getattr(self, axis)}" for axis in (*MESH_AXES, "ep") if getattr(self, axis) > 1
        ]
        return "-".join(named) or "single"

    def leaves_node(self, axis: str, ranks_a_node: int) -> bool:
        """Whether neighbours on an axis are on different nodes, which take the ranks in order."""
        inside = MESH_AXES[MESH_AXES.index(axis) :]
        together = math.prod(getattr(self, name) for name in inside)
        return getattr(self, axis) > 1 and ranks_a_node % together != 0

    def resolve(self, world_size: int) -> Layout:
        """Put a number in the place of -1.

        Raises ValueError, with the equation, where the product is not `world_size`.
        """
        axis = self.open_axis
        if axis:
            others = math.prod(size for size in self.sizes if size != LEFT_OVER)
            if world_size % others:
                product = self._product(skip=axis)
                raise ValueError(f"layout.{axis}=-1: {world_size} ranks / ({product}) is not whole")
            return replace(self, **{axis: world_size // others})
        if self.world_size != world_size:
            raise ValueError(f"layout: {self._product()} = {self.world_size} != {world_size} ranks")
        return self

    def _product(self, skip: str | None = None) -> str:
        return " * ".join(f"{axis}({getattr(self, axis)})" for axis in MESH_AXES if axis != skip)


Axis = tuple[str, int]  # an axis and its size


def weights_axes(layout: Layout) -> dict[str, Axis]:
    """The axis that replicates weights, and the one that shards them.

    cp goes with the axis that shards, where there is one.
    """

    def joined(*axes: str) -> Axis:
        named = [axis for axis in axes if getattr(layout, axis) > 1]
        return "*".join(named), math.prod(getattr(layout, axis) for axis in axes)

    if layout.dp_shard > 1:
        return {"replicate": joined("dp_replicate"), "shard": joined("dp_shard", "cp")}
    return {"replicate": joined("dp_replicate", "cp"), "shard": ("", 1)}


def expert_axes(layout: Layout) -> list[Axis]:
    """The axes that replicate or shard experts, outermost first: what ep leaves of the data."""
    ep = layout.ep
    if layout.dp_shard > 1:
        return [("dp_replicate", layout.dp_replicate), ("dp_shard/ep", layout.dp_shard // ep)]
    return [("dp_replicate/ep", layout.dp_replicate // ep)]


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"  # products of the blocks; all else as in bf16 (parallel/float8.py)


class ActivationCheckpointing(str, Enum):
    none = "none"
    selective = "selective"
    full = "full"
    offload = "offload"


class Impl(str, Enum):
    torch = "torch"  # torch's own wrappers
    by_hand = "by_hand"  # parallel/by_hand/: the same, written out in torch.distributed primitives
    accelerate = "accelerate"  # through Hugging Face Accelerate


class GradientSync(str, Enum):
    """When sharded gradients are reduced, where a step has several micro-batches."""

    step = "step"  # after the last: sent once, and whole gradients wait for it
    micro_batch = "micro_batch"  # after each: sent as often, and only shards wait


# By its value, for 1f1b is no name in Python.
PipelineSchedule = Enum(
    "PipelineSchedule",
    {
        "gpipe": "gpipe",
        "1f1b": "1f1b",
        "interleaved_1f1b": "interleaved_1f1b",
        "looped_bfs": "looped_bfs",
        "interleaved_zero_bubble": "interleaved_zero_bubble",
        "zbv_zero_bubble": "zbv_zero_bubble",
        "dualpipev": "dualpipev",
    },
    type=str,
)


ONE_F_ONE_B = PipelineSchedule("1f1b")


@dataclass
class PipelineConfig:
    """How a model is cut into stages, and in which order they work."""

    schedule: PipelineSchedule = ONE_F_ONE_B
    stages_per_rank: int | None = None  # null: what the schedule takes; 2 for those that loop
    split: list[int] | None = None  # blocks of each stage, in order; null: balanced by flops

    @property
    def one_stage_a_rank(self) -> bool:
        return self.schedule.value in ("gpipe", "1f1b")

    @property
    def is_v_shaped(self) -> bool:
        """The second half of the stages runs back over the ranks, so rank 0 has first and last."""
        return self.schedule.value in ("zbv_zero_bubble", "dualpipev")

    @property
    def splits_backward(self) -> bool:
        """Gradients of inputs and of weights are computed apart (Qi et al. 2023, zero bubble)."""
        return self.schedule.value in ("interleaved_zero_bubble", "zbv_zero_bubble", "dualpipev")

    @property
    def local_stages(self) -> int:
        """Stages that each rank holds."""
        return self.stages_per_rank or (1 if self.one_stage_a_rank else 2)

    def rank_of(self, stage: int, ranks: int) -> int:
        """The pp rank that holds `stage`."""
        lap, place = divmod(stage, ranks)
        return ranks - 1 - place if self.is_v_shaped and lap % 2 else place

    def stages_of(self, rank: int, ranks: int) -> list[int]:
        """The stages that a pp rank holds, in order."""
        stages = range(ranks * self.local_stages)
        return [stage for stage in stages if self.rank_of(stage, ranks) == rank]


@dataclass(frozen=True)
class Options:
    """What a strategy may want to know besides the mesh."""

    precision: Precision = Precision.fp32
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    compile: bool = False
    impl: Impl = Impl.torch
    # What dp_shard cuts: 1 the optimizer, 2 gradients too, 3 weights too (ZeRO's stages)
    zero_stage: int = 3
    gradient_sync: GradientSync = GradientSync.step
    sequence_parallel: bool = False
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    # of one forward pass of one data-parallel rank, before cp cuts the sequence
    micro_batch_size: int = 1
    seq_len: int = 1
    micro_batches: int = 1  # of one optimiser step
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def may_scatter_each(self, layout: Layout) -> bool:
        """Whether gradient_sync makes a difference: gradients are sharded, and wait for others."""
        sharded = layout.dp_shard > 1 and self.zero_stage > 1
        return sharded and layout.pp == 1 and self.micro_batches > 1
