"""Every plan for 70B on 512 H100, family by family, and for other sizes: who wins, and why."""

from __future__ import annotations

import math
from typing import Any

from experiments.ask.answer import Answer, Cell, Said, Table, listed, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import COUNT, SHARE, Quantity, formula, published
from experiments.ask.runs import (
    SECONDS,
    SHAPE,
    STRATEGIES,
    agreement,
    h100_memory,
    on_laptop,
    states,
    strategy,
)
from experiments.ask.search import (
    HEAD,
    cells_of,
    commands_of,
    described,
    headline,
    part,
    plan_number,
    plans_table,
    simplest_of,
)

QUESTION = "Train a large language model across hundreds of GPUs: which parallelism, and why?"
ORDER = 1
WORDS = (
    "llm strategy choose best plan layout 70b 3d fsdp tensor pipeline data cluster h100 thousands"
)

LLAMA = ("model=llama3_70b", "cluster=h100", "gpus=512", "global_batch_tokens=4M", "top=3")
NO_MODEL = ("layout.pp=1", "layout.tp=1", "layout.cp=1")
# family -> what is fixed; of several the best is taken
FAMILIES: dict[str, list[tuple[str, ...]]] = {
    "DDP": [(*NO_MODEL, "layout.dp_shard=1")],
    "FSDP over all": [(*NO_MODEL, "layout.dp_replicate=1")],
    "HSDP": [(*NO_MODEL, "layout.dp_shard=64")],
    "TP + data": [("layout.pp=1", "layout.cp=1", f"layout.tp={n}") for n in (2, 4, 8)],
    "PP + data": [("layout.tp=1", "layout.cp=1", f"layout.pp={n}") for n in (2, 4, 8)],
    "TP + PP + data": [("layout.cp=1", "layout.tp=8", f"layout.pp={n}") for n in (2, 4, 8)],
    "all, free": [()],
}
FREE = "all, free"
SIZES = {
    "8B on 64": ("model=llama3_8b", "cluster=h100", "gpus=64", "global_batch_tokens=1M", "top=1"),
    "70B on 512": (*LLAMA[:-1], "top=1"),
    "405B on 4,096": (
        "model=llama3_405b",
        "cluster=h100",
        "gpus=4096",
        "global_batch_tokens=16M",
        "schedule=[1f1b,interleaved_1f1b,zbv_zero_bubble]",
        "top=1",
    ),
}
LLAMA3 = (
    "Llama team 2024, The Llama 3 Herd of Models, table 4: row llama3-002 of "
    "experiments/published/measured.csv"
)
SEQ_LEN = 8192  # of Llama 3: its context, where nothing else is asked for
HIDDEN = 0.05  # of a step: what is lost to messages and bubbles below it is little
CHECKED = ("DDP", "FSDP (ZeRO-3)", "TP", "PP (1F1B)")


def answer(evidence: Evidence) -> Answer:
    families = {n: best_of(evidence, n, keys) for n, keys in FAMILIES.items()}
    sizes = {n: evidence.searched(n, *keys) for n, keys in SIZES.items()}
    runs = [strategy(evidence, name) for name in CHECKED]
    twins = [on_laptop(evidence, n, *SHAPE, *STRATEGIES[n]) for n in CHECKED]
    return Answer(
        conclusion=[
            why_split(evidence),
            *winner(families),
            *others(families),
            *by_size(sizes),
            practice(),
        ],
        tables=[family_table(families), size_table(sizes), plans_table(families[FREE])],
        commands=[
            *commands_of(families[FREE]),
            *(best for n, run in families.items() if n != FREE for best in commands_of(run, n)[:1]),
            *(best for n, run in sizes.items() for best in commands_of(run, n)[:1]),
        ],
        carries_over=agreement(runs, twins),
        does_not=[
            say(
                "The winner: it is the cluster's, by bandwidths that are {ratio} apart in and "
                "between nodes of H100; two ranks on a loopback have one network.",
                ratio=bandwidths(),
            ),
            SECONDS,
        ],
    )


