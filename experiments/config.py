"""The configuration of a run: one dataclass a group, checked on construction.

Hydra composes configs/train.yaml over these schemas in the parent process. Types and enums are
checked there; ranges and cross-field rules here. No torch: a bad key is refused in half a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from minigpt.checks import PATH, PROSE, share_of_all
from minigpt.config import (
    LR_TIMES_WIDTH,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    above,
    at_least,
    require,
)
from minigpt.finetune import FinetuneConfig
from parallel.layout import (
    ActivationCheckpointing,
    GradientSync,
    Impl,
    Layout,
    Options,
    PipelineConfig,
    Precision,
)
from parallel.rules import check

LONGEST_S = 1e8  # three years; what torch takes for a time-out ends somewhere beyond


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Backend(str, Enum):
    auto = "auto"
    gloo = "gloo"
    nccl = "nccl"


class Launch(str, Enum):
    local = "local"
    dry = "dry"


class Nonfinite(str, Enum):
    stop = "stop"
    skip = "skip"


class Logger(str, Enum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class WandbMode(str, Enum):
    offline = "offline"
    online = "online"


@dataclass
class ValidationConfig:
    """The held-out loss."""

    every: int = 0  # steps between validations; 0: only after the last step
    batches: int = 8  # global batches of each validation; 0: never validate

    def __post_init__(self) -> None:
        at_least("validation.every", self.every, 0)
        at_least("validation.batches", self.batches, 0)


@dataclass
class SampleConfig:
    """The text that is printed after training."""

    tokens: int = 200  # 0: none
    prompt: str = field(default="def ", metadata=PROSE)
    temperature: float = 0.7
    top_k: int | None = 40  # of the likeliest so many; null: of all
    top_p: float | None = (
        None  # of the fewest that hold this share of the probability; null: of all
    )

    def __post_init__(self) -> None:
        at_least("sample.tokens", self.tokens, 0)
        at_least("sample.temperature", self.temperature, 0)
        at_least("sample.top_k", self.top_k, 1)
        share_of_all("sample.top_p", self.top_p)
        require(bool(self.prompt), "sample.prompt is empty: at least one character is needed")


@dataclass
class LoggingConfig:
    """A mirror of the run's own files, which are the record."""

    to: Logger = Logger.none
    project: str = "worldsize"
    mode: WandbMode = WandbMode.offline
    group: str | None = None  # null: the sweep's folder, where there is one


@dataclass
class RunConfig:
    """Where a run leaves its files."""

    dir: str | None = field(default=None, metadata=PATH)  # null: runs/DATE-TIME-LAYOUT
    save: bool = True  # keep the trained weights, which `generate` reads


@dataclass
class CheckpointConfig:
    """The state on disk from which a run can go on. A pre-empted run writes one in any case."""

    every: int = 0  # steps between checkpoints, and one after the last; 0: none
    keep: int = 2  # newest ones that stay; the one before the last is there if that is damaged
    asynchronous: bool = False  # write beside the next steps, from a copy on the host

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 2)


@dataclass
class DriftConfig:
    """Whether ranks that hold copies of a weight still hold the same, by checksums."""

    # steps between comparisons, and one after the last; 0: before each checkpoint only
    every: int = 50

    def __post_init__(self) -> None:
        at_least("drift.every", self.every, 0)


