"""Runs that several questions share: one small GPT, the same 16 sequences a step, on two ranks.

Laptop and simulated cluster get the same keys, so that a measured ledger has its twin by formula.
"""

from __future__ import annotations

from costs.ledger import MEMORY_PARTS
from experiments.ask.answer import Said, say
from experiments.ask.evidence import Evidence, Run
from experiments.ask.quantity import Quantity

# 3.3 million parameters: weights and activations are of the same order, a step takes well under 1 s
SHAPE = ("strategy=single", "data=generated", "model.d_model=256")
FOUR_STEPS = "steps=4"  # memory is followed in the third, one is timed
TWELVE_STEPS = "steps=12"  # of which seven are timed
PIPED = ("micro_batch_size=4", "gradient_accumulation_steps=4")

# what makes a strategy on two ranks; with 16 sequences a step each
STRATEGIES: dict[str, tuple[str, ...]] = {
    "one process": ("micro_batch_size=16",),
    "DDP": ("layout.dp_replicate=2",),
    "ZeRO-1": ("layout.dp_shard=2", "zero_stage=1"),
    "ZeRO-2": ("layout.dp_shard=2", "zero_stage=2"),
    "FSDP (ZeRO-3)": ("layout.dp_shard=2",),
    "TP": ("layout.tp=2", "micro_batch_size=16"),
    "TP + sequence": ("layout.tp=2", "sequence_parallel=true", "micro_batch_size=16"),
    "PP (1F1B)": ("layout.pp=2", *PIPED),
    "CP (ring)": ("layout.cp=2", "micro_batch_size=16"),
}


def strategy(evidence: Evidence, name: str, steps: str = FOUR_STEPS) -> Run:
    """A strategy as it trains on two ranks."""
    return evidence.measured(name, *SHAPE, *STRATEGIES[name], steps)


def on_laptop(evidence: Evidence, name: str, *overrides: str) -> Run:
    """The formula's ledger of what evidence.measured trains with the same keys."""
    return evidence.simulated(name, "cluster=laptop", "precision=fp32", *overrides)


def parts_of(run: Run) -> dict[str, Quantity]:
    """Memory by category at the peak."""
    return {part: run.memory(part) for part in MEMORY_PARTS}


def states(run: Run) -> Quantity:
    """Memory of weights, gradients and optimizer: what is there whatever the batch."""
    return run.memory("parameters") + run.memory("gradients") + run.memory("optimizer")


def h100_memory(run: Run) -> Quantity:
    """Of a simulated run on one of the clusters of H100."""
    return run.at("environment.device_memory_bytes", "B", "memory of an H100")


def fits(run: Run) -> bool:
    """Whether its fullest H100 holds it."""
    return run.memory().value <= h100_memory(run).value


def share_of_step(run: Run, part: str) -> Quantity:
    """A part of the step's time, as exposed_communication or bubble."""
    return (run.seconds(part) / run.seconds()).as_share()


def off(pairs: list[tuple[Quantity, Quantity]]) -> Quantity:
    """The largest relative difference of pairs (measured, by formula)."""
    ours, wanted = max(pairs, key=lambda pair: abs(pair[0].value / pair[1].value - 1))
    share = (ours.apart(wanted) / wanted).as_share()
    return share.named(f"largest difference to the formula: {ours.label}")


def agreement(measured: list[Run], formulas: list[Run]) -> list[Said]:
    """How near the closed forms are to what these runs measured: what makes them worth trusting."""
    pairs = list(zip(measured, formulas, strict=True))
    sent = [(m.payload(), f.payload()) for m, f in pairs if m.payload().value]
    peaks = [(m.memory(), f.memory()) for m, f in pairs]
    said = []
    if sent:
        equal = sum(a.value == b.value for a, b in sent)
        said.append(
            say(
                "Bytes: of {n} runs here {equal} hand over exactly what the closed form says "
                "(largest difference {worst}), and the same form gives the bytes of any cluster.",
                n=len(sent),
                equal=equal,
                worst=off(sent),
            )
        )
    said.append(
        say(
            "Memory: the measured peak is within {worst} of the closed form in {runs} here.",
            worst=off(peaks),
            runs=f"all {len(peaks)} runs" if len(peaks) > 1 else "the run",
        )
    )
    return said


SECONDS = say(
    "Seconds and tokens/s: two cores and a loopback are neither a GPU nor its network. For those "
    "the simulator has the cluster's own peaks and bandwidths."
)
