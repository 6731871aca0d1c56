"""Which keys tell each two runs apart, against the definition."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.compare.config_differences import UNKNOWN, pairs_of


@pytest.mark.parametrize("keys", [0, 3, 62, 63, 140])
def test_pairs_are_told_apart_by_each_key(keys: int) -> None:
    """Against the definition, pair by pair; more keys than a whole number of numpy's has bits."""
    codes = np.random.default_rng(keys).integers(UNKNOWN, 2, (9, keys))
    codes[4:6] = codes[3]
    pairs = pairs_of(codes)
    wanted = {
        (i, j): sum(
            1 << k
            for k, (a, b) in enumerate(zip(codes[i].tolist(), codes[j].tolist(), strict=True))
            if a != b and UNKNOWN not in (a, b)
        )
        for j in range(len(codes))
        for i in range(j)
    }
    every = [(i, j, mask) for (i, j), mask in wanted.items()]
    assert list(pairs.that(lambda mask: True)) == every
    assert list(pairs.that(lambda mask: not mask)) == [e for e in every if not e[2]] != []
    assert len(set(pairs.masks)) == len(pairs.masks) == len(set(wanted.values()))
