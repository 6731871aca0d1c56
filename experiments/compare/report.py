"""./launch.sh report RUN... [out=FILE]: runs as one HTML file that opens anywhere, offline.

./launch.sh report runs/ddp runs/fsdp             report.html
./launch.sh report runs/sweep-* out=sweep.html    sort=, as compare takes it

The tables of `compare`, which sort; its pictures, which show their numbers; of runs with trace=true
the timeline of ranks and memory over time; and predictions beside what was measured. Its scripts
are in it, once, and nothing in it may fetch anything.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from costs import trace as traces
from experiments.compare.command import asked_for
from experiments.compare.comparison import Comparison, compared
from experiments.compare.report_figures import PlotlyFigure, figures_of, memory_over_time, timeline
from experiments.compare.sheets import sheets_of
from experiments.outside_text import complain, visible
from experiments.refused import Refused
from experiments.sheets import Sheet

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
TRACE = "trace.json.gz"
MOST_TIMELINES = 8  # runs with a trace that are drawn
MOST_CHANGES = 12  # differences that get a table of their own


@dataclass
class Section:
    """A part of the page."""

    title: str
    figures: list[PlotlyFigure] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)


def command(argv: list[str]) -> int:
    """Write the page."""
    asked = asked_for(argv, "report")
    if asked.format:
        raise Refused(f"--format={asked.format}: report writes HTML; compare has other formats")
    out = asked.out or Path("report.html")
    comparison = compared(asked.runs, asked.sort)
    sections, problems = sections_of(comparison)
    for line in [*comparison.problems, *problems]:
        complain(line)
    page = rendered(comparison, sections, shlex.join(["./launch.sh", "report", *argv]))
    try:
        out.write_text(page)
    except OSError as error:
        raise ValueError(f"out={out}: {error.strerror}") from error
    print(f"report {out}, {len(page) / 1e6:.1f} MB")
    return 2 if comparison.unread else 0


def sections_of(comparison: Comparison) -> tuple[list[Section], list[str]]:
    """The page's parts, and a line for each trace that cannot be read."""
    few = len(comparison.differences.elementary) <= MOST_CHANGES
    first, *others = sheets_of(comparison, with_changes=few)
    timelines, problems = timelines_of(comparison)
    sections = [
        Section("Runs", sheets=[first]),
        Section("Costs", figures_of(comparison)),
        Section("Timelines", timelines),
        Section("Tables", sheets=others),
    ]
    return [s for s in sections if s.figures or s.sheets], problems


def timelines_of(comparison: Comparison) -> tuple[list[PlotlyFigure], list[str]]:
    """Of each run that has a trace, who did what when and what filled memory."""
    figures: list[PlotlyFigure] = []
    problems = []
    paths = [(run, run.folder / TRACE) for run in comparison.runs]
    for run, path in [(run, path) for run, path in paths if path.is_file()][:MOST_TIMELINES]:
        try:
            trace = traces.read(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        name = f"run {run.number}, {run.name}"
        drawn = (
            timeline(trace, f"Ranks over one step of {name}") if trace.slices else None,
            memory_over_time(trace, f"Memory over one step of {name}"),
        )
        figures += [figure for figure in drawn if figure]
    return figures, problems


def rendered(comparison: Comparison, sections: list[Section], command: str) -> str:
    """The page's text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_as_it_reads,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    count = len(comparison.runs)
    return environment.get_template("report.html").render(
        title=f"worldsize: {count} run{'' if count == 1 else 's'}",
        summary=summary_of(comparison),
        warnings=[*comparison.problems, *comparison.warnings],
        sections=sections,
        command=command,
        plotly=get_plotlyjs(),
    )


def _as_it_reads(value: Any) -> Any:
    """Return what an expression of the template shows. What is marked as HTML or JSON is ours."""
    own = not isinstance(value, str) or hasattr(value, "__html__")
    return value if own else visible(value, lines=True)


def summary_of(comparison: Comparison) -> list[str]:
    """What a reader must know first."""
    runs = comparison.runs
    by_source: dict[str, int] = {}
    for run in runs:
        by_source[run.source] = by_source.get(run.source, 0) + 1
    sources = ", ".join(f"{count} {source}" for source, count in by_source.items())
    best = runs[comparison.by_cost()[0]]
    lines = [f"Runs: {sources}. The first of the table is run {best.number}, {best.name}."]
    keys = comparison.differences.keys
    if len(runs) > 1:
        lines.append(f"What differs: {', '.join(keys)}." if keys else "No key differs.")
    if not any((run.folder / TRACE).is_file() for run in runs):
        lines.append("No run has a trace, so there is no timeline; trace=true records one.")
    return lines
