"""What answers rest on: ledgers of real runs, kept by the hash of their configuration; searches,
kept for this version of the simulator; and simulations, which take milliseconds and are made anew.

A run is looked for in runs/ask and started where it is not there; `again` starts all of them anew.
It is kept for this machine, Python and torch, not for a version of this program: after a change of
what is measured, ask with --again.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from costs import ledger as ledgers
from experiments import environment, launch
from experiments.ask.kept import KEPT, alone, computed, digest
from experiments.ask.quantity import FORMULA, MEASURED, SHARE, Quantity
from experiments.console import progress
from experiments.overrides import composed
from experiments.predict.plan_config import plain
from experiments.process import Stopped

# of every measured run: what costs time and is not asked for, and the same processor everywhere
PLAIN = ("device=cpu", "backend=gloo", "validation.batches=0", "sample.tokens=0", "run.save=false")
SAME_MACHINE = ("torch", "python", "processor", "cores")


class RunFailed(RuntimeError):
    """A run that an answer needs did not end well."""


@dataclass(frozen=True)
class Run:
    """A ledger, or what else was found out, and where it is kept."""

    name: str  # what it is called in an answer
    ledger: dict[str, Any]
    run: str  # its folder, or the command that prints it
    source: str

    def at(self, where: str, unit: str, label: str = "") -> Quantity:
        """The number at a place of the ledger. Raises ValueError where it was not measured.

        `where`: keys with dots; [i] an entry of a list; [key=value,...] the sum over the entries
        that match, [] over all; [key] of a dictionary whose keys are no words.
        """
        value = value_at(self.ledger, where)
        if value is None:
            raise ValueError(f"{self.run}: {where} was not measured")
        label = label or where.removeprefix("step.").replace("_", " ")
        return Quantity(f"{self.name}: {label}", value, unit, self.source, self.run, where)

    def memory(self, part: str = "peak") -> Quantity:
        return self.at(f"step.memory_bytes.{part}", "B", f"memory, {part}")

    def seconds(self, part: str = "total") -> Quantity:
        return self.at(f"step.time_s.{part}", "s", f"seconds, {part.replace('_', ' ')}")

    def payload(self, **match: str) -> Quantity:
        """Bytes that a rank hands over in a step, of the rows that match (axis, phase ...)."""
        return self._sent("payload_bytes", match)

    def wire(self, **match: str) -> Quantity:
        """Bytes that a ring sends."""
        return self._sent("wire_bytes", match)

    def _sent(self, what: str, match: dict[str, str]) -> Quantity:
        rows = ",".join(f"{key}={value}" for key, value in match.items())
        label = " ".join([what.replace("_", " "), *match.values()])
        return self.at(f"step.communication[{rows}].{what}", "B", label)

    @property
    def mfu(self) -> Quantity:
        return self.at("step.mfu", SHARE, "MFU")

    @property
    def speed(self) -> Quantity:
        return self.at("step.tokens_per_s", "tokens/s", "speed")

    @property
    def losses(self) -> list[float]:
        """Of each step; None where a step of fp16 was skipped for a loss that was not finite."""
        return self.ledger["training"]["losses"]


def value_at(ledger: Any, where: str) -> float | None:
    """See Run.at. Raises KeyError or IndexError where there is no such place."""
    head = re.match(r"([A-Za-z_0-9]+)|\[([^\]]*)\]", where)
    if not head:
        return ledger
    rest = where[head.end() :].removeprefix(".")
    key, inside = head.groups()
    if key is not None:
        return value_at(ledger[key], rest)
    if re.fullmatch(r"-?\d+", inside):
        return value_at(ledger[int(inside)], rest)
    if ledger is None:
        return None
    if isinstance(ledger, dict):
        return value_at(ledger[inside], rest)
    wanted = dict(pair.split("=") for pair in inside.split(",") if pair)
    rows = [row for row in ledger if all(str(row[k]) == v for k, v in wanted.items())]
    values = [value_at(row, rest) for row in rows]
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


class Evidence:
    """Gives questions their runs and simulations, and keeps what it gave: `ledgers`, by `run`."""

    def __init__(self, again: bool = False) -> None:
        self.again = again
        self.ledgers: dict[str, dict[str, Any]] = {}
        self.fresh: set[Path] = set()  # measured by this process

    def measured(self, name: str, *overrides: str) -> Run:
        """A real run. Raises RunFailed with the reason."""
        found = self.attempted(name, *overrides)
        if isinstance(found, str):
            raise RunFailed(f"./launch.sh {' '.join(overrides)}: {found}")
        return found

    def attempted(self, name: str, *overrides: str) -> Run | str:
        """A real run that may fail, or be refused: then the reason, one line."""
        try:
            config = environment.settle(composed("train", (*PLAIN, *overrides)), None, gpus=0)
        except ValueError as error:
            return str(error)
        folder = KEPT / f"{config.layout.label}-{_digest(config)}"
        self._once(folder, ("ledger.json", "failed.txt"), lambda: _start(config, overrides, folder))
        failed = folder / "failed.txt"
        if failed.exists():
            return failed.read_text().strip()
        return self._keep(Run(name, ledgers.read(folder / "ledger.json"), str(folder), MEASURED))

    def probed(self, name: str, ranks: int, module: str, function: str) -> Run:
        """What a function of a module finds out on each of `ranks` ranks: {"ranks": [...]}.

        By their names: the module may take seconds to import.
        """
        facts = {key: environment.facts()[key] for key in SAME_MACHINE}
        folder = KEPT / f"{name}-{digest([module, function, ranks, facts])}"
        path = folder / "measured.json"

        def measure() -> None:
            from experiments.ranks import run_ranks

            progress(f"measuring {name}")
            folder.mkdir(parents=True, exist_ok=True)
            found = run_ranks(ranks, getattr(importlib.import_module(module), function))
            path.write_text(json.dumps({"ranks": found, "environment": facts}, indent=1))

        self._once(folder, (path.name,), measure)
        return self._keep(Run(name, json.loads(path.read_text()), str(folder), MEASURED))

    def simulated(self, name: str, *overrides: str) -> Run:
        """The closed forms' ledger. Raises Refused for a plan that the rules do not let pass."""
        from experiments.predict.simulate import simulate

        ledger = simulate(composed("simulate", overrides), Path())
        return self._keep(Run(name, ledger, _command("simulate", overrides), FORMULA))

    def searched(self, name: str, *overrides: str) -> Run:
        """What `./launch.sh search --json` prints."""
        from experiments.predict.search import find, said_of

        config = composed("search", overrides)
        said = computed("search", plain(config), self.again, lambda: said_of(config, find(config)))
        return self._keep(Run(name, said, _command("search", overrides), FORMULA))

    def _once(self, folder: Path, files: tuple[str, ...], measure: Callable[[], None]) -> None:
        """Measure where none of the files is there, or where it is wanted again."""

        def there() -> bool:
            known = any((folder / name).exists() for name in files)
            return known and (not self.again or folder in self.fresh)

        if there():
            return
        with alone():
            if not there():  # another process may have made it in the meantime
                measure()
                self.fresh.add(folder)

    def _keep(self, run: Run) -> Run:
        self.ledgers[run.run] = run.ledger
        return run


