"""fp32, bf16 and fp16 side by side, runs that are made to fail, and the guard that catches each."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from experiments.ask.answer import Answer, Picture, Said, Table, listed, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import COUNT, Quantity, mean
from experiments.ask.runs import SECONDS, agreement, on_laptop, states

QUESTION = (
    "bf16, fp16, fp32: memory, speed, stability. Why does a loss go NaN, and which guard catches "
    "it?"
)
ORDER = 8
WORDS = "nan inf diverge mixed precision half loss scaler overflow clipping learning rate unstable"

KINDS = ("fp32", "bf16", "fp16")
# real text, long enough for a curve; small, for a processor multiplies fp16 slowly
SHAPE = (
    "strategy=single",
    "data=stdlib",
    "model.n_layer=2",
    "model.d_model=64",
    "model.context=64",
    "micro_batch_size=8",
    "steps=80",
)
WILD = "optimizer.lr=10"  # thousands of times what trains
# what is done -> keys: each meets another guard
TRIALS: dict[str, tuple[str, ...]] = {
    "lr 10, clipped at 1": (WILD,),
    "fp16, lr 10, clipped at 1": (WILD, "precision=fp16"),
    "lr 10, not clipped": (WILD, "clip=null"),
    "lr 1000, not clipped": ("optimizer.lr=1000", "clip=null"),
    "lr 1000, not clipped, nonfinite=skip": (
        "optimizer.lr=1000",
        "clip=null",
        "nonfinite=skip",
    ),
    "SGD at lr 10, not clipped": (WILD, "clip=null", "optimizer.name=sgd"),
    "fp16, SGD at lr 10, not clipped": (
        WILD,
        "clip=null",
        "optimizer.name=sgd",
        "precision=fp16",
    ),
}
ALIKE = 0.02  # of the loss
UNKNOWN = "no finite loss"
LLAMA = (
    "model=llama3_8b",
    "cluster=h100",
    "seq_len=4096",
    "layout.dp_shard=8",
    "micro_batch_size=1",
)
LAST_LOSSES = "mean loss of the last ten steps"


def answer(evidence: Evidence) -> Answer:
    runs = {kind: evidence.measured(kind, *SHAPE, f"precision={kind}") for kind in KINDS}
    trials = {n: evidence.attempted(n, *SHAPE, *keys) for n, keys in TRIALS.items()}
    large = {k: evidence.simulated(f"8B {k}", *LLAMA, f"precision={k}") for k in KINDS}
    twin = on_laptop(evidence, "fp32", *SHAPE)
    return Answer(
        conclusion=[
            *memory_and_speed(runs, large),
            stability(runs),
            scaler(runs),
            *guards(trials),
        ],
        tables=[measured_table(runs), large_table(large), trial_table(trials)],
        pictures=[picture(runs, trials)],
        carries_over=[
            *agreement([runs["fp32"]], [twin]),
            say(
                "Range and grain: fp16 ends at 65,504 and needs a loss scaler, bf16 has fp32's "
                "range with 8 bits of grain. They are the formats', not the machine's."
            ),
        ],
        does_not=[
            say(
                "The speed of the low precisions: it is that of the units a device has for them. "
                "Here bf16 takes {bf16} of fp32's step and fp16 {fp16}; by formula bf16 on H100 "
                "{there}.",
                bf16=(runs["bf16"].seconds() / runs["fp32"].seconds()).as_share(),
                fp16=(runs["fp16"].seconds() / runs["fp32"].seconds()).as_share(),
                there=(large["bf16"].seconds() / large["fp32"].seconds()).as_share(),
            ),
            SECONDS,
        ],
    )


def memory_and_speed(runs: dict[str, Run], large: dict[str, Run]) -> list[Said]:
    """What a low precision saves here and there."""
    said = []
    for where, of in (("here", runs), ("for Llama 3 8B with FSDP on 8 H100", large)):
        said.append(
            say(
                "Memory {where}: bf16 holds {peak} of fp32's peak, for activations are {a} of it "
                "and weights, gradients and moments stay {s}.",
                where=where,
                peak=(of["bf16"].memory() / of["fp32"].memory()).as_share(),
                a=(of["bf16"].memory("activations") / of["fp32"].memory("activations")).as_share(),
                s=(states(of["bf16"]) / states(of["fp32"])).as_share(),
            )
        )
    order = sorted(KINDS, key=lambda kind: runs[kind].seconds().value)
    said.append(
        say(
            "Speed here: {first} is fastest and {last} slowest ({ratio}). On H100 bf16 makes the "
            "step {there} as fast.",
            first=order[0],
            last=order[-1],
            ratio=runs[order[-1]].seconds() / runs[order[0]].seconds(),
            there=large["fp32"].seconds() / large["bf16"].seconds(),
        )
    )
    return said


def mean_last_losses(run: Run) -> Quantity | None:
    """The mean of the last ten steps, of those that had a finite one."""
    count = len(run.losses)
    finite = [i for i in range(count - 10, count) if run.losses[i] is not None]
    if not finite:
        return None
    each = [run.at(f"training.losses[{i}]", "nats", "loss") for i in finite]
    return mean(f"{run.name}: {LAST_LOSSES}", each)


def stability(runs: dict[str, Run]) -> Said:
    losses = {kind: mean_last_losses(run) for kind, run in runs.items()}
    values = [math.inf if q is None else q.value for q in losses.values()]
    same = "do not train alike"
    if max(values) - min(values) < ALIKE * min(values):
        same = "train alike"
    each = listed([say("{k} {l}", k=kind, l=q or UNKNOWN) for kind, q in losses.items()])
    return say(
        "With what is tuned they {same}: in the mean of the last ten of 80 steps {all}.",
        same=same,
        all=each,
    )


def scaler(runs: dict[str, Run]) -> Said:
    skipped = runs["fp16"].at("training.skipped_steps", COUNT, "steps that the scaler skipped")
    why = (
        "its first scales were too large, and each overflow halves the scale"
        if skipped.value
        else "no gradient overflowed at the scale of 65,536 that it begins with"
    )
    return say("fp16's loss scaler skipped {n} of 80 steps: {why}.", n=skipped, why=why)


def guards(trials: dict[str, Run | str]) -> list[Said]:
    """What became of each trial."""
    said = []
    for name, found in trials.items():
        if isinstance(found, str):
            said.append(say("{n}: stopped. {why}.", n=name, why=short(found)))
            continue
        skipped = found.at("training.skipped_steps", COUNT, "skipped steps")
        text = "{n}: went on to a mean loss of {loss} in the last ten steps" + (
            ", with {s} steps skipped" if skipped.value else ""
        )
        said.append(say(text + ".", n=name, loss=mean_last_losses(found) or UNKNOWN, s=skipped))
    stopped = [n for n, found in trials.items() if isinstance(found, str)]
    went_on = [n for n in trials if n not in stopped]
    said.append(
        say(
            "So a loss goes NaN when an update was too large for what the formats can hold, most "
            "often by the learning rate. Four guards: clipping bounds what one update takes from "
            "a gradient; the scaler skips a step that overflowed in fp16; a loss or a norm that "
            "is not finite stops the run before the update, with the weights of the step before; "
            "nonfinite=skip leaves out such a step, and stops where they go on. Stopped here: "
            "{stopped}. Where nothing overflows the last two do not speak ({went_on}): then the "
            "loss itself is the sign.",
            stopped="; ".join(stopped) or "none of the trials",
            went_on="; ".join(went_on) or "no trial here",
        )
    )
    return said


def short(reason: str) -> str:
    """Without the places in the program."""
    return re.sub(r" at \S+:\d+.*| \(traceback.*", "", reason).rstrip(".")


def measured_table(runs: dict[str, Run]) -> Table:
    rows = [
        [
            kind,
            run.memory(),
            run.memory("activations"),
            run.seconds(),
            run.speed,
            mean_last_losses(run),
            run.at("training.skipped_steps", COUNT, "skipped steps"),
        ]
        for kind, run in runs.items()
    ]
    head = ["precision", "peak", "activations", "step", "speed", LAST_LOSSES, "skipped"]
    return Table("One process, 80 steps on real text: two blocks of width 64", head, rows)


def large_table(large: dict[str, Run]) -> Table:
    rows = [
        [kind, run.memory(), run.memory("activations"), run.wire(), run.seconds(), run.mfu]
        for kind, run in large.items()
    ]
    head = ["precision", "peak", "activations", "wire", "step", "MFU"]
    return Table("Llama 3 8B with FSDP on 8 H100, a sequence of 4,096 a device", head, rows)


def trial_table(trials: dict[str, Run | str]) -> Table:
    rows: list = []
    for name, found in trials.items():
        if isinstance(found, str):
            rows.append([name, short(found), None])
        else:
            rows.append([name, "went on", mean_last_losses(found)])
    return Table("Runs that ask for trouble", ["trial", "what became of it", LAST_LOSSES], rows)


def picture(runs: dict[str, Run], trials: dict[str, Run | str]) -> Picture:
    lines = {kind: (list(range(len(run.losses))), run.losses) for kind, run in runs.items()}
    wild = {n: found.losses for n, found in trials.items() if isinstance(found, Run)}
    other = {n: (list(range(len(loss))), loss) for n, loss in wild.items()}

    def draw(path: Path) -> None:
        from experiments.ask import charts

        left = charts.Lines("as tuned", "step", "loss, nats", lines)
        right = charts.Lines("asking for trouble", "step", "loss, nats", other, log_y=True)
        charts.draw(path, *([left, right] if other else [left]))

    return Picture("precision", "loss curves by precision", draw, json.dumps([lines, other]))
