"""FSDP beside DDP by tokens and network; tensor parallelism in a node and out of it."""

from __future__ import annotations

from pathlib import Path

from experiments.ask.answer import Answer, Picture, Said, Table, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import Quantity
from experiments.ask.runs import (
    SECONDS,
    SHAPE,
    TWELVE_STEPS,
    agreement,
    fits,
    on_laptop,
    share_of_step,
)

QUESTION = (
    "When does FSDP's extra communication cost time? When does tensor parallel have to stay in "
    "the node?"
)
ORDER = 5
WORDS = "slower than ddp exposed overlap network nvlink zero3 sharding hide prefetch across tp fsdp"

AXES = {"DDP": "dp_replicate", "FSDP": "dp_shard"}
BATCHES = (1, 4, 16)  # sequences of a rank, measured
TOKENS = (512, 1024, 2048, 4096, 8192)  # of a rank and micro-batch
NETWORKS = {  # between nodes, bytes/s of a GPU
    "400 Gbit/s": 5.0e10,
    "100 Gbit/s": 1.25e10,
    "25 Gbit/s": 3.125e9,
}
COUNT = 8  # micro-batches, by formula
NOTICED = 0.05  # of a step: more than that is a cost
NODES = (8, 4, 2)  # H100 of a node, over which eight ranks of tp are laid


def answer(evidence: Evidence) -> Answer:
    measured = {
        (kind, size): evidence.measured(
            f"{kind}, {size} a rank", *keys_of((kind, size)), TWELVE_STEPS
        )
        for kind in AXES
        for size in BATCHES
    }
    twins = [on_laptop(evidence, run.name, *keys_of(key)) for key, run in measured.items()]
    curves = {name: curve(evidence, rate) for name, rate in NETWORKS.items()}
    tensor = {n: tensor_runs(evidence, n) for n in NODES}
    return Answer(
        conclusion=[
            *sharded(curves),
            more_bytes(measured),
            low_bytes(evidence),
            here(measured),
            *tensor_in_node(tensor),
        ],
        tables=[measured_table(measured), curve_table(curves), tensor_table(tensor)],
        pictures=[picture(curves)],
        carries_over=[
            *agreement(list(measured.values()), twins),
            say(
                "The shape of it: FSDP's bytes are those of the weights, whatever the batch, so "
                "time to hide them grows with the tokens of a micro-batch."
            ),
        ],
        does_not=[
            say(
                "The threshold: it is where compute of a block takes as long as its messages, and "
                "both are the device's. gloo's messages are worked on by the cores that compute, "
                "so here they are hidden least."
            ),
            SECONDS,
        ],
    )


def keys_of(key: tuple[str, int]) -> tuple[str, ...]:
    kind, size = key
    return (*SHAPE, f"layout.{AXES[kind]}=2", f"micro_batch_size={size}")


def llama(tokens: int) -> tuple[str, ...]:
    """Llama 3 8B on H100, with sequences of so many."""
    full = "activation_checkpointing=full"
    return ("model=llama3_8b", "cluster=h100", f"seq_len={tokens}", full)


def curve(evidence: Evidence, rate: float) -> dict[int, tuple[Run, Run]]:
    """(FSDP, DDP) by tokens of a micro-batch, on 64 H100. DDP does not fit, but its seconds are
    known."""
    network = f"cluster.between_nodes.bandwidth={rate:g}"
    return {tokens: both(evidence, tokens, COUNT, network) for tokens in TOKENS}


def both(evidence: Evidence, tokens: int, count: int, *more: str) -> tuple[Run, Run]:
    batch = ("micro_batch_size=1", f"gradient_accumulation_steps={count}")
    keys = (*llama(tokens), *more, *batch)
    return (
        evidence.simulated(f"FSDP, {tokens} tokens", *keys, "layout.dp_shard=64"),
        evidence.simulated(f"DDP, {tokens} tokens", *keys, "layout.dp_replicate=64"),
    )


