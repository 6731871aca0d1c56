"""docs/results/costs.md: what a step of every strategy costs, measured and by formula.

./launch.sh python -m experiments.figures.costs > docs/results/costs.md      some minutes on two
cores
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator

from experiments.console import DASH
from experiments.document import heading, rule, table
from experiments.explain import Explained, Explanation, case_of, messages
from experiments.figures.kernel_bytes import STEPS, WIDE, Counted, measure

COMMAND = "./launch.sh python -m experiments.figures.costs > docs/results/costs.md"
WORLD_SIZES = (2, 4)
WIDTH = 100  # of a line of prose


def communication() -> Iterator[str]:
    """Bytes of every strategy: the ledgers', the closed forms', the kernel's."""
    yield "## Bytes that a step sends\n"
    yield textwrap.fill(
        f"GPT of 4 layers, width {WIDE['model.d_model']}, sequences of {WIDE['seq_len']}, fp32, "
        "gradients clipped; all ranks together, MB (10^6 bytes). *payload*: what the ledgers say "
        "was handed over, by NCCL's convention; *closed form*: the same by formula; *off*: the "
        "bytes by which any message of any rank differs, summed. *ring*: what a ring would send; "
        "*gloo*: what gloo's algorithms send, whose reduce_scatter is an all_reduce of the whole "
        f"input. *kernel*: what the loopback device counted in a step, the mean of {STEPS}, in a "
        "network namespace of its own; *framing*: what that is more than gloo's bytes: headers of "
        "TCP, IP and gloo, and acknowledgements.",
        WIDTH,
    )
    for world_size in WORLD_SIZES:
        counted = measure(world_size)
        yield f"\n### {world_size} ranks\n"
        head = ("strategy", "payload", "closed form", "off, B", "ring", "gloo", "kernel", "framing")
        yield table(*head)
        yield rule(len(head))
        for strategy in counted:
            yield bytes_row(strategy)
        if world_size == WORLD_SIZES[0]:
            first = counted
    yield "\n### Each message and its formula: rank 0 of two\n"
    yield from formula_tables(first)


def bytes_row(strategy: Counted) -> str:
    """Of all ranks together; a message between two is counted where it is sent."""
    rows = [row for rank in explained(strategy) for row in rank]
    closed = sum(r.closed_form or 0 for r in rows if not r.cost.startswith("recv"))
    offs = [row.off for row in rows]
    off = DASH if None in offs else f"{sum(abs(of or 0) for of in offs):.0f}"
    numbers = [strategy.total("payload_bytes"), closed]
    counts = [strategy.total("wire_bytes"), strategy.total("backend_bytes"), strategy.kernel_bytes]
    return table(
        strategy.name,
        *[f"{number / 1e6:.3f}" for number in numbers],
        off,
        *[f"{number / 1e6:.3f}" for number in counts],
        f"{100 * strategy.framing:.2f} %",
    )


def explained(strategy: Counted) -> list[list[Explained]]:
    """Each rank's messages beside their closed forms."""
    config = strategy.config
    return [
        messages(case_of(config, rank), rows, config.impl)
        for rank, rows in enumerate(strategy.rows)
    ]


def formula_tables(strategies: list[Counted]) -> Iterator[str]:
    """Symbols, values and what was measured, in bytes."""
    head = ("strategy", "message", "formula", "gives", "measured")
    yield table(*head)
    yield rule(len(head))
    everything: list[Explained] = []
    for strategy in strategies:
        rows = explained(strategy)[0]
        everything += rows
        for row in rows:
            values = [f"{value or 0:,.0f}" for value in (row.closed_form, row.measured)]
            yield table(strategy.name, row.cost, row.formula or DASH, *values)
    yield ""
    yield textwrap.fill(f"{Explanation(everything).letters}.", WIDTH)


# What the document says, in order. Each gives lines of Markdown under a heading of its own.
SECTIONS: list[Callable[[], Iterator[str]]] = [communication]


def main() -> int:
    print(heading("What a step costs", COMMAND))
    for section in SECTIONS:
        try:
            for line in section():
                print(line, flush=True)
        except OSError as reason:  # no network namespace
            print(f"{section.__name__}: {reason}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
