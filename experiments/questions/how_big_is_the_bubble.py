"""Idle time and memory of each schedule: measured on two stages, by formula on eight."""

from __future__ import annotations

from pathlib import Path

from experiments.ask.answer import Answer, Picture, Said, Table, listed, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.kept import SIMULATOR, code_of
from experiments.ask.quantity import SHARE, Quantity, formula, mean
from experiments.ask.runs import SECONDS, agreement, fits, h100_memory, on_laptop
from experiments.overrides import composed
from experiments.refused import Refused
from parallel.layout import PipelineConfig, PipelineSchedule
from simulator.coarse_programs import coarse_timeline
from simulator.order_times import ideal_bubble
from simulator.timeline import Timeline

QUESTION = (
    "How big is the bubble for each schedule and number of micro-batches, and what does a smaller "
    "one cost in memory?"
)
ORDER = 6
WORDS = "pipeline gpipe 1f1b interleaved zero bubble dualpipe idle stages schedule pp"

SCHEDULES = tuple(schedule.value for schedule in PipelineSchedule)
# eight blocks, so that two stages a rank have two each
DEEP = (
    "strategy=single",
    "data=generated",
    "model.n_layer=8",
    "layout.pp=2",
    "micro_batch_size=2",
)
STEPS = "steps=12"
SOURCE = "simulator/order_times.py, ideal_bubble"
MEASURED = (2, 4, 8)  # micro-batches
BASE = "1f1b"
# eight stages of one node each
LLAMA = (
    "model=llama3_70b",
    "cluster=h100",
    "layout.pp=8",
    "layout.tp=8",
    "sequence_parallel=true",
    "micro_batch_size=1",
)
COUNTS = (8, 16, 32, 64)  # micro-batches, by formula


def answer(evidence: Evidence) -> Answer:
    runs, twins = {}, []
    for schedule in SCHEDULES:
        for count in MEASURED if schedule == BASE else (4,):
            keys = (*DEEP, f"gradient_accumulation_steps={count}", f"pipeline.schedule={schedule}")
            name = f"{schedule}, {count}"
            runs[schedule, count] = evidence.measured(name, *keys, STEPS)
            if schedule in ("gpipe", BASE):  # the others' memory has no closed form to the byte
                twins.append((runs[schedule, count], on_laptop(evidence, name, *keys)))
    eight = {(s, m): planned(evidence, s, m) for s in SCHEDULES for m in COUNTS}
    known = {key: run for key, run in eight.items() if run}
    return Answer(
        conclusion=[
            law(runs),
            *by_schedule(known),
            *price(known),
            *filling(known),
        ],
        tables=[measured_table(runs), bubble_table(known), memory_table(known)],
        pictures=[timelines()],
        carries_over=[
            say(
                "The bubble as a share: it follows from the order of the schedule. The {n} runs "
                "above stand beside it.",
                n=len(runs),
            ),
            *agreement([run for run, _ in twins], [twin for _, twin in twins]),
        ],
        does_not=[
            say(
                "What the stages wait for on top: cores that share a memory take each other's time "
                "({most} was measured where the ideal is {ideal}).",
                **widest(runs),
            ),
            SECONDS,
        ],
    )


def planned(evidence: Evidence, schedule: str, count: int) -> Run | None:
    """70B on 64 H100; None where the rules refuse so many micro-batches."""
    keys = (*LLAMA, f"pipeline.schedule={schedule}", f"gradient_accumulation_steps={count}")
    try:
        return evidence.simulated(f"70B {schedule}, {count}", *keys)
    except (Refused, ValueError):
        return None


def measured_bubble(run: Run) -> Quantity:
    """Mean of the ranks: the first waits at the end, the last at the beginning."""
    ranks = range(len(run.ledger["pipeline"]["stages"]))
    each = [run.at(f"pipeline.stages[{i}].bubble", SHARE, f"bubble of rank {i}") for i in ranks]
    return mean(f"{run.name}: mean bubble of the ranks", each)


def ideal(run: Run) -> Quantity:
    """The schedule's own (simulator/order_times.py), by formula although a ledger holds it."""
    config = run.ledger["config"]
    pipeline = PipelineConfig(
        PipelineSchedule(config["pipeline"]["schedule"]), config["pipeline"]["stages_per_rank"]
    )
    layout, count = run.ledger["layout"], config["gradient_accumulation_steps"]
    value = ideal_bubble(pipeline, layout["pp"], count)
    return formula(f"{run.name}: ideal bubble", value, SHARE, SOURCE)


def law(runs: dict[tuple[str, int], Run]) -> Said:
    few, many = MEASURED[0], MEASURED[-1]
    a, b = runs[BASE, few], runs[BASE, many]
    return say(
        "1F1B and GPipe idle (p-1)/(m+p-1) of forward and backward, with v stages a rank "
        "(p-1)/(v m+p-1), and where the backward is split (p-1)/(3 v m+p-1) if the micro-batches "
        "fill the pipeline: ZBV needs 2 (p-1) of them, and idles more with fewer. Every ideal here "
        "is walked through in torch's own order. 1F1B on two stages with {few} micro-batches: "
        "{ideal_a}, and measured {a}; with {many}: {ideal_b} and {b}.",
        few=few,
        ideal_a=ideal(a),
        a=measured_bubble(a),
        many=many,
        ideal_b=ideal(b),
        b=measured_bubble(b),
    )