def extra(pair: tuple[Run, Run]) -> Quantity:
    """How many times DDP's step FSDP's takes."""
    fsdp, ddp = pair
    return fsdp.seconds() / ddp.seconds()


def exposed(run: Run) -> Quantity:
    return share_of_step(run, "exposed_communication")


def sharded(curves: dict[str, dict[int, tuple[Run, Run]]]) -> list[Said]:
    """From how many tokens on FSDP's messages are hidden, network by network."""
    said = []
    for network, pairs in curves.items():
        hidden = [t for t, pair in pairs.items() if exposed(pair[0]).value <= NOTICED]
        enough = next((t for t in TOKENS if all(u in hidden for u in TOKENS if u >= t)), None)
        verdict = say("at none of these is it below {n:.0%}", n=NOTICED)
        if enough is not None:
            least = pairs[enough][0].at("config.seq_len", "tokens", "tokens of a micro-batch")
            verdict = say("it is below {n:.0%} from {least} on", n=NOTICED, least=least)
        few, many = pairs[TOKENS[0]], pairs[TOKENS[-1]]
        said.append(
            say(
                "Llama 3 8B on 64 H100, {network} a GPU between nodes, {m} micro-batches: FSDP's "
                "messages are exposed for {few} of the step with {a:,} tokens a micro-batch and "
                "for {many} with {b:,}; {verdict}. Its step takes {x} and {y} that of DDP, "
                "{ddp}.",
                network=network,
                m=COUNT,
                few=exposed(few[0]),
                a=TOKENS[0],
                many=exposed(many[0]),
                b=TOKENS[-1],
                verdict=verdict,
                x=extra(few),
                y=extra(many),
                ddp=if_it_fitted(many[1]),
            )
        )
    return said


def if_it_fitted(ddp: Run) -> Said:
    """DDP's seconds are known whether or not its memory is there."""
    text = "which fits" if fits(ddp) else "which would need {m} a device and does not fit"
    return say(text, m=ddp.memory())


def low_bytes(evidence: Evidence) -> Said:
    """In bf16 weights travel in two bytes, gradients in four."""
    one, many = (both(evidence, TOKENS[-1], count) for count in (1, COUNT))
    return say(
        "In bf16 the weights that are gathered take two bytes and gradients four: with one "
        "micro-batch FSDP sends {one} DDP's bytes, with {m} it sends {many}, for DDP adds "
        "gradients up and sends them once.",
        one=one[0].wire() / one[1].wire(),
        m=COUNT,
        many=many[0].wire() / many[1].wire(),
    )


def more_bytes(measured: dict[tuple[str, int], Run]) -> Said:
    size = BATCHES[-1]
    ring = measured["FSDP", size].wire() / measured["DDP", size].wire()
    return say(
        "In fp32 it sends {ring} DDP's bytes, measured (an all_gather for the forward, one for the "
        "backward, a reduce_scatter; DDP's all_reduce is two of such).",
        ring=ring,
    )


def here(measured: dict[tuple[str, int], Run]) -> Said:
    few, many = BATCHES[0], BATCHES[-1]
    a, b = (extra((measured["FSDP", n], measured["DDP", n])) for n in (few, many))
    if b.value < a.value:
        trend = "the extra shrinks with the batch here too"
    else:
        trend = "the extra did not shrink with the batch here, where nothing is hidden"
    return say(
        "Measured on two ranks FSDP's step takes {a} DDP's with {few} sequence a rank and {b} with "
        "{many}: {trend}.",
        a=a,
        few=few,
        b=b,
        many=many,
        trend=trend,
    )


def tensor_runs(evidence: Evidence, node: int) -> tuple[Run, Run]:
    """(tp=8, tp=node) of Llama 3 8B on eight H100 in nodes of `node`; the rest is data parallel."""
    keys = (
        *llama(4096),
        f"cluster.node_size={node}",
        "micro_batch_size=1",
        "sequence_parallel=true",
    )
    whole = evidence.simulated(
        f"tp8 over nodes of {node}", *keys, "layout.tp=8", "gradient_accumulation_steps=32"
    )
    inside = evidence.simulated(
        f"tp{node} in nodes of {node}",
        *keys,
        f"layout.tp={node}",
        f"layout.dp_shard={8 // node}",
        f"gradient_accumulation_steps={32 * node // 8}",
    )
    return whole, inside


