"""Does a diagnosis name the right fault, and none where there is none? Prints docs/debug.md:

./launch.sh python -m experiments.debug.figures > docs/debug.md
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from experiments.compose import configs_of
from experiments.debug.diagnose import Diagnosis, diagnose
from experiments.debug.faults import FAULTS, NONE, Fault, Program, fault_of
from experiments.environment import settle

SEEDS = (0, 1, 2)

# sound runs of ten layouts, among them what a fault looks like and is none
SOUND = {
    "single": "strategy=single",
    "single, fp16 with its scaler, no warm-up at a small rate": (
        "strategy=single precision=fp16 optimizer.warmup_steps=0 optimizer.lr=1e-3"
    ),
    "ddp, accumulation, uneven token counts": (
        "strategy=ddp layout.dp_replicate=2 micro_batch_size=2 gradient_accumulation_steps=2 "
        "data.ragged=true"
    ),
    "fsdp, bf16": "strategy=fsdp layout.dp_shard=2 micro_batch_size=4 precision=bf16",
    "tp, tied head": "strategy=tp layout.tp=2 model.tied=true",
    "tp_sp, dropout": "strategy=tp_sp layout.tp=2 model.dropout=0.2",
    "pp, tied head": "strategy=pp layout.pp=2 model.tied=true micro_batch_size=2",
    "cp, bf16": "strategy=cp layout.cp=2 precision=bf16",
    "ep, experts": "strategy=ep model=tiny_moe layout.dp_shard=2 layout.ep=2 micro_batch_size=4",
    "fsdp and tp, by four ranks": "strategy=fsdp_tp layout.dp_shard=2 layout.tp=2",
}
# each fault once more, in another layout than its own
ELSEWHERE = {
    "nan-after-30": "strategy=fsdp layout.dp_shard=2",
    "exploding-gradients": "strategy=pp layout.pp=2 micro_batch_size=2",
    "missing-causal-mask": "strategy=ddp layout.dp_replicate=2 model.attention=plain",
    "heads-merged-wrongly": "strategy=tp layout.tp=2",
    "no-warm-up": "strategy=fsdp layout.dp_shard=2 micro_batch_size=4",
    "mean-of-means": "strategy=ddp layout.dp_replicate=2 gradient_accumulation_steps=1",
    "rank-with-another-seed": "strategy=fsdp layout.dp_shard=2 impl=torch",
    "data-overlap": "strategy=hsdp layout.dp_replicate=2 layout.dp_shard=2 micro_batch_size=2",
    "validation-in-train-mode": "strategy=ddp layout.dp_replicate=2",
    "tied-head-lost": "strategy=fsdp_tp layout.dp_shard=2 layout.tp=2",
}

ABOUT = """\
`./launch.sh debug NAME` trains with a fault that is put into the program from outside
([experiments/debug/patches.py](../experiments/debug/patches.py)), on real ranks where it is about
ranks; `--diagnose` runs it through the checks below. The diagnosis gets the program and its
configuration, not the name: it imports nothing of the faults, and a test holds it to that.
`--explain` adds the same run without the fault, and a picture of both. With `none` in the place of
NAME nothing is planted: for a program that you have changed."""


@dataclass(frozen=True)
class Case:
    """One run, and what was found."""

    fault: str
    where: str
    seed: int
    diagnosis: Diagnosis

    @property
    def right(self) -> bool:
        return self.diagnosis.found == (None if self.fault == NONE.name else self.fault)


def run(fault: Fault, given: str, seed: int, where: str = "") -> Case:
    """Diagnose one run; a line on standard error says how it went."""
    overrides = fault.overrides([*given.split(), f"seed={seed}"])
    config = settle(configs_of("train", overrides)[0], None, 0)
    fault.check(config)
    diagnosis = diagnose(Program(fault.name, config))
    case = Case(fault.name, where or config.layout.label, seed, diagnosis)
    print(f"{fault.name} {case.where} {seed}: {case.diagnosis.found}", file=sys.stderr, flush=True)
    return case


def table(heads: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def found(cases: list[Case], heads: list[str]) -> Iterator[str]:
    """One row a run and layout, one column a seed."""
    rows: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        mark = "" if case.right else " (WRONG)"
        said = f"{case.diagnosis.found or 'none'}{mark}"
        rows.setdefault((case.fault, case.where), []).append(said)
    yield from table(heads, [[*key, *said] for key, said in rows.items()])


def checks(sound: list[Case], broken: list[Case]) -> Iterator[str]:
    """Each check from both sides: the largest value of sound runs, the smallest of the runs that it
    named, and which faults fail it besides."""
    kinds = {f.check: f.bound for case in sound + broken for f in case.diagnosis.evidence}
    rows = []
    for check, bound in kinds.items():
        values = [value_of(case, check) for case in sound]
        largest = max((v for v in values if v is not None), default=math.nan)
        named = [
            f.value
            for case in broken
            for f in case.diagnosis.evidence
            if f.check == check and not f.holds and f.names == case.fault
        ]
        failing = {
            case.fault
            for case in broken
            for f in case.diagnosis.evidence
            if f.check == check and not f.holds
        }
        least = f"{min(named):.2g}" if named else "-"
        rows.append([check, f"{largest:.2g}", f"{bound:g}", least, ", ".join(sorted(failing))])
    heads = ["check", "sound runs, at most", "bound", "its fault, at least", "who fails it"]
    yield from table(heads, rows)


def value_of(case: Case, check: str) -> float | None:
    return next((f.value for f in case.diagnosis.evidence if f.check == check), None)


def report() -> Iterator[str]:
    own = [run(fault, "", seed) for fault in FAULTS for seed in SEEDS]
    elsewhere = [run(fault_of(name), given, 0) for name, given in ELSEWHERE.items()]
    sound = [run(NONE, given, seed, name) for name, given in SOUND.items() for seed in SEEDS]
    yield "# Broken runs"
    yield ""
    yield "Made by `./launch.sh python -m experiments.debug.figures > docs/debug.md`."
    yield ""
    yield from ABOUT.splitlines()
    yield ""
    for title, cases in (
        ("Ten faults in their own settings", own),
        ("The same in other layouts", elsewhere),
        ("Sound runs", sound),
    ):
        right = sum(case.right for case in cases)
        yield f"## {title}: {right} of {len(cases)} right"
        yield ""
        seeds = [f"seed {seed}" for seed in sorted({case.seed for case in cases})]
        yield from found(cases, ["planted", "layout", *(f"found, {seed}" for seed in seeds)])
        yield ""
    yield "## The checks from both sides"
    yield ""
    yield "A check fails above its bound. They stand in the order in which causes come before"
    yield "effects: the first that fails and has a name is the diagnosis."
    yield ""
    yield from checks(sound, own + elsewhere)


if __name__ == "__main__":
    for line in report():
        print(line, flush=True)
