"""The table that textbooks print in words, with numbers: measured on two ranks, and by formula."""

from __future__ import annotations

from dataclasses import replace

from experiments.ask.answer import Answer, Said, Table, listed, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import COUNT, Quantity, formula
from experiments.ask.runs import (
    SECONDS,
    SHAPE,
    STRATEGIES,
    agreement,
    fits,
    h100_memory,
    on_laptop,
    share_of_step,
    states,
    strategy,
)

QUESTION = (
    "The textbook's table (DDP, FSDP, TP, PP: what is split, memory saved, communication, best "
    "used when), each cell with its number."
)
ORDER = 3
WORDS = "compare strategies zero sharding tensor pipeline context parallel summary cheat sheet"

SPLIT = {
    "one process": "nothing",
    "DDP": "the batch",
    "ZeRO-1": "and the optimizer's state",
    "ZeRO-2": "and gradients, weights between steps",
    "FSDP (ZeRO-3)": "and weights between forward and backward",
    "TP": "width of each block, vocabulary",
    "TP + sequence": "and what lies between, by tokens",
    "PP (1F1B)": "depth",
    "CP (ring)": "the sequence",
}
SHARED = ("parameters", "optimizer", "activations")
# Llama 3 8B, 64 sequences of 4,096 a step, on 8 H100 of one node and on 8 nodes of one each
LLAMA = ("model=llama3_8b", "cluster=h100", "seq_len=4096", "activation_checkpointing=full")
APART = "cluster.node_size=1"
EIGHT = {
    "DDP": ("layout.dp_replicate=8", "micro_batch_size=1", "gradient_accumulation_steps=8"),
    "ZeRO-2": (
        "layout.dp_shard=8",
        "zero_stage=2",
        "micro_batch_size=1",
        "gradient_accumulation_steps=8",
    ),
    "FSDP (ZeRO-3)": ("layout.dp_shard=8", "micro_batch_size=1", "gradient_accumulation_steps=8"),
    "TP + sequence": (
        "layout.tp=8",
        "sequence_parallel=true",
        "micro_batch_size=1",
        "gradient_accumulation_steps=64",
    ),
    "PP (1F1B)": ("layout.pp=8", "micro_batch_size=1", "gradient_accumulation_steps=64"),
    "CP (ring)": ("layout.cp=8", "micro_batch_size=1", "gradient_accumulation_steps=64"),
}
CLOSE = 1.1  # a plan that takes no more than this times the fastest is as good
BYTES_OF_A_PARAMETER = 16.0  # fp32 weight, gradient, two moments


def answer(evidence: Evidence) -> Answer:
    runs = {name: strategy(evidence, name) for name in STRATEGIES}
    twins = [on_laptop(evidence, n, *SHAPE, *keys) for n, keys in STRATEGIES.items()]
    near = {n: evidence.simulated(f"8B {n}", *LLAMA, *keys) for n, keys in EIGHT.items()}
    far = {
        n: evidence.simulated(f"8B {n}, 8 nodes", *LLAMA, *keys, APART) for n, keys in EIGHT.items()
    }
    return Answer(
        conclusion=[
            *best_when(near, far),
            memory_order(runs),
            *at_the_peak(runs),
            bytes_order(runs),
        ],
        tables=[measured_table(runs), simulated_table(near, far), best_table(evidence, near, far)],
        carries_over=agreement(list(runs.values()), twins),
        does_not=[
            say(
                "The order of the bytes: DDP and FSDP send by the parameters, TP, PP and CP by the "
                "tokens, and this model is {p} on {t} tokens a step.",
                p=runs["DDP"].at("model.parameters", "parameters", "parameters"),
                t=runs["DDP"].at("step.tokens", COUNT, "tokens"),
            ),
            SECONDS,
        ],
    )


