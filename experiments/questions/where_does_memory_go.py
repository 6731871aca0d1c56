"""Remedies alone and together: measured on two ranks, by formula for Llama 3 8B on 8 H100."""

from __future__ import annotations

from pathlib import Path

from costs.ledger import MEMORY_PARTS
from experiments.ask.answer import Answer, Picture, Said, Table, listed, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import COUNT, Quantity, formula
from experiments.ask.runs import (
    FOUR_STEPS,
    SECONDS,
    SHAPE,
    STRATEGIES,
    agreement,
    fits,
    h100_memory,
    on_laptop,
    parts_of,
    states,
)

QUESTION = (
    "Where does memory go, and what does each remedy save (bf16, checkpointing, accumulation, "
    "ZeRO-1/2/3, tensor, pipeline, offload), alone and together?"
)
ORDER = 4
WORDS = "out of memory oom gpu ram activations gradients optimizer states recomputation offloading"

DDP = STRATEGIES["DDP"]
BASE = "nothing (DDP, fp32)"
SMALLER = ("micro_batch_size=2", "gradient_accumulation_steps=4")
# what is done against memory -> keys; 16 sequences a step on two ranks in each
REMEDIES: dict[str, tuple[str, ...]] = {
    BASE: DDP,
    "bf16": (*DDP, "precision=bf16"),
    "selective checkpointing": (*DDP, "activation_checkpointing=selective"),
    "full checkpointing": (*DDP, "activation_checkpointing=full"),
    "4 micro-batches of 2": (*DDP, *SMALLER),
    "ZeRO-1": STRATEGIES["ZeRO-1"],
    "ZeRO-2": STRATEGIES["ZeRO-2"],
    "ZeRO-3 (FSDP)": STRATEGIES["FSDP (ZeRO-3)"],
    "tensor parallel": STRATEGIES["TP"],
    "tensor + sequence": STRATEGIES["TP + sequence"],
    "pipeline, 4 micro-batches": STRATEGIES["PP (1F1B)"],
    "ZeRO-3 + bf16 + full": (
        *STRATEGIES["FSDP (ZeRO-3)"],
        "precision=bf16",
        "activation_checkpointing=full",
    ),
    "all of these + 4 micro-batches": (
        *STRATEGIES["FSDP (ZeRO-3)"],
        *SMALLER,
        "precision=bf16",
        "activation_checkpointing=full",
    ),
}
TOGETHER = "all of these + 4 micro-batches"
# the same on 8 H100, 16 sequences of 4,096 a step
LLAMA = ("model=llama3_8b", "cluster=h100", "seq_len=4096")
ON_EIGHT: dict[str, tuple[str, ...]] = {
    BASE: ("layout.dp_replicate=8", "micro_batch_size=2", "precision=fp32"),
    "bf16": ("layout.dp_replicate=8", "micro_batch_size=2"),
    "bf16 + full checkpointing": (
        "layout.dp_replicate=8",
        "micro_batch_size=2",
        "activation_checkpointing=full",
    ),
    "bf16 + ZeRO-1": ("layout.dp_shard=8", "zero_stage=1", "micro_batch_size=2"),
    "bf16 + ZeRO-2": ("layout.dp_shard=8", "zero_stage=2", "micro_batch_size=2"),
    "bf16 + ZeRO-3": ("layout.dp_shard=8", "micro_batch_size=2"),
    "bf16 + tensor and sequence": (
        "layout.tp=8",
        "sequence_parallel=true",
        "micro_batch_size=2",
        "gradient_accumulation_steps=8",
    ),
    "bf16 + pipeline": ("layout.pp=8", "micro_batch_size=1", "gradient_accumulation_steps=16"),
    "bf16 + ZeRO-3 + 2 micro-batches": (
        "layout.dp_shard=8",
        "micro_batch_size=1",
        "gradient_accumulation_steps=2",
    ),
    "bf16 + ZeRO-3 + full": (
        "layout.dp_shard=8",
        "micro_batch_size=2",
        "activation_checkpointing=full",
    ),
}
NOTHING = 0.02  # of the peak: saves less than that saves nothing


