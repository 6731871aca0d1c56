"""Bytes that leave a node for each way to lay devices over two nodes, and where they cross."""

from __future__ import annotations

from pathlib import Path

from experiments.ask.answer import Answer, Picture, Said, Table, listed, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import COUNT, Quantity, formula
from experiments.ask.runs import SECONDS, SHAPE, agreement, fits, on_laptop
from experiments.lab.node_bytes import leaving

QUESTION = "A pipeline that minimises communication between nodes: DDP, FSDP or tensor parallel?"
ORDER = 2
WORDS = "network bandwidth bytes ethernet infiniband inter node traffic slow interconnect pp hsdp"

# four ranks as two nodes of two, the same 16 sequences a step
FOUR: dict[str, tuple[str, ...]] = {
    "DDP over all": ("layout.dp_replicate=4", "micro_batch_size=4"),
    "FSDP over all": ("layout.dp_shard=4", "micro_batch_size=4"),
    "HSDP: FSDP in, DDP between": (
        "layout.dp_shard=2",
        "layout.dp_replicate=2",
        "micro_batch_size=4",
    ),
    "TP over all": ("layout.tp=4", "micro_batch_size=16"),
    "TP in, DDP between": ("layout.tp=2", "layout.dp_replicate=2", "micro_batch_size=8"),
    "TP in, PP between": (
        "layout.tp=2",
        "layout.pp=2",
        "micro_batch_size=4",
        "gradient_accumulation_steps=4",
    ),
}
# Llama 3 8B on two nodes of four H100, 64 sequences of 4,096 a step, bf16
LLAMA = ("model=llama3_8b", "cluster=h100", "cluster.node_size=4", "seq_len=4096")
FULL = "activation_checkpointing=full"
EIGHT: dict[str, tuple[str, ...]] = {
    "DDP over all": ("layout.dp_replicate=8", "gradient_accumulation_steps=8"),
    "FSDP over all": ("layout.dp_shard=8", "gradient_accumulation_steps=8"),
    "HSDP: FSDP in, DDP between": (
        "layout.dp_shard=4",
        "layout.dp_replicate=2",
        "gradient_accumulation_steps=8",
    ),
    "TP over all": ("layout.tp=8", "sequence_parallel=true", "gradient_accumulation_steps=64"),
    "TP in, DDP between": (
        "layout.tp=4",
        "sequence_parallel=true",
        "layout.dp_replicate=2",
        "gradient_accumulation_steps=32",
    ),
    "TP in, PP between": (
        "layout.tp=4",
        "sequence_parallel=true",
        "layout.pp=2",
        "gradient_accumulation_steps=64",
    ),
}
TOKENS = [2**n for n in range(12, 24)]  # of a step, for the crossing
SHOWN = ("DDP over all", "FSDP over all", "TP over all", "TP in, DDP between", "TP in, PP between")


def answer(evidence: Evidence) -> Answer:
    runs = {n: evidence.measured(n, *SHAPE, *keys, "steps=4") for n, keys in FOUR.items()}
    twins = [on_laptop(evidence, n, *SHAPE, *keys) for n, keys in FOUR.items()]
    eight = {n: simulated(evidence, n, keys) for n, keys in EIGHT.items()}
    here = {n: leaving(run, 2) for n, run in runs.items()}
    there = {n: leaving(run, 4) for n, run in eight.items()}
    return Answer(
        conclusion=[
            *least(there, eight),
            once(evidence),
            same_order(here, there, runs),
            crossing(evidence),
            seconds(evidence),
        ],
        tables=[table(here, runs, there, eight)],
        pictures=[picture(evidence)],
        carries_over=[
            *agreement(list(runs.values()), twins),
            say(
                "What decides: data parallelism sends by the parameters (and the micro-batches, "
                "where weights are gathered), tensor and pipeline parallelism by the tokens."
            ),
        ],
        does_not=[
            say(
                "The crossing: it lies where tokens x width x layers are as many as parameters, so "
                "a small model on few tokens has another order than a large one."
            ),
            SECONDS,
        ],
    )


def simulated(evidence: Evidence, name: str, keys: tuple[str, ...], *more: str) -> Run:
    return evidence.simulated(name, *LLAMA, FULL, "micro_batch_size=1", *keys, *more)


def least(there: dict[str, Quantity], eight: dict[str, Run]) -> list[Said]:
    """Who sends least between nodes, of all and of those that fit."""
    order = sorted(there, key=lambda name: there[name].value)
    fitting = [name for name in order if fits(eight[name])]
    three = [name for name in order if name.endswith("over all")]
    out = [say("{n} ({m})", n=n, m=eight[n].memory()) for n in three if n not in fitting]
    too_large = say(" Of these do not fit a device: {n}.", n=listed(out)) if out else Said("")
    said = [
        say(
            "Of the three, over all 8 H100 of two nodes, Llama 3 8B sends least between the nodes "
            "with {a} ({x} a step), then {b} ({y}), most with {c} ({z}).{too_large}",
            too_large=too_large,
            a=three[0],
            x=there[three[0]],
            b=three[1],
            y=there[three[1]],
            c=three[2],
            z=there[three[2]],
        )
    ]
    best = fitting[0] if fitting else order[0]
    other = "" if best == order[0] else f" ({order[0]} sends less, but does not fit)"
    said.append(
        say(
            "Best is to mix: {best} sends {x}{other}; {worst} sends {ratio} as much. What sends "
            "often stays in the node; what sends least goes between.",
            best=best,
            x=there[best],
            ratio=there[order[-1]] / there[best],
            worst=order[-1],
            other=other,
        )
    )
    return said


