"""What the command line may say: every group composes, and every mistake is one line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.compose import CONFIGS, SCHEMAS
from experiments.config import TrainConfig
from experiments.environment import check_memory, settle
from experiments.launch import Torchrun
from experiments.refused import Refused
from experiments.warn import warn
from minigpt.config import LR_TIMES_WIDTH, ModelConfig
from parallel.layout import Layout
from tests.configs import compose

GROUPS = sorted(
    (path.parent.name, path.stem)
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "cluster")  # tests/test_clusters.py has those
)
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
NEEDED = {
    "text": ["data.path=README.md"],
    "openwebtext": ["model.vocab_size=4096"],
    "ep": ["model=tiny_moe"],
}

MISTAKES = [
    (["lr=1"], "lr=1: no such key; did you mean optimizer.lr?"),
    (["run.folder=x"], "run.folder=x: no such key; did you mean run.dir"),
    (["stepz=1"], "stepz=1: no such key; did you mean steps"),
    (["optimizer.learning_rate=1"], "optimizer.learning_rate=1: no such key; did you mean"),
    (["+extra=1"], "extra: no such key"),
    (["zyx.wv=1"], "zyx.wv=1: no such key; --help lists all that there are"),
    (["steps=abc"], "steps=abc: Value 'abc'"),
    (["steps=4", "steps=abc"], "steps=abc: Value 'abc'"),
    (["hydra.run.dir=x"], "hydra.run.dir=x: the folder of a run is run.dir="),
    (["timeout_s=1e20"], "timeout_s=1e+20: must be at most 1e8"),
    (["steps=1.5"], "steps=1.5: Value '1.5'"),
    (["steps=0"], "steps=0: must be at least 1"),
    (["steps="], "steps=: Value ''"),
    (["steps=[1,2]"], "steps=[1,2]: Value '[1, 2]'"),
    (["steps=${nope}"], "steps: Interpolation key 'nope' not found"),
    (["++steps=2=3"], "++steps=2=3: cannot be read"),
    (
        ["precision=fp4"],
        "precision=fp4: Invalid value 'fp4', expected one of [fp32, bf16, fp16, fp8]",
    ),
    (["compile=maybe"], "compile=maybe: Value 'maybe' is not a valid bool"),
    (["model=tinny"], "model=tinny: no such option; allowed: gpt2, "),
    (["model=[tiny,small]"], "model=[tiny,small]: model takes one option"),
    (["strategy=zero9"], "strategy=zero9: no such option; allowed: 3d, "),
    (["experiment=fast"], "experiment=fast: no such option; allowed: accumulation"),
    (["model.n_layer=null"], "model.n_layer=null: field 'model.n_layer' is not Optional"),
    (["model.d_model=100", "model.n_head=3"], "model.d_model=100 % model.n_head=3 = 1"),
    (["model.vocab_size=100"], "model.vocab_size=100: smaller than the data's 256 ids"),
    (["seq_len=4096"], "seq_len=4096: longer than model.context=128"),
    (["global_batch_size=15", "layout.dp_replicate=2"], "global_batch_size=15 != micro_batch"),
    (
        ["strategy=tp", "layout.tp=3"],
        "layout.tp=3: model.n_head(4) % tp(3) = 1: each rank takes whole heads; 3 ranks could be ",
    ),
    (
        ["strategy=pp", "layout.pp=8"],
        "layout.pp=8: pp(8) * stages_per_rank(1) = 8 stages > model.n_layer(4); 8 ranks could be ",
    ),
    (
        ["strategy=pp", "gradient_accumulation_steps=1"],
        "gradient_accumulation_steps=1: 1f1b with layout.pp=2 takes other numbers of "
        "micro-batches; the nearest: 2, 3, 4, 5",
    ),
    (
        ["pipeline.schedule=2f2b"],
        "pipeline.schedule=2f2b: Invalid value '2f2b', expected one of [gpipe, 1f1b, ",
    ),
    (["strategy=ep"], "layout.ep=2: model.ffn=swiglu has no experts"),
    (["layout.dp_replicate=0"], "layout.dp_replicate=0: must be at least 1"),
    (
        ["layout.dp_shard=-1", "layout.dp_replicate=-1"],
        "layout.dp_replicate=-1 and layout.dp_shard=-1: ",
    ),
    (["data=text"], "data.path is not set"),
    (["data.tokenizer=bpe"], "data.vocab_size=256: must be at least 257"),
    (["data=generated", "data.tokenizer=bpe"], "data.tokenizer=bpe: data=generated makes tokens"),
    (["data.validation_fraction=1"], "data.validation_fraction=1.0: must be at least 0 and below"),
    (["optimizer.lr=-1"], "optimizer.lr=-1.0: must be greater than 0"),
    (["clip=inf"], "clip=inf: must be greater than 0"),
    (["seed=-1"], "seed=-1: must be at least 0"),
    (["backend=nccl", "device=cpu"], "backend=nccl: needs device=cuda"),
    (["launch=slurm"], "launch=slurm: Invalid value 'slurm', expected one of [local, dry]"),
    (["sample.prompt=''"], "sample.prompt is empty"),
    (["validation=3"], "validation=3: validation is a section"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["--cfg", "everything"], "argument --cfg/-c: invalid choice"),
]


@pytest.mark.parametrize("group, name", GROUPS)
def test_every_option_of_every_group_composes(group: str, name: str) -> None:
    config = compose(f"{group}={name}", "model.context=2048", *NEEDED.get(name, []))
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_begin_with_their_command(name: str) -> None:
    package, command, *_ = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert package == "# @package _global_", "Hydra reads it from the first line only"
    assert command == f"# ./launch.sh experiment={name}"
    assert compose(f"experiment={name}") != compose()


@pytest.mark.parametrize("overrides, said", MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_is_one_line_with_key_and_value(overrides: list[str], said: str) -> None:
    with pytest.raises((Refused, ValueError)) as refused:
        compose(*overrides)
    message = str(refused.value)
    assert message.startswith(said), message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["class ", "def f(x): return {'a': [1, \"b\"]}", "a,b", "\\"])
def test_a_prompt_is_free_text(text: str) -> None:
    assert compose(f"sample.prompt={text}").sample.prompt == text


def test_a_path_may_hold_what_hydras_grammar_does_not_take() -> None:
    path = "/a folder (1)/text=x.txt"
    assert compose("data=text", f"data.path={path}").data.path == path


def test_hydras_own_door_composes_the_same() -> None:
    """It is taken where Hydra itself is asked for something."""
    keys = ("strategy=3d", "model=small", "optimizer.lr=1e-3", "experiment=smoke")
    assert compose(*keys) == compose(*keys, "hydra.verbose=false")


def test_the_schema_and_tiny_agree() -> None:
    """ModelConfig() is what ./launch.sh trains, so that a test and a user mean the same model."""
    assert compose().model == ModelConfig()


def test_the_rate_follows_the_width() -> None:
    assert compose("model=small").optimizer.lr == LR_TIMES_WIDTH / 384
    assert compose("optimizer.lr=0.5").optimizer.lr == 0.5


def test_presets_only_set_numbers() -> None:
    by_number = compose("layout.dp_replicate=1", "layout.dp_shard=-1")
    assert asdict(compose("strategy=fsdp")) == asdict(by_number)


def test_devices_and_left_over_ranks_are_settled() -> None:
    default = settle(compose(), None, gpus=0)
    assert (default.device.value, default.backend.value) == ("cpu", "gloo")
    assert default.layout == Layout(dp_replicate=2), "two ranks on a laptop"
    on_gpus = settle(compose(), None, gpus=8, nodes=2)
    assert (on_gpus.device.value, on_gpus.backend.value) == ("cuda", "nccl")
    assert on_gpus.layout.world_size == 16
    four = ("device=cuda", "layout.dp_replicate=4")
    shared = settle(compose(*four, "backend=gloo"), None, gpus=1)
    assert (shared.device.value, shared.layout.world_size) == ("cuda", 4)
    with pytest.raises(ValueError, match="with backend=gloo ranks share a device"):
        settle(compose(*four), None, gpus=1)
    given_four = settle(compose("strategy=fsdp", "layout.dp_replicate=2"), 4, gpus=0)
    assert given_four.layout == Layout(dp_replicate=2, dp_shard=2)


@pytest.mark.parametrize(
    "overrides, world_size, said",
    [
        (["device=cuda"], None, "device=cuda: torch sees no CUDA device here"),
        (["backend=nccl"], None, "backend=nccl: needs a CUDA device"),
        (["layout.dp_replicate=3"], 4, "layout: .* = 3 != 4 ranks"),
        (["layout.dp_replicate=3", "layout.dp_shard=-1"], 4, "layout.dp_shard=-1: 4 ranks / "),
        (["strategy=single"], 2, "= 1 != 2 ranks"),
        (["precision=fp8"], None, "precision=fp8: needs a GPU with units for it"),
        (["global_batch_size=9"], None, "global_batch_size=9 != micro_batch_size"),
        (["activation_checkpointing=offload"], None, "activation_checkpointing=offload: moves"),
        (["strategy=zero2", "layout.tp=2", "layout.pp=8"], 16, "layout.pp=8: .* 16 ranks could be"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(
    overrides: list[str], world_size: int | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        settle(compose(*overrides), world_size, gpus=0)


def test_more_than_the_memory_holds_is_refused_before_it_starts() -> None:
    many = settle(compose("layout.dp_replicate=100000"), None, gpus=0)
    with pytest.raises(ValueError, match=r"layout needs 100000 ranks here, but the .* GB"):
        check_memory(many, 100000)
    large = settle(compose("model=llama3_405b"), None, gpus=0)
    with pytest.raises(ValueError, match=r"model: 405,853,388,800 parameters need 12,987\.3 GB"):
        check_memory(large, 2)


def test_configs_lie_in_their_groups() -> None:
    loose = {path.name for path in Path(CONFIGS).glob("*.yaml")}
    assert loose == {f"{command}.yaml" for command in SCHEMAS}


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ("--max-restarts=-1", "0 to 1,000"),
        ("--max_restarts=x", "0 to 1,000"),
        ("--node-rank=x", "0 to 100,000"),
        ("--master-port=0", "1 to 65,535"),
    ],
)
def test_a_number_that_torchrun_would_not_take_is_one_line(option: str, allowed: str) -> None:
    name, _, value = option.replace("_", "-").partition("=")
    with pytest.raises(ValueError, match=f"^{name}={value}: must be a whole number, {allowed}$"):
        Torchrun([option])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["zero_stage=1"], "zero_stage=1: changes nothing, for layout.dp_shard is 1"),
        (["pipeline.schedule=gpipe"], "pipeline: its keys change nothing"),
        (["finetune.rank=4"], "finetune: its keys change nothing without finetune=lora"),
        (["data.path=x", "data=generated"], "data.path: data=generated reads no file"),
        (["strategy=fsdp", "gradient_sync=micro_batch"], "gradient_sync=micro_batch: changes noth"),
        (
            ["strategy=fsdp", "gradient_sync=micro_batch", "gradient_accumulation_steps=2"],
            "",
        ),
        (["strategy=zero1"], ""),
        (["strategy=pp", "pipeline.schedule=gpipe"], ""),
    ],
)
def test_what_changes_nothing_is_warned_of(
    overrides: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn(settle(compose(*overrides), None, 0, 1, 2))
    error = capsys.readouterr().err
    assert said in error and bool(error) == bool(said)
