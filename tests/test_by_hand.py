"""parallel/by_hand/: trains as a single process does, sends what its docstrings say, shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any

import pytest
import torch
from torch import nn

from experiments.config import TrainConfig
from experiments.figures.parity import VARIANTS, Trajectory, compare, make_config, trajectories
from experiments.ranks import run_ranks
from minigpt.config import ModelConfig
from parallel.by_hand.ddp import in_buckets
from parallel.layout import (
    ActivationCheckpointing,
    Impl,
    Layout,
    PipelineConfig,
    PipelineSchedule,
    Precision,
)
from simulator.communication import payload_bytes
from tests.by_hand_on_ranks import (
    Key,
    beginnings,
    everything,
    in_small_buckets,
    where_weights_are,
)
from tests.on_ranks import weights_and_validation
from tests.test_house import ROOT, imports_of

FILES = sorted((ROOT / "parallel/by_hand").glob("*.py"))
WRAPPERS = (
    "torch.nn.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.pipelining",
    "torch.distributed.optim",
    "torch.distributed._composable",
    "torch.distributed.algorithms",
)
BY_HAND = {"impl": Impl.by_hand}
STEPS = {"steps": 8}  # docs/results/parity.md has twenty of them
# strategy -> the axis that it is for, and what it needs besides
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("dp_replicate", {}),
    "zero1": ("dp_shard", {"zero_stage": 1}),
    "zero2": ("dp_shard", {"zero_stage": 2}),
    "fsdp": ("dp_shard", {}),
    "tp": ("tp", {}),
    "sp": ("tp", {"sequence_parallel": True}),
    "pp": ("pp", {"gradient_accumulation_steps": 4}),
}
MODELS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "padded": {"model.d_ff": 50, "model.vocab_size": 97, "clip": 0.5},
    "grouped": {"model.n_kv_head": 2, "model.positions": "sinusoidal", "model.norm": "rmsnorm"},
    # learned positions, biases, a tied head; a stage for each of four ranks
    "at once": {**VARIANTS["gpt2"], "data.ragged": True, "clip": 0.5, "model.n_layer": 4},
}
CHECKPOINTED = ["full checkpointing", "selective checkpointing"]
TRAINED: dict[int, dict[str, list[str]]] = {
    2: {
        "ddp": ["plain", "uneven", "gpt2", "experts", *CHECKPOINTED],
        "zero1": ["uneven", "gpt2", "sgd", "padded"],
        "zero2": ["accumulation", "full checkpointing"],
        "fsdp": ["plain", "uneven", "gpt2", "experts", "padded", *CHECKPOINTED],
        "tp": ["plain", "uneven", "gpt2", "grouped", *CHECKPOINTED],
        "sp": ["uneven", "gpt2", "grouped", *CHECKPOINTED],
        "pp": ["clipping", "uneven", "gpt2", "experts", *CHECKPOINTED],
    },
    4: {name: ["at once"] for name in ("zero1", "fsdp", "tp", "pp")},
}
FULL = {"activation_checkpointing": ActivationCheckpointing.full}
SENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt2": {**VARIANTS["gpt2"], "clip": 1.0},
    "full": FULL,
    "padded": {"model.d_ff": 50, "model.vocab_size": 97},
}
DOES_NOT_DIVIDE = {("tp", "padded"), ("sp", "padded")}  # refused: 97 rows of the vocabulary
EVEN = {"model.n_layer": 4, "clip": 1.0, "steps": 4}


def config_of(strategy: str, changes: dict[str, Any], ranks: int = 2) -> TrainConfig:
    axis, needed = STRATEGIES[strategy]
    return make_config(Layout(**{axis: ranks}), {**STEPS, **needed, **changes, **BY_HAND})


class Measured:
    """Everything that is run on so many ranks, at once: starting ranks is what takes time."""

    def __init__(self, ranks: int) -> None:
        self.trained = [(s, v) for s, names in TRAINED[ranks].items() for v in names]
        enough = {"model.n_layer": max(3, ranks), "gradient_accumulation_steps": ranks}  # for pp
        cells = [(s, v) for s in STRATEGIES for v in SENT if (s, v) not in DOES_NOT_DIVIDE]
        self.sent = [
            (s, v, config_of(s, {**SENT[v], **enough}, ranks))
            for s, v in cells
            if ranks == 2 or (v == "gpt2" and s in TRAINED[4])
        ]
        self.kept = ["ddp", "zero1", "fsdp", "tp"]
        self.ranks = run_ranks(
            ranks,
            everything,
            [config_of(s, MODELS[v], ranks) for s, v in self.trained],
            [config for _, _, config in self.sent],
            [config_of(s, EVEN, ranks) for s in self.kept],
        )


@pytest.fixture(scope="module", params=[2, 4])
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(request.param)


@pytest.fixture(scope="module")
def alone() -> dict[str, Trajectory]:
    """Each model that is trained on ranks, on a single process and in one micro-batch."""
    configs = [
        make_config(Layout(), {**STEPS, **changes, "gradient_accumulation_steps": 1})
        for changes in MODELS.values()
    ]
    return dict(zip(MODELS, trajectories(configs), strict=True))


@pytest.mark.slow
def test_losses_gradients_and_norms_of_a_single_process(
    measured: Measured, alone: dict[str, Trajectory]
) -> None:
    runs = zip(measured.trained, measured.ranks[0]["runs"], strict=True)
    cells = {cell: compare(run, alone[cell[1]]) for cell, run in runs}
    assert not {cell: far for cell, far in cells.items() if not far.holds}


@pytest.mark.slow
def test_payloads_are_the_closed_form_to_the_byte(measured: Measured) -> None:
    for rank, results in enumerate(measured.ranks):
        for (strategy, name, config), sent in zip(measured.sent, results["payloads"], strict=True):
            assert sent == closed_form(strategy, config, rank), (strategy, name, rank)


def closed_form(strategy: str, config: TrainConfig, rank: int) -> dict[Key, int]:
    """What the docstrings of parallel/by_hand/ say, of one rank and step."""
    model, m = config.model, config.gradient_accumulation_steps
    axis, clipped = STRATEGIES[strategy][0], config.clip is not None
    n = getattr(config.layout, axis)
    sent: Counter[Key] = Counter({("all_reduce", axis, "float64"): 16})
    fp32 = {kind: (kind, axis, "float32") for kind in COLLECTIVES}
    if strategy in ("fsdp", "zero2"):
        sent = Counter(payload_bytes(model, config.layout, config.options, clipped))
    if strategy in ("ddp", "zero1"):
        sent[fp32["all_reduce"]] = 4 * model.parameters
    if strategy == "zero1":
        for of_kind in (True, False):  # matrices, which decay, and vectors
            numbers = sum(prod(shape) for _, shape in shapes(model) if (len(shape) > 1) == of_kind)
            sent[fp32["all_gather"]] += 4 * n * -(-numbers // n)
    tokens = config.micro_batch_size * config.seq_len
    activation, L = 4 * tokens * model.d_model, model.n_layer
    full = config.activation_checkpointing == ActivationCheckpointing.full
    if strategy in ("tp", "sp"):
        sent[fp32["all_reduce"]] = m * 12 * tokens + (4 if clipped else 0)
    if strategy == "tp":
        sent[fp32["all_reduce"]] += m * activation * (4 * L + 2 + full * L)
    if strategy == "sp":
        behind_g = ("attention.out.bias", "mlp.down.bias")
        copies = [s for name, s in shapes(model) if "norm" in name or name in behind_g]
        sent[fp32["all_reduce"]] += m * (activation + 4 * sum(map(prod, copies)))
        sent[fp32["all_gather"]] = m * activation * (4 * L + 2 + full * 2 * L)
        sent[fp32["reduce_scatter"]] = m * activation * (4 * L + 1 + full * L)
    if strategy == "pp":
        if clipped:
            sent[fp32["all_reduce"]] = 4
        for kind in ("send", "recv"):  # forward and back, over each boundary of this stage
            sent[fp32[kind]] = m * activation * ((rank > 0) + (rank < n - 1))
        if model.tied and rank in (0, n - 1):
            sent["all_reduce", axis, "float32"] += 4 * model.vocab_size * model.d_model
    return dict(sent)


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send", "recv")


def shapes(model: ModelConfig) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter; names of blocks without their number."""
    return [*model.outer_shapes.items(), *[*model.block_shapes.items()] * model.n_layer]


