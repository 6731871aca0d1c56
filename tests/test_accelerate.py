"""Through Accelerate: the losses, gradients and bytes of plain DDP, and no setting but our own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from costs import ledger as ledgers
from experiments import accelerate_launch
from experiments import environment as machine
from experiments.__main__ import main
from experiments.config import TrainConfig
from experiments.figures.parity import VARIANTS, Trajectory, compare, make_config, trajectories
from experiments.ranks import run_ranks
from experiments.refused import Refused
from minigpt.config import ModelConfig
from parallel.layout import ActivationCheckpointing, Impl, Layout, Precision
from simulator.communication import payload_bytes
from tests.configs import compose
from tests.launching import PATIENCE_S, ROOT, SMALL, environment, launch, only_run
from tests.on_ranks import Key, payloads

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed: pip install 'accelerate>=1.15,<2'",
)
NAMES = ("plain", "accumulation", "clipping", "tied", "uneven")
BF16 = {"precision": Precision.bf16}
# what `accelerate config` and `accelerate launch` may leave: it must not change anything
LEFT_BEHIND = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.parametrize(
    "overrides, gpus, said",
    [
        (["layout.dp_replicate=1", "layout.dp_shard=2"], 0, "impl=accelerate: layout.dp_shard=2 n"),
        (["layout.dp_replicate=2", "layout.dp_shard=2"], 0, "impl=accelerate: layout.dp_shard=2 n"),
        (["layout.dp_replicate=1", "layout.tp=2"], 8, "impl=accelerate: tp2; it takes dp_rep"),
        (["layout.dp_replicate=1", "layout.cp=2"], 8, "impl=accelerate: cp2; it takes dp_rep"),
        (["layout.dp_replicate=2", "precision=fp16"], 0, "impl=accelerate: precision=fp16 would"),
        (["layout.dp_replicate=1", "layout.dp_shard=2", "zero_stage=1"], 8, "impl=accelerate: zer"),
    ],
)
def test_what_it_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], gpus: int, said: str
) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda _package: True)
    with pytest.raises((Refused, ValueError)) as refused:
        machine.settle(compose("strategy=accelerate", *overrides), None, gpus=gpus)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_the_layout_alone_says_whether_it_shards_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda _package: True)
    sharded = compose("strategy=accelerate", "layout.dp_replicate=2", "layout.dp_shard=-1")
    assert machine.settle(sharded, None, gpus=8).layout == Layout(dp_replicate=2, dp_shard=4)
    replicated = machine.settle(compose("strategy=accelerate"), None, gpus=0)
    assert (replicated.layout, replicated.impl) == (Layout(dp_replicate=2), Impl.accelerate)


def test_where_it_is_not_installed_one_line_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda _package: False)
    with pytest.raises(ValueError, match="impl=accelerate: the package is not installed; pip ins"):
        machine.settle(compose("strategy=accelerate"), None, gpus=0)


def test_accelerate_launch_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"ACCELERATE_USE_CPU": "True"}
    assert machine.given_rank(one) == machine.Rank(0, 0, 1), "--num_processes 1"
    several = {**one, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert machine.given_rank(several) is None, (
        "one process all the same: our launcher starts the ranks"
    )
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert machine.gpu_count() == 0, "--cpu"


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}
HYBRID = {**FSDP1, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}
MESH = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}
MEGATRON = {"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
# what `accelerate launch` sets where nobody has asked for anything
DEFAULTS = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.parametrize(
    ("variables", "keys", "way"),
    [
        (FSDP, [], "give strategy=fsdp"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, ["strategy=fsdp"], "give strategy=zero2"),
        (FSDP1, ["strategy=accelerate"], "give strategy=zero2"),
        (HYBRID, ["strategy=fsdp"], "give strategy=hsdp zero_stage=3"),
        (FSDP | {"FSDP_SHARDING_STRATEGY": "NO_SHARD", "FSDP_VERSION": "1"}, ["strategy=fsdp"],
         "give strategy=ddp"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, ["strategy=fsdp"], "take FSDP_OFFLOAD_PARAMS=tr"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [],
         "give strategy=fsdp activation_checkpointing=full"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, [], "give precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["precision=fp16"], "give precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, ["strategy=accelerate"],
         "give impl=torch precision=fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_FP8_BACKEND": "TE"}, [],
         "give precision=fp8, and take ACCELERATE_FP8_BACKEND=TE out"),
        (DEEPSPEED, ["strategy=zero1"], "give strategy=zero1, and take ACCELERATE_USE_DEEPSPEED=t"),
        (MEGATRON, [], "give layout.tp=2 layout.pp=1, and take ACCELERATE_USE_MEGATRON_LM=true"),
        (MESH, ["layout.dp_replicate=1"], "give layout.tp=2"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, [], "give compile=true"),
        ({"ACCELERATE_DYNAMO_BACKEND": "eager"}, [], "take ACCELERATE_DYNAMO_BACKEND=eager out"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, [], "give gradient_accumulation_steps=4"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, [], "give clip=0.5"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:0"}, [], "give device=cuda"),
        ({"ACCELERATE_CPU_AFFINITY": "1"}, [], "take ACCELERATE_CPU_AFFINITY=1 out"),
        ({"ACCELERATE_USE_NEWER": "true"}, [], "take ACCELERATE_USE_NEWER=true out"),
    ],
)  # fmt: skip
def test_what_accelerate_launch_asks_for_and_the_run_is_not_is_refused(
    variables: dict[str, str], keys: list[str], way: str
) -> None:
    config = machine.settle(compose(*keys), None, gpus=0)
    with pytest.raises(ValueError) as refused:
        accelerate_launch.check(config, {**DEFAULTS, **variables})
    said = str(refused.value)
    assert said.startswith("accelerate launch asks for ") and "\n" not in said
    assert f": {way}" in said, said


@pytest.mark.parametrize(
    ("variables", "keys"),
    [
        ({}, []),
        ({}, ["precision=bf16", "gradient_accumulation_steps=4", "clip=null"]),
        (FSDP, ["strategy=fsdp"]),
        (FSDP, ["strategy=single"]),
        (FSDP1, ["strategy=zero2"]),
        (HYBRID, ["strategy=hsdp"]),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
         ["strategy=fsdp", "activation_checkpointing=full"]),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["precision=bf16"]),
        (MESH, ["strategy=tp"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["compile=true"]),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1"}, []),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, ["gradient_accumulation_steps=2"]),
    ],
)  # fmt: skip
def test_what_agrees_with_accelerate_launch_is_taken(
    variables: dict[str, str], keys: list[str]
) -> None:
    config = machine.settle(compose(*keys), None, gpus=0)
    accelerate_launch.check(config, {**DEFAULTS, **variables})


AS_RANK = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("started", [{}, AS_RANK])
def test_both_launchers_hold_it_against_the_run(
    started: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {**FSDP, **started}.items():
        monkeypatch.setenv(name, value)
    assert main(["data=generated", "launch=dry"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("launch.sh: accelerate launch asks for") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def train_and_send(configs: list[TrainConfig]) -> tuple[list[Trajectory], list[dict[Key, int]]]:
    """On a rank: each run, and the payloads of one step of each. The environment is left as is."""
    before = dict(os.environ)
    results = trajectories(configs), payloads(configs)
    assert dict(os.environ) == before
    return results


def train_sharded(configs: list[TrainConfig]) -> tuple[list[Trajectory], list[dict[Key, int]]]:
    """The same on CPU ranks that Accelerate takes for GPUs, for which it has FSDP2."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def cpu(state: Any) -> None:
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *given: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = cpu
    return train_and_send(configs)


