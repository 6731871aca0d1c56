"""Does the comparison with a single process notice a bug? Each is planted, on real ranks."""

from __future__ import annotations

import pytest

from experiments.config import TrainConfig
from experiments.figures.parity import Trajectory, compare, make_config, trajectory
from experiments.ranks import run_ranks
from parallel.layout import Layout
from tests.plain_loop import plain_loop
from tests.planted import ACCUMULATE, CLIP, PLANTS, SMALL
from tests.planted_on_ranks import Seen, run_planted

LEAST = 12  # plants without which this test would say little


def holds(seen: Seen, wanted: Trajectory, config: TrainConfig) -> bool:
    """Whether nothing was noticed. With dropout, losses say nothing: only masks and copies do."""
    if config.model.dropout:
        return seen.masks and seen.run.drift == 0
    return seen.masks and compare(seen.run, wanted).holds


@pytest.mark.slow
def test_every_planted_bug_is_caught() -> None:
    sound = {str(plant.config): plant.config for plant in PLANTS}
    names = [None] * len(sound) + [plant.name for plant in PLANTS]
    configs = [*sound.values(), *(plant.config for plant in PLANTS)]
    seen = run_ranks(2, run_planted, names, configs)[0]
    wanted = {key: plain_loop(config) for key, config in sound.items()}
    for (key, config), one in zip(sound.items(), seen[: len(sound)], strict=True):
        assert holds(one, wanted[key], config), f"without a plant: {config}"
    escaped = [
        plant.name
        for plant, one in zip(PLANTS, seen[len(sound) :], strict=True)
        if holds(one, wanted[str(plant.config)], plant.config)
    ]
    caught = len(PLANTS) - len(escaped)
    print(f"the suite catches {caught} of {len(PLANTS)} planted bugs")
    assert not escaped, f"caught {caught} of {len(PLANTS)}; these escape: {', '.join(escaped)}"
    assert caught >= LEAST


@pytest.mark.parametrize("changes", [{}, {"data.ragged": True, **CLIP, **ACCUMULATE}])
def test_a_single_process_does_what_the_plain_loop_does(changes: dict) -> None:
    """The reference of every comparison has a reference too."""
    config = make_config(Layout(), {**SMALL, **changes})
    assert compare(trajectory(config), plain_loop(config)).holds
