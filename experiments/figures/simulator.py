"""docs/results/simulator.md: how near the simulator is to real ranks, and how fast it is.

./launch.sh python -m experiments.figures.simulator > docs/results/simulator.md     twelve minutes,
2 cores
./launch.sh python -m experiments.figures.simulator seconds speed          only those, to the screen
"""

from __future__ import annotations

import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

from experiments.calibrate.check import MEMORY_BAR, ROUNDS, TIME_BAR, check, configurations
from experiments.console import progress
from experiments.document import heading, rule, table
from experiments.figures.agreement import Agreement, agreements, plans_of
from experiments.figures.given_back import given_back
from experiments.figures.large_traces import CLUSTER, both_ways, simulate
from experiments.predict import clusters
from minigpt.config import ModelConfig
from parallel.layout import Layout, Options
from simulator.plans import Plans
from simulator.search import CHUNK, predict

COMMAND = "./launch.sh python -m experiments.figures.simulator > docs/results/simulator.md"
WIDTH = 100  # of a line of prose
WORLD_SIZES = (2, 4, 8)
FORMULA_BAR, REPLAY_BAR = 0.05, 0.05
REPLAYS = 5  # recorded runs of each layout
GIB = 2**30


def head(*names: str) -> Iterator[str]:
    yield table(*names)
    yield rule(len(names))


def prose(text: str) -> str:
    return textwrap.fill(text, WIDTH) + "\n"


def off(value: float, bar: float, digits: int = 1) -> str:
    """A signed error; one that is not within its bar stands out."""
    text = f"{value:+.{digits}%}"
    return text if abs(value) <= bar else f"**{text}**"


def ranks() -> Iterator[str]:
    """Bytes and memory of every layout: measured, traced, by formula."""
    yield "## Bytes and memory of every layout\n"
    yield prose(
        "Each layout of docs/results/parity.md that is traced (not those written by hand, nor "
        "experts whom "
        "tokens choose without a limit), 4 layers of width 64, sequences of 128, fp32, gradients "
        "clipped. *bytes*: payload of all messages of a step on the rank with the most; the "
        "column behind counts the messages, by collective, axis, group size, dtype and phase, of "
        "which calls or bytes differ between measured and traced, and those, by collective, axis "
        "and dtype, of which bytes differ between traced and closed form, over all ranks that "
        "were traced (the last; where stages differ the first, and of many stages one in the "
        "middle). *peak*: memory of a rank at "
        f"its fullest, MB (10^6 bytes). Bars: no byte; {MEMORY_BAR:.0%} traced to measured, "
        f"{FORMULA_BAR:.0%} formula to traced; bold marks what is not within them."
    )
    names = ("layout", "ranks", "bytes", "differ", "flops", "peak", "traced", "formula to traced")
    yield from head(*names)
    for world_size in WORLD_SIZES:
        progress(f"ranks: {world_size}")
        of_plan: dict[str, list[Agreement]] = {}
        for one in agreements(world_size, plans_of(world_size)):
            of_plan.setdefault(one.plan.name, []).append(one)
        for name, found in of_plan.items():
            yield ranks_row(name, world_size, found)


def ranks_row(name: str, world_size: int, found: list[Agreement]) -> str:
    differ = sum(differences(one) for one in found)
    sent = max(sum(one.payloads[0].values()) for one in found)
    same_flops = all(one.traced.flops == one.measured["flops"]["hardware"] for one in found)
    peaks = [one.peaks for one in found]
    fullest = max(measured for measured, _, _ in peaks)
    traced = max((t / m - 1 for m, t, _ in peaks), key=abs)
    formula = max((f / t - 1 for _, t, f in peaks), key=abs)
    return table(
        name,
        str(world_size),
        f"{sent:,}",
        str(differ) if differ == 0 else f"**{differ}**",
        "equal" if same_flops else "**differ**",
        f"{fullest / 1e6:.3f}",
        off(traced, MEMORY_BAR, 2),
        off(formula, FORMULA_BAR, 2),
    )


def differences(one: Agreement) -> int:
    """Kinds of messages that are not the same in all sources."""
    measured, traced = one.calls
    _, sent, formula = one.payloads
    count = sum(measured.get(key) != traced.get(key) for key in measured.keys() | traced.keys())
    if formula is not None:
        count += sum(sent.get(k, 0) != formula.get(k, 0) for k in sent.keys() | formula.keys())
    return count


