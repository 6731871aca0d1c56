"""docs/results/score.md and docs/results/score.png: how far predictions are from published
measurements.

./launch.sh python -m experiments.predict.score_report        about a minute
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.document import heading, table
from experiments.predict.fit import timed_problem
from experiments.predict.score import ROWS, Scored, error_cells, percent, score
from minigpt.config import FFN
from simulator.fit import Problem, fit, leave_one_source_out, parameters
from simulator.published import Row
from simulator.score import MOST_OVER, summary

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
COMMAND = "./launch.sh python -m experiments.predict.score_report"
ORIGINS = {
    "mpt": "LLM-Foundry: MPT, FSDP",
    "tt": "torchtitan",
    "fms": "fms-fsdp",
    "ptdp": "Megatron-LM: Narayanan et al. 2021, tables 1 and 2",
    "meg20": "Megatron-LM, 2020",
    "megh": "Megatron-Core on H100",
    "megl": "Megatron-LM: Llama in fp8",
    "kort": "Megatron-LM: Korthikanti et al. 2022",
    "mtnlg": "Megatron-Turing NLG 530B",
    "llama3": "Llama 3 405B",
    "mega": "MegaScale",
    "bs": "BLOOM's tuning runs",
    "bs13": "BigScience 1.3B on V100",
    "nt": "nanotron",
    "vt": "vTrain's ground truth",
    "sx": "SimuMax on B200",
    "sl": "Sailor on GH200",
    "nemo": "NeMo",
    "mb": "Megatron-Bridge",
}
WORST = 15  # rows that the document lists


def main() -> int:
    scored = score(ROWS)
    problem = timed_problem()
    x = fit(problem, np.ones(len(problem.rows), dtype=bool))
    left_out = leave_one_source_out(problem)
    draw(scored, DOCS / "score.png")
    (DOCS / "score.md").write_text("\n".join(document(scored, problem, x, left_out)) + "\n")
    return 0


def document(scored: Scored, problem: Problem, x: np.ndarray, left_out: np.ndarray) -> list[str]:
    said = scored.said()
    out = summary(left_out, problem.measured, problem.sources.tolist())
    fits, time = said["feasibility"], said["time"]
    return [
        *heading("Predictions against published measurements", COMMAND).splitlines(),
        "",
        "`./launch.sh score` predicts the same rows again.",
        "",
        f"{time['rows']} configurations with a published step time, from {len(time['sources'])} "
        "sources (experiments/published/README.md). Nothing is fitted to a row or to a source: "
        f"{len(x)} numbers, most of them one a kind of device, are fitted to all of them. So the "
        "honest figure is the last column: the error on a source whose rows the fit has not seen.",
        "",
        "![predicted against measured](score.png)",
        "",
        "## Step time",
        "",
        *time_table(time, out),
        "",
        *megatron(scored),
        "",
        "A row's program is known, and with it what it hides behind compute, which attention "
        "kernel and loss it has and how it cuts its stages (simulator/habits.py, "
        "simulator/candidates.py): the same for every row of a program, and no number that is "
        "fitted; but which of these facts matter was learnt with all sources in sight. What a row "
        "leaves open (micro-batch, recomputation, stages a rank) is tried, and the fastest that "
        "fits is taken.",
        "",
        "## Memory",
        "",
        "Peaks mean what each source means by it: BigScience the whole process, torchtitan and "
        "nanotron what the allocator reserved, SimuMax what was allocated.",
        "",
        *memory_table(said["memory"]),
        "",
        f"Of {fits['out_of_memory']} rows that ran out of memory "
        f"{fits['predicted_not_to_fit']} are predicted not to fit{but(fits)}. Of {fits['ran']} "
        "that ran "
        f"{fits['ran_above_limit']} are predicted to need more than {MOST_OVER} of their device.",
        *missed(scored),
        "",
        "## Mixtures of experts",
        "",
        *mixtures(scored, problem, left_out),
        "",
        "## Rows without a prediction",
        "",
        *(without(said["not_expressed"]) or ["None: every row is predicted."]),
        "",
        "## What was fitted",
        "",
        "`./launch.sh python -m experiments.predict.fit write` puts these into configs/cluster. "
        "Priors are what libraries and copies reach by themselves; `sd` is how far the fit went "
        "from one.",
        "",
        *parameter_table(x),
        "",
        f"## The {WORST} rows that are furthest off",
        "",
        *worst_table(scored),
    ]


def time_table(seen: dict[str, Any], unseen: dict[str, Any]) -> list[str]:
    lines = [
        "| source | | rows | mean error | median | 90th percentile | bias | left out of the fit |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, one in seen["sources"].items():
        out = percent(unseen["sources"][name]["mape"])
        cells = (name, ORIGINS.get(name, ""), str(one["rows"]), *error_cells(one), out)
        lines.append(table(*cells))
    means = f"{percent(seen['macro_mape'])} | | | | **{percent(unseen['macro_mape'])}**"
    return [*lines, f"| **mean of sources** | | {seen['rows']} | {means} |"]


MEGATRON = ("ptdp", "kort", "meg20")


def megatron(scored: Scored) -> list[str]:
    """The rows of Megatron-LM's own tables on A100, as one figure."""
    errors = [
        abs(predicted / row.seconds - 1)
        for row, predicted in zip(scored.rows, scored.seconds, strict=True)
        if row.source in MEGATRON and row.cluster.startswith("a100") and row.seconds
    ]
    mean = percent(float(np.mean(errors)))
    return [f"Megatron-LM's tables on A100 ({', '.join(MEGATRON)}): {len(errors)} rows, {mean}."]