def best_of(evidence: Evidence, name: str, family: list[tuple[str, ...]]) -> Run:
    """The search of a family that finds the fastest plan; any of them where nothing fits."""
    runs = [evidence.searched(name, *LLAMA, *keys) for keys in family]
    found = [run for run in runs if run.ledger["plans"]]
    return min(found or runs, key=lambda run: seconds_of(run))


def seconds_of(run: Run) -> float:
    plans = run.ledger["plans"]
    return plans[0]["time_s"] if plans else math.inf


def bandwidths() -> Quantity:
    from experiments.predict.clusters import load

    h100 = load("h100")
    inside, across = (
        formula(name, level.bandwidth, "B/s", "configs/cluster/h100.yaml", name)
        for name, level in (("in_node", h100.in_node), ("between_nodes", h100.between_nodes))
    )
    return inside / across


def why_split(evidence: Evidence) -> Said:
    """Why anything must be split at all."""
    plan = evidence.simulated(
        "70B in DDP", "model=llama3_70b", "cluster=h100", "layout.dp_replicate=512"
    )
    device, held = h100_memory(plan), states(plan)
    each = held / plan.at("model.parameters", COUNT, "parameters")
    return say(
        "Weights, gradients and optimizer of Llama 3 70B take {held} ({each} a parameter), {times} "
        "an H100's {device}: they have to be split {n} ways at least, before any activation.",
        held=held,
        each=each,
        times=held / device,
        device=device,
        n=int(-(-held.value // device.value)),
    )


def winner(families: dict[str, Run]) -> list[Said]:
    best = families[FREE]
    if not best.ledger["plans"]:
        return [say("No plan fits.")]
    plan = best.ledger["plans"][0]
    lost = {kind: part(best, 0, kind) for kind in ("exposed_communication", "bubble")}
    most = max(lost.values(), key=lambda share: share.value)
    hidden = (
        "what it sends is hidden behind the compute of {tokens:,} tokens a device and micro-batch"
        if most.value < HIDDEN
        else "{tokens:,} tokens a device and micro-batch do not hide what it sends"
    )
    tokens = plan["micro_batch_size"] * SEQ_LEN // (plan["layout"]["tp"] * plan["layout"]["cp"])
    return [
        say(
            "Of {n} plans on 512 H100 the fastest that fits is {words}: {how}. A step takes {time} "
            "(MFU {mfu}), and a device holds {memory}.",
            n=best.at("predicted", COUNT, "plans"),
            words=in_words(plan),
            how=described(plan),
            **headline(best, 0),
        ),
        say(
            "Why: of its step {exposed} is exposed communication and {bubble} bubble; {hidden}.",
            exposed=lost["exposed_communication"],
            bubble=lost["bubble"],
            hidden=hidden.format(tokens=tokens),
        ),
        *simplest_of(best),
    ]


def in_words(plan: dict[str, Any]) -> str:
    """The axes that a layout uses, by the names that people give them."""
    sizes = plan["layout"]
    shards = "FSDP" if plan["zero_stage"] == 3 else f"ZeRO-{plan['zero_stage']}"
    names = {
        "pp": "a pipeline of {n} stages",
        "tp": "tensor parallel {n}",
        "cp": "context parallel {n}",
        "dp_shard": shards + " over {n}",
        "dp_replicate": "{n} replicas",
    }
    return " x ".join(text.format(n=sizes[a]) for a, text in names.items() if sizes[a] > 1)


def others(families: dict[str, Run]) -> list[Said]:
    """Each family beside the winner, and what it loses by."""
    free = families[FREE]
    misses = [n for n, run in families.items() if not run.ledger["plans"]]
    said = []
    if misses:
        said.append(say(f"No plan of {' or '.join(misses)} fits at all, with any checkpointing."))
    slower = []
    for name, run in families.items():
        if name in (FREE, *misses):
            continue
        if run.ledger["plans"][0]["layout"] == free.ledger["plans"][0]["layout"]:
            continue  # it is the winner
        times = plan_number(run, 0, "time_s", "s") / plan_number(free, 0, "time_s", "s")
        losses = {
            kind: part_seconds(run, kind).value - part_seconds(free, kind).value
            for kind in ("compute", "exposed_communication", "bubble")
        }
        by = max(losses, key=lambda kind: losses[kind])
        where = f" ({by.replace('_', ' ')})" if times.value > 1.005 else ""
        slower.append(say("{n} {t}{w}", n=name, t=times, w=where))
    if slower:
        text = "The best of each other family takes, of that time: {all}. In brackets what most "
        text += "of the difference is."
        said.append(say(text, all=listed(slower)))
    return said


def part_seconds(run: Run, kind: str) -> Quantity:
    return plan_number(run, 0, f"time_parts.{kind}", "s")


def by_size(sizes: dict[str, Run]) -> list[Said]:
    """What the winner splits as model and cluster grow, and where the batch makes it split."""
    each, short = [], []
    for name, run in sizes.items():
        if not run.ledger["plans"]:
            each.append(say("{n}: nothing fits", n=name))
            continue
        plan = run.ledger["plans"][0]
        mfu = plan_number(run, 0, "mfu", SHARE)
        each.append(say("{n}: {w} (MFU {m})", n=name, w=in_words(plan), m=mfu))
        axes = plan["layout"]
        data = axes["dp_replicate"] * axes["dp_shard"]
        sequences = plan["micro_batch_size"] * plan["gradient_accumulation_steps"] * data
        devices = data * axes["pp"] * axes["tp"] * axes["cp"]
        if sequences < devices:
            text = f"{name} GPUs has {sequences:,} sequences a step, {sequences / devices:g} a GPU"
            short.append(text)
    said = [say("By size: {all}.", all=listed(each))]
    if short:
        text = "; ".join(short)
        said.append(
            say(
                "The batch decides too: {text}. Data parallelism gives each rank a sequence at "
                "least, so there tp, cp or pp must share the sequences out.",
                text=text,
            )
        )
    return said


def practice() -> Said:
    """What was run, and reached."""
    row = published_row("llama3-002")
    gpus, sequences = int(row["n_gpus"]), int(row["global_batch_seqs"])
    each = (
        f": {gpus / sequences:g} GPUs for each of its {sequences:,} sequences, so that tp, cp or "
        "pp had to share them out whatever the memory"
        if gpus > sequences
        else ""
    )
    return say(
        "What Meta ran for Llama 3 405B on {gpus:,} H100: tp{tp}, pp{pp}, the rest data parallel, "
        "with {flops} a GPU{each}.",
        gpus=gpus,
        each=each,
        tp=row["tp"],
        pp=row["pp"],
        flops=published(
            f"Llama 3 405B on {gpus:,} H100: FLOP/s of a GPU",
            1e12 * float(row["tflops_per_gpu"]),
            "FLOP/s",
            LLAMA3,
        ),
    )


def published_row(name: str) -> dict[str, str]:
    import csv

    from experiments.predict.score import ROWS

    with open(ROWS, newline="") as file:
        return next(row for row in csv.DictReader(file) if row["id"] == name)


def family_table(families: dict[str, Run]) -> Table:
    rows: list[list[Cell]] = []
    for name, run in families.items():
        if not run.ledger["plans"]:
            rows.append([name, "does not fit", *[None] * 6])
            continue
        rows.append([name, *cells_of(run, 0)])
    title = "Llama 3 70B on 512 H100, 4M tokens a step in sequences of 8,192"
    return Table(title, ["family", "its best", *HEAD[1:]], rows)


def size_table(sizes: dict[str, Run]) -> Table:
    rows: list[list[Cell]] = []
    for name, run in sizes.items():
        if run.ledger["plans"]:
            rows.append([name, *cells_of(run, 0)[:4]])
        else:
            rows.append([name, "does not fit", *[None] * 3])
    return Table("The best plan by size, on H100", ["size", "plan", *HEAD[1:4]], rows)