def through(layout: Layout, changes: dict[str, Any]) -> TrainConfig:
    return make_config(layout, {**changes, "impl": Impl.accelerate})


def single(changes: dict[str, Any]) -> TrainConfig:
    return make_config(Layout(), {**changes, "gradient_accumulation_steps": 1})


def sent(config: TrainConfig) -> dict[Key, int]:
    return payload_bytes(config.model, config.layout, config.options, config.clip is not None)


@needs_accelerate
@pytest.mark.slow
def test_it_trains_and_sends_as_plain_ddp_does() -> None:
    changes = [*(VARIANTS[name] for name in NAMES), BF16]
    references = trajectories([single(c) for c in changes])
    configs = [through(Layout(dp_replicate=2), c) for c in changes]
    ranks = run_ranks(2, train_and_send, configs, variables=LEFT_BEHIND)
    far = [compare(*pair) for pair in zip(ranks[0][0], references, strict=True)]
    assert all(difference.holds for difference in far[:-1]), dict(zip(NAMES, far, strict=False))
    assert far[-1].loss < 1e-3 and far[-1].gradient < 0.1, "bf16, beside bf16 in one process"
    for _, payload in ranks:
        assert payload == [sent(config) for config in configs]
    parameters = configs[0].model.parameters
    assert ranks[0][1][0]["all_reduce", "dp_replicate", "float32"] == 4 * parameters


@needs_accelerate
@pytest.mark.slow
def test_its_fsdp2_trains_and_sends_as_ours_does() -> None:
    full = {"activation_checkpointing": ActivationCheckpointing.full}
    changes = [*(VARIANTS[name] for name in NAMES), full]
    references = trajectories([single(c) for c in changes])
    configs = [through(Layout(dp_shard=2), c) for c in changes]
    ranks = run_ranks(2, train_sharded, configs)
    far = [compare(*pair) for pair in zip(ranks[0][0], references, strict=True)]
    assert all(difference.holds for difference in far), far
    for _, payload in ranks:
        assert payload == [sent(config) for config in configs]


@needs_accelerate
@pytest.mark.slow
def test_one_rank_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's variables would make it a process group of one, and messages."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    config = through(Layout(), {"steps": 2})
    reference = single({"steps": 2})
    assert compare(*trajectories([config, reference])).holds
    assert not torch.distributed.is_initialized()


@needs_accelerate
@pytest.mark.slow
def test_launch_sh_takes_it_and_its_ledger_is_ddps(tmp_path: Path) -> None:
    done = launch("strategy=accelerate", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ledger = ledgers.read(only_run(tmp_path) / "ledger.json")
    assert ledger["config"]["impl"] == "accelerate"
    rows = {row["dtype"]: row["payload_bytes"] for row in ledger["step"]["communication"]}
    model = ModelConfig(n_layer=2, d_model=32, context=32)
    assert rows == {"float32": 4 * model.parameters, "float64": 16}
    refused = launch("strategy=accelerate", "layout.dp_shard=2", *SMALL, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


@needs_accelerate
@pytest.mark.slow
@pytest.mark.parametrize(
    "options, ranks",
    [
        (["--cpu", "--num_processes", "1"], 1),
        (["--cpu", "--num_processes", "2"], 2),
        (["--multi_gpu", "--num_processes", "2"], 2),  # torchrun's variables, on CPUs too
    ],
)
def test_accelerate_launch_starts_it(tmp_path: Path, options: list[str], ranks: int) -> None:
    module = ["--module", "experiments", "strategy=accelerate", "device=cpu", *SMALL]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *module]
    variables = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    ledger = ledgers.read(only_run(tmp_path) / "ledger.json")
    assert ledger["layout"]["dp_replicate"] == ledger["layout"]["world_size"] == ranks
