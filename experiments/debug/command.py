"""Runs that are broken on purpose, and what finds out.

./launch.sh debug                              the faults
./launch.sh debug nan-after-200 [OVERRIDES]    train with one of them
./launch.sh debug mean-of-means --diagnose     what is wrong with it, by the project's checks
./launch.sh debug mean-of-means --explain      and the evidence, as a table and a picture
./launch.sh debug none --diagnose [OVERRIDES]  nothing planted: for a program that you have changed
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.table import Table

from experiments import environment
from experiments.commands import Command, print_rows
from experiments.compose import run_hydra, to_config
from experiments.config import Device, TrainConfig
from experiments.console import make_console
from experiments.launch import Torchrun
from experiments.refused import Refused
from experiments.run_folder import make_folder

if TYPE_CHECKING:  # it needs torch, which takes seconds
    from experiments.debug.diagnose import Diagnosis

OPTIONS = ("--json", "--diagnose", "--explain")


def command(argv: list[str]) -> int:
    """List, train or diagnose. Exit status 0 whatever a diagnosis finds."""
    from experiments.debug.faults import fault_of  # torch takes seconds

    options = [a for a in argv if a in OPTIONS]
    rest = [a for a in argv if a not in OPTIONS]
    if not rest:
        return print_faults("--json" in options)
    fault = fault_of(rest[0])
    overrides = fault.overrides(rest[1:])
    composed: list[DictConfig] = []
    run_hydra("train", overrides, composed.append)
    if not composed:  # --help and its like
        return 0
    config = environment.settle(to_config(composed[0], TrainConfig), None, 0)
    fault.check(config)
    if "--diagnose" in options or "--explain" in options:
        return explain(fault.name, config, options)
    print(f"broken on purpose: {fault.name}: {fault.says}", file=sys.stderr, flush=True)
    train = Command(Torchrun(), "--json" in options, fault=fault.name)
    run_hydra("train", overrides, train)
    return print_rows(train)


def explain(name: str, config: TrainConfig, options: list[str]) -> int:
    """Diagnose, and say what was found."""
    from experiments.debug.diagnose import diagnose
    from experiments.debug.faults import FaultyProgram
    from experiments.debug.picture import draw

    if config.device == Device.cuda:
        raise Refused("device=cuda: a diagnosis runs on device=cpu")
    if config.resume or config.init or config.finetune.on:
        raise Refused("resume, init, finetune: a diagnosis is of a run from its first weights on")
    diagnosis = diagnose(FaultyProgram(name, config))
    sound = folder = None
    if "--explain" in options:
        sound = diagnose(FaultyProgram("none", config))
        folder = make_folder(Path(config.run.dir) if config.run.dir else None, config.layout)
        draw(diagnosis, sound, folder / "evidence.png", f"debug {name}: found {diagnosis.found}")
    if "--json" in options:
        print(json.dumps(diagnosis.said(name), indent=1))
        return 0
    console = make_console()
    console.print(table_of(diagnosis, sound))
    console.print(f"found: {diagnosis.found or 'nothing wrong'}", markup=False)
    if folder:
        console.print(f"picture: {folder / 'evidence.png'}", markup=False)
    return 0


def table_of(diagnosis: Diagnosis, sound: Diagnosis | None) -> Table:
    """The evidence, and beside it that of the same run without the fault where it was made."""
    table = Table(title="evidence", title_justify="left")
    heads = ("check", "measured", *(["without the fault"] if sound else []), "", "means")
    for head in heads:
        table.add_column(head, overflow="fold")
    beside = {f.check: f.says for f in sound.evidence} if sound else {}
    for f in diagnosis.evidence:
        without = [beside.get(f.check, "")] if sound else []
        means = "" if f.holds else f.names or "several"
        table.add_row(f.check, f.says, *without, "holds" if f.holds else "FAILS", means)
    return table


def print_faults(as_json: bool) -> int:
    """The list, and how to go on."""
    from experiments.debug.faults import FAULTS

    if as_json:
        said = [{"name": fault.name, "says": fault.says} for fault in FAULTS]
        print(json.dumps({"faults": said}, indent=1))
        return 0
    table = Table(title="faults", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("what is seen of it")
    for fault in FAULTS:
        table.add_row(fault.name, fault.says)
    console = make_console()
    console.print(table)
    console.print("./launch.sh debug NAME trains with it; --diagnose and --explain find it")
    return 0
