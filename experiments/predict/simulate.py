"""./launch.sh simulate [OVERRIDES]: what a step would cost on a cluster that you don't have.

./launch.sh simulate model=llama3_70b cluster=h100 layout.tp=8 layout.pp=4 layout.dp_shard=16 \
    micro_batch_size=1 gradient_accumulation_steps=16 activation_checkpointing=selective
./launch.sh simulate ... method=trace         the program itself on fake tensors, not closed forms
./launch.sh simulate ... trace=true           and its timeline, event by event
./launch.sh simulate ... scale.tokens=15T scale.price=2.5

Writes the ledger that a real run writes into a run folder, and prints its tables and a verdict.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from costs import ledger as ledgers
from experiments.compose import configs_of
from experiments.console import (
    DASH,
    costs_tables,
    human_bytes,
    human_seconds,
    make_console,
    share,
)
from experiments.outside_text import complain
from experiments.predict.plan_command import command_of
from experiments.predict.plan_config import Method, SimulateConfig, plain
from experiments.predict.scale import run_to_the_end, say_scale
from experiments.refused import Refused
from experiments.run_folder import make_folder
from parallel.layout import Impl
from simulator.coarse_programs import coarse_timeline
from simulator.formula_ledger import formula_steps
from simulator.plan_programs import event_count
from simulator.plan_times import timeline_of
from simulator.timeline import Timeline
from simulator.verdict import verdict
from simulator.work import peak_dtype

Step = dict[str, Any]
MOST_EVENTS = 50_000  # of a timeline; ten times as many took minutes to write and to draw


def command(argv: list[str]) -> int:
    """Predict, write, and print the tables or the ledger."""
    as_json = "--json" in argv
    configs = configs_of("simulate", [a for a in argv if a != "--json"])
    for number, config in enumerate(configs):
        check(config)
        given = Path(config.run.dir) if config.run.dir else None
        if given and len(configs) > 1:  # a sweep (-m)
            given = given / str(number)
        folder = make_folder(given, config.layout)
        ledger = simulate(config, folder)
        OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
        ledgers.write(folder / "ledger.json", ledger)
        if as_json:
            print(json.dumps(ledger, indent=1))
        else:
            show(config, ledger, folder)
            if not any(argument.lstrip("+").startswith("precision=") for argument in argv):
                print(f"precision={config.precision.value} was assumed; precision= sets it")
    return 0


def check(config: SimulateConfig) -> None:
    """Raise Refused for what no simulation has."""
    if config.impl != Impl.torch:
        raise Refused(f"impl={config.impl.value}: only impl=torch is simulated; give impl=torch")
    if config.compile:
        raise Refused("compile=true: a compiled step is not simulated; compile=false is")


def simulate(config: SimulateConfig, folder: Path) -> dict[str, Any]:
    """The ledger. With trace=true the timeline goes into `folder`."""
    if config.method == Method.trace:
        from experiments.predict.simulate_traced import traced_steps  # torch takes seconds

        return ledger_of(config, *traced_steps(config, folder))
    steps = formula_steps(
        config.model, config.layout, config.options, config.cluster, config.clip is not None
    )
    if config.trace:
        from experiments.predict.simulate_traced import draw

        draw(config, folder, drawn_timeline(config))
    return ledger_of(config, "formula", steps)


def drawn_timeline(config: SimulateConfig) -> Timeline:
    """Return the step of one rank of each pipeline stage, operator by operator, or pass by pass
    where that is more than MOST_EVENTS, and say so on standard error."""
    plan, clipped = (config.model, config.layout, config.options), config.clip is not None
    events = event_count(*plan, clipped)
    if events <= MOST_EVENTS:
        return timeline_of(*plan, config.cluster, clipped)
    complain(
        f"the timeline has an event for each pass of a stage: operator by operator it would have "
        f"{events:,}, and {MOST_EVENTS:,} are drawn at most"
    )
    return coarse_timeline(*plan, config.cluster, clipped)


def ledger_of(config: SimulateConfig, source: str, steps: list[Step]) -> dict[str, Any]:
    """A ledger of one rank of each pipeline place, or of the one that was traced."""
    layout, device = config.layout, config.cluster.device
    limit = device.memory_bytes * (1 - config.headroom)
    step, end = ledgers.step_of(steps), None
    seconds = step["time_s"]["total"]
    if seconds is not None:
        sizes = (config.model.parameters, step["tokens"], seconds, layout.world_size)
        end = run_to_the_end(config.scale, *sizes)
    return {
        "schema": ledgers.SCHEMA,
        "source": source,
        "config": plain(config),
        "layout": {"world_size": layout.world_size, **layout.by_axis},
        "model": {
            "parameters": config.model.parameters,
            "flops_per_token": steps[0]["flops"]["model"] * layout.world_size / steps[0]["tokens"],
        },
        "environment": {
            "cluster": config.cluster.name,
            "device": device.name,
            "device_memory_bytes": device.memory_bytes,
            "command": command_of(config),
            "fits": step["memory_bytes"]["peak"] <= limit,
            "verdict": verdict(steps, layout, config.options, limit),
            "peak_flops_per_s": device.flops(peak_dtype(config.precision)),
            "peak_dtype": peak_dtype(config.precision),
            "to_the_end": end,
        },
        "step": step,
        "ranks": steps,
    }


def human_peak(ledger: dict[str, Any]) -> str:
    """Return the peak that MFU and HFU are shares of."""
    known = ledger["environment"]
    return f"{known['peak_flops_per_s'] / 1e12:,.4g} TFLOP/s ({known['peak_dtype']})"


def show(config: SimulateConfig, ledger: dict[str, Any], folder: Path) -> None:
    """Tables as a run has them, and the verdict."""
    console, layout = make_console(), config.layout
    console.print(
        f"{config.model.parameters:,} parameters, {layout.label} on {layout.world_size:,} x "
        f"{config.cluster.device.name} ({config.cluster.name}), {config.precision.value}: "
        f"{config.batch_size:,} sequences of {config.seq_len:,} tokens a step",
        highlight=False,
    )
    for table in costs_tables(ledger):
        console.print(table)
    step = ledger["step"]
    total = step["time_s"]["total"]
    speed = DASH if step["tokens_per_s"] is None else f"{step['tokens_per_s']:,.0f}"
    console.print(
        f"{human_seconds(total)} a step, {speed} tokens/s  MFU {share(step['mfu'], 1.0)}  "
        f"HFU {share(step['hfu'], 1.0)} of {human_peak(ledger)}; "
        f"peak {human_bytes(step['memory_bytes']['peak'])} of "
        f"{human_bytes(config.cluster.device.memory_bytes)}"
    )
    console.print(ledger["environment"]["verdict"], markup=False, style="bold", soft_wrap=True)
    if ledger["environment"]["to_the_end"]:
        say_scale(console, ledger["environment"]["to_the_end"])
    console.print(f"run folder {folder}", markup=False)