def answer(evidence: Evidence) -> Answer:
    runs = {n: evidence.measured(n, *SHAPE, *keys, FOUR_STEPS) for n, keys in REMEDIES.items()}
    twins = [on_laptop(evidence, n, *SHAPE, *keys) for n, keys in REMEDIES.items()]
    eight = {n: evidence.simulated(f"8B {n}", *LLAMA, *keys) for n, keys in ON_EIGHT.items()}
    offload = evidence.attempted("offload", *SHAPE, *DDP, "activation_checkpointing=offload")
    device = h100_memory(eight[BASE])
    return Answer(
        conclusion=[
            *where_it_goes(runs[BASE]),
            *alone(runs),
            together(runs),
            *on_h100(eight, device),
            offloading(eight, offload),
        ],
        tables=[
            memory_table("two ranks of this machine, 16 sequences of 128 a step", runs),
            memory_table("Llama 3 8B on 8 H100, 16 sequences of 4,096 a step", eight),
        ],
        pictures=[picture(runs, eight, device)],
        carries_over=agreement(list(runs.values()), twins),
        does_not=[recomputation(runs, eight), SECONDS],
    )


def where_it_goes(base: Run) -> list[Said]:
    parts = parts_of(base)
    largest = max(parts, key=lambda name: parts[name].value)
    parameters = base.at("model.parameters", COUNT, "parameters")
    held = states(base)
    return [
        say(
            "Of {peak} in plain DDP the largest part is {largest}: {part}, {share}.",
            peak=base.memory(),
            largest=largest,
            part=parts[largest],
            share=(parts[largest] / base.memory()).as_share(),
        ),
        say(
            "Weights, gradients and AdamW's two moments are {states}: {each} a parameter, whatever "
            "the batch; only activations grow with it.",
            states=held,
            each=held / parameters,
        ),
    ]


def saved(run: Run, base: Run) -> Quantity:
    """The share of the base's peak that is gone."""
    return ((base.memory() - run.memory()) / base.memory()).as_share().named(f"{run.name}: saved")


def alone(runs: dict[str, Run]) -> list[Said]:
    """The order of the remedies, and what each cuts."""
    names = [n for n in runs if n != BASE and "+ bf16" not in n and n != TOGETHER]
    gains = {name: saved(runs[name], runs[BASE]) for name in names}
    order = sorted(names, key=lambda name: -gains[name].value)
    good = [say("{n} {g}", n=n, g=gains[n]) for n in order if gains[n].value > NOTHING]
    idle = [say("{n} {g}", n=n, g=gains[n]) for n in order if gains[n].value <= NOTHING]
    said = [say("Alone they save, of DDP's peak here: {all}.", all=listed(good))]
    if idle:
        said.append(say("Saves nothing, or costs: {all}.", all=listed(idle)))
    base = parts_of(runs[BASE])
    cuts: dict[str, list[str]] = {}
    for name in order:
        less = {p: base[p].value - runs[name].memory(p).value for p in MEMORY_PARTS}
        if gains[name].value > NOTHING:
            cuts.setdefault(max(less, key=lambda part: less[part]), []).append(name)
    each = "; ".join(f"{part} by {', '.join(who)}" for part, who in cuts.items())
    said.append(say(f"What each takes most from: {each}. So two that cut the same part overlap."))
    return said


def together(runs: dict[str, Run]) -> Said:
    """Savings do not add up, for what is gone cannot go twice."""
    own = ("ZeRO-3 (FSDP)", "bf16", "full checkpointing", "4 micro-batches of 2")
    gains = [saved(runs[name], runs[BASE]) for name in own]
    added = sum(gain.value for gain in gains)
    whole = saved(runs[TOGETHER], runs[BASE])
    compared = "less than their sum" if whole.value < added else "as much as their sum"
    return say(
        "Together ({names}) they leave {peak} of {base}: {whole} is saved, {compared} ({each}).",
        names=", ".join(own),
        peak=runs[TOGETHER].memory(),
        base=runs[BASE].memory(),
        whole=whole,
        compared=compared,
        each=listed([say("{g}", g=gain) for gain in gains]),
    )


