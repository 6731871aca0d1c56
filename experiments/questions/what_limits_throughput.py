"""A roofline of this machine from measured operators, and what the steps of real runs spend."""

from __future__ import annotations

from pathlib import Path

from experiments.ask.answer import Answer, Picture, Said, Table, listed, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import SHARE, Quantity, combined, formula
from experiments.ask.runs import SECONDS, TWELVE_STEPS, agreement, on_laptop, share_of_step
from experiments.predict.clusters import load

QUESTION = (
    "What limits throughput here: compute, memory or network (a roofline picture from measured "
    "points)?"
)
ORDER = 9
WORDS = "roofline bound bandwidth flops mfu utilisation slow bottleneck arithmetic intensity speed"

# width and ranks of the runs; 16 sequences of 128 a step
RUNS: dict[str, tuple[str, ...]] = {
    "width 64, one": ("model.d_model=64", "micro_batch_size=16"),
    "width 256, one": ("model.d_model=256", "micro_batch_size=16"),
    "width 64, DDP 2": ("model.d_model=64", "micro_batch_size=8", "layout.dp_replicate=2"),
    "width 256, DDP 2": ("model.d_model=256", "micro_batch_size=8", "layout.dp_replicate=2"),
    "width 256, TP 2": ("model.d_model=256", "micro_batch_size=16", "layout.tp=2"),
}
BASE = ("strategy=single", "data=generated")


def answer(evidence: Evidence) -> Answer:
    probe = evidence.probed("roofline", 2, "experiments.ask.roofline", "measure")
    runs = {n: evidence.measured(n, *BASE, *keys, TWELVE_STEPS) for n, keys in RUNS.items()}
    twins = [on_laptop(evidence, n, *BASE, *keys) for n, keys in RUNS.items()]
    return Answer(
        conclusion=[*limits(runs), ridge(probe), *bound(probe), on_gpus()],
        tables=[operator_table(probe), run_table(runs)],
        pictures=[picture(probe)],
        carries_over=[
            say(
                "Which operators are bound by memory: FLOPs for each byte are the operator's own. "
                "GPUs have a ridge further right, so that what is bound by memory here is so there."
            ),
            *agreement(list(runs.values()), twins),
        ],
        does_not=[
            say(
                "Caches: small operators here live in a core's cache and may lie above the roof "
                "of the memory ({which}).",
                which=above(probe) or "none of these does",
            ),
            SECONDS,
        ],
    )


def rank(probe: Run, where: str, unit: str, label: str) -> Quantity:
    """Of the first rank; the other measured at the same time."""
    return probe.at(f"ranks[0].{where}", unit, label)


def operators(probe: Run) -> list[str]:
    return list(probe.ledger["ranks"][0]["operators"])


def of(probe: Run, name: str, what: str) -> Quantity:
    unit = {"flops_per_s": "FLOP/s", "flops_per_byte": "FLOP/B"}[what]
    return rank(probe, f"operators.{name}.{what}", unit, f"{name}: {what.replace('_', ' ')}")


def peak(probe: Run) -> Quantity:
    return rank(probe, "peak_flops_per_s", "FLOP/s", "peak of a core")


def bandwidth(probe: Run) -> Quantity:
    return rank(probe, "memory_bytes_per_s", "B/s", "memory bandwidth of a core")


def knee(probe: Run) -> Quantity:
    return combined("ridge", "/", (peak(probe), bandwidth(probe)), "FLOP/B")


def ridge(probe: Run) -> Said:
    network = rank(probe, "network_bytes_per_s", "B/s", "loopback, all_reduce of a rank")
    return say(
        "A core here multiplies at {peak} and copies at {bandwidth}: what does less than {ridge} "
        "waits for memory. Messages go at {network}, {ratio} slower than memory.",
        peak=peak(probe),
        bandwidth=bandwidth(probe),
        ridge=knee(probe),
        network=network,
        ratio=bandwidth(probe) / network,
    )


