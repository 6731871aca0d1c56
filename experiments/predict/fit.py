"""./launch.sh python -m experiments.predict.fit [write|constants]: efficiencies, fitted.

Prints each number with its prior, and how far predictions are off. `write` puts the numbers into
configs/cluster/*.yaml, where the others leave them. `constants` fits nothing, and says how far
predictions are off at other values of two constants of the simulator.
"""

from __future__ import annotations

import re
import sys

import numpy as np

from experiments.predict import clusters
from experiments.predict.score import ROWS
from simulator import data_seconds, estimate
from simulator.fit import Parameter, Problem, fit, parameters
from simulator.published import read
from simulator.score import summary

AS_H100 = ("mi300x", "tpu_v5p")  # no published run of theirs was fitted
# where they are, and values at which the error is shown
CONSTANTS = {
    "FUSED": (estimate, (0.4, 0.6, 0.8, 1.0)),
    "SLOWED": (data_seconds, (0.0, 0.1, 0.189, 0.3, 0.4)),
}
FP8 = "device.efficiency.matmul_fp8"


def main(argv: list[str]) -> int:
    problem = timed_problem()
    if "constants" in argv:
        errors_at_constants(problem)
        return 0
    found, x = parameters(), fit(problem, np.ones(len(problem.rows), dtype=bool))
    for parameter, at in zip(found, x, strict=True):
        value, kind = parameter.value(at), " ".join(parameter.clusters)
        print(f"{parameter.key:30} {value:<10.4g} prior {parameter.prior:<8g} {at:+.1f} sd  {kind}")
    errors = summary(problem.predict(), problem.measured, problem.sources.tolist())
    print(f"mean over sources of the mean absolute error: {100 * errors['macro_mape']:.2f} %")
    if "write" in argv:
        for parameter, at in zip(found, x, strict=True):
            write(parameter, parameter.value(at))
    return 0


def errors_at_constants(problem: Problem) -> None:
    """Print the error of the clusters as they are, with other constants than the simulator has."""
    for name, (module, values) in CONSTANTS.items():
        own = getattr(module, name)
        for value in values:
            setattr(module, name, value)
            errors = summary(problem.predict(), problem.measured, problem.sources.tolist())
            mark = " as it is" if value == own else ""
            print(f"{name}={value}: {100 * errors['macro_mape']:.2f} %{mark}")
        setattr(module, name, own)


def timed_problem() -> Problem:
    """All published rows that have a time."""
    known = clusters.load_all()
    rows, _ = read(ROWS, known)
    return Problem([row for row in rows if row.seconds and not row.out_of_memory], known)


def write(parameter: Parameter, value: float) -> None:
    """Put a number into the files of its clusters, at its dotted key; nothing else changes."""
    names = parameter.clusters + (AS_H100 if "h100" in parameter.clusters else ())
    for name in names:
        path = clusters.FOLDER / f"{name}.yaml"
        if parameter.key == FP8 and clusters.load(name).device.peak_flops.fp8 is None:
            continue
        path.write_text(replaced(path.read_text(), parameter.key, value))


def replaced(text: str, key: str, value: float) -> str:
    """A YAML of nested maps with another number at a dotted key, comments and order kept."""
    *path, last = key.split(".")
    at = 0
    for depth, name in enumerate(path):
        found = re.compile(rf"^{'  ' * depth}{name}:\n", re.MULTILINE).search(text, at)
        assert found, key
        at = found.end()
    line = re.compile(rf"^{'  ' * len(path)}{last}: .*$", re.MULTILINE)
    number = f"{value:.4g}"
    if "e" in number:  # YAML wants a point before the exponent
        mantissa, _, exponent = number.partition("e")
        number = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}"
    return text[:at] + line.sub(f"{'  ' * len(path)}{last}: {number}", text[at:], count=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