def seconds() -> Iterator[str]:
    """Step times: replayed, and predicted after this machine was measured."""
    yield "## Time of a step on this machine\n"
    yield prose(
        f"Recorded runs replayed on their own messages, replayed over measured (bar: within "
        f"{REPLAY_BAR:.0%} in the median of {REPLAYS} runs; 4 layers of width 64):"
    )
    yield from head("layout", "median", "all runs")
    progress("seconds: recorded runs")
    for label, ratios in given_back(REPLAYS).items():
        every = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
        yield table(label, off(statistics.median(ratios) - 1, REPLAY_BAR), every)
    model = configurations()["single"].model
    yield ""
    yield prose(
        f"Predicted after `./launch.sh calibrate` (GPT of {model.n_layer} layers, width "
        f"{model.d_model}, 8 sequences of {model.context}, fp32, two ranks of one thread; models "
        f"of other shapes are calibrated on; measured is the median of {ROUNDS} turns). Bars: "
        f"{TIME_BAR:.0%} of the time, {MEMORY_BAR:.0%} of the memory; bold is not within. The same "
        "table: `./launch.sh check`."
    )
    yield from head("layout", "measured, ms", "traced", "off", "formula", "off", "memory off")
    for one in check():
        times = [f"{1e3 * s:.0f}" for s in (one.measured_s, one.traced_s, one.formula_s)]
        errors = [off(error, TIME_BAR) for error in (one.time_error, one.formula_error)]
        memory = off(one.memory_error, MEMORY_BAR, 2)
        yield table(one.name, times[0], times[1], errors[0], times[2], errors[1], memory)


def large() -> Iterator[str]:
    """Traces of large models: speed, memory and step time beside the closed forms."""
    yield f"## Large models on {CLUSTER}\n"
    yield prose(
        "Sequences of 8,192, one a micro-batch, bf16. *answers in*: `./launch.sh simulate ... "
        "method=trace` from the command line, one rank of each pipeline stage traced, and the "
        "resident memory of its fullest process; bars: 70B on 1,024 ranks in 30 s and 4 GiB, 405B "
        f"in 60 s. Memory of a rank: bar {FORMULA_BAR:.0%}. *step*: the traced programs replayed, "
        "with a GPU's kernels and streams, beside the closed form. The "
        "trace prices each of torch's operators by its flops and bytes, and what the host takes "
        "for it, of DTensors over tp more; the closed form counts a block's products and "
        "element-wise passes, fused as in the programs whose published runs it is fitted on. "
        "*exposed*: seconds in which a rank only waits for a message."
    )
    yield from head(
        *("model, layout", "answers in", "needs", "a rank holds", "formula off"),
        *("step, traced", "formula", "off", "exposed, traced", "formula"),
    )
    for name, traced, formula in both_ways():
        times = [one.ledger["step"]["time_s"] for one in (traced, formula)]
        yield table(
            name,
            f"{traced.seconds:.1f} s",
            f"{traced.memory_bytes / GIB:.2f} GiB",
            f"{traced.peak / GIB:.1f} GiB",
            off(formula.peak / traced.peak - 1, FORMULA_BAR),
            f"{traced.step_s:.2f} s",
            f"{formula.step_s:.2f} s",
            f"{formula.step_s / traced.step_s - 1:+.0%}",
            *[f"{one['exposed_communication']:.2f} s" for one in times],
        )


def speed() -> Iterator[str]:
    """Closed forms: plans a second, and the command line."""
    yield "## Speed of the closed forms\n"
    progress("speed")
    rate = plans_a_second()
    walls = [simulate("model=llama3_70b", "layout.dp_shard=64").seconds for _ in range(5)]
    yield prose(
        f"{rate:,.0f} plans a second on one core, time and memory of each (bar: 100,000). "
        f"`./launch.sh simulate model=llama3_70b layout.dp_shard=64` answers in "
        f"{statistics.median(walls):.2f} s, the median of {len(walls)} (bar: 1 s)."
    )


def plans_a_second() -> float:
    """Time and memory of plans, in arrays as large as the search's; the median of five."""
    one = Plans.of(ModelConfig(), Layout(dp_shard=8, tp=2), Options())
    plans, cluster = one[[0] * CHUNK], clusters.load(CLUSTER)
    taken = []
    for _ in range(5):
        start = time.process_time()  # of one core, however busy the machine is
        predict(plans, cluster)
        taken.append(time.process_time() - start)
    return CHUNK / statistics.median(taken)


# What the document says, in order. Each gives lines of Markdown under a heading of its own.
SECTIONS: list[Callable[[], Iterator[str]]] = [ranks, seconds, large, speed]


def main(names: list[str]) -> None:
    """Print the document, or the sections that are asked for."""
    print(heading("How near the simulator is", COMMAND))
    for section in SECTIONS:
        if not names or section.__name__ in names:
            for line in section():
                print(line, flush=True)
            print()


if __name__ == "__main__":
    main(sys.argv[1:])