def _command(verb: str, overrides: tuple[str, ...]) -> str:
    return " ".join(["./launch.sh", verb, *overrides])


def _digest(config: Any) -> str:
    """Of the machine that a configuration is measured on, and of what it sets otherwise than the
    schema does: a key that is new, and has its default, changes nothing."""
    facts = {key: environment.facts()[key] for key in SAME_MACHINE}
    return digest([different(plain(config), plain(type(config)())), facts])


def different(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What of a nested configuration is not as the defaults have it."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            value = different(value, defaults[key])
            if value:
                made[key] = value
        elif key not in defaults or value != defaults[key]:
            made[key] = value
    return made


def _start(config: Any, overrides: tuple[str, ...], folder: Path) -> None:
    """Train, as ./launch.sh does. What failed leaves failed.txt, with the reason."""
    progress(f"measuring ./launch.sh {' '.join(overrides)}")
    if folder.exists():  # of a run that was cut off, or is wanted again
        shutil.rmtree(folder)
    job = launch.prepare_job(config, list(overrides), launch.Torchrun(), folder)
    ended = launch.run(job, quiet=True)
    if ended.signal:  # a run that is done is kept all the same
        raise Stopped(ended.signal, ended.reason)
    if ended.reason:
        (folder / "failed.txt").write_text(f"{ended.reason}\n")
