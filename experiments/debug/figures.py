"""Does a diagnosis name the right fault, and none where there is none? Prints
docs/results/debug.md:

./launch.sh python -m experiments.debug.figures > docs/results/debug.md
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from experiments.compose import configs_of
from experiments.config import TrainConfig
from experiments.debug.diagnose import Diagnosis, conclude
from experiments.debug.faults import FAULTS, NONE, Fault, FaultyProgram, fault_of, planted
from experiments.debug.observe import Seen, watch
from experiments.document import rule, table
from experiments.environment import settle
from experiments.ranks import run_ranks

SEEDS = (0, 1, 2)
LONG = 7200.0  # seconds that all runs of as many ranks may take

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
([experiments/debug/patches.py](../../experiments/debug/patches.py)), on real ranks where it is
about
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


Planned = tuple[Fault, str, int, str]  # a fault, overrides, a seed, and what the row is called


def run(fault: Fault, given: str, seed: int) -> Case:
    """Diagnose one run."""
    return run_all([(fault, given, seed, "")])[0]


def run_all(planned: Sequence[Planned]) -> list[Case]:
    """Diagnose runs, those of as many ranks after one start: starting ranks is what takes time."""
    programs = [program_of(fault, given, seed) for fault, given, seed, _ in planned]
    seen: dict[int, Seen] = {}
    for ranks in sorted({p.config.layout.world_size for p in programs}):
        here = [i for i, p in enumerate(programs) if p.config.layout.world_size == ranks]
        todo = [(planned[i][0].name, programs[i].config) for i in here]
        done = (
            watch_all(todo) if ranks == 1 else run_ranks(ranks, watch_all, todo, timeout_s=LONG)[0]
        )
        seen.update(zip(here, done, strict=True))
    cases = []
    for i, ((fault, _, seed, where), program) in enumerate(zip(planned, programs, strict=True)):
        where = where or program.config.layout.label
        cases.append(Case(fault.name, where, seed, conclude(program, seen[i])))
    return cases


def program_of(fault: Fault, given: str, seed: int) -> FaultyProgram:
    overrides = fault.overrides([*given.split(), f"seed={seed}"])
    config = settle(configs_of("train", overrides)[0], None, 0)
    fault.check(config)
    return FaultyProgram(fault.name, config)


def watch_all(runs: list[tuple[str, TrainConfig]]) -> list[Seen]:
    """One run after the other in the program that has its fault."""
    seen = []
    for name, config in runs:
        seen.append(planted(name, watch, config))
        if len(runs) > 1 and seen[-1].start:  # rank 0
            print(f"watched: {name}, {config.layout.label}", file=sys.stderr, flush=True)
    return seen


def rows_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield table(*heads)
    yield rule(len(heads))
    yield from (table(*row) for row in rows)


def found(cases: list[Case], heads: list[str]) -> Iterator[str]:
    """One row a run and layout, one column a seed."""
    rows: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        mark = "" if case.right else " (WRONG)"
        said = f"{case.diagnosis.found or 'none'}{mark}"
        rows.setdefault((case.fault, case.where), []).append(said)
    yield from rows_of(heads, [[*key, *said] for key, said in rows.items()])


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
    yield from rows_of(heads, rows)


def value_of(case: Case, check: str) -> float | None:
    return next((f.value for f in case.diagnosis.evidence if f.check == check), None)


def report() -> Iterator[str]:
    own = [(fault, "", seed, "") for fault in FAULTS for seed in SEEDS]
    elsewhere = [(fault_of(name), given, 0, "") for name, given in ELSEWHERE.items()]
    sound = [(NONE, given, seed, name) for name, given in SOUND.items() for seed in SEEDS]
    cases = run_all([*own, *elsewhere, *sound])
    parts = len(own), len(own) + len(elsewhere)
    of_faults, of_others, of_sound = cases[: parts[0]], cases[slice(*parts)], cases[parts[1] :]
    yield "# Broken runs"
    yield ""
    yield "Made by `./launch.sh python -m experiments.debug.figures > docs/results/debug.md`."
    yield ""
    yield from ABOUT.splitlines()
    yield ""
    for title, part in (
        ("Ten faults in their own settings", of_faults),
        ("The same in other layouts", of_others),
        ("Sound runs", of_sound),
    ):
        right = sum(case.right for case in part)
        yield f"## {title}: {right} of {len(part)} right"
        yield ""
        seeds = [f"seed {seed}" for seed in sorted({case.seed for case in part})]
        yield from found(part, ["planted", "layout", *(f"found, {seed}" for seed in seeds)])
        yield ""
    yield "## The checks from both sides"
    yield ""
    yield "A check fails above its bound. They stand in the order in which causes come before"
    yield "effects: the first that fails and has a name is the diagnosis."
    yield ""
    yield from checks(of_sound, of_faults + of_others)


if __name__ == "__main__":
    for line in report():
        print(line, flush=True)
