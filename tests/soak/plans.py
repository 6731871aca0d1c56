"""Plans that are printed, searched and traced, and what people type about them."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from experiments.predict.simulate import MOST_EVENTS
from tests.launching import SMALL, launch
from tests.soak.trial import trial
from tests.test_simulate import LARGEST

WRONG, TYPED = "Silent and wrong", "Input that people type"
BIG = ("model=llama3_70b", "cluster=h100", "gpus=512", "global_batch_tokens=4M")


def said(*arguments: str, cwd: Path) -> Any:
    """Return what a command with --json prints, after it exited with 0."""
    done = launch(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: str, cwd: Path) -> str:
    """Return the one line on standard error of a command that exited with 2."""
    done = launch(*arguments, cwd=cwd)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, (done.returncode, done.stderr)
    return f"exit 2: {lines[0].removeprefix('launch.sh: ')}"


@trial(WRONG, "70B on 512 H100: type what search prints for its fastest plan")
def printed_plan(folder: Path) -> str:
    done = launch("search", *BIG, "top=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("./launch.sh simulate"))
    plan = said("search", *BIG, "top=1", cwd=folder)["plans"][0]
    assert plan["command"] == line
    ledger = said(*shlex.split(line)[1:], cwd=folder)
    seconds, fits = ledger["step"]["time_s"]["total"], ledger["environment"]["fits"]
    assert (seconds, fits) == (plan["time_s"], plan["fits"]) and fits
    return f"search: {plan['time_s']:.2f} s and fits; simulate of its line: {seconds:.2f} s, fits"


@trial(WRONG, "type what `ask '70B on 512 H100'` prints")
def asked_plan(folder: Path) -> str:
    done = launch("ask", "70B on 512 H100", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stdout.splitlines() if x.startswith("./launch.sh simulate")]
    seconds = [said(*shlex.split(x)[1:], cwd=folder)["step"]["time_s"]["total"] for x in lines[:2]]
    assert all(f"{second:.2f} s" in done.stdout for second in seconds)
    return f"{len(lines)} plans with their commands; the first two take {seconds[0]:.2f} and " + (
        f"{seconds[1]:.2f} s, as printed"
    )


@trial(WRONG, "GPT-3 175B on 1,024 A100: is there a plan with tp?")
def padded_vocabulary(folder: Path) -> str:
    keys = ("cluster=a100_80g", "gpus=1024", "global_batch_tokens=3M", "top=1")
    done = launch("search", "model=gpt3_175b", *keys, cwd=folder)
    first = next(x for x in done.stdout.splitlines() if "does not divide" in x)
    found = said("search", "model=gpt3_175b", *keys, cwd=folder)["plans"][0]
    published = said("search", "model=gpt3_175b", "model.vocab_size=51200", *keys, cwd=folder)
    seconds = [plan["time_s"] for plan in (found, published["plans"][0])]
    assert found["layout"]["tp"] > 1 and abs(seconds[0] / seconds[1] - 1) < 0.03
    return f"{first} Best: {found['label']}, {seconds[0]:.2f} s; with 51,200: {seconds[1]:.2f} s"


@trial(WRONG, "train with tp=2 a vocabulary of 97, padded to 128, beside one process without")
def padded_training(folder: Path) -> str:
    vocabulary = ("model.vocab_size=97", "data.vocab_size=97")
    line = refused("strategy=tp", *SMALL, *vocabulary, cwd=folder)
    assert "model.pad_vocab_to=128" in line
    alone = said("strategy=single", *SMALL, *vocabulary, "run.dir=one", cwd=folder)
    keys = ("strategy=tp", *SMALL, *vocabulary, "model.pad_vocab_to=128", "run.dir=two")
    both = said(*keys, cwd=folder)
    losses = [run["training"]["losses"] for run in (alone, both)]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert apart <= 5e-6, losses
    return f"{line}; padded, losses are {apart:.1e} apart"


@trial(WRONG, "method=trace of LoRA on one device beside the run")
def traced_adapters(folder: Path) -> str:
    keys = ("finetune=lora", "strategy=single", "precision=fp32", *SMALL)
    base = launch("strategy=single", *SMALL, "run.dir=base", cwd=folder)
    assert base.returncode == 0, base.stderr
    run = said(*keys, "resume=base", "device=cpu", "run.dir=run", cwd=folder)
    trace = said("simulate", *keys, "cluster=laptop", "method=trace", "run.dir=trace", cwd=folder)
    measured, traced = (x["step"]["memory_bytes"]["peak"] for x in (run, trace))
    assert abs(traced / measured - 1) < 0.05, (measured, traced)
    return f"{traced:,} bytes traced, {measured:,} measured"


@trial(TYPED, "replay of a trace that torch's profiler wrote (Kineto)")
def kineto(folder: Path) -> str:
    with gzip.open(folder / "trace.json.gz", "wt") as file:
        json.dump({"schemaVersion": 1, "traceEvents": []}, file)
    return refused("replay", str(folder), "cluster=h100", cwd=folder)


@trial(TYPED, "replay RUN/trace.json.gz")
def trace_for_a_run(folder: Path) -> str:
    done = launch("strategy=ddp", *SMALL, "trace=true", "run.dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    there = said("replay", "run/trace.json.gz", "cluster=ethernet_10g", cwd=folder)
    assert there["source"] == "replayed"
    return f"replays its run: {there['step']['time_s']['total']:.3f} s a step on ethernet_10g"


@trial(TYPED, "simulate cluster=topo.txt, a file that is no profile")
def not_a_profile(folder: Path) -> str:
    (folder / "topo.txt").write_text("GPU0 GPU1\nNV18 X\n")
    return refused("simulate", "cluster=topo.txt", cwd=folder)


@trial(TYPED, "simulate strategy=ddp")
def a_preset(folder: Path) -> str:
    layout = said("simulate", "strategy=ddp", cwd=folder)["layout"]
    assert layout["dp_replicate"] == layout["world_size"] > 1
    return f"dp_replicate={layout['dp_replicate']}: one node of the cluster; gpus=N takes others"


@trial(TYPED, "simulate experiment=gpt2, and the line that it offers")
def compiled(folder: Path) -> str:
    line = refused("simulate", "experiment=gpt2", cwd=folder)
    ledger = said("simulate", "experiment=gpt2", "compile=false", cwd=folder)
    return f"{line}; which takes {ledger['step']['time_s']['total']:.2f} s a step"


@trial(TYPED, "search micro_batch_size=1 precision=bf16, no brackets")
def a_list_of_one(folder: Path) -> str:
    keys = ("model=llama3_8b", "gpus=64", "micro_batch_size=1", "precision=bf16")
    plans = said("search", *keys, cwd=folder)["plans"]
    assert plans and {plan["micro_batch_size"] for plan in plans} == {1}
    return f"{len(plans)} plans, each with micro_batch_size 1"


@trial(TYPED, "compare RUN missing")
def a_run_that_is_missing(folder: Path) -> str:
    said("simulate", "run.dir=run", cwd=folder)
    done: subprocess.CompletedProcess = launch("compare", "run", "missing", cwd=folder)
    assert done.returncode == 2 and "missing: no such file or folder" in done.stderr
    return f"exit 2: {done.stderr.strip()}, and the table of the run that is there"


@trial(TYPED, "`simulate trace=true` of 134,217,728 ranks, then `method=trace` of as many")
def whole_world(folder: Path) -> str:
    began = time.perf_counter()
    done = launch("simulate", *LARGEST, "trace=true", "run.dir=run", cwd=folder)
    seconds = time.perf_counter() - began
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    with gzip.open(folder / "run" / "trace.json.gz", "rt") as file:
        programs = json.load(file)["programs"]
    events = sum(map(len, programs.values()))
    assert len(programs) == 32 and events <= MOST_EVENTS
    line = refused("simulate", *LARGEST, "method=trace", cwd=folder)
    return f"a timeline of {events:,} events in {seconds:.1f} s; {line}"