def by_schedule(known: dict[tuple[str, int], Run]) -> list[Said]:
    """On eight stages, with as many micro-batches as most schedules take."""
    count = COUNTS[1]
    here = {s: known[s, count] for s in SCHEDULES if (s, count) in known}
    order = sorted(here, key=lambda s: ideal(here[s]).value)
    each = [say("{s} {b}", s=s, b=ideal(here[s])) for s in order]
    return [say("On eight stages with {m} micro-batches: {all}.", m=count, all=listed(each))]


def price(known: dict[tuple[str, int], Run]) -> list[Said]:
    """What a smaller bubble costs in memory, beside 1F1B."""
    count = COUNTS[1]
    base = known[BASE, count]
    each = []
    for schedule in SCHEDULES:
        run = known.get((schedule, count))
        if run is None or schedule == BASE:
            continue
        each.append(say("{s} {m}", s=schedule, m=fullest(run) / fullest(base)))
    limit, fitting = h100_memory(base), [key for key, run in known.items() if fits(run)]
    return [
        say(
            "In memory, beside 1F1B's {base} of the fullest rank (Llama 3 70B, pp8-tp8, {m} "
            "micro-batches): {all}.",
            base=fullest(base),
            m=count,
            all=listed(each),
        ),
        say(
            "Without checkpointing these fit an H100's {limit}: {which}.",
            limit=limit,
            which=", ".join(f"{s} with m = {m}" for s, m in fitting) or "none",
        ),
    ]


def filling(known: dict[tuple[str, int], Run]) -> list[Said]:
    """More micro-batches: the bubble falls, and memory only where a schedule keeps them all."""
    said = []
    for schedule in ("gpipe", BASE):
        counts = [m for m in COUNTS if (schedule, m) in known]
        few, many = known[schedule, counts[0]], known[schedule, counts[-1]]
        grew = fullest(many) / fullest(few)
        word = "stays" if grew.value < 1.02 else "grows" if grew.value > 1.25 else "hardly grows"
        said.append(
            say(
                "From {a} to {b} micro-batches {schedule}'s bubble falls from {x} to {y} and its "
                "memory {word} ({grew}).",
                a=counts[0],
                b=counts[-1],
                schedule=schedule,
                x=ideal(few),
                y=ideal(many),
                word=word,
                grew=grew,
            )
        )
    return said


def fullest(run: Run) -> Quantity:
    return run.memory()


def widest(runs: dict[tuple[str, int], Run]) -> dict[str, Quantity]:
    worst = max(runs.values(), key=lambda r: measured_bubble(r).value - ideal(r).value)
    return {"most": measured_bubble(worst), "ideal": ideal(worst)}


def measured_table(runs: dict[tuple[str, int], Run]) -> Table:
    base = runs[BASE, 4]
    rows = [
        [
            schedule,
            str(count),
            ideal(run),
            measured_bubble(run),
            run.seconds(),
            run.memory(),
            run.memory("activations"),
            run.memory() / base.memory(),
        ]
        for (schedule, count), run in runs.items()
    ]
    head = ["schedule", "m", "ideal", "bubble", "step", "peak", "activ.", "of 1F1B's"]
    return Table("Two stages on this machine: eight blocks of width 128", head, rows)


def bubble_table(known: dict[tuple[str, int], Run]) -> Table:
    rows = [
        [s, *[ideal(known[s, m]) if (s, m) in known else None for m in COUNTS]] for s in SCHEDULES
    ]
    head = ["schedule", *[f"m = {m}" for m in COUNTS]]
    return Table("The ideal bubble on eight stages in torch's order, by micro-batches", head, rows)


def memory_table(known: dict[tuple[str, int], Run]) -> Table:
    rows = [
        [s, *[fullest(known[s, m]) if (s, m) in known else None for m in COUNTS]] for s in SCHEDULES
    ]
    head = ["schedule", *[f"m = {m}" for m in COUNTS]]
    title = "Memory of the fullest rank: Llama 3 70B, bf16, pp8-tp8 on 64 H100, sequences of 8,192"
    return Table(title, head, rows)


def timelines() -> Picture:
    """Four schedules of four stages, replayed event by event."""
    shown = ("gpipe", BASE, "interleaved_1f1b", "zbv_zero_bubble")
    keys = ("model=llama3_8b", "cluster=h100", "seq_len=4096", "layout.pp=4", "micro_batch_size=1")

    def timeline_of(schedule: str) -> Timeline:
        more = (f"pipeline.schedule={schedule}", "gradient_accumulation_steps=8")
        config = composed("simulate", (*keys, *more))
        return coarse_timeline(config.model, config.layout, config.options, config.cluster)

    def draw(path: Path) -> None:
        from experiments.pictures import draw_schedules  # matplotlib takes a second

        draw_schedules({schedule: timeline_of(schedule) for schedule in shown}, path)

    return Picture(
        "schedules",
        "one step of Llama 3 8B on four H100, 8 micro-batches",
        draw,
        str((shown, keys, code_of(*SIMULATOR))),
    )
