"""The same 16 sequences a step in 1, 2, 4 and 8 micro-batches, under DDP and FSDP, to the loss."""

from __future__ import annotations

from experiments.ask.answer import Answer, Said, Table, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import Quantity
from experiments.ask.runs import SECONDS, SHAPE, agreement, on_laptop

QUESTION = "What does accumulation change in communication, memory and loss?"
ORDER = 7
WORDS = "gradient accumulation micro batches no_sync batch size mean of means global"

COUNTS = (1, 2, 4, 8)  # micro-batches of a step
STEPS = "steps=20"
AXES = {"DDP": "dp_replicate", "FSDP": "dp_shard"}
# FSDP that scatters the gradients of each micro-batch, and keeps no whole ones
EACH = "FSDP, each"
LLAMA = ("model=llama3_8b", "cluster=h100", "seq_len=4096")


def answer(evidence: Evidence) -> Answer:
    wanted = [(k, n) for k in (*AXES, EACH) for n in COUNTS if k != EACH or n > 1]
    runs = {key: measured(evidence, *key) for key in wanted}
    twins = [on_laptop(evidence, run.name, *keys_of(*key)) for key, run in runs.items()]
    large = {key: simulated(evidence, *key) for key in wanted}
    return Answer(
        conclusion=[
            *communication(runs),
            memory(runs),
            scattering_each(runs, large),
            loss(runs),
            time(large),
        ],
        tables=[
            table("Two ranks, 16 sequences of 128 a step", runs, losses=True),
            table("Llama 3 8B on 8 H100, 64 sequences of 4,096 a step", large, losses=False),
        ],
        carries_over=[
            *agreement(list(runs.values()), twins),
            say(
                "The loss: a step over the same sequences is the same mathematics, however it is "
                "cut. What is left are rounding differences of sums in another order."
            ),
        ],
        does_not=[
            say(
                "What smaller micro-batches cost in speed: on a GPU small products fill the device "
                "less, and FSDP has fewer tokens behind which to hide its messages."
            ),
            SECONDS,
        ],
    )


def batch(count: int) -> tuple[str, ...]:
    """Eight sequences of a rank in so many micro-batches."""
    return (f"micro_batch_size={8 // count}", f"gradient_accumulation_steps={count}")


def strategy(kind: str, ranks: int) -> tuple[str, ...]:
    if kind == EACH:
        return (*strategy("FSDP", ranks), "gradient_sync=micro_batch")
    return (f"layout.{AXES[kind]}={ranks}",)


def keys_of(kind: str, count: int) -> tuple[str, ...]:
    return (*SHAPE, *strategy(kind, 2), *batch(count))


def measured(evidence: Evidence, kind: str, count: int) -> Run:
    return evidence.measured(f"{kind}, {count}", *keys_of(kind, count), STEPS)


def simulated(evidence: Evidence, kind: str, count: int) -> Run:
    keys = (*strategy(kind, 8), *batch(count), "activation_checkpointing=full")
    return evidence.simulated(f"8B {kind}, {count}", *LLAMA, *keys)


def grew(runs: dict[tuple[str, int], Run], kind: str) -> Quantity:
    return runs[kind, COUNTS[-1]].wire() / runs[kind, COUNTS[0]].wire()


def communication(runs: dict[tuple[str, int], Run]) -> list[Said]:
    said = []
    for kind in AXES:
        times = grew(runs, kind)
        if abs(times.value - 1) < 0.01:
            text = "{kind} sends as much with {n} micro-batches as with one ({bytes} a rank and "
            text += "step): gradients are added up here and sent once."
        else:
            text = "{kind} sends {times} as much with {n} micro-batches ({bytes} a rank and step): "
            text += "weights are gathered again for each; gradients are scattered once."
        bytes_sent = runs[kind, COUNTS[-1]].wire()
        said.append(say(text, kind=kind, n=COUNTS[-1], bytes=bytes_sent, times=times))
    return said