def bound(probe: Run) -> list[Said]:
    edge = knee(probe).value
    low = [n for n in operators(probe) if of(probe, n, "flops_per_byte").value < edge]
    high = [n for n in operators(probe) if n not in low]

    def said(names: list[str]) -> Said:
        return listed(
            [
                say("{n} ({f})", n=n.replace("_", " "), f=of(probe, n, "flops_per_byte"))
                for n in names
            ]
            or [say("-")]
        )

    best = max(high, key=lambda n: of(probe, n, "flops_per_s").value)
    reached = (of(probe, best, "flops_per_s") / peak(probe)).as_share()
    return [
        say("Left of the ridge, bound by memory: {low}.", low=said(low)),
        say(
            "Right of it, bound by compute: {high}; {best} reaches {reached} of the peak.",
            high=said(high),
            best=best.replace("_", " "),
            reached=reached,
        ),
    ]


def above(probe: Run) -> str:
    rate = bandwidth(probe).value
    names = [
        n
        for n in operators(probe)
        if of(probe, n, "flops_per_s").value > rate * of(probe, n, "flops_per_byte").value
        and of(probe, n, "flops_per_byte").value < knee(probe).value
    ]
    return ", ".join(names)


def spent(run: Run) -> dict[str, Quantity]:
    """Shares of a step: products at the measured peak, exposed messages, and the rest."""
    products = run.at("step.hfu", SHARE, "products at the peak's rate")
    network = share_of_step(run, "exposed_communication")
    whole = share_of_step(run, "total")
    rest = (whole - products - network).named(f"{run.name}: memory-bound operators and the host")
    return {"compute": products, "network": network, "memory and host": rest}


def limits(runs: dict[str, Run]) -> list[Said]:
    said, times = [], dict.fromkeys(("compute", "memory and host", "network"), 0)
    for name, run in runs.items():
        parts = spent(run)
        most = max(parts, key=lambda part: parts[part].value)
        times[most] += 1
        said.append(
            say(
                "{name}: {most} is the largest part of a step ({share}).",
                name=name[0].upper() + name[1:],
                most=most,
                share=parts[most],
            )
        )
    order = sorted(times, key=lambda part: -times[part])
    each = ", ".join(f"{part} in {times[part]}" for part in order)
    return [say("Of {n} runs here what takes most of a step is {e}.", n=len(runs), e=each), *said]


def on_gpus() -> Said:
    """The ridges of devices, from their datasheets."""
    each = []
    for name in ("v100", "a100_80g", "h100", "b200"):
        device = load(name).device
        value = device.flops("bf16") / device.memory_bandwidth
        run = f"configs/cluster/{name}.yaml"
        where = "device.peak_flops.bf16 / device.memory_bandwidth"
        each.append(
            say("{n} {r}", n=name, r=formula(f"ridge of {name}", value, "FLOP/B", run, where))
        )
    return say("The ridge of GPUs in bf16, by their datasheets: {all}.", all=listed(each))


def operator_table(probe: Run) -> Table:
    rows = []
    for name in operators(probe):
        rate = of(probe, name, "flops_per_s")
        share = (rate / peak(probe)).as_share()
        rows.append([name.replace("_", " "), of(probe, name, "flops_per_byte"), rate, share])
    head = ["operator", "FLOPs a byte", "reached", "of the peak"]
    return Table("Operators on one core, fp32, 2,048 tokens of width 256", head, rows)


def run_table(runs: dict[str, Run]) -> Table:
    rows = [[name, run.seconds(), *spent(run).values(), run.speed] for name, run in runs.items()]
    head = ["run", "step", "compute", "network", "memory, host", "speed"]
    return Table("Where the time of a step goes: 16 sequences of 128", head, rows)


def picture(probe: Run) -> Picture:
    top, rate = peak(probe).value / 1e9, bandwidth(probe).value / 1e9
    spots = {
        n.replace("_", " "): (
            [of(probe, n, "flops_per_byte").value],
            [of(probe, n, "flops_per_s").value / 1e9],
        )
        for n in operators(probe)
    }
    left, right = 0.05, 400.0
    roof = ([left, top / rate, right], [left * rate, top, top])

    def draw(path: Path) -> None:
        from experiments.ask import charts

        charts.draw(
            path,
            charts.Lines(
                "roofline of one core of this machine, fp32 (measured)",
                "FLOPs a byte",
                "GFLOP/s",
                {"roof": roof},
                spots,
                log_x=True,
                log_y=True,
                labels=True,
            ),
        )

    return Picture("roofline", "measured operators under the roof", draw, str((spots, roof)))
