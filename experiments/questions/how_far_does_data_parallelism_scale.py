"""Speed and cost against the number of GPUs, at a fixed batch and at one that grows with them."""

from __future__ import annotations

from pathlib import Path

from experiments.ask.answer import Answer, Picture, Said, Table, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import COUNT, SHARE, Quantity, published
from experiments.ask.runs import (
    SECONDS,
    SHAPE,
    TWELVE_STEPS,
    agreement,
    on_laptop,
    share_of_step,
)
from experiments.questions.which_parallelism import published_row

QUESTION = (
    "How far does data parallelism scale before batch or network stop it? How many GPUs are worth "
    "it for a budget?"
)
ORDER = 10
WORDS = "scaling efficiency speedup cost money price dollars days weak strong critical batch size"

# Llama 3 8B in bf16 with FSDP, sequences of 8,192
LLAMA = ("model=llama3_8b", "cluster=h100", "activation_checkpointing=full", "micro_batch_size=1")
SEQUENCES = 512  # of a step: 4M tokens
COUNTS = (8, 16, 32, 64, 128, 256, 512)  # GPUs, at the fixed batch
MORE = (1024, 2048, 4096)  # where the batch has to grow
SLOW = "cluster.between_nodes.bandwidth=3.125e9"
NETWORKS = {"400 Gbit/s": (), "25 Gbit/s": (SLOW,)}
TOKENS, PRICE = "1T", "2.5"  # of a run to its end; $ of a GPU-hour
MONEY = (f"scale.tokens={TOKENS}", f"scale.price={PRICE}")
GOOD = 0.9  # of its speed on the fewest, that each GPU keeps
DEARER = 1.10  # times the cheapest: the most that time saved is worth here
RANKS = (1, 2, 4)
MPT = ("mpt-039", "mpt-012", "mpt-011", "mpt-010")  # MPT-7B on 8, 128, 256, 512 H100
CITED = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"