def on_h100(eight: dict[str, Run], device: Quantity) -> list[Said]:
    fit = [name for name, run in eight.items() if fits(run)]
    out = [name for name in eight if name not in fit]
    said = [
        say(
            "Llama 3 8B on 8 H100 of {device}: {out} do not fit; {fit} do.",
            device=device,
            out=listed([say("{n} ({m})", n=n, m=eight[n].memory()) for n in out] or [say("none")]),
            fit=listed([say("{n} ({m})", n=n, m=eight[n].memory()) for n in fit] or [say("none")]),
        )
    ]
    low, wide = parts_of(eight["bf16"]), parts_of(eight[BASE])
    kept = ("parameters", "gradients", "optimizer")
    if all(low[part].value == wide[part].value for part in kept):
        said.append(
            say(
                "bf16 by autocast cuts activations only ({low} for {wide}): weights, gradients and "
                "moments stay in fp32, {parameters} of weights alone.",
                low=low["activations"],
                wide=wide["activations"],
                parameters=low["parameters"],
            )
        )
    return said


def offloading(eight: dict[str, Run], refusal: Run | str) -> Said:
    """What waits on the host beside full checkpointing, and that a processor has none."""
    run = eight["bf16 + ZeRO-3 + full"]
    config = run.ledger["config"]
    model, size = config["model"], config["micro_batch_size"] * config["seq_len"]
    inputs = formula(
        "inputs of all blocks in bf16",
        2 * model["n_layer"] * size * model["d_model"],
        "B",
        "parallel/activation_checkpointing.py, offload",
        "2 L B T D",
    )
    return say(
        "Offload moves to the host what full checkpointing keeps, the input of each block: with "
        "ZeRO-3 on 8 H100 {inputs} of its {activations} activations, for copies over PCIe. It is "
        "for GPUs, and refused here: {why}.",
        inputs=inputs,
        activations=run.memory("activations"),
        why=refusal,
    )


def recomputation(runs: dict[str, Run], eight: dict[str, Run]) -> Said:
    """What full checkpointing costs: the same flops everywhere, other seconds."""
    here = runs["full checkpointing"].at("step.flops.hardware", "FLOP") / runs[BASE].at(
        "step.flops.hardware", "FLOP"
    )
    there = eight["bf16 + ZeRO-3 + full"].seconds() / eight["bf16 + ZeRO-3"].seconds()
    return say(
        "What a remedy costs in time. Full checkpointing runs {here} the flops here; by formula it "
        "makes Llama 3 8B's step with ZeRO-3 on H100 {there} as long.",
        here=here,
        there=there,
    )


def memory_table(title: str, runs: dict[str, Run]) -> Table:
    base = next(iter(runs.values()))
    rows = [
        [name, run.memory(), *parts_of(run).values(), saved(run, base)]
        for name, run in runs.items()
    ]
    return Table(f"Memory at the peak: {title}", ["remedy", "peak", *MEMORY_PARTS, "saved"], rows)


def picture(runs: dict[str, Run], eight: dict[str, Run], device: Quantity) -> Picture:
    def panel(title: str, of: dict[str, Run], unit: str, size: float, limit: float | None):
        from experiments.ask.charts import Bars

        parts = {p: [r.memory(p).value / size for r in of.values()] for p in MEMORY_PARTS}
        return Bars(title, list(of), parts, unit, limit)

    def draw(path: Path) -> None:
        from experiments.ask import charts

        charts.draw(
            path,
            panel("measured: two ranks of this machine", runs, "MB", 1e6, None),
            panel(
                "by formula: Llama 3 8B on 8 H100 (dashed: the device)",
                eight,
                "GB",
                1e9,
                device.value / 1e9,
            ),
        )

    key = str([(n, r.ledger["step"]["memory_bytes"]) for n, r in {**runs, **eight}.items()])
    return Picture("memory", "memory by category under each remedy", draw, key)