@pytest.mark.slow
def test_each_rank_keeps_its_share_of_weights_gradients_and_moments(measured: Measured) -> None:
    n, model = len(measured.ranks), config_of("ddp", EVEN).model
    P, tensors = model.parameters, len(list(shapes(model)))
    norms = sum(prod(shape) for name, shape in shapes(model) if "norm" in name)
    assert P % n == 0 == norms % n
    for results in measured.ranks:
        ddp, zero1, fsdp, tp = results["memory"]
        # AdamW keeps two numbers a weight, and counts its steps in each tensor: zero1 has two
        assert (ddp["parameters"], ddp["optimizer"]) == (4 * P, 8 * P + 4 * tensors)
        assert (zero1["parameters"], zero1["optimizer"]) == (4 * P, 8 * P // n + 4 * 2)
        assert (fsdp["parameters"], fsdp["optimizer"]) == (4 * P // n, 8 * P // n + 4 * tensors)
        cut = (P - norms) // n + norms  # norms are copies along tp
        assert (tp["parameters"], tp["optimizer"]) == (4 * cut, 8 * cut + 4 * tensors)
        assert fsdp["communication"] > 0
        assert fsdp["peak"] < zero1["peak"] < ddp["peak"] or n == 2


@pytest.mark.slow
def test_ddp_sends_several_buckets_and_gradients_live_in_them(alone: dict[str, Trajectory]) -> None:
    config, limit = config_of("ddp", MODELS["uneven"]), 2**17
    for rank, seen in enumerate(run_ranks(2, in_small_buckets, config, limit)):
        assert len(seen["sizes"]) == seen["storages"] > 3
        assert sum(seen["sizes"]) == 4 * config.model.parameters
        if rank == 0:
            assert compare(seen["run"], alone["uneven"]).holds


@pytest.mark.slow
def test_fsdp_gives_the_whole_weights_back() -> None:
    configs = [config_of(s, {}) for s in ("fsdp", "zero2")]
    for fsdp, zero2 in run_ranks(2, where_weights_are, configs):
        whole = 4 * configs[0].model.ff_dim * configs[0].model.d_model
        assert fsdp["forward"] == [0] * 4 and zero2["forward"] == [whole] * 4
        for seen in (fsdp, zero2):
            assert seen["step"] == [0] * 4
            assert seen["evaluation"] == [0] * 4


@pytest.mark.slow
def test_initial_weights_and_validation_are_those_of_a_single_process() -> None:
    tied = {"model.tied": True, "gradient_accumulation_steps": 4}
    ((weights, loss),) = weights_and_validation([make_config(Layout(), tied)])
    configs = [config_of(s, tied) for s in STRATEGIES]
    for rank, results in enumerate(run_ranks(2, beginnings, configs)):
        for strategy, seen in zip(STRATEGIES, results, strict=True):
            assert seen["loss"] == pytest.approx(loss, abs=5e-6), strategy
            if rank == 0:
                assert seen["weights"].keys() == weights.keys()
                assert all(torch.equal(seen["weights"][name], weights[name]) for name in weights)
        # 1F1B: as many as there are stages from here on, whatever the number of micro-batches
        assert results[-1]["in_flight"] == 2 - rank


def test_buckets_take_parameters_in_reverse_until_they_are_full() -> None:
    a, b, c, large = (nn.Parameter(torch.zeros(n)) for n in (3, 4, 5, 100))
    filled = in_buckets([large, a, b, c], limit=4 * 9)
    assert [[len(p) for p in bucket] for bucket in filled] == [[5, 4], [3], [100]]


@pytest.mark.parametrize(
    ("layout", "changes", "says"),
    [
        (Layout(dp_shard=2, tp=2), {}, "one of dp_replicate, dp_shard, tp, pp at a time"),
        (Layout(cp=2), {}, "has cp"),
        (Layout(dp_shard=2), {"precision": Precision.bf16}, "precision=fp32"),
        (Layout(dp_shard=2), {"compile": True}, "compile=false"),
        (
            Layout(pp=2),
            {"pipeline": PipelineConfig(PipelineSchedule("gpipe"))},
            "pipeline.schedule=gpipe: impl=by_hand",
        ),
    ],
)
def test_what_is_not_written_by_hand_is_refused(
    layout: Layout, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        make_config(layout, {**changes, **BY_HAND, "gradient_accumulation_steps": 4})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_a_page_and_takes_no_wrapper(file: Any) -> None:
    assert len(file.read_text().splitlines()) <= 150
    assert not [name for name in imports_of(file) if name.startswith(WRAPPERS)]
