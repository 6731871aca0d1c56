"""Says where a run's learning rate is not what its user may think: after a resume, in warm-up."""

from __future__ import annotations

import math

from experiments.checkpoints import Checkpoint
from experiments.config import TrainConfig
from minigpt.config import OptimizerConfig
from minigpt.optimizer import learning_rate


def schedule_warnings(config: TrainConfig, found: Checkpoint | None) -> list[str]:
    """Return one line if the warm-up is longer than the run, and one if a resume from `found`
    changes the learning rate that the run before would have gone on with.

    A finished run would have gone on with the lowest rate of its cosine.
    """
    ours, steps = config.optimizer, config.steps
    warnings = []
    if ours.warmup_steps >= steps:
        warnings.append(
            f"optimizer.warmup_steps={ours.warmup_steps}: steps={steps} end before it does; the "
            f"learning rate rises to {learning_rate(ours, steps - 1, steps):.3g} in the last step, "
            f"and never to optimizer.lr={ours.lr:.3g}"
        )
    if found is None:
        return warnings
    theirs, before = _schedule_in(found)
    step = found.step
    last, now = learning_rate(theirs, step - 1, before), learning_rate(ours, step, steps)
    if not math.isclose(now, learning_rate(theirs, step, before), rel_tol=1e-6):
        keeps = f"; optimizer.schedule=constant optimizer.lr={last:.3g} would keep it"
        warnings.append(
            f"resume: the learning rate goes from {last:.3g} in step {step} of {before} to "
            f"{now:.3g} in step {step + 1} of {steps}, because steps or optimizer differ"
            f"{keeps if step >= ours.warmup_steps else ''}"
        )
    return warnings


def _schedule_in(found: Checkpoint) -> tuple[OptimizerConfig, int]:
    """Return what the learning rate of the run that wrote a checkpoint followed, and its steps."""
    settings = found.manifest["config"]
    try:
        return OptimizerConfig(**settings["optimizer"]), int(settings["steps"])
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{found.folder}: its manifest has no optimizer or no steps") from error
