"""What must hold of every simulated plan, whatever the numbers: drawn by hypothesis.

The other sanities stand with what they are of: the bubble of 1F1B (test_bubble.py), all_reduce as
reduce_scatter and all_gather (test_collectives.py), the timeline of another engine and that of a
faster network (test_replay.py).
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.config import FFN, ModelConfig
from simulator.flops import products
from simulator.plans import Plans
from simulator.search import Found, search
from tests.test_estimate import H100, MANY, plans, total
from tests.test_search import SPACE, cluster

EVERY = plans(**MANY)
NETWORK = [
    f"{level}.{key}"
    for level in ("in_node", "between_nodes")
    for key in ("bandwidth", "latency", "oversubscription")
]
faster = st.dictionaries(st.sampled_from(NETWORK), st.floats(1, 1e4), min_size=1)


@given(faster)
def test_a_faster_network_never_makes_a_slower_step(factors: dict[str, float]) -> None:
    values = {}
    for key, factor in factors.items():
        level, name = key.split(".")
        was = getattr(getattr(H100, level), name)
        values[key] = was * factor if name == "bandwidth" else was / factor
    assert np.all(total(EVERY, H100.changed(values)) <= total(EVERY) * (1 + 1e-12))


@settings(max_examples=10)
@given(st.floats(1e8, 1e11), st.floats(1, 100), st.floats(0, 0.5))
def test_more_memory_never_unfits(size: float, factor: float, headroom: float) -> None:
    """Every plan that fits a device fits a larger one, and none is refused that was not."""
    small, large = (search(SPACE, cluster(s), headroom) for s in (size, size * factor))
    assert np.all(small.fits <= large.fits)
    assert small.refused == large.refused and _fastest(large) <= _fastest(small) * 1.001


def _fastest(found: Found) -> float:
    times = found.predicted.time_s["total"][found.fits]
    return float(times.min()) if len(times) else np.inf


@given(st.integers(1, 200), st.sampled_from(list(FFN)), st.sampled_from([None, 2]), st.booleans())
def test_doubling_layers_doubles_the_flops_of_blocks(
    layers: int, ffn: FFN, kv_heads: int | None, tied: bool
) -> None:
    once, twice = (block_flops(layers * n, ffn, kv_heads, tied) for n in (1, 2))
    assert np.array_equal(twice, 2 * once) and np.all(once > 0)


def block_flops(layers: int, ffn: FFN, kv_heads: int | None, tied: bool) -> np.ndarray:
    """Of all products but the head, of plans without a pipeline."""
    experts = {"n_expert": 8} if ffn == FFN.moe else {}
    model = ModelConfig(
        n_layer=layers, n_head=8, n_kv_head=kv_heads, d_model=512, ffn=ffn, tied=tied, **experts
    )
    some: Plans = plans(model, 256, **{**MANY, "pp": [1], "checkpointing": [0, 1, 2]})
    return sum(p.flops for name, p in products(some).items() if name != "head")  # type: ignore[return-value]
