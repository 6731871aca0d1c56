"""The learning rate of each step: up in a line, then down half a cosine."""

from __future__ import annotations

import math


def warm_up(step: int, warmup_steps: int, highest: float) -> float:
    """The rate of `step`, counted from 0, of a line to `highest`, which step `warmup_steps` has.

    At first Adam's averages hold few gradients, and its steps are all of full size: a high rate
    then throws the weights about. Step 0 is already above zero, so that no step is for nothing.
    """
    return highest * (step + 1) / (warmup_steps + 1)


def cosine(progress: float, highest: float, lowest: float) -> float:
    """From `highest` at progress 0 to `lowest` at progress 1 (Loshchilov 2017, eq. 5).

    Flat at both ends: long at a high rate, and long at a low one.
    """
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
