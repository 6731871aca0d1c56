"""Context parallelism: parts that make a whole, and a ring that is attention, to the byte."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain, product

import pytest
import torch

from costs.messages import Row
from experiments.ranks import run_ranks
from minigpt.config import ModelConfig, Positions
from parallel.context_parallel import local_part, positions, ring_attention, who_sees_what
from parallel.layout import ActivationCheckpointing, Precision
from tests.context_on_ranks import (
    attention_errors,
    attention_errors_of_pair,
    each,
    model_errors,
    model_rows,
)

CPU = torch.device("cpu")
TINY = ModelConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=32, vocab_size=64, context=64)
Sent = Counter[tuple[str, str]]


def below(errors: dict[str, float], most: float) -> bool:
    return all(error < most for error in errors.values())  # false for NaN


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_are_a_partition_of_the_sequence(size: int) -> None:
    length = 8 * size
    held = [positions(length, rank, size, CPU) for rank in range(size)]
    assert torch.cat(held).sort().values.tolist() == list(range(length))
    for mine in held:
        assert mine.tolist() == sorted(mine.tolist()), "causal over a part needs ascending order"
    tokens = torch.randint(100, (3, length))
    for rank, mine in enumerate(held):
        part = local_part(tokens, rank, size)
        assert part.is_contiguous() and torch.equal(part, tokens[:, mine])


def test_a_rank_holds_an_early_chunk_and_a_late_one() -> None:
    assert positions(8, 0, 2, CPU).tolist() == [0, 1, 6, 7]
    assert positions(8, 1, 2, CPU).tolist() == [2, 3, 4, 5]


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layout\.cp=2 needs a multiple of 4"):
        positions(10, 0, 2, CPU)


def test_attention_dropout_is_refused() -> None:
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match=r"model\.dropout=0\.1"):
        ring_attention(q, q, q, group=None, dropout=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_what_is_attended_is_what_is_causal_and_costs_all_ranks_the_same(size: int) -> None:
    here = 6
    held = [positions(here * size, rank, size, CPU) for rank in range(size)]
    for rank in range(size):
        for source in range(size):
            seen = torch.zeros(here, here, dtype=torch.bool)
            seen[who_sees_what(rank, source, here)] = True
            if source == rank:
                seen = seen.tril()
            else:
                assert seen.sum() == here * here / 2
            assert torch.equal(seen, held[rank][:, None] >= held[source][None, :])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ring_is_causal_attention(world_size: int) -> None:
    most = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # a bf16 near 2 is off by up to 2^-7
    cases = [(4, kv_heads, 48, dtype) for kv_heads in (4, 2, 1) for dtype in most]
    for rank in run_ranks(world_size, each, attention_errors, cases):
        for case, errors in zip(cases, rank, strict=True):
            assert below(errors, most[case[-1]]), (case, errors)


@pytest.mark.slow
def test_ring_of_a_subgroup_stays_within_it() -> None:
    for errors in run_ranks(4, attention_errors_of_pair, 4, 2, 32):
        assert below(errors, 1e-5), errors


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_model_is_the_single_one(world_size: int) -> None:
    configs = [replace(TINY, positions=kind) for kind in Positions]
    cases = [
        (config, 64, mode, precision)
        for precision in (Precision.fp32, Precision.bf16)
        for config in configs
        for mode in ActivationCheckpointing
    ]
    for rank in run_ranks(world_size, each, model_errors, cases):
        for case, errors in zip(cases, rank, strict=True):
            most = 1e-5 if case[-1] == Precision.fp32 else 3e-2
            assert below(errors, most), (case, errors)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_are_the_closed_form(world_size: int) -> None:
    precisions = (Precision.fp32, Precision.bf16)
    modes = list(product(ActivationCheckpointing, precisions))
    cases = [(TINY, 32, *mode) for mode in modes]
    wanted = [closed_form(world_size, *mode) for mode in modes]
    for rank in run_ranks(world_size, each, model_rows, cases):
        assert [tuple(map(sent_of, rows)) for rows in rank] == wanted
        for row in chain.from_iterable(chain.from_iterable(rank)):
            assert (row["axis"], row["group_size"]) == ("cp", world_size)


def sent_of(rows: list[Row]) -> Sent:
    """Calls and bytes by dtype; what was received must be as much as what was sent."""
    by_direction: dict[str, Sent] = {"send": Counter(), "recv": Counter()}
    for row in rows:
        counted = by_direction[row["collective"]]
        counted.update({(row["dtype"], key): row[key] for key in ("calls", "payload_bytes")})
    assert by_direction["send"] == by_direction["recv"]
    return by_direction["send"]


def closed_form(n: int, mode: ActivationCheckpointing, precision: Precision) -> tuple[Sent, Sent]:
    """The docstring of parallel/context_parallel.py: forward and backward of model_rows."""
    B, T, K, H = 2, 32, TINY.kv_heads, TINY.head_dim
    messages, numbers = TINY.n_layer * (n - 1), 2 * B * T // n * K * H
    dtype, itemsize = ("bfloat16", 2) if precision == Precision.bf16 else ("float32", 4)
    kv = Counter(
        {(dtype, "calls"): messages, (dtype, "payload_bytes"): messages * numbers * itemsize}
    )
    dkv = Counter(
        {("float32", "calls"): messages, ("float32", "payload_bytes"): messages * numbers * 4}
    )
    again = Counter() if mode == ActivationCheckpointing.none else kv  # what is recomputed
    return kv, kv + dkv + again