def but(fits: dict[str, Any]) -> str:
    """Which rows that ran out of memory are predicted to fit."""
    missed = fits["out_of_memory_but_predicted_to_fit"]
    return f" (not {', '.join(missed)})" if missed else ""


def missed(scored: Scored) -> list[str]:
    """Of each row that ran out of memory and is predicted to fit: its nearest row that ran."""
    places = {row.name: i for i, row in enumerate(scored.rows)}
    gib = scored.memory_bytes / 2**30
    lines = []
    for name in scored.missed():
        i = places[name]
        row = scored.rows[i]
        near = [
            j
            for j, other in enumerate(scored.rows)
            if not other.out_of_memory
            and other.memory_bytes
            and (other.source, how(other)) == (row.source, how(row))
        ]
        said = f"{name} is predicted to need {gib[i]:.1f} GiB of {scored.capacity[i] / 2**30:.0f}."
        if near:
            j = min(near, key=lambda j: abs(gib[j] - gib[i]))
            ran = scored.rows[j]
            assert ran.memory_bytes
            said += (
                f" {ran.name} of the same layout, micro-batch and number of heads, which is "
                f"predicted to need {gib[j]:.1f}, ran and was measured at "
                f"{ran.memory_bytes / 2**30:.0f}: no column of the two rows says why one of them "
                "ran out. A known miss."
            )
        lines += ["", said]
    return lines


def how(row: Row) -> tuple[Any, ...]:
    """The device, layout, micro-batch, recomputation and heads of a row's first candidate."""
    plan = row.candidates[0].plan
    names = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "micro_batch_size")
    sizes = [int(getattr(plan, name)[0]) for name in (*names, "checkpointing", "precision")]
    return row.cluster, plan.model.n_head, *sizes