def memory_order(runs: dict[str, Run]) -> Said:
    alone = runs["one process"]
    others = [run for name, run in runs.items() if name != "one process"]
    least = min(others, key=lambda run: run.memory().value)
    most = max(others, key=lambda run: run.memory().value)
    return say(
        "Measured on two ranks with the same 16 sequences a step, {least} holds least ({a} of one "
        "process's {whole}) and {most} most ({b}).",
        least=least.name,
        a=(least.memory() / alone.memory()).as_share(),
        whole=alone.memory(),
        most=most.name,
        b=(most.memory() / alone.memory()).as_share(),
    )


def at_the_peak(runs: dict[str, Run]) -> list[Said]:
    """Why the gradients of a table of peaks may be few."""
    alone, ddp, pp = (runs[n].memory("gradients") for n in ("one process", "DDP", "PP (1F1B)"))
    if alone.value >= min(ddp.value, pp.value):
        return []
    return [
        say(
            "A rank is fullest when a backward begins, before its gradients are there ({alone} in "
            "one process): they are there where a buffer for them stays (DDP's buckets, {ddp}) or "
            "an earlier micro-batch has left its own (PP, {pp}).",
            alone=alone,
            ddp=ddp,
            pp=pp,
        )
    ]


def bytes_order(runs: dict[str, Run]) -> Said:
    """Who sends how many times DDP's bytes."""
    ddp = runs["DDP"].wire()
    sent = {n: run.wire() / ddp for n, run in runs.items() if n not in ("one process", "DDP")}
    order = sorted(sent, key=lambda name: sent[name].value)
    return say(
        "What a rank sends in a step, in DDP's {ddp}: {all}. An all_reduce is a reduce_scatter "
        "and an all_gather: ZeRO-2 sends the two apart, and ZeRO-3 gathers once more, for the "
        "backward.",
        ddp=ddp,
        all=listed([say("{n} {r}", n=name, r=sent[name]) for name in order]),
    )


def best_when(near: dict[str, Run], far: dict[str, Run]) -> list[Said]:
    """What the formulas say of Llama 3 8B: who fits, and who is fastest in a node and across."""
    ddp = near["DDP"]
    most = most_parameters(ddp)
    said = [
        say(
            "DDP while everything fits each device: {each:g} bytes a parameter make {most} "
            "on an H100 before any activation; 8B in DDP takes {peak}, {fits} {limit}.",
            each=BYTES_OF_A_PARAMETER,
            most=most,
            peak=ddp.memory(),
            fits="within" if fits(ddp) else "more than",
            limit=h100_memory(ddp),
        )
    ]
    for where, runs in (("In one node", near), ("On 8 nodes of one H100 each", far)):
        fitting = {n: r for n, r in runs.items() if fits(r)}
        order = sorted(fitting, key=lambda name: fitting[name].seconds().value)
        best = fitting[order[0]].seconds()
        as_good = [n for n in order[1:] if fitting[n].seconds().value <= CLOSE * best.value]
        slowest = fitting[order[-1]].seconds()
        also = f" ({' and '.join(as_good)} within {100 * (CLOSE - 1):.0f} %)" if as_good else ""
        said.append(
            say(
                "{where} the fastest that fits is {name}{also} with {best} a step; {last} takes "
                "{times} as long.",
                where=where,
                name=order[0],
                also=also,
                best=best,
                last=order[-1],
                times=slowest / best,
            )
        )
    slower = {n: far[n].seconds() / near[n].seconds() for n in near}
    worst, least = (
        max(slower, key=lambda n: slower[n].value),
        min(slower, key=lambda n: slower[n].value),
    )
    said.append(
        say(
            "Leaving the node hurts {worst} most ({a}) and {least} least ({b}): the first wants "
            "the node's network, the second may go between nodes.",
            worst=worst,
            a=slower[worst],
            least=least,
            b=slower[least],
        )
    )
    return said


def most_parameters(ddp: Run) -> Quantity:
    """What fits one device without any activation, in fp32 with AdamW."""
    each = formula("fp32 weight, gradient, two moments", BYTES_OF_A_PARAMETER, "B", "4 x 4 bytes")
    ratio = h100_memory(ddp) / each
    return replace(ratio, unit="parameters", label="parameters that fit one H100")


