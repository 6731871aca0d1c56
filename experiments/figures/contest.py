"""Training steps of several kinds that take turns: a noisy machine slows all of them alike."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments.assemble import make_batches, make_trainer
from experiments.config import Backend, Device, TrainConfig
from experiments.environment import SINGLE_NODE
from experiments.figures.plain_parallel import MICRO_BATCHES, plain_strategy
from experiments.figures.yardstick import Shape, plain_loop
from experiments.metering import Meters
from experiments.ranks import run_ranks
from experiments.train import train_step
from minigpt.config import FFN, DataConfig, ModelConfig, Norm, OptimizerConfig, Positions
from minigpt.corpus import prepare
from parallel.layout import Impl, Layout, Precision
from parallel.mesh import build_mesh
from parallel.passes import NoMarks
from parallel.step import Trainer

WARMUP = 5  # steps; by then the meters have looked at the operators (step_log.MEMORY_STEP)
TURN = 3  # steps that are counted
POLL_S = 0.1  # rarely: everyone who waits takes time from the two cores of the one who runs
GEMM_SIZE = 1024
PATIENCE_S = 1800
TUNED = "plain, tuned"  # with what our launcher sets for its ranks (environment.of_a_rank)
PLAIN_STRATEGIES = ("plain tp", "plain pp")
YARDSTICKS = {"plain": None, TUNED: None, "plain ddp": "ddp", "plain fsdp": "fsdp"}
# how the other plain loops are started: as anyone would
AS_IT_COMES = {"OMP_NUM_THREADS": "1", **SINGLE_NODE}
HAND = {"impl": Impl.by_hand}
FILLED = {"gradient_accumulation_steps": MICRO_BATCHES}
FULLER = {"gradient_accumulation_steps": 2 * MICRO_BATCHES}  # less bubble, smaller products
KINDS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "fp32": (Layout(), {}),
    "bf16": (Layout(), {"precision": Precision.bf16}),
    "ddp": (Layout(dp_replicate=2), {}),
    "zero1": (Layout(dp_shard=2), {"zero_stage": 1}),
    "zero2": (Layout(dp_shard=2), {"zero_stage": 2}),
    "fsdp": (Layout(dp_shard=2), {}),
    "tp": (Layout(tp=2), {}),
    "tp_sp": (Layout(tp=2), {"sequence_parallel": True}),
    "pp": (Layout(pp=2), FILLED),
    "pp, 8 micro-batches": (Layout(pp=2), FULLER),
    "cp": (Layout(cp=2), {}),
    "ddp by hand": (Layout(dp_replicate=2), HAND),
    "fsdp by hand": (Layout(dp_shard=2), HAND),
    "tp by hand": (Layout(tp=2), HAND),
    "pp by hand": (Layout(pp=2), {**HAND, **FILLED}),
}
ALONE = "alone"  # a single process beside a rank that does nothing

Step = Callable[[], object]


def our_config(
    shape: Shape, layout: Layout, steps: int, changes: dict[str, Any] | None = None
) -> TrainConfig:
    """The yardstick's shape as a configuration of ours."""
    changes = changes or {}
    micro_batches = changes.get("gradient_accumulation_steps", 1)
    model = ModelConfig(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        d_model=shape.d_model,
        vocab_size=shape.vocab_size,
        context=shape.seq_len,
        norm=Norm.layernorm,
        positions=Positions.learned,
        ffn=FFN.gelu,
        tied=True,
    )
    return TrainConfig(
        model=model,
        optimizer=OptimizerConfig(lr=1e-3),
        layout=layout,
        micro_batch_size=shape.batch // layout.data_parallel // micro_batches,
        seq_len=shape.seq_len,
        steps=steps,
        device=Device.cpu,
        backend=Backend.gloo,
        **changes,
    )


class NoMeters(NoMarks):
    """In the place of Meters, which then measure nothing."""

    last_step_s = 0.0

    def __init__(self, _config: TrainConfig, _trainer: Trainer) -> None: ...

    def step(self, _index: int) -> AbstractContextManager:
        return nullcontext()


class Following(Meters):
    """Meters that follow the memory of every step operator by operator, not only of one."""

    def _looking(self, _index: int) -> AbstractContextManager:
        return self._follow_memory()