def tensor_in_node(tensor: dict[int, tuple[Run, Run]]) -> list[Said]:
    inside = tensor[8][0]
    said = []
    for node in NODES[1:]:
        whole, kept = tensor[node]
        slower = whole.seconds() / inside.seconds()
        better = kept.seconds().value < whole.seconds().value
        said.append(
            say(
                "Eight ranks of tp over nodes of {node} take {slower} the step that they take in "
                "one node of 8 (exposed {a} of it, for {b}); {verdict}",
                node=node,
                slower=slower,
                a=exposed(whole),
                b=exposed(inside),
                verdict=say(
                    "tp={node} in the node and FSDP between takes {t}: it {must} stay inside.",
                    node=node,
                    t=kept.seconds() / inside.seconds(),
                    must="has to" if better else "need not",
                ),
            )
        )
    messages = inside.at("step.communication[axis=tp].payload_bytes", "B", "payload over tp")
    weights = tensor[4][1].at(
        "step.communication[axis=dp_shard].payload_bytes", "B", "payload over dp_shard"
    )
    said.append(
        say(
            "For tp hands over more: {tp} a step and rank over tp=8, where FSDP between two nodes "
            "of tp=4 hands over {fsdp}.",
            tp=messages,
            fsdp=weights,
        )
    )
    return said


def measured_table(measured: dict[tuple[str, int], Run]) -> Table:
    rows = []
    for size in BATCHES:
        for kind in AXES:
            run = measured[kind, size]
            rows.append([f"{kind}, {size}", run.wire(), run.seconds(), exposed(run), run.speed])
    head = ["strategy, sequences a rank", "wire", "step", "exposed", "speed"]
    return Table("Two ranks of this machine, sequences of 128", head, rows)


def curve_table(curves: dict[str, dict[int, tuple[Run, Run]]]) -> Table:
    rows = []
    for tokens in TOKENS:
        pairs = [pairs[tokens] for pairs in curves.values()]
        numbers = [n for pair in pairs for n in (extra(pair), exposed(pair[0]))]
        rows.append([f"{tokens:,}", *numbers])
    heads = [name for network in curves for name in (network, "exposed")]
    title = "Llama 3 8B on 64 H100: FSDP's step in DDP's, by tokens of a micro-batch and network"
    return Table(title, ["tokens", *heads], rows)


def tensor_table(tensor: dict[int, tuple[Run, Run]]) -> Table:
    rows = []
    for node, (whole, kept) in tensor.items():
        rows.append([f"tp8, nodes of {node}", whole.seconds(), exposed(whole), whole.mfu])
        if node < 8:
            name = f"tp{node} x dp_shard{8 // node}, nodes of {node}"
            rows.append([name, kept.seconds(), exposed(kept), kept.mfu])
    title = "Llama 3 8B on eight H100, 32 sequences of 4,096 a step: tp in and out of the node"
    return Table(title, ["layout", "step", "exposed", "MFU"], rows)


def picture(curves: dict[str, dict[int, tuple[Run, Run]]]) -> Picture:
    lines = {
        network: (list(pairs), [100 * exposed(pair[0]).value for pair in pairs.values()])
        for network, pairs in curves.items()
    }

    def draw(path: Path) -> None:
        from experiments.ask import charts

        what = "exposed communication of FSDP: Llama 3 8B on 64 H100 (formula)"
        axis = "tokens of a micro-batch"
        charts.draw(path, charts.Lines(what, axis, "per cent of the step", lines, log_x=True))

    return Picture("fsdp-cost", "exposed communication of FSDP", draw, str(lines))
