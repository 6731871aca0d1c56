"""What the meters cost: steps with them off, on, and following memory operator by operator.

./launch.sh python -m experiments.figures.overhead > docs/results/overhead.md   six minutes, two
free cores
./launch.sh python -m experiments.figures.overhead rounds=2              a look at whether it works

Off is the same loop on gloo itself, with nobody told of anything. On is how every step runs, also
with trace=true: a trace is made of what is recorded anyway. `following` is the one step of a run
that is looked at operator by operator, for memory and its picture; here every step is. Contestants
take turns (contest.py), and a ratio is the median of the ratios of neighbouring steps.
"""

from __future__ import annotations

import statistics
import sys

from experiments.document import heading, rule, table
from experiments.figures import contest
from experiments.figures.benchmark import SHAPES
from experiments.figures.yardstick import Shape

COMMAND = "./launch.sh python -m experiments.figures.overhead > docs/results/overhead.md"
SHAPE = SHAPES["L"]
BARS = {"on": 1.02, "following": 1.15}
ROUNDS = 12
WORLD_SIZES = {"fp32": 1, "ddp": 2}


def overheads(shape: Shape, rounds: int) -> dict[str, dict[str, list[float]]]:
    """By kind and by how it is metered, the ratio of each step to its neighbour's without."""
    found = {}
    for kind, world_size in WORLD_SIZES.items():
        kinds = [kind + contest.OFF, kind, f"{kind} meters following"]
        off, on, following = contest.hold(kinds, world_size, shape, rounds).values()
        found[kind] = {
            "on": [a / b for a, b in zip(on, off, strict=True)],
            "following": [a / b for a, b in zip(following, off, strict=True)],
        }
    return found


INTRO = f"""
{SHAPE.n_layer} layers x width {SHAPE.d_model} x {SHAPE.seq_len} tokens x {SHAPE.batch} sequences,
fp32, one thread a rank. *on*: every step of every run, traced or not. *following*: each operator's
tensors are followed too, as a run does in one step, for its memory and the picture of it; here in
every step. Contestants take turns; a ratio is to the neighbouring step without meters: median and
quartiles.
"""


def main(rounds: int) -> None:
    print(heading("What the meters cost", COMMAND), end="")
    print(INTRO)
    print(table("kind", "ranks", "meters", "ratio to off", "quartiles", "bar", "steps"))
    print(rule(7))
    for kind, ways in overheads(SHAPE, rounds).items():
        for way, ratios in ways.items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            spread = f"{low:.3f} - {high:.3f}"
            cells = (kind, str(WORLD_SIZES[kind]), way, f"{middle:.3f}", spread)
            print(table(*cells, f"<= {BARS[way]:.2f}", str(len(ratios))))


if __name__ == "__main__":
    given = [a.removeprefix("rounds=") for a in sys.argv[1:]]
    main(int(given[0]) if given else ROUNDS)
