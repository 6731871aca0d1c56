"""A model, a cluster and a number of devices: what the search finds, as an answer."""

from __future__ import annotations

from typing import Any

from experiments.ask.answer import Answer, Cell, Said, Table, listed, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import COUNT, SHARE, Quantity, formula
from experiments.ask.runs import SECONDS
from experiments.ask.words import Wanted, models
from experiments.predict.search_tables import scatters_each, schedule_of, zero_of
from simulator.search import CLOSE

TOP = 5  # plans that are shown
HEAD = ["layout", "how", "step", "MFU", "memory", "exposed", "bubble"]  # of cells_of


def answer(asked: Wanted, evidence: Evidence) -> Answer:
    """Raises Refused, as the search does."""
    found = evidence.searched("search", *asked.overrides)
    plans = found.ledger["plans"]
    taken = say(
        "Taken as model={model} ({parameters}), cluster={cluster}, gpus={gpus}: {command}",
        model=asked.model,
        parameters=formula(
            f"parameters of {asked.model}",
            models()[str(asked.model)],
            "parameters",
            f"configs/model/{asked.model}.yaml",
        ),
        cluster=asked.cluster,
        gpus=asked.gpus,
        command=found.run,
    )
    said = best_of(found) if plans else nothing(found)
    return Answer(
        conclusion=[taken, *said],
        tables=[plans_table(found)] if plans else [],
        commands=commands_of(found),
        carries_over=[say("Bytes and memory: closed forms that tests hold to real ranks.")],
        does_not=[
            say(
                "Seconds are fitted to published runs: docs/results/score.md says how far they are "
                "off, "
                "source by source."
            ),
            SECONDS,
        ],
    )


def plan_number(found: Run, i: int, where: str, unit: str) -> Quantity:
    label = f"plan {i + 1}, {found.ledger['plans'][i]['label']}: {where.replace('_', ' ')}"
    return found.at(f"plans[{i}].{where}", unit).named(label)


def headline(found: Run, i: int) -> dict[str, Quantity]:
    """What is said first of a plan."""
    return {
        "time": plan_number(found, i, "time_s", "s"),
        "mfu": plan_number(found, i, "mfu", SHARE),
        "memory": plan_number(found, i, "memory_bytes", "B"),
    }


def part(found: Run, i: int, name: str) -> Quantity:
    """A part of the step, as a share of it."""
    time = plan_number(found, i, "time_s", "s")
    return (plan_number(found, i, f"time_parts.{name}", "s") / time).as_share()


def best_of(found: Run) -> list[Said]:
    best = found.ledger["plans"][0]
    said = [
        say(
            "The best of {n} plans: {how}. A step takes {time} (MFU {mfu}), and the fullest device "
            "holds {memory}.",
            n=found.at("predicted", COUNT, "plans"),
            how=described(best),
            **headline(found, 0),
        ),
        *simplest_of(found),
    ]
    lost = ("exposed_communication", "bubble", "optimizer")
    worst = max(lost, key=lambda name: part(found, 0, name).value)
    said.append(
        say(
            "Beside compute it spends most on {name}: {share} of the step.",
            name=worst.replace("_", " "),
            share=part(found, 0, worst),
        )
    )
    reasons = found.ledger["rejected"]
    other = [r for r in reasons if not r.startswith("refused")]
    if other:
        each = [
            say("{r} {n}", r=reason, n=found.at(f"rejected[{reason}]", COUNT, f"plans: {reason}"))
            for reason in other
        ]
        said.append(
            say("What the other plans lose by, and how many of them: {all}.", all=listed(each))
        )
    return said


def simplest_of(found: Run) -> list[Said]:
    """The plan with fewest axes, where it is not the fastest."""
    ledger = found.ledger
    if ledger["simplest"] == ledger["plans"][0]:
        return []

    def number(where: str, unit: str) -> Quantity:
        label = f"simplest plan, {ledger['simplest']['label']}: {where.replace('_', ' ')}"
        return found.at(f"simplest.{where}", unit).named(label)

    return [
        say(
            "Of the plans within {close} of the fastest this has fewest axes: {how}, {times} the "
            "step and {memory} a device.",
            close=f"{100 * CLOSE:g} %",
            how=described(ledger["simplest"]),
            times=number("time_s", "s") / plan_number(found, 0, "time_s", "s"),
            memory=number("memory_bytes", "B"),
        )
    ]


def nothing(found: Run) -> list[Said]:
    return [
        say(
            "None of {n} plans fits: more devices, or a smaller global batch of shorter sequences.",
            n=found.at("predicted", COUNT, "plans"),
        )
    ]


def shortly(plan: dict[str, Any]) -> list[str]:
    """For two cells of a table: the layout, and how it is run."""
    how = [schedule_of(plan)] if plan["schedule"] else []
    how += [f"zero {zero_of(plan)}"] if plan["zero_stage"] else []
    how.append(f"{plan['gradient_accumulation_steps']} x {plan['micro_batch_size']}")
    checkpointing = plan["activation_checkpointing"]
    how += [checkpointing] if checkpointing != "none" else []
    return [plan["label"], ", ".join(how)]


def described(plan: dict[str, Any]) -> str:
    """In words: layout, schedule, batch, checkpointing."""
    how = [plan["label"]]
    if plan["schedule"]:
        how.append(schedule_of(plan))
    if plan["zero_stage"]:
        how.append(f"zero_stage={plan['zero_stage']}")
    if scatters_each(plan):
        how.append("gradient_sync=micro_batch")
    count = plan["gradient_accumulation_steps"]
    how.append(f"{count} micro-batch{'es' * (count > 1)} of {plan['micro_batch_size']}")
    if plan["activation_checkpointing"] != "none":
        how.append(f"{plan['activation_checkpointing']} checkpointing")
    return ", ".join(how)


def cells_of(found: Run, i: int) -> list[Cell]:
    """A plan's row of a table, under HEAD."""
    lost = [part(found, i, name) for name in ("exposed_communication", "bubble")]
    return [*shortly(found.ledger["plans"][i]), *headline(found, i).values(), *lost]


def commands_of(found: Run, name: str = "") -> list[tuple[str, str]]:
    """The commands that rebuild the plans of `plans_table`, and the simplest one."""
    ledger, named = found.ledger, f"{name}: " if name else ""
    shown = ledger["plans"][:TOP]
    shown += [ledger["simplest"]] if ledger["simplest"] not in (*shown, None) else []
    return [(named + described(plan), plan["command"]) for plan in shown]


def plans_table(found: Run) -> Table:
    rows = [cells_of(found, i) for i in range(len(found.ledger["plans"][:TOP]))]
    title = (
        "The fastest plans that fit: schedule, ZeRO stage, micro-batches x sequences, checkpointing"
    )
    return Table(title, HEAD, rows)