def best_table(evidence: Evidence, near: dict[str, Run], far: dict[str, Run]) -> Table:
    """When each is the one to take, with the number that says so."""
    large = evidence.simulated("70B", "model=llama3_70b", "cluster=h100", "layout.dp_replicate=8")
    slower = {name: far[name].seconds() / near[name].seconds() for name in near}
    ddp, tp, pp = near["DDP"], near["TP + sequence"], near["PP (1F1B)"]
    optimizer = (ddp.memory("optimizer") / ddp.memory()).as_share()
    when = {
        "DDP": say("all states fit a device: up to {n} on an H100", n=most_parameters(ddp)),
        "ZeRO-2": say(
            "the model fits but its optimizer does not: {o} of DDP's peak for 8B; {t} a step in "
            "the node, DDP's {d}",
            o=optimizer,
            t=near["ZeRO-2"].seconds(),
            d=ddp.seconds(),
        ),
        "FSDP (ZeRO-3)": say(
            "the model does not fit, and the network hides its gathers: 70B's states are {n} "
            "H100's memory; leaving the node costs {s}",
            n=states(large) / h100_memory(ddp),
            s=slower["FSDP (ZeRO-3)"],
        ),
        "TP + sequence": say(
            "a layer or its activations are too large, within a node: it holds {m} of DDP's "
            "activations, and leaving the node costs {s}",
            m=(tp.memory("activations") / ddp.memory("activations")).as_share(),
            s=slower["TP + sequence"],
        ),
        "PP (1F1B)": say(
            "the network between nodes is slow and micro-batches are many: it sends {b} of FSDP's "
            "bytes, and idles {i} of the step with 64 of them",
            b=(pp.wire() / near["FSDP (ZeRO-3)"].wire()).as_share(),
            i=share_of_step(pp, "bubble"),
        ),
        "CP (ring)": say(
            "sequences are long: activations are {a} of DDP's, while its states are not cut "
            "({m} a device)",
            a=(near["CP (ring)"].memory("activations") / ddp.memory("activations")).as_share(),
            m=near["CP (ring)"].memory(),
        ),
    }
    rows = [[name, said] for name, said in when.items()]
    return Table("Best used when (Llama 3 8B on 8 H100, as above)", ["strategy", "when"], rows)


def held(run: Run, alone: Run, part: str) -> Quantity:
    """A rank's part of what one process holds."""
    return (run.memory(part) / alone.memory(part)).as_share().named(f"{run.name}: {part} held")


def measured_table(runs: dict[str, Run]) -> Table:
    alone = runs["one process"]
    rows = [
        [
            name,
            SPLIT[name],
            *[held(run, alone, part) for part in SHARED],
            run.memory("gradients"),
            ((alone.memory() - run.memory()) / alone.memory()).as_share(),
            run.wire(),
        ]
        for name, run in runs.items()
    ]
    head = ["strategy", "splits", "weights", "optim.", "activ.", "gradients", "saved", "sent"]
    title = (
        "Two ranks, 16 sequences a step: what a rank holds of one process's when it is fullest, "
        "and sends in a step"
    )
    return Table(title, head, rows)


def simulated_table(near: dict[str, Run], far: dict[str, Run]) -> Table:
    rows = []
    for name, run in near.items():
        other = far[name]
        exposed = [share_of_step(r, "exposed_communication") for r in (run, other)]
        rows.append(
            [
                name,
                run.memory(),
                run.wire(),
                run.seconds(),
                exposed[0],
                share_of_step(run, "bubble"),
                other.seconds(),
                exposed[1],
            ]
        )
    head = ["strategy", "memory", "wire", "node", "exposed", "bubble", "8 nodes", "exposed"]
    title = (
        "Llama 3 8B, bf16, full checkpointing, 64 sequences of 4,096 a step: on 8 H100 of one "
        "node, and of 8 nodes"
    )
    return Table(title, head, rows)
