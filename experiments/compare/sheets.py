"""The tables of a comparison: runs by cost, what each holds, sends and spends, what changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from costs.ledger import MEMORY_PARTS, TIME_PARTS
from experiments.compare.comparison import MEDIANS, Comparison, names_of_predictions, summary
from experiments.compare.config_differences import CLUSTER, SOURCE, Difference, Values
from experiments.compare.run_costs import (
    EXPOSED,
    LOSS,
    NONE,
    PEAK,
    STEP,
    TOKENS,
    VALIDATION,
    WIRE,
    Change,
    Cost,
    Costs,
    error_of,
    ratio_text,
)
from experiments.console import DASH, human_bytes, human_seconds
from experiments.sheets import NOTHING, Cell, Sheet

IN_SHORT = (STEP, EXPOSED, PEAK, WIRE, TOKENS, LOSS, VALIDATION)
MOST_MESSAGES = 6  # kinds that have a column of their own
SMALLEST_ERROR = 0.001  # that is written out
WORDS = {
    STEP: "step",
    EXPOSED: "exposed",
    PEAK: "peak",
    WIRE: "sent",
    TOKENS: "tokens/s",
    LOSS: "loss",
    VALIDATION: "held-out",
}


def words_of(name: str) -> str:
    """A cost's name for a reader: wire_bytes.all_gather.dp_shard is `all_gather dp_shard`."""
    if name in WORDS:
        return WORDS[name]
    kind, _, rest = name.partition(".")
    said = rest.replace(".", " ") if kind in (WIRE, "payload_bytes") else rest.replace("_", " ")
    return said or kind.upper()


def human(name: str, value: float | None) -> str:
    """A cost with its unit."""
    if value is None:
        return DASH
    if name.startswith("time_s"):
        return human_seconds(value)
    if name.startswith(("memory_bytes", WIRE, "payload_bytes")):
        return human_bytes(value)
    if name == "mfu":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if name == TOKENS else f"{value:.4f}"


def sheets_of(comparison: Comparison, with_changes: bool = True) -> list[Sheet]:
    """All tables that have something to say; `with_changes`: one for each difference too."""
    changed = comparison.differences.elementary
    every = [
        runs_sheet(comparison),
        *([predictions_sheet(comparison)] if comparison.differences.predictions else []),
        *([differences_sheet(comparison)] if changed else []),
        *[change_sheet(comparison, difference) for difference in changed if with_changes],
        parts_sheet(comparison, "time of a step", STEP, TIME_PARTS),
        parts_sheet(comparison, "memory at the peak", PEAK, MEMORY_PARTS),
        messages_sheet(comparison),
    ]
    return [sheet for sheet in every if sheet.rows]


def runs_sheet(comparison: Comparison) -> Sheet:
    """The cheapest step a token first: what differs, and what it cost."""
    runs = comparison.runs
    rows = []
    for i in comparison.by_cost():
        cells = [cost_cell(name, comparison.costs[i]) for name in IN_SHORT]
        number = Cell(str(runs[i].number), runs[i].number)
        differs = in_words(comparison.differences.values[i])
        name = runs[i].name if differs == DASH else f"{runs[i].name}: {differs}"
        rows.append((number, Cell(name, name), *cells))
    columns = ("#", "run", *(WORDS[name] for name in IN_SHORT))
    title = f"runs, {ORDER_WORDS[comparison.order]}"
    return Sheet(title, columns, rows, ("run",), NOISE_CAPTION)


ORDER_WORDS = {
    "tokens": "the fastest a token first",
    "time": "the shortest step first",
    "memory": "the lowest peak first",
    "bytes": "the fewest bytes first",
    "loss": "the lowest loss first",
    "given": "in the order given",
}
NOISE_CAPTION = "± is the noise: half the distance between the quartiles of a run's steps"


def cost_cell(name: str, costs: Costs) -> Cell:
    """A cost, with its noise in per cent where it has one."""
    cost = costs.get(name)
    if cost is None:
        return NOTHING
    return Cell(human(name, cost.value) + noise_text(name, cost), cost.value)


def noise_text(name: str, cost: Cost) -> str:
    """Of a step, in per cent; its parts and its rate have the same."""
    if name != STEP or not cost.noise or not cost.value:
        return ""
    percent = 100 * cost.noise / cost.value
    return f" ±{percent:.1f}%" if percent < 1 else f" ±{percent:.0f}%"


def parts_sheet(comparison: Comparison, title: str, whole: str, parts: tuple[str, ...]) -> Sheet:
    """A row a run, a column a part."""
    kind = whole.partition(".")[0]
    names = [whole, *(f"{kind}.{part}" for part in parts)]
    names = [n for n in names if any(own[n].value for own in comparison.costs if n in own)]
    columns = ("#", "run", *(words_of(name) for name in names))
    return Sheet(title, columns, list(_rows(comparison, names)), ("run",))


def messages_sheet(comparison: Comparison) -> Sheet:
    """Bytes that a rank sends in a step, by collective and axis; the largest kinds by name."""
    kinds = comparison.message_kinds()[:MOST_MESSAGES]
    columns = ("#", "run", *(words_of(name) for name in (*kinds, WIRE)))
    rows = _rows(comparison, [*kinds, WIRE])
    title = "what a rank sends in a step, by collective and axis"
    return Sheet(title, columns, list(rows) if kinds else [], ("run",))


