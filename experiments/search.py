"""./launch.sh search [OVERRIDES]: every plan for a model on so many devices, the best first.

./launch.sh search model=llama3_70b cluster=h100 gpus=512 global_batch_tokens=4M
./launch.sh search ... explain=pp8-dp_shard8-tp8    why that layout is not the best
./launch.sh search ... plot=front.png               memory against time
./launch.sh search ... --verify                     trace the winner, and train its tiny twin
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from rich.table import Table

from experiments.compose import Refused, run_hydra, to_config
from experiments.console import DASH, human_bytes, human_seconds, make_console, share
from experiments.plan_config import SearchConfig, axes_of
from experiments.scale import run_to_the_end, say_scale
from parallel.layout import MESH_AXES
from simulator.plans import CHECKPOINTING, PRECISIONS, SCHEDULES
from simulator.search import Found, search
from simulator.space import Space, layout_at


def command(argv: list[str]) -> int:
    """Search, and print what was found."""
    as_json, verify = "--json" in argv, "--verify" in argv
    composed: list[DictConfig] = []
    rest = [a for a in argv if a not in ("--json", "--verify")]
    run_hydra("search", rest, composed.append)
    for job in composed:
        config = to_config(job, SearchConfig)
        found = find(config)
        said = said_of(config, found)
        if config.plot:
            from experiments.search_picture import draw

            draw(found, config, Path(config.plot))
        if verify:
            from experiments.verify import verify_winner

            said["verified"] = verify_winner(config, found)
        if as_json:
            print(json.dumps(said, indent=1))
        else:
            show(config, found, said)
    return 0


def find(config: SearchConfig) -> Found:
    """All plans. Raises Refused where there is none."""
    space = Space(
        config.model,
        config.seq_len,
        config.gpus,
        config.batch_size,
        config.layout.given,
        tuple(config.precision),
        tuple(config.activation_checkpointing),
        tuple(config.schedule),
        tuple(config.zero_stage),
        micro_batch_sizes=tuple(config.micro_batch_size),
    )
    try:
        return search(space, config.cluster, config.headroom, config.tensor_parallel_in_node)
    except ValueError as error:
        raise Refused(str(error)) from error


def said_of(config: SearchConfig, found: Found) -> dict[str, Any]:
    """For --json."""
    order = found.order
    said: dict[str, Any] = {
        "considered": len(found.predicted) + sum(found.refused.values()),
        "predicted": len(found.predicted),
        "plans": [plan_of(found, int(i)) for i in order[: config.top]],
        "front": [plan_of(found, int(i)) for i in found.front()],
        "rejected": dict(found.reasons().most_common()),
    }
    if config.explain is not None:
        said["explained"] = explain(config, found)
    if len(order):
        said["to_the_end"] = run_to_the_end(
            config.scale,
            config.model.parameters,
            float(found.predicted.plans.tokens[order[0]]),
            said["plans"][0]["time_s"]["total"],
            config.gpus,
        )
    return said


def plan_of(found: Found, i: int) -> dict[str, Any]:
    """One plan, with what it takes."""
    predicted, plans = found.predicted, found.predicted.plans
    layout = layout_at(plans, i)
    staged = layout.pp > 1
    return {
        "layout": {axis: getattr(layout, axis) for axis in (*MESH_AXES, "ep")},
        "label": layout.label,
        "schedule": SCHEDULES[plans.schedule[i]].value if staged else None,
        "stages_per_rank": int(plans.local_stages[i]) if staged else None,
        "micro_batch_size": int(plans.micro_batch_size[i]),
        "gradient_accumulation_steps": int(plans.micro_batches[i]),
        "activation_checkpointing": CHECKPOINTING[plans.checkpointing[i]].value,
        "zero_stage": int(plans.zero_stage[i]) if layout.dp_shard > 1 else None,
        "sequence_parallel": bool(plans.sequence_parallel[i]),
        "precision": PRECISIONS[plans.precision[i]].value,
        "fits": bool(found.fits[i]),
        "time_s": {key: float(value[i]) for key, value in predicted.time_s.items()},
        "mfu": float(predicted.mfu[i]),
        "memory_bytes": {key: int(value[i]) for key, value in predicted.memory_bytes.items()},
    }


def explain(config: SearchConfig, found: Found) -> dict[str, Any]:
    """The best plan of the layout that the user names, beside the winner."""
    assert config.explain is not None
    wanted, plans = axes_of(config.explain), found.predicted.plans
    same = np.ones(len(plans), dtype=bool)
    for axis, size in wanted.items():
        same &= getattr(plans, axis) == size
    if not same.any():
        product = " * ".join(f"{axis}({size})" for axis, size in wanted.items() if axis != "ep")
        raise Refused(
            f"explain={config.explain}: the search has no such plan ({product} must be "
            f"gpus={config.gpus}, and the layout must be allowed)"
        )
    places = np.flatnonzero(same)
    fitting = places[found.fits[places]]
    key = "total" if len(fitting) else "peak"
    of = found.predicted.time_s if len(fitting) else found.predicted.memory_bytes
    among = fitting if len(fitting) else places
    best = int(among[np.argmin(of[key][among])])
    order = found.order
    reason = None
    if not len(fitting):
        over = found.predicted.memory_bytes["peak"][best] - found.limit
        reason = f"out of memory by {human_bytes(float(over))}"
    elif len(order) and best != order[0]:
        reason = str(found.lost(np.array([best]), int(order[0]))[0])
    return {"plan": plan_of(found, best), "loses_by": reason}


def show(config: SearchConfig, found: Found, said: dict[str, Any]) -> None:
    """Tables: the best plans, the front, why the others lost."""
    console = make_console()
    device = config.cluster.device
    console.print(
        f"{said['predicted']:,} plans of {config.gpus:,} x {device.name or config.cluster.name}, "
        f"{config.batch_size:,} sequences of {config.seq_len:,} tokens a step; "
        f"{human_bytes(found.limit)} may be filled",
        highlight=False,
    )
    if not said["plans"]:
        console.print("no plan fits: more devices, or a smaller micro-batch, would be needed")
    else:
        console.print(plans_table("the fastest plans that fit", said["plans"]))
        console.print(plans_table("less memory, more time", said["front"][1:]))
    reasons = Table(title="why the others lost", title_justify="left")
    reasons.add_column("reason")
    reasons.add_column("plans", justify="right")
    for reason, count in said["rejected"].items():
        reasons.add_row(reason, f"{count:,}")
    console.print(reasons)
    if "explained" in said:
        say_explained(console, said)
    if said.get("to_the_end"):
        say_scale(console, said["to_the_end"])
    if "verified" in said:
        console.print(said["verified"]["says"], markup=False)


def plans_table(title: str, plans: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layout", overflow="fold")
    for name in ("schedule", "batch", "recompute", "zero"):
        table.add_column(name)
    for name in ("step", "MFU", "memory", "exposed", "bubble"):
        table.add_column(name, justify="right")
    for plan in plans:
        time = plan["time_s"]
        looped = (plan["stages_per_rank"] or 1) > 1
        table.add_row(
            plan["label"],
            (plan["schedule"] or DASH) + (f" x{plan['stages_per_rank']}" if looped else ""),
            f"{plan['micro_batch_size']} x {plan['gradient_accumulation_steps']}",
            plan["activation_checkpointing"],
            DASH if plan["zero_stage"] is None else str(plan["zero_stage"]),
            human_seconds(time["total"]),
            share(plan["mfu"], 1.0),
            human_bytes(plan["memory_bytes"]["peak"]),
            share(time["exposed_communication"], time["total"]),
            share(time["bubble"], time["total"]),
        )
    return table


def say_explained(console: Any, said: dict[str, Any]) -> None:
    """The named layout's parts beside the winner's."""
    own, reason = said["explained"]["plan"], said["explained"]["loses_by"]
    console.print(plans_table(f"explained: loses by {reason or 'nothing, it is the best'}", [own]))
    if not said["plans"]:
        return
    best = said["plans"][0]
    table = Table(title=f"{own['label']} beside {best['label']}", title_justify="left")
    for name in ("part", own["label"], best["label"], "more"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for key in own["time_s"]:
        a, b = own["time_s"][key], best["time_s"][key]
        table.add_row(key.replace("_", " "), human_seconds(a), human_seconds(b), _more(a, b))
    a, b = own["memory_bytes"]["peak"], best["memory_bytes"]["peak"]
    table.add_row("memory", human_bytes(a), human_bytes(b), _more(a, b))
    console.print(table)


def _more(a: float, b: float) -> str:
    return f"{100 * (a / b - 1):+.1f} %" if b else DASH