# "ddp meters off": a kind of KINDS, but for its meters
METERS: dict[str, Any] = {"": Meters, "off": NoMeters, "following": Following}
OFF = " meters off"


class OurLoop:
    """The training loop's own step, with its meters on."""

    def __init__(self, config: TrainConfig, meters_of: Any = Meters) -> None:
        self.config = config
        self.trainer = make_trainer(config, build_mesh(config.layout, torch.device("cpu")))
        self.meters = meters_of(config, self.trainer)
        self.batches = make_batches(config, prepare(config.data))
        self.numbers = iter(range(config.steps))

    def __call__(self) -> None:
        train_step(next(self.numbers), self.config, self.trainer, self.batches, self.meters)


def gemm() -> Step:
    """The device's best: one square matrix product in fp32."""
    a = torch.randn(GEMM_SIZE, GEMM_SIZE)
    return lambda: torch.mm(a, a)


def make_step(kind: str, shape: Shape, steps: int) -> Step:
    """A contestant by its name in KINDS."""
    if kind == "gemm":
        return gemm()
    text = prepare(DataConfig()).folder / "train.bin"
    if kind in YARDSTICKS:
        return plain_loop(shape, text, YARDSTICKS[kind])
    if kind in PLAIN_STRATEGIES:
        return plain_strategy(kind, shape, text)
    if kind == ALONE and dist.get_rank():
        return lambda: None
    name, _, meters = kind.partition(" meters ")
    layout, changes = KINDS["fp32" if kind == ALONE else name]
    return OurLoop(our_config(shape, layout, steps, changes), METERS[meters])


class Baton:
    """Whose turn it is, in a file: contestants live in processes of their own, and only one runs.

    A process that several models share slows each of them by some per cent (caches, heap).
    """

    def __init__(self, file: Path, number: int, contestants: int) -> None:
        self.file, self.number, self.contestants = file, number, contestants
        self.over = file.with_suffix(".over")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for this contestant's turn; afterwards it is the next one's. For all its ranks."""
        if dist.get_rank() == 0:
            while int(self.file.read_text()) != self.number:
                if self.over.exists():
                    raise RuntimeError("another contestant has failed")
                time.sleep(POLL_S)
        dist.barrier()
        yield
        dist.barrier()
        if dist.get_rank() == 0:
            part = self.file.with_suffix(f".{self.number}")
            part.write_text(str((self.number + 1) % self.contestants))
            part.rename(self.file)


def perform(kind: str, shape: Shape, rounds: int, baton: Baton) -> list[float]:
    """Seconds of TURN steps of each round, on this rank.

    The first step of a turn is not counted: the caches still hold another contestant.
    """
    torch.set_num_threads(1)
    with baton.turn():
        step = make_step(kind, shape, WARMUP + rounds * (TURN + 1))
        for _ in range(WARMUP):
            step()
    times = []
    for _ in range(rounds):
        with baton.turn():
            step()
            for _ in range(TURN):
                dist.barrier()
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
    return times


def hold(kinds: list[str], world_size: int, shape: Shape, rounds: int) -> dict[str, list[float]]:
    """The contest: seconds of each step of each kind, of its slowest rank. What one of them raises
    ends it."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(kinds)) as pool:
        file = Path(name) / "turn"
        file.write_text("0")
        batons = [Baton(file, number, len(kinds)) for number in range(len(kinds))]
        running = []
        for kind, baton in zip(kinds, batons, strict=True):
            plain = kind in YARDSTICKS or kind in PLAIN_STRATEGIES
            variables = AS_IT_COMES if plain and kind != TUNED else None
            limits: dict[str, Any] = {"timeout_s": PATIENCE_S, "variables": variables}
            if kind.endswith(OFF):
                limits["backend"] = "gloo"  # itself: the meter's backend stands before it
            job = pool.submit(run_ranks, world_size, perform, kind, shape, rounds, baton, **limits)
            running.append(job)
        done, _ = wait(running, return_when=FIRST_EXCEPTION)
        failed = next((error for job in done if (error := job.exception())), None)
        if failed:
            batons[0].over.touch()  # or the others would wait for its turn to end
            raise failed
        ranks = [run.result() for run in running]
    return {k: [max(s) for s in zip(*r, strict=True)] for k, r in zip(kinds, ranks, strict=True)}