def once(evidence: Evidence) -> Said:
    """FSDP's bytes are those of its micro-batches."""
    name = "FSDP over all"
    many = leaving(simulated(evidence, name, EIGHT[name]), 4)
    one = leaving(simulated(evidence, name, (EIGHT[name][0], "gradient_accumulation_steps=1")), 4)
    ddp = leaving(simulated(evidence, "DDP over all", EIGHT["DDP over all"]), 4)
    return say(
        "FSDP gathers its weights again for each of 8 micro-batches; with a single one it sends "
        "{one}, {share} of what it sends with 8 and {times} DDP's, which sends as much either way.",
        one=one,
        share=(one / many).as_share(),
        times=one / ddp,
    )


def same_order(here: dict[str, Quantity], there: dict[str, Quantity], runs: dict[str, Run]) -> Said:
    own = sorted(here, key=lambda name: here[name].value)
    theirs = sorted(there, key=lambda name: there[name].value)
    same = own == theirs
    ledger = next(iter(runs.values())).ledger
    parameters, tokens = ledger["model"]["parameters"], ledger["step"]["tokens"]
    return say(
        "Measured on four ranks as two nodes of two, with {model}, the order {is_}: {all}.",
        model=f"{parameters / 1e6:.1f} million parameters and {tokens:,} tokens a step",
        is_="is the same" if same else "is another, for bytes scale with other things",
        all=listed([say("{n} {b}", n=name, b=here[name]) for name in own]),
    )


def crossing(evidence: Evidence) -> Said:
    """Tokens of a step from which tensor parallelism sends more than DDP, by the closed forms'
    slopes: DDP's bytes stand still, TP's are as many as the tokens."""
    ddp = leaving(simulated(evidence, "DDP over all", EIGHT["DDP over all"]), 4)
    tp_run = simulated(evidence, "TP over all", EIGHT["TP over all"])
    tp, tokens = leaving(tp_run, 4), tp_run.at("step.tokens", COUNT, "tokens")
    even = formula(
        "tokens where TP sends as much as DDP",
        ddp.value / tp.value * tokens.value,
        "tokens",
        f"{ddp.run}; {tp.run}",
        f"({tokens.where}) x DDP's bytes / TP's",
    )
    return say(
        "TP's bytes grow with the tokens and DDP's do not: they are equal at {even} a step. The "
        "{now} a step above are {relation} that.",
        even=even,
        now=tp_run.at("step.tokens", "tokens", "tokens of a step"),
        relation="more than" if tokens.value > even.value else "less than",
    )


def seconds(evidence: Evidence) -> Said:
    """Bytes are not time: on this network, and on one ten times slower."""
    said = []
    for network, change in (
        ("400 Gbit/s a GPU", ()),
        ("10 Gbit/s a GPU", ("cluster.between_nodes.bandwidth=1.25e9",)),
    ):
        runs = {n: simulated(evidence, n, keys, *change) for n, keys in EIGHT.items()}
        seconds_of = {n: r.seconds() for n, r in runs.items() if fits(r)}
        order = sorted(seconds_of, key=lambda name: seconds_of[name].value)
        said.append(
            say(
                "with {network} {best} is fastest ({a} a step), {worst} slowest ({b})",
                network=network,
                best=order[0],
                a=seconds_of[order[0]],
                worst=order[-1],
                b=seconds_of[order[-1]],
            )
        )
    return say(
        "Fewer bytes are less time only where the network is slow: of the plans that fit, "
        "{a}; {b}.",
        a=said[0],
        b=said[1],
    )


def table(
    here: dict[str, Quantity],
    runs: dict[str, Run],
    there: dict[str, Quantity],
    eight: dict[str, Run],
) -> Table:
    rows = [
        [name, here[name], runs[name].wire(), there[name], eight[name].wire(), eight[name].memory()]
        for name in here
    ]
    head = ["layout", "between, here", "a rank, here", "between, 8B", "a rank, 8B", "memory, 8B"]
    title = (
        "Bytes of a step on the wire, rings: between the nodes, all ranks together, and of one "
        "rank. Here: 4 ranks as 2 nodes. 8B: Llama 3 on 2 nodes of 4 H100"
    )
    return Table(title, head, rows)


def picture(evidence: Evidence) -> Picture:
    """Bytes between nodes against tokens of a step."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name in SHOWN:
        base = simulated(evidence, name, EIGHT[name])
        tokens = base.ledger["step"]["tokens"]
        each = base.ledger["config"]["gradient_accumulation_steps"]
        xs, ys = [], []
        for wanted in TOKENS:
            count = wanted * each // tokens
            if count < 1 or (base.ledger["layout"]["pp"] > 1 and count < 2):
                continue
            made = simulated(evidence, name, EIGHT[name], f"gradient_accumulation_steps={count}")
            xs.append(made.ledger["step"]["tokens"])
            ys.append(leaving(made, 4).value / 1e9)
        lines[name] = (xs, ys)

    def draw(path: Path) -> None:
        from experiments.ask import charts

        title = "Llama 3 8B on two nodes of four H100 (formula)"
        y = "GB between the nodes in a step"
        charts.draw(path, charts.Lines(title, "tokens of a step", y, lines, log_x=True, log_y=True))

    return Picture("between-nodes", "bytes between nodes against tokens", draw, str(lines))
