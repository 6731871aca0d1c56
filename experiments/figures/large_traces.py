"""Models and worlds that no laptop holds, simulated both ways from the command line: how far apart
the trace and the closed forms are, and how long each takes."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from experiments.console import progress
from experiments.ranks import ROOT

CLUSTER = "h100"
FULL = "activation_checkpointing=full"
# name -> what ./launch.sh simulate is given
LARGE: dict[str, list[str]] = {
    "8B, fsdp64": ["model=llama3_8b", "layout.dp_shard=64"],
    "8B, tp8 x ddp8": ["model=llama3_8b", "layout.tp=8", "layout.dp_replicate=8"],
    "70B, fsdp1024": ["model=llama3_70b", "layout.dp_shard=1024", FULL],
    "70B, tp8 x fsdp128": ["model=llama3_70b", "layout.tp=8", "layout.dp_shard=128"],
    "70B, pp4 x fsdp32 x tp8": [
        *("model=llama3_70b", "layout.pp=4", "layout.dp_shard=32", "layout.tp=8"),
        "gradient_accumulation_steps=8",
    ],
    "405B, tp8 x fsdp256": ["model=llama3_405b", "layout.tp=8", "layout.dp_shard=256", FULL],
    "405B, pp8 x fsdp16 x tp8": [
        *("model=llama3_405b", "layout.pp=8", "layout.dp_shard=16", "layout.tp=8", FULL),
        "gradient_accumulation_steps=8",
    ],
}
COMMON = ["micro_batch_size=1", "seq_len=8192", f"cluster={CLUSTER}", "precision=bf16"]


@dataclass(frozen=True)
class Answer:
    """What a command said, and what it took."""

    ledger: dict[str, Any]
    seconds: float  # from the command line, start of Python included
    memory_bytes: int  # resident, of its fullest process

    @property
    def peak(self) -> int:
        return self.ledger["step"]["memory_bytes"]["peak"]

    @property
    def step_s(self) -> float:
        return self.ledger["step"]["time_s"]["total"]


def simulate(*overrides: str) -> Answer:
    """./launch.sh simulate, as a user runs it. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ROOT / "launch.sh"), "simulate", *overrides, "--json"]
        command.append(f"run.dir={folder}/run")
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as running:
            assert running.stdout
            text = running.stdout.read()
            _, status, used = os.wait4(running.pid, 0)
            running.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)
    return Answer(json.loads(text), seconds, used.ru_maxrss * 1024)


def both_ways() -> Iterator[tuple[str, Answer, Answer]]:
    """Each of LARGE: its name, traced, by formula."""
    for name, plan in LARGE.items():
        progress(f"large: {name}")
        yield name, simulate(*plan, *COMMON, "method=trace"), simulate(*plan, *COMMON)