@dataclass
class TrainConfig:
    """Everything `./launch.sh` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    layout: Layout = field(default_factory=Layout)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)

    # auto, RUN or RUN/step-N: see experiments/resume.py
    resume: str | None = field(default=None, metadata=PATH)
    # weights to start from: a .safetensors file, of ours or GPT-2's
    init: str | None = field(default=None, metadata=PATH)
    steps: int = 300
    micro_batch_size: int = 8  # sequences of one forward, for each data-parallel rank
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None  # null: what the others make; a number is checked
    seq_len: int = 128
    seed: int = 0
    precision: Precision = Precision.fp32
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    compile: bool = False
    impl: Impl = Impl.torch
    zero_stage: int = (
        3  # what layout.dp_shard cuts: 1 the optimizer, 2 gradients too, 3 weights too
    )
    # when gradients that zero_stage cuts are reduced: once a step, after its last micro-batch, or
    # after each micro_batch, which sends them as often and keeps no whole ones in between
    gradient_sync: GradientSync = GradientSync.step
    sequence_parallel: bool = (
        False  # with layout.tp: norms and residuals are cut along the sequence
    )
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    clip: float | None = 1.0  # the gradient norm's upper bound; null: no clipping
    nonfinite: Nonfinite = Nonfinite.stop  # a NaN or inf in the loss or a gradient: stop or skip
    device: Device = Device.auto
    backend: Backend = Backend.auto
    trace: bool = False  # write one step of all ranks as trace.json.gz, and pictures of it
    launch: Launch = Launch.local
    timeout_s: float = 600.0  # how long a collective may wait for its last rank

    def __post_init__(self) -> None:
        for key in ("steps", "micro_batch_size", "gradient_accumulation_steps", "seq_len"):
            at_least(key, getattr(self, key), 1)
        at_least("global_batch_size", self.global_batch_size, 1)
        at_least("seed", self.seed, 0)
        above("clip", self.clip, 0)
        above("timeout_s", self.timeout_s, 0)
        require(self.timeout_s <= LONGEST_S, f"timeout_s={self.timeout_s:g}: must be at most 1e8")
        require(self.seed < 2**63, f"seed={self.seed}: must be below 2^63")
        model, data = self.model, self.data
        data.vocab_size = data.id_count
        if self.optimizer.lr is None:
            self.optimizer.lr = LR_TIMES_WIDTH / model.d_model
        require(
            self.seq_len <= model.context,
            f"seq_len={self.seq_len}: longer than model.context={model.context}",
        )
        require(
            data.vocab_size is None or data.vocab_size <= model.vocab_size,
            f"model.vocab_size={model.vocab_size}: smaller than the data's {data.vocab_size} ids",
        )
        require(
            self.resume is None or self.init is None,
            f"init={self.init}: resume={self.resume} has weights of its own; give one of the two",
        )
        require(
            not (self.backend == Backend.nccl and self.device == Device.cpu),
            "backend=nccl: needs device=cuda, not device=cpu",
        )
        self._check_layout()

    def _check_layout(self) -> None:
        """A layout that can train this model, and a global batch size that divides."""
        if self.layout.open_axis:
            return
        check(self.model, self.layout, self.options)
        if self.global_batch_size is None:
            return
        made = self.batch_size
        require(
            self.global_batch_size == made,
            f"global_batch_size={self.global_batch_size} != "
            f"micro_batch_size({self.micro_batch_size}) * "
            f"gradient_accumulation_steps({self.gradient_accumulation_steps}) * "
            f"dp_replicate({self.layout.dp_replicate}) * dp_shard({self.layout.dp_shard}) = {made}",
        )

    @property
    def parameters(self) -> int:
        """Numbers in the model and in its adapters, where it has some."""
        return self.model.parameters + self.finetune.adapters(self.model)

    @property
    def batch_size(self) -> int:
        """Sequences of one optimiser step. Needs a resolved layout."""
        ranks = self.layout.data_parallel
        return self.micro_batch_size * self.gradient_accumulation_steps * ranks

    @property
    def options(self) -> Options:
        """What parallelize() takes besides the model and the mesh."""
        return Options(
            precision=self.precision,
            activation_checkpointing=self.activation_checkpointing,
            compile=self.compile,
            impl=self.impl,
            zero_stage=self.zero_stage,
            gradient_sync=self.gradient_sync,
            sequence_parallel=self.sequence_parallel,
            pipeline=self.pipeline,
            micro_batch_size=self.micro_batch_size,
            seq_len=self.seq_len,
            micro_batches=self.gradient_accumulation_steps,
            finetune=self.finetune,
        )


@dataclass
class ExportConfig:
    """Everything `./launch.sh export` takes."""

    run: str = field(default="???", metadata=PATH)  # RUN, or RUN/step-N
    out: str = field(default="model.safetensors", metadata=PATH)


@dataclass
class GenerateConfig:
    """Everything `./launch.sh generate` takes."""

    run: str = field(default="???", metadata=PATH)
    prompt: str = field(default="def ", metadata=PROSE)
    tokens: int = 400
    temperature: float = 0.7
    top_k: int | None = 40
    top_p: float | None = None
    seed: int = 0
    device: Device = Device.auto

    def __post_init__(self) -> None:
        at_least("tokens", self.tokens, 1)
        at_least("temperature", self.temperature, 0)
        at_least("top_k", self.top_k, 1)
        share_of_all("top_p", self.top_p)
        at_least("seed", self.seed, 0)
        require(bool(self.prompt), "prompt is empty: at least one character is needed")
