"""docs/results/strategies.md: how fast each strategy is on two ranks, beside the plainest torch
code.

./launch.sh python -m experiments.figures.strategy_speed > docs/results/strategies.md   ten
minutes, 2 cores
./launch.sh python -m experiments.figures.strategy_speed pp           that contest's rows only
"""

from __future__ import annotations

import statistics
import sys

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from costs.timing import intersection, length
from experiments.console import progress
from experiments.document import heading, marked, rule, table
from experiments.figures import contest
from experiments.figures.benchmark import SHAPES
from experiments.figures.contest import ALONE
from experiments.ranks import run_ranks

COMMAND = "./launch.sh python -m experiments.figures.strategy_speed > docs/results/strategies.md"
ROUNDS = 4
# what is timed, against what, and the most that the ratio may be
PLAINEST = {"ddp": "plain ddp", "fsdp": "plain fsdp", "tp": "plain tp", "pp": "plain pp"}
PLAINEST_BAR = 1.10
SPEEDUPS = {
    "ddp": 1.50,
    "tp": 1.44,
    "pp": 1.46,
    "pp, 8 micro-batches": 1.46,
}  # picotron's, measured at this shape on two cores
# Who takes turns with whom: each contest is small, for the memory of those who wait grows cold
CONTESTS = (
    ("ddp", "fsdp"),
    ("tp",),
    ("pp", "pp, 8 micro-batches"),
    ("zero1", "zero2", "tp_sp", "cp"),
)
FSDP_BAR = 1.17  # of ddp
# ranks of the steps whose time outside torch's operators is taken
# (not fsdp and tp: they wait inside of operators, so that their waits would be taken off twice)
OUTSIDE = {"fp32": 1, "ddp": 2, "pp": 2}
OUTSIDE_BAR = 0.05
WATCHED = 5  # steps
MARK = "the whole step"


HEAD = ("step", "ms", "faster than one process", "of the plainest torch code", "of the library")
Times = dict[str, list[float]]  # seconds of each step, by contestant


def contestants(names: tuple[str, ...]) -> list[str]:
    """One process, then each strategy beside its plainest code and what is written by hand."""
    kinds = [ALONE]
    for name in names:
        hand = f"{name} by hand"
        plain = [PLAINEST[name]] if name in PLAINEST else []
        kinds += [*plain, name, *([hand] if hand in contest.KINDS else [])]
    return kinds


def measure(names: tuple[str, ...]) -> Times:
    """One contest."""
    progress(f"{', '.join(names)} ...")
    return contest.hold(contestants(names), 2, SHAPES["L"], ROUNDS)


def ratio(times: Times, one: str, other: str) -> float:
    """The median of the ratios of neighbouring steps."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def rows(times: Times) -> str:
    ours = [name for name in times if not name.startswith("plain") and name != ALONE]
    return "\n".join(row(times, name) for name in ours)


def row(times: Times, name: str) -> str:
    faster = 1 / ratio(times, name, ALONE)
    speedup = f"{faster:.2f}"
    if name in SPEEDUPS:
        bar = SPEEDUPS[name]
        speedup = marked(f"{faster:.2f} (>= {bar:.2f})", faster < bar)
    plain = library = "-"
    if name in PLAINEST:
        of_plain = ratio(times, name, PLAINEST[name])
        plain = marked(f"{of_plain:.3f} (<= {PLAINEST_BAR:.2f})", of_plain > PLAINEST_BAR)
    if name.endswith(" by hand"):
        library = f"{ratio(times, name, name.removesuffix(' by hand')):.3f}"
    ms = (
        f"{1e3 * statistics.median(times[name]):.0f} of {1e3 * statistics.median(times[ALONE]):.0f}"
    )
    return table(name, ms, speedup, plain, library)


def outside_operators(kind: str) -> float:
    """The share of a step's time that no operator of torch covers, on this rank.

    What is left is Python, the autograd engine and the meters. Time in which the rank waits for
    others counts in neither. torch.profiler records the operators; its own cost counts as outside.
    """
    torch.set_num_threads(1)
    step = contest.make_step(kind, SHAPES["L"], contest.WARMUP + WATCHED)
    assert isinstance(step, contest.OurLoop)
    for _ in range(contest.WARMUP):
        step()
    outside = total = 0.0
    for _ in range(WATCHED):
        with profile(activities=[ProfilerActivity.CPU]) as recorded, record_function(MARK):
            step()
        events = [(e.name, (e.time_range.start, e.time_range.end)) for e in recorded.events()]
        (whole,) = [span for name, span in events if name == MARK]
        inside = [span for name, span in events if is_operator(name)]
        waited = length(step.meters.last.held_up())
        here = whole[1] - whole[0] - 1e6 * waited
        outside += here - length(intersection(inside, [whole]))
        total += here
    return outside / total


def is_operator(name: str) -> bool:
    """Not the engine's own frames, nor an operator that only waits."""
    return "::" in name and "autograd" not in name and "wait" not in name


def outside_rows() -> list[str]:
    lines = [table("step", f"outside (<= {OUTSIDE_BAR:.0%})"), rule(2)]
    for kind, ranks in OUTSIDE.items():
        lines.append(table(kind, f"{max(run_ranks(ranks, outside_operators, kind)):.1%}"))
    return lines


def main() -> None:
    shape = SHAPES["L"]
    print(heading("Speed of the strategies", COMMAND))
    print(
        f"{shape.n_layer} layers x width {shape.d_model} x {shape.seq_len} tokens x {shape.batch} "
        "sequences, fp32, two ranks of one thread, meters on; pipelines of "
        f"{contest.MICRO_BATCHES} micro-batches. Each contestant has processes of its own and they "
        "take turns with one process that trains alone; ms are medians, the strategy's of that "
        "one's, and ratios are medians over neighbouring steps. The plainest torch code is in "
        "yardstick.py and plain_parallel.py in experiments/figures/. In brackets: the bar; bold is "
        "not within.\n"
    )
    print("\n".join((table(*HEAD), rule(len(HEAD)))))
    for names in CONTESTS:
        times = measure(names)
        print(rows(times), flush=True)
        if "fsdp" in times:
            fsdp = ratio(times, "fsdp", "ddp")
    print(f"\nfsdp takes {fsdp:.3f} of ddp's time (<= {FSDP_BAR:.2f}).")
    print(
        "\nTime outside torch's operators (Python, the autograd engine, the meters; recorded by "
        "torch.profiler, waiting left out), as a share of a step, on the rank with the most:\n"
    )
    print("\n".join(outside_rows()))


if __name__ == "__main__":
    if asked := sys.argv[1:]:
        for names in CONTESTS:
            if set(asked) & set(names):
                print(rows(measure(names)))
    else:
        main()