def answer(evidence: Evidence) -> Answer:
    fixed = {
        network: {n: at(evidence, n, SEQUENCES // n, *keys) for n in COUNTS}
        for network, keys in NETWORKS.items()
    }
    grown = {n: at(evidence, n, 1) for n in MORE}
    measured = {n: small(evidence, n) for n in RANKS}
    twins = [on_laptop(evidence, r.name, *keys_of(n)) for n, r in measured.items()]
    fast = fixed["400 Gbit/s"]
    return Answer(
        conclusion=[
            *efficiency(fixed),
            batch(fast, grown),
            others(),
            *budget({**fast, **grown}),
            here(measured),
        ],
        tables=[fixed_table(fixed), grown_table(grown), published_table(), here_table(measured)],
        pictures=[picture(fixed, grown)],
        carries_over=agreement(list(measured.values()), twins),
        does_not=[
            say(
                "Where it stops: that is set by the network and by the batch that the model "
                "still learns from."
            ),
            SECONDS,
        ],
    )


def at(evidence: Evidence, gpus: int, micro_batches: int, *keys: str) -> Run:
    return evidence.simulated(
        f"8B on {gpus:,}",
        *LLAMA,
        f"layout.dp_shard={gpus}",
        f"gradient_accumulation_steps={micro_batches}",
        *MONEY,
        *keys,
    )


def keys_of(ranks: int) -> tuple[str, ...]:
    return (*SHAPE, f"layout.dp_replicate={ranks}", "micro_batch_size=8")


def small(evidence: Evidence, ranks: int) -> Run:
    return evidence.measured(f"DDP on {ranks}", *keys_of(ranks), TWELVE_STEPS)


def each_gpu(run: Run) -> Quantity:
    """Tokens a second of one device."""
    ranks = run.at("layout.world_size", COUNT, "devices")
    return (run.speed / ranks).named(f"{run.name}: speed of a device")


def kept(run: Run, first: Run) -> Quantity:
    """Scaling efficiency: speed of a device in that of the fewest."""
    return (each_gpu(run) / each_gpu(first)).as_share().named(f"{run.name}: efficiency")


def efficiency(fixed: dict[str, dict[int, Run]]) -> list[Said]:
    said = []
    for network, runs in fixed.items():
        first, last = runs[COUNTS[0]], runs[COUNTS[-1]]
        good = [n for n in COUNTS if kept(runs[n], first).value >= GOOD]
        said.append(
            say(
                "Llama 3 8B, 4M tokens a step, {network} a GPU between nodes: up to {most} each "
                "keeps {good:.0f} % of its speed on 8; on {n} it keeps {kept}, and {exposed} "
                "of the step is exposed communication.",
                network=network,
                most=runs[max(good)].at("layout.world_size", "GPUs"),
                good=100 * GOOD,
                n=COUNTS[-1],
                kept=kept(last, first),
                exposed=share_of_step(last, "exposed_communication"),
            )
        )
    return said


def batch(fast: dict[int, Run], grown: dict[int, Run]) -> Said:
    """One sequence a rank is the end; beyond it the batch grows."""
    row = published_row("llama3-002")
    tokens = int(row["seq_len"]) * int(row["global_batch_seqs"])
    largest = published(
        "tokens of a step of Llama 3 405B",
        tokens,
        "tokens",
        "Llama team 2024, table 4: row llama3-002 of experiments/published/measured.csv",
        "seq_len x global_batch_seqs",
    )
    last = max(grown)
    wanted = grown[last].at("step.tokens", "tokens", "tokens of a step")
    relation = "more than" if wanted.value > largest.value else "no more than"
    return say(
        "The batch stops it at {n} GPUs, one sequence of 8,192 each; {last:,} would take {wanted} "
        "a step, {relation} the {largest} of Llama 3 405B. Beyond what the model learns from (its "
        "gradient noise scale: McCandlish et al. 2018) more GPUs buy no fewer steps.",
        n=max(fast),
        last=last,
        wanted=wanted,
        relation=relation,
        largest=largest,
    )


def mpt(name: str) -> tuple[int, Quantity]:
    row = published_row(name)
    speed = float(row["tokens_per_s_per_gpu"])
    label = f"MPT-7B on {row['n_gpus']} H100: speed of a GPU"
    return int(row["n_gpus"]), published(label, speed, "tokens/s", f"{CITED} ({name})")


def others() -> Said:
    first, last = mpt(MPT[0]), mpt(MPT[-1])
    return say(
        "Measured by others with a batch that grows along: MPT-7B with FSDP makes {a} a GPU on {n} "
        "H100 and {b} on {m}: it keeps {kept}.",
        a=first[1],
        n=first[0],
        b=last[1],
        m=last[0],
        kept=(last[1] / first[1]).as_share(),
    )


def cost(run: Run) -> Quantity:
    return run.at(
        "environment.to_the_end.cost", "$", f"cost of {TOKENS} tokens at {PRICE} a GPU-hour"
    )


def days(run: Run) -> Quantity:
    return run.at("environment.to_the_end.time_s", "s", f"time of {TOKENS} tokens")


def budget(runs: dict[int, Run]) -> list[Said]:
    cheapest = min(runs.values(), key=lambda run: cost(run).value)
    worth = [n for n, run in runs.items() if cost(run).value <= DEARER * cost(cheapest).value]
    most, fastest = runs[max(worth)], min(runs.values(), key=lambda run: days(run).value)
    return [
        say(
            "{tokens} tokens at $ {price} a GPU-hour: cheapest is {c} with {x} in {d}; the most "
            "that cost no more than {dearer:.0%} of it are {n:,} GPUs, {y} in {e}: up to there "
            "time is nearly free.",
            tokens=TOKENS,
            price=PRICE,
            c=cheapest.name,
            x=cost(cheapest),
            d=days(cheapest),
            dearer=DEARER,
            n=max(worth),
            y=cost(most),
            e=days(most),
        ),
        say(
            "The fastest of these is {f}: {d}, {times} the cheapest's cost.",
            f=fastest.name,
            d=days(fastest),
            times=cost(fastest) / cost(cheapest),
        ),
    ]


def here(measured: dict[int, Run]) -> Said:
    two, four = (kept(measured[n], measured[1]) for n in (2, 4))
    cores = measured[1].ledger["environment"]["cores"]
    return say(
        "Measured here with DDP on {cores} cores: two ranks keep {two} of one's speed each, four "
        "keep {four}{note}.",
        note="; more than all is what a busy machine does to seconds" if two.value > 1.05 else "",
        cores=cores,
        two=two,
        four=four,
    )


def fixed_table(fixed: dict[str, dict[int, Run]]) -> Table:
    fast, slow = fixed.values()
    rows = []
    for n in COUNTS:
        run = fast[n]
        rows.append(
            [
                f"{n:,}",
                str(SEQUENCES // n),
                run.seconds(),
                kept(run, fast[COUNTS[0]]),
                kept(slow[n], slow[COUNTS[0]]),
                run.at("step.mfu", SHARE, "MFU"),
                days(run),
                cost(run),
            ]
        )
    head = ["GPUs", "m", "step", "kept", "kept, 25 Gbit/s", "MFU", f"{TOKENS} tokens", "cost"]
    title = f"Llama 3 8B with FSDP on H100, 4M tokens a step, $ {PRICE} a GPU-hour"
    return Table(title, head, rows)


def grown_table(grown: dict[int, Run]) -> Table:
    rows = [
        [f"{n:,}", run.at("step.tokens", "tokens"), run.seconds(), run.mfu, days(run), cost(run)]
        for n, run in grown.items()
    ]
    head = ["GPUs", "tokens a step", "step", "MFU", f"{TOKENS} tokens", "cost"]
    return Table("One sequence a GPU: the batch grows with them", head, rows)


def published_table() -> Table:
    first = mpt(MPT[0])[1]
    rows: list = [
        [f"{n:,}", speed, (speed / first).as_share()] for n, speed in (mpt(name) for name in MPT)
    ]
    return Table("MPT-7B on H100, as published", ["GPUs", "speed of a GPU", "kept"], rows)


def here_table(measured: dict[int, Run]) -> Table:
    rows = [
        [
            str(n),
            run.speed,
            kept(run, measured[1]),
            share_of_step(run, "exposed_communication"),
        ]
        for n, run in measured.items()
    ]
    head = ["ranks", "speed", "kept", "exposed"]
    return Table("DDP on this machine, 8 sequences of 128 a rank", head, rows)


def picture(fixed: dict[str, dict[int, Run]], grown: dict[int, Run]) -> Picture:
    lines = {
        network: (list(runs), [100 * kept(run, runs[COUNTS[0]]).value for run in runs.values()])
        for network, runs in fixed.items()
    }
    first = fixed["400 Gbit/s"][COUNTS[0]]
    lines["400 Gbit/s, batch grows"] = (
        list(grown),
        [100 * kept(run, first).value for run in grown.values()],
    )
    base = mpt(MPT[0])[1].value
    marks = [mpt(name) for name in MPT]
    points = {
        "MPT-7B (published)": (
            [n for n, _ in marks],
            [100 * speed.value / base for _, speed in marks],
        )
    }

    def draw(path: Path) -> None:
        from experiments.ask import charts

        title = "speed of a GPU, in that on 8 (Llama 3 8B, FSDP, H100)"
        panel = charts.Lines(title, "GPUs", "per cent", lines, points, log_x=True)
        charts.draw(path, panel)

    return Picture("data-parallel", "scaling efficiency", draw, str((lines, points)))
