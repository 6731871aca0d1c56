"""./launch.sh score [rows=FILE] [plot=FILE] [--json]: published measurements against predictions.

./launch.sh score                             experiments/published/measured.csv
./launch.sh score rows=more.csv --json        another file with the same columns
./launch.sh score plot=predicted.png          and a picture of predicted against measured

Nothing is fitted here: the efficiencies are those of configs/cluster (experiments/predict/fit.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from experiments.arguments import key_values
from experiments.console import DASH, make_console
from experiments.predict import clusters
from experiments.refused import Refused
from simulator.fit import Problem
from simulator.published import Row, read
from simulator.score import FITS, MOST_OVER, feasibility, summary

ROWS = Path(__file__).resolve().parents[1] / "published" / "measured.csv"


@dataclass
class Scored:
    """Rows, what was predicted for each of them, and what could not be expressed."""

    rows: list[Row]
    seconds: np.ndarray
    memory_bytes: np.ndarray
    capacity: np.ndarray
    not_expressed: dict[str, str]

    def time(self) -> dict[str, Any]:
        return self._summary([row.seconds for row in self.rows], self.seconds)

    def memory(self) -> dict[str, Any]:
        return self._summary([row.memory_bytes for row in self.rows], self.memory_bytes)

    def known(self, measured: list[float | None]) -> list[int]:
        """Places of the rows that ran and have a value in `measured`."""
        return [i for i, value in enumerate(measured) if value and not self.rows[i].out_of_memory]

    def _summary(self, measured: list[float | None], predicted: np.ndarray) -> dict[str, Any]:
        known = self.known(measured)
        values = np.array([measured[i] for i in known], dtype=np.float64)
        return summary(predicted[known], values, [self.rows[i].source for i in known])

    def missed(self) -> list[str]:
        """Rows that ran out of memory and are predicted to fit."""
        fits = self.memory_bytes <= FITS * self.capacity
        return [
            row.name for row, fit in zip(self.rows, fits, strict=True) if row.out_of_memory and fit
        ]

    def said(self) -> dict[str, Any]:
        """For --json."""
        failed = np.array([row.out_of_memory for row in self.rows], dtype=bool)
        return {
            "time": self.time(),
            "memory": self.memory(),
            "feasibility": {
                **feasibility(self.memory_bytes, self.capacity, failed),
                "out_of_memory_but_predicted_to_fit": self.missed(),
            },
            "not_expressed": self.not_expressed,
        }


def command(argv: list[str]) -> int:
    """Print the tables, or the object of --json."""
    _, given = key_values("score", "rows=FILE, plot=FILE, --json", argv)
    path = Path(given.get("rows", ROWS))
    try:
        scored = score(path)
    except OSError as error:
        raise Refused(f"rows={path}: {error.strerror}") from error
    if "plot" in given:
        from experiments.predict.score_report import draw

        draw(scored, Path(given["plot"]))
    if "--json" in argv:
        print(json.dumps(scored.said(), indent=1))
    else:
        show(scored)
    return 0


def score(path: Path) -> Scored:
    """Predict every row of a file. Raises ValueError or OSError, one line, for a bad one."""
    known = clusters.load_all()
    rows, not_expressed = read(path, known)
    if not rows:
        empty = np.zeros(0)
        return Scored([], empty, empty, empty, not_expressed)
    problem = Problem(rows, known)
    return Scored(rows, problem.predict(), problem.memory(), problem.capacity, not_expressed)


def show(scored: Scored) -> None:
    """Tables of time and memory by source, feasibility, and rows without a plan."""
    said, console = scored.said(), make_console()
    for name in ("time", "memory"):
        console.print(errors_table(f"{name}: predicted against measured", said[name]))
    fits = said["feasibility"]
    missed = " ".join(fits["out_of_memory_but_predicted_to_fit"])
    console.print(
        f"{fits['predicted_not_to_fit']} of {fits['out_of_memory']} rows that ran out of memory "
        f"are predicted not to fit{f' (not {missed})' if missed else ''}; "
        f"{fits['ran_above_limit']} of {fits['ran']} that ran are "
        f"predicted to need more than {MOST_OVER} of their device"
    )
    reasons: dict[str, list[str]] = {}
    for row, why in said["not_expressed"].items():
        reasons.setdefault(why, []).append(row)
    console.print(f"{len(said['not_expressed'])} rows not expressed")
    for why, rows in reasons.items():
        console.print(f"  {len(rows)}  {why}: {' '.join(rows)}", markup=False)


def errors_table(title: str, part: dict[str, Any]) -> Table:
    """One line a source, and the mean over sources below."""
    table = Table(title=title, title_justify="left")
    for name in ("source", "rows", "mean |error|", "median", "90th percentile", "bias"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, one in part["sources"].items():
        table.add_row(name, str(one["rows"]), *error_cells(one))
    table.add_section()
    macro = part["macro_mape"]
    table.add_row("mean of sources", str(part["rows"]), DASH if macro is None else percent(macro))
    return table


def error_cells(one: dict[str, Any]) -> list[str]:
    """Mean, median, 90th percentile and bias of one source."""
    values = [percent(one[key]) for key in ("mape", "median", "p90")]
    return [*values, f"{100 * one['bias']:+.1f} %"]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
