"""./launch.sh search [OVERRIDES]: every plan for a model on so many devices, the best first.

./launch.sh search model=llama3_70b cluster=h100 gpus=512 global_batch_tokens=4M
./launch.sh search ... explain=pp8-dp_shard8-tp8    why that layout is not the best
./launch.sh search ... plot=front.png               memory against time
./launch.sh search ... scale.price=2.5              what a million tokens cost, at a price an hour
./launch.sh search ... --verify                     trace the winner, and train its tiny twin
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.compose import configs_of
from experiments.console import human_bytes
from experiments.predict.plan_command import command_of_plan
from experiments.predict.plan_config import SearchConfig, axes_of
from experiments.predict.scale import run_to_the_end
from experiments.predict.search_tables import show
from experiments.refused import Refused
from simulator.at_scale import HOUR
from simulator.plans import CHECKPOINTING, PRECISIONS, SCHEDULES
from simulator.search import BEST, Found, search
from simulator.space import Space, layout_at, options_at


def command(argv: list[str]) -> int:
    """Search, and print what was found. Exit status 1 where --verify finds a difference."""
    gc.freeze()  # what is loaded stays: the collector would look through it again and again
    status = 0
    as_json, verify = "--json" in argv, "--verify" in argv
    for config in configs_of("search", [a for a in argv if a not in ("--json", "--verify")]):
        found = find(config)
        said = said_of(config, found)
        if config.plot:
            from experiments.predict.search_picture import draw

            draw(found, config, Path(config.plot))
        if verify:
            from experiments.predict.verify import verify_winner

            said["verified"] = verify_winner(found)
            status = 0 if said["verified"]["holds"] else 1
        if as_json:
            print(json.dumps(said, indent=1))
        else:
            show(config, found, said)
    return status


def find(config: SearchConfig) -> Found:
    """All plans. Raises Refused where there is none."""
    space = Space(
        config.searched_model,
        config.seq_len,
        config.gpus,
        config.batch_size,
        config.layout.given,
        tuple(config.precision),
        tuple(config.activation_checkpointing),
        tuple(config.schedule),
        tuple(config.zero_stage),
        tuple(config.gradient_sync),
        micro_batch_sizes=tuple(config.micro_batch_size),
    )
    try:
        in_node, best = config.tensor_parallel_in_node, max(BEST, config.top)
        return search(space, config.cluster, config.headroom, in_node, best)
    except ValueError as error:
        raise Refused(str(error)) from error


def said_of(config: SearchConfig, found: Found) -> dict[str, Any]:
    """For --json."""
    simplest = found.simplest()  # first: it may look at more plans' memory
    order = found.order
    said: dict[str, Any] = {
        "considered": len(found.predicted) + sum(found.refused.values()),
        "predicted": len(found.predicted),
        "pad_vocab_to": found.predicted.plans.model.pad_vocab_to,
        "plans": [rebuildable(config, found, int(i)) for i in order[: config.top]],
        "simplest": None if simplest is None else rebuildable(config, found, simplest),
        "front": [rebuildable(config, found, int(i)) for i in found.front()],
        "rejected": dict(found.reasons().most_common()),
        "lost_by": found.margins(),
    }
    if config.scale.price is not None:
        for plan in [*said["plans"], *said["front"], *filter(None, [said["simplest"]])]:
            plan["cost_per_million_tokens"] = cost_of(config, plan["time_s"])
    if config.explain is not None:
        said["explained"] = explain(config, found)
    if len(order):
        said["to_the_end"] = run_to_the_end(
            config.scale,
            config.searched_model.parameters,
            float(found.predicted.plans.tokens[order[0]]),
            said["plans"][0]["time_s"],
            config.gpus,
        )
    return said


def cost_of(config: SearchConfig, time_s: float) -> float:
    """Of a million tokens, in what `scale.price` is in; failures are left out."""
    assert config.scale.price is not None
    hours = config.gpus * time_s / HOUR
    return config.scale.price * hours * 1e6 / (config.batch_size * config.seq_len)


def rebuildable(config: SearchConfig, found: Found, i: int) -> dict[str, Any]:
    """Return one plan with the command line that simulates it again."""
    plans = found.predicted.plans
    command = command_of_plan(config, layout_at(plans, i), options_at(plans, i))
    return {"command": command, **plan_of(found, i)}


def plan_of(found: Found, i: int) -> dict[str, Any]:
    """One plan, with what it takes: seconds of a step and bytes of the fullest rank, by part."""
    predicted, plans = found.predicted, found.predicted.plans
    layout, options = layout_at(plans, i), options_at(plans, i)
    staged, sync = layout.pp > 1, options.gradient_sync.value
    time = {key: float(value[i]) for key, value in predicted.time_s.items()}
    memory = {key: int(value[i]) for key, value in predicted.memory_bytes.items()}
    return {
        "layout": layout.by_axis,
        "label": layout.label,
        "schedule": SCHEDULES[plans.schedule[i]].value if staged else None,
        "stages_per_rank": int(plans.local_stages[i]) if staged else None,
        "micro_batch_size": int(plans.micro_batch_size[i]),
        "gradient_accumulation_steps": int(plans.micro_batches[i]),
        "activation_checkpointing": CHECKPOINTING[plans.checkpointing[i]].value,
        "zero_stage": int(plans.zero_stage[i]) if layout.dp_shard > 1 else None,
        "gradient_sync": sync if options.may_scatter_each(layout) else None,
        "sequence_parallel": bool(plans.sequence_parallel[i]),
        "precision": PRECISIONS[plans.precision[i]].value,
        "fits": bool(found.fits[i]),
        "time_s": time.pop("total"),
        "time_parts": time,
        "mfu": float(predicted.mfu[i]),
        "memory_bytes": memory.pop("peak"),
        "memory_parts": memory,
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
    best = found.best_of(np.flatnonzero(same))
    order = found.order
    reason = None
    if not found.fits[best]:
        over = found.predicted.memory_bytes["peak"][best] - found.limit
        reason = f"out of memory by {human_bytes(float(over))}"
    elif len(order) and best != order[0]:
        reason = str(found.lost(np.array([best]), int(order[0]))[0])
    return {"plan": rebuildable(config, found, best), "loses_by": reason}