def memory(runs: dict[tuple[str, int], Run]) -> Said:
    """Which parts fall and which rise."""
    one, many = runs["DDP", COUNTS[0]], runs["DDP", COUNTS[-1]]
    activations = many.memory("activations") / one.memory("activations")
    extra = many.memory("gradients") - one.memory("gradients")
    also = say("gradients take no more than before")
    if extra.value > 0:
        text = "gradients, which now stay from one micro-batch to the next, add {more}"
        also = say(text, more=extra)
    return say(
        "Activations fall to {a} of those of one micro-batch ({x} for {y}); {also}; the peak goes "
        "from {before} to {after}.",
        a=activations.as_share(),
        x=many.memory("activations"),
        y=one.memory("activations"),
        also=also,
        before=one.memory(),
        after=many.memory(),
    )


def scattering_each(runs: dict[tuple[str, int], Run], large: dict[tuple[str, int], Run]) -> Said:
    """What FSDP gains and pays by gradient_sync=micro_batch, here and for Llama 3 8B."""
    most = COUNTS[-1]
    once, each = runs["FSDP", most], runs[EACH, most]
    large_once, large_each = large["FSDP", most], large[EACH, most]
    return say(
        "With gradient_sync=micro_batch FSDP keeps shards of gradients from one micro-batch to the "
        "next, and no whole ones: with {n} the peak is {after} for {before} here, and it sends "
        "{more} as much; {large_after} for {large_before} and {large_more} for Llama 3 8B.",
        n=most,
        after=each.memory(),
        before=once.memory(),
        more=each.wire() / once.wire(),
        large_after=large_each.memory(),
        large_before=large_once.memory(),
        large_more=large_each.wire() / large_once.wire(),
    )


def loss(runs: dict[tuple[str, int], Run]) -> Said:
    """The largest difference to one micro-batch, over all steps."""
    alone = {kind: runs["FSDP" if kind == EACH else kind, 1] for kind, _ in runs}
    differences = {key: apart(run, alone[key[0]]) for key, run in runs.items() if key[1] > 1}
    worst = max(differences.values(), key=lambda q: q.value)
    last = runs["DDP", 1].at("training.losses[-1]", "nats", "last loss")
    same = "the same curve" if worst.value < 1e-4 else "another curve"
    return say(
        "The loss is {same}: over {n} steps no run is further than {worst} from the one with a "
        "single micro-batch (last loss {last}). Divide by the valid tokens of the whole batch; a "
        "mean of the micro-batches' means is wrong as soon as they differ in length.",
        same=same,
        n=len(runs["DDP", 1].losses),
        worst=worst,
        last=last,
    )


def apart(run: Run, other: Run) -> Quantity:
    """Largest difference of two loss curves."""
    pairs = list(zip(run.losses, other.losses, strict=True))
    step = max(range(len(pairs)), key=lambda i: abs(pairs[i][0] - pairs[i][1]))
    a, b = (r.at(f"training.losses[{step}]", "nats", f"loss of step {step}") for r in (run, other))
    return a.apart(b)


def time(large: dict[tuple[str, int], Run]) -> Said:
    ddp, fsdp = (
        large[kind, COUNTS[-1]].seconds() / large[kind, COUNTS[0]].seconds() for kind in AXES
    )
    return say(
        "In time, by formula for Llama 3 8B on 8 H100: {n} micro-batches of one sequence take "
        "{ddp} the step of one of {n} under DDP, {fsdp} under FSDP.",
        n=COUNTS[-1],
        ddp=ddp,
        fsdp=fsdp,
    )


def table(title: str, runs: dict[tuple[str, int], Run], losses: bool) -> Table:
    rows = []
    for (kind, count), run in runs.items():
        row = [
            kind,
            str(count),
            run.wire(),
            run.memory(),
            run.memory("activations"),
            run.memory("gradients"),
            run.seconds(),
        ]
        if losses:
            last = len(run.losses) - 1
            row.append(run.at(f"training.losses[{last}]", "nats", "last loss"))
        rows.append(row)
    head = ["strategy", "m", "sent", "peak", "activations", "gradients", "step"]
    return Table(title, [*head, *(["last loss"] if losses else [])], rows)
