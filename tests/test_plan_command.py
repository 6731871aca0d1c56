"""The command of a plan: what it simulates is the plan that was printed, to the digit."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.ask.command import free_words
from experiments.overrides import composed
from experiments.predict.plan_command import SIMULATE, command_of, wrapped
from experiments.predict.search import find, rebuildable
from experiments.predict.simulate import simulate

SEARCHES = {
    "dense": ("model=llama3_70b", "cluster=h100", "gpus=512", "global_batch_tokens=4M"),
    "experts": ("model=mixtral_8x7b", "cluster=a100_80g", "gpus=64", "global_batch_tokens=1M"),
    "precisions": (
        *("model=gpt2_xl", "cluster=ethernet_10g", "gpus=24", "global_batch_tokens=384k"),
        *("precision=[fp32,fp16,fp8]", "headroom=0.35", "seq_len=512"),
    ),
    "padded": ("model=gpt2", "cluster=h100", "gpus=8", "global_batch_tokens=512k", "layout.tp=4"),
    "changed": (
        *("model=tiny", "model.vocab_size=128", "model.n_layer=12", "gpus=8", "cluster=laptop"),
        *("global_batch_tokens=64k", "cluster.device.memory_bytes=2e7"),
    ),
}
PLANS_EACH = 8


@pytest.mark.parametrize("name", SEARCHES)
def test_a_plan_is_rebuilt_by_its_command(name: str) -> None:
    """Time, memory and whether it fits, of plans that fit and plans that do not."""
    config = composed("search", SEARCHES[name])
    found = find(config)
    draw = random.Random(name)
    fitting, others = (np.flatnonzero(which).tolist() for which in (found.fits, ~found.fits))
    chosen = [
        i for some in (fitting, others) for i in draw.sample(some, min(PLANS_EACH, len(some)))
    ]
    found.look_at(chosen)
    for i in chosen:
        plan = rebuildable(config, found, i)
        simulated = composed("simulate", overrides_of(plan["command"]))
        ledger = simulate(simulated, Path())
        assert ledger["step"]["time_s"]["total"] == plan["time_s"], plan["command"]
        assert ledger["step"]["memory_bytes"]["peak"] == plan["memory_bytes"], plan["command"]
        assert ledger["environment"]["fits"] == plan["fits"], plan["command"]
        assert command_of(simulated) == plan["command"], "simulate prints the same line"


def overrides_of(command: str) -> tuple[str, ...]:
    """Return what a shell hands to simulate."""
    assert command.startswith(SIMULATE)
    return tuple(shlex.split(command.removeprefix(SIMULATE)))


def test_search_and_simulate_agree_through_their_doors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["model=llama3_8b", "cluster=h100", "gpus=16", "global_batch_tokens=512k", "top=2"]
    assert main(["search", *given, "explain=pp2-dp_shard4-tp2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    for number, plan in enumerate([*said["plans"], said["simplest"], said["explained"]["plan"]]):
        argv = ["simulate", *overrides_of(plan["command"]), f"run.dir={tmp_path / str(number)}"]
        assert main([*argv, "--json"]) == 0
        ledger = json.loads(capsys.readouterr().out)
        assert ledger["step"]["time_s"]["total"] == plan["time_s"]
        assert ledger["environment"]["command"] == plan["command"]
    assert main(["search", *given]) == 0
    text = capsys.readouterr().out
    assert all(plan["command"] in text.splitlines() for plan in said["plans"])


def test_a_key_that_simulate_assumes_is_not_written() -> None:
    bare = command_of(composed("simulate", ("model=gpt2", "layout.dp_replicate=2", "seq_len=1024")))
    assert bare == f"{SIMULATE} model=gpt2 cluster=h100 layout.dp_replicate=2"


def test_values_that_a_shell_or_hydra_would_take_apart_are_quoted() -> None:
    given = (
        "layout.pp=2",
        "pipeline.split=[3,1]",
        "gradient_accumulation_steps=2",
        "optimizer.lr=1e-4",
    )
    config = composed("simulate", given)
    again = composed("simulate", overrides_of(command_of(config)))
    assert again == config and "'pipeline.split=[3,1]'" in command_of(config)


def test_a_narrow_terminal_breaks_a_command_so_that_a_shell_joins_it() -> None:
    config = composed(
        "simulate", ("layout.pp=2", "pipeline.split=[3,1]", "gradient_accumulation_steps=2")
    )
    command = command_of(config)
    broken = wrapped(command, 40)
    assert max(map(len, broken.splitlines())) <= 40 and len(broken.splitlines()) > 2
    assert shlex.split(broken.replace("\\\n", "")) == shlex.split(command)
    assert wrapped(command, 1000) == command


def test_an_answer_has_the_command_of_each_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_words("8B on 16 H100", as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    first = said["commands"][0]
    ledger = simulate(composed("simulate", overrides_of(first["command"])), Path())
    time = next(n for n in said["numbers"] if n["label"].endswith("time s"))
    assert time["value"] == ledger["step"]["time_s"]["total"]
    assert free_words("8B on 16 H100", as_json=False) == 0
    assert first["command"] in capsys.readouterr().out.splitlines()
