"""docs/strategies.md: how fast each strategy is on two ranks, beside the plainest torch code.

./launch.sh python -m experiments.strategy_speed > docs/strategies.md
"""

from __future__ import annotations

import statistics
import sys
import time

from experiments import contest, environment
from experiments.benchmark import SHAPES, rule, table
from experiments.contest import ALONE

COMMAND = "./launch.sh python -m experiments.strategy_speed > docs/strategies.md"
ROUNDS = 6
# what is timed, against what, and the most that the ratio may be
PLAINEST = {"ddp": "plain ddp", "fsdp": "plain fsdp", "tp": "plain tp", "pp": "plain pp"}
PLAINEST_BAR = 1.10
SPEEDUPS = {"ddp": 1.50, "tp": 1.44, "pp": 1.46}  # picotron's, measured at this shape on two cores
OTHERS = ("zero1", "zero2", "tp_sp", "cp")
FSDP_BAR = 1.17  # of ddp


def measure() -> dict[str, list[float]]:
    """Seconds of each step of each contestant, which take turns."""
    hand = [f"{name} by hand" for name in PLAINEST]
    kinds = [ALONE, *PLAINEST.values(), *PLAINEST, *OTHERS, *hand]
    print(f"{len(kinds)} contestants", file=sys.stderr, flush=True)
    return contest.hold(kinds, 2, SHAPES["L"], ROUNDS)


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """The median of the ratios of neighbouring steps."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def rows(times: dict[str, list[float]]) -> list[str]:
    head = ("step", "ms", "faster than one process", "of the plainest torch code", "of the library")
    lines = [table(*head), rule(len(head))]
    for name in [name for name in times if not name.startswith("plain")]:
        speedup = f"{1 / ratio(times, name, ALONE):.2f}"
        if name in SPEEDUPS:
            speedup += f" (>= {SPEEDUPS[name]:.2f})"
        plain = "-"
        if name in PLAINEST:
            plain = f"{ratio(times, name, PLAINEST[name]):.3f} (<= {PLAINEST_BAR:.2f})"
        library = "-"
        if name.endswith(" by hand"):
            library = f"{ratio(times, name, name.removesuffix(' by hand')):.3f}"
        ms = f"{1e3 * statistics.median(times[name]):.0f}"
        lines.append(table(name, ms, speedup, plain, library))
    return lines


def main() -> None:
    facts, shape = environment.facts(), SHAPES["L"]
    print(f"# Speed of the strategies\n\nMade by `{COMMAND}` on {time.strftime('%Y-%m-%d')}")
    print(f"({facts['processor']}, {facts['cores']} cores; torch {facts['torch']}, gloo).\n")
    print(
        f"{shape.n_layer} layers x width {shape.d_model} x {shape.seq_len} tokens x {shape.batch} "
        "sequences, fp32, two ranks of one thread, meters on; pipelines of "
        f"{contest.MICRO_BATCHES} micro-batches. Each contestant has processes of its own and they "
        "take turns; ratios are medians over neighbouring steps. The plainest torch code is in "
        "experiments/yardstick.py and experiments/plain_parallel.py. In brackets: the bar.\n"
    )
    times = measure()
    print("\n".join(rows(times)))
    print(f"\nfsdp takes {ratio(times, 'fsdp', 'ddp'):.3f} of ddp's time (<= {FSDP_BAR:.2f}).")


if __name__ == "__main__":
    main()
