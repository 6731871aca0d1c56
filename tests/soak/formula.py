"""Trials of the closed form: what `simulate` says of a plan, against its own timeline."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings

from experiments.compose import configs_of
from simulator.plan_times import timeline_of
from tests.soak.trial import trial
from tests.test_monotone import Case, cases, judge

GROUP = "Silent and wrong"
PLAN = "model=llama3_70b cluster=h100 layout.pp=8 layout.tp=8 sequence_parallel=true"
PLAN += " pipeline.schedule=zbv_zero_bubble seq_len=4096 micro_batch_size=1"
PLAN += " gradient_accumulation_steps=8"


def simulate(keys: str, folder: Path) -> tuple[int, str, str]:
    """Run `simulate --json`; return its exit status, standard output and error."""
    argv = [*keys.split(), f"run.dir={folder / str(len(list(folder.iterdir())))}", "--json"]
    command = [sys.executable, "-m", "experiments", "simulate", *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr.strip()


def step(keys: str, folder: Path) -> dict[str, Any]:
    """The ledger of a simulation that must succeed."""
    status, out, error = simulate(keys, folder)
    assert status == 0, error
    return json.loads(out)


@trial(GROUP, "Seconds of tp and pp without a data axis, where autocast sends fp32")
def table_and_timeline(folder: Path) -> str:
    table = step(PLAN, folder)["step"]["time_s"]["total"]
    config = configs_of("simulate", PLAN.split())[0]
    plan = (config.model, config.layout, config.options, config.cluster)
    timeline = timeline_of(*plan).total
    assert abs(table / timeline - 1) < 0.01
    return f"table {table:.3f} s, its timeline {timeline:.3f} s"


@trial(GROUP, "Flops of a step of 8 million tokens of Llama 3 405B on one rank")
def flops_beyond_64_bits(folder: Path) -> str:
    keys = "model=llama3_405b cluster=h100 seq_len=8192 gradient_accumulation_steps=1024"
    flops = step(keys, folder)["step"]["flops"]
    assert flops["hardware"] > flops["model"] > 2**63
    return f"exit 0: {flops['hardware']:.4g} hardware flops a rank"


@trial(GROUP, "MFU of fp8")
def mfu_of_fp8(folder: Path) -> str:
    keys = "model=llama3_405b cluster=gb200_nvl72 layout.dp_replicate=2 seq_len=4096"
    keys += " micro_batch_size=4 gradient_accumulation_steps=64 precision=fp8"
    ledger = step(keys, folder)
    mfu, peak = ledger["step"]["mfu"], ledger["environment"]["peak_flops_per_s"]
    assert mfu < 1 and ledger["environment"]["peak_dtype"] == "fp8"
    return f"{100 * mfu:.1f} % of {peak / 1e12:,.0f} TFLOP/s in fp8"


@trial(GROUP, "1e20 GPUs, and 1e300 tokens")
def absurd_sizes(folder: Path) -> str:
    seen = []
    for keys in ("layout.dp_replicate=100000000000000000000", "scale.tokens=1e300"):
        status, out, error = simulate(keys, folder)
        assert status == 2 and not out and len(error.splitlines()) == 1
        seen.append(f"exit 2: {error}")
    return "; ".join(seen)


@trial(GROUP, "The same keys on cores: simulate's precision and train's")
def precision_of_cores(folder: Path) -> str:
    here, there = (step(f"cluster={name}", folder) for name in ("laptop", "h100"))
    kinds = [ledger["config"]["precision"] for ledger in (here, there)]
    assert kinds == ["fp32", "bf16"]
    return f"cluster=laptop assumes {kinds[0]}, as train does; cluster=h100 {kinds[1]}"


@trial(GROUP, "The bubble of ZBV with 8 stages and 8 micro-batches")
def bubble_of_zbv(folder: Path) -> str:
    from parallel.layout import PipelineConfig, PipelineSchedule
    from simulator.order_times import ideal_bubble

    names = ("zbv_zero_bubble", "interleaved_zero_bubble")
    zbv, other = (ideal_bubble(PipelineConfig(PipelineSchedule(n)), 8, 8) for n in names)
    assert round(zbv, 3) == 0.226 and round(other, 3) == 0.127
    return f"ideal in torch's order {100 * zbv:.1f} %; interleaved zero bubble {100 * other:.1f} %"


@trial(GROUP, "Twice the sequence, replicas or micro-batches of 2,000 random plans")
def twice_as_much(folder: Path) -> str:
    counts: Counter[str] = Counter()

    @settings(
        max_examples=2000,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.nested_given],
    )
    @given(cases().filter(lambda case: case.allowed))
    def judged(case: Case) -> None:
        counts.update(judge(case))

    judged()
    seen = "; ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    assert min(counts[name] for name in ("sequence", "replicas", "micro-batches")) > 1000
    return f"no pair without a named exception. Pairs, and those with one: {seen}"