def _rows(comparison: Comparison, names: list[str]) -> Iterable[tuple[Cell, ...]]:
    for i in comparison.by_cost():
        run = comparison.runs[i]
        cells = [cost_cell(name, comparison.costs[i]) for name in names]
        yield (Cell(str(run.number), run.number), Cell(run.name, run.name), *cells)


def differences_sheet(comparison: Comparison) -> Sheet:
    """A row a difference: by how much each cost grew or shrank, or that it did not."""
    rows = []
    for difference in comparison.differences.elementary:
        changes = comparison.changes(difference)
        title = Cell(title_of(difference))
        pairs = Cell(str(len(difference.pairs)), len(difference.pairs))
        rows.append((title, pairs, *(ratio_cell(changes.get(name)) for name in IN_SHORT)))
    columns = ("what differs", "pairs", *(WORDS[name] for name in IN_SHORT))
    return Sheet("what each difference changed", columns, rows, ("what differs",))


def ratio_cell(changes: list[Change] | None) -> Cell:
    """After over before, the median of all pairs; `none` within the noise."""
    if not changes:
        return NOTHING
    told = summary(changes)
    middle = told["ratio"]
    if told["says"].startswith(NONE):
        return Cell(NONE, middle)
    return Cell(told["says"] if middle is None else ratio_text(middle), middle)


def change_sheet(comparison: Comparison, difference: Difference) -> Sheet:
    """Each cost before and after, the difference and the ratio, or that there is none."""
    rows: list[tuple[Cell, ...]] = []
    for name, changes in sorted(comparison.changes(difference).items(), key=_in_order):
        if name.startswith("payload_bytes") or not any(c.before or c.after for c in changes):
            continue
        told = summary(changes)
        before, after, apart, noise = (told[key] for key in (*MEDIANS, "noise"))
        rows.append(
            (
                Cell(_of_what(name)),
                Cell(human(name, before), before),
                Cell(human(name, after), after),
                Cell(signed(name, apart), apart),
                Cell(human(name, noise) if noise else DASH, noise),
                Cell(told["says"]),
            )
        )
    several = len(difference.pairs) > 1
    caption = f"medians of {len(difference.pairs)} pairs of runs" if several else ""
    columns = ("cost", "before", "after", "difference", "noise", "ratio")
    return Sheet(title_of(difference), columns, rows, ("cost", "ratio"), caption)


def _in_order(named: tuple[str, Any]) -> int:
    """Times, rates, memory, messages, losses; in each the order in which they were found."""
    kind = named[0].partition(".")[0]
    return KINDS.index(kind)


KINDS = (
    "time_s",
    TOKENS,
    "mfu",
    "memory_bytes",
    WIRE,
    "payload_bytes",
    LOSS,
    VALIDATION,
)


def _of_what(name: str) -> str:
    """Parts stand below their whole."""
    said = words_of(name)
    return said if name in (*IN_SHORT, "mfu") and name != EXPOSED else f"  {said}"


def signed(name: str, value: float) -> str:
    """A difference; of losses to two digits, for it may be small."""
    if not value:
        return "0"
    if name in (LOSS, VALIDATION):
        return f"{value:+.2g}"
    return human(name, value) if value < 0 else f"+{human(name, value)}"


def title_of(difference: Difference) -> str:
    """`precision: fp32 -> bf16`."""
    pairs = zip(difference.before.items(), difference.after.values(), strict=True)
    return ", ".join(f"{key}: {said(a)} -> {said(b)}" for (key, a), b in pairs)


def said(value: Any) -> str:
    return "null" if value is None else str(value)


def in_words(values: Values) -> str:
    """What a run has of the keys that differ; a simulation says how it was made. Of a layout the
    axes that are more than 1."""
    made, cluster = values.get(SOURCE), values.get(CLUSTER, DASH)
    where = [f"{made} on {cluster}" if made else cluster] if cluster != DASH else [made or ""]
    axes = {key: size for key, size in values.items() if key.startswith("layout.")}
    cut = [f"{key.removeprefix('layout.')}={size}" for key, size in axes.items() if size != 1]
    layout = cut or (["single"] if axes else [])
    hidden = {SOURCE, CLUSTER, *axes}
    rest = [f"{key}={said(value)}" for key, value in values.items() if key not in hidden]
    return " ".join(word for word in (*where, *layout, *rest) if word) or DASH


def error_text(error: float) -> str:
    """Signed; 0 where a prediction is right to the last byte."""
    small = abs(error) < SMALLEST_ERROR
    return "0" if not error else f"below {SMALLEST_ERROR:.1%}" if small else f"{error:+.1%}"


def predictions_sheet(comparison: Comparison) -> Sheet:
    """A measured run beside a simulation of its configuration, cost by cost."""
    rows = []
    for i, j in comparison.differences.predictions:
        measured, predicted = comparison.costs[i], comparison.costs[j]
        for name in names_of_predictions(measured):
            error = error_of(name, measured, predicted)
            if error is None or name.startswith("payload_bytes"):
                continue
            numbers = f"{comparison.runs[i].number} and {comparison.runs[j].number}"
            made = f"{comparison.runs[j].source} on {comparison.cluster(j)}"
            values = (measured[name].value, predicted[name].value)
            rows.append(
                (
                    Cell(numbers),
                    Cell(made),
                    Cell(_of_what(name)),
                    *(Cell(human(name, value), value) for value in values),
                    Cell(error_text(error), error),
                )
            )
    columns = ("runs", "predicted by", "cost", "measured", "predicted", "error")
    return Sheet("measured beside simulated", columns, rows, ("runs", "predicted by", "cost"))