def mixtures(scored: Scored, problem: Problem, left_out: np.ndarray) -> list[str]:
    """How far the rows with experts are off, and what the mean over sources is without them."""
    experts = np.array([row.candidates[0].plan.model.ffn == FFN.moe for row in problem.rows])
    names = np.array([row.name for row in problem.rows])
    seen = dict(zip([row.name for row in scored.rows], scored.seconds, strict=True))
    fitted = np.array([seen[name] for name in names])
    rest = ~experts
    means = [
        summary(values[rest], problem.measured[rest], problem.sources[rest].tolist())["macro_mape"]
        for values in (fitted, left_out)
    ]
    lines = [
        f"{int(experts.sum())} of the rows are mixtures of experts. The columns do not say the "
        "experts' shape; it is known by the model's name (simulator/described.py). Without these "
        f"rows the mean of sources is {percent(means[0])}, and {percent(means[1])} left out.",
        "",
        "| source | rows | mean error | bias | left out of the fit |",
        "|---|--:|--:|--:|--:|",
    ]
    for source in dict.fromkeys(problem.sources[experts].tolist()):
        own = experts & (problem.sources == source)
        error, out = (v[own] / problem.measured[own] - 1 for v in (fitted, left_out))
        cells = (percent(np.abs(error).mean()), f"{100 * error.mean():+.1f} %")
        lines.append(table(source, str(own.sum()), *cells, percent(np.abs(out).mean())))
    return lines


def without(reasons: dict[str, str]) -> list[str]:
    return [f"- {n}: {why}" for why, n in Counter(reasons.values()).items()]


def memory_table(part: dict[str, Any]) -> list[str]:
    lines = [
        "| source | rows | mean error | median | 90th percentile | bias |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, one in part["sources"].items():
        lines.append(table(name, str(one["rows"]), *error_cells(one)))
    macro = percent(part["macro_mape"])
    return [*lines, f"| **mean of sources** | {part['rows']} | **{macro}** | | | |"]


def parameter_table(x: np.ndarray) -> list[str]:
    lines = ["| number | clusters | prior | fitted | sd |", "|---|---|--:|--:|--:|"]
    for parameter, at in zip(parameters(), x, strict=True):
        where = "all" if len(parameter.clusters) > 5 else ", ".join(parameter.clusters)
        value = f"{parameter.value(at):.3g}"
        lines.append(f"| {parameter.key} | {where} | {parameter.prior:g} | {value} | {at:+.1f} |")
    return lines


def worst_table(scored: Scored) -> list[str]:
    pairs = [
        (p / r.seconds - 1, r, p)
        for r, p in zip(scored.rows, scored.seconds, strict=True)
        if r.seconds
    ]
    lines = ["| row | measured s | predicted s | error |", "|---|--:|--:|--:|"]
    for error, row, predicted in sorted(pairs, key=lambda pair: -abs(pair[0]))[:WORST]:
        lines.append(f"| {row.name} | {row.seconds:.4g} | {predicted:.4g} | {100 * error:+.0f} % |")
    return lines


def draw(scored: Scored, path: Path) -> None:
    """Predicted against measured, seconds and bytes, both axes logarithmic, a colour a source."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    measured_s = [row.seconds for row in scored.rows]
    measured_gib = [row.memory_bytes and row.memory_bytes / 2**30 for row in scored.rows]
    _scatter(left, scored, measured_s, scored.seconds, "step time, seconds")
    _scatter(right, scored, measured_gib, scored.memory_bytes / 2**30, "peak memory, GiB")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _scatter(axes: Any, scored: Scored, measured: list, predicted: np.ndarray, what: str) -> None:
    sources = list(dict.fromkeys(row.source for row in scored.rows))
    known = scored.known(measured)
    for number, source in enumerate(sources):
        own = [i for i in known if scored.rows[i].source == source]
        marker, colour = "os^DvP*"[number % 7], f"C{number % 10}"
        axes.scatter(
            [measured[i] for i in own],
            predicted[own],
            s=14,
            c=colour,
            marker=marker,
            alpha=0.7,
            label=source,
        )
    if known:
        shown = np.array([[measured[i] for i in known], predicted[known]], dtype=np.float64)
        ends = np.array([shown.min() / 1.3, shown.max() * 1.3])
        axes.fill_between(ends, ends * 0.9, ends * 1.1, color="#e9e9ec", zorder=0)
        axes.plot(ends, ends, color="#8c8c8c", linewidth=0.8, zorder=1)
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=f"measured {what}", ylabel=f"predicted {what}")


if __name__ == "__main__":
    raise SystemExit(main())
