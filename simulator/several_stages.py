"""Memory of pipeline ranks with several stages: the sizes of what simulator/schedule_moments.py
counts. Arrays have one entry a plan; sizes are in bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minigpt.config import FFN
from simulator.held import Held
from simulator.plans import NONE, SCHEDULES, Array, distinct
from simulator.schedule_moments import OF_LAP, SHARED, Kind, column, moments


class Bytes(NamedTuple):
    """What one count is of, by the ledger's parts."""

    gradients: Array | float = 0.0
    activations: Array | float = 0.0
    communication: Array | float = 0.0


def fullest(on: Held) -> tuple[Array, Array, Array]:
    """Gradients, activations and messages of each plan at its fullest moment."""
    rank = on.rank
    table = sizes(on)  # (parts, plans, columns)
    of_all = table.sum(axis=0)
    moment = np.zeros_like(of_all)  # of each plan the fullest
    for first, here in zip(*distinct(rank.pipelines.T), strict=True):
        schedule, *others = rank.pipelines[first].tolist()
        rows = moments(Kind(SCHEDULES[schedule], *others))
        width = rows.shape[1]
        moment[here, :width] = rows[(rows @ of_all[here, :width].T).argmax(axis=0)]
    gradients, activations, messages = np.einsum("nc,pnc->pn", moment, table)
    return gradients, activations, messages + on.gathered(rank.layers, 0 * on.outer > 0)


def sizes(on: Held) -> Array:
    """(parts, plans, columns) of what each column counts."""
    of, laps = on.of, int(on.rank.local_stages.max())
    table = np.zeros((3, len(on.plans.pp), len(SHARED) + laps * len(OF_LAP)))

    def put(place: int, of_one: Bytes) -> None:
        for part, value in enumerate(of_one):
            table[part, :, place] = value

    put(SHARED.index("messages"), Bytes(communication=of.width))
    put(SHARED.index("turned"), Bytes(activations=of.width))
    put(SHARED.index("newest"), Bytes(activations=(4 + on.low) * of.logits))
    block = in_a_block(on)
    for lap in range(laps):
        for name, of_one in of_lap(on, lap, *block).items():
            put(column(name, lap), of_one)
    return table


def weights(on: Held, numbers: Array, whole: Array) -> Bytes:
    """Gradients of so many; where they wait for an all_reduce, of the `whole` tensors."""
    size = on.plans.numerics.gradients
    return Bytes(size * ~on.modular * numbers, 0.0, size * on.modular * whole)


def sum_of(*parts: Bytes) -> Bytes:
    return Bytes(*(sum(part) for part in zip(*parts, strict=True)))


def in_a_block(on: Held) -> tuple[Bytes, Bytes]:
    """What the backward of a block makes at its fullest moment, and how much more where it has to
    make the gradients too, which may be another moment. See simulator/memory.py for which."""
    of, nothing, size = on.of, 0 * on.outer, on.plans.numerics.gradients
    found = [(of.in_mlp, on._down, nothing)]
    if on.model.ffn != FFN.moe:
        found.append((of.before_mlp, on._down + on._up, nothing))
    ring_runs = on.plans.cp > 2
    if np.any(ring_runs):  # the plans beside those that have a ring must not see it
        in_ring = ring_runs * (of.in_ring - of.after_attention)
        found.append((in_ring, ring_runs * on._down, ring_runs * on.ring_blocks))
    made, there, ring = (np.stack(each) for each in zip(*found, strict=True))

    def at(most: Array) -> tuple[Array, Array, Array]:
        place = most.argmax(axis=0)[None]
        return tuple(np.take_along_axis(x, place, axis=0)[0] for x in (made, there, ring))

    (old, _, old_ring), (new, weighs, new_ring) = at(made + ring), at(made + ring + size * there)
    more = Bytes(0.0, new - old, new_ring - old_ring)
    return Bytes(0.0, old, old_ring), sum_of(more, weights(on, weighs, weighs))


def of_lap(on: Held, lap: int, in_block: Bytes, new: Bytes) -> dict[str, Bytes]:
    """What one of each of OF_LAP weighs, of the stage of `lap`: bytes by name of the column."""
    of, rank, plans = on.of, on.rank, on.plans
    stage, blocks = rank.stage(lap), rank.blocks[lap]
    last, first = (1 * (stage == end) for end in (rank.stage_count - 1, 0))
    turned = rank.v_shaped & (stage > 0) & (stage % plans.pp == 0)
    before = (blocks - 1).clip(0)  # blocks that have gone backward when its first one does
    checkpointed = plans.checkpointing != NONE
    outer, back = rank.outer_of(first, last, rank.weight_shards), on.back_of(last)
    block, whole = on.block, on.whole_block + on.whole_experts
    all_of_it = weights(on, blocks * block + outer // rank.weight_shards, blocks * whole + outer)
    embedding = on.embedding * first * plans.tp * (plans.tp > 1)

    enters = of.width * (of.entering(lap) | turned)
    waiting = blocks * of.kept + of.angles + last * (of.head + of.outputs) - enters
    ring_keeps = ~checkpointed * blocks * of.message_of_block
    looked_up = first * of.entering(lap) * of.width
    for_weights = of.gradients_of_products + of.made_again
    # of the loss's graph gradients of norm and logits are left
    split = blocks * for_weights + last * (of.input_of_products - 4 * of.logits)
    split_messages = blocks * of.gradients_sent
    came = (1 - last) * of.width  # what enters is a message's, or of the next stage here
    again = Bytes(0.0, of.made_again - came, checkpointed * of.message_of_block)
    whole_backward = sum_of(in_block, again, Bytes(0.0, -last * of.head))
    in_first = Bytes(0.0, (before > 0) * came - before * of.kept)
    kept_of_others = Bytes(0.0, before * for_weights + last * of.input_of_products)
    first_gradients = sum_of(new, weights(on, back, back))
    return {
        "waiting": Bytes(0.0, waiting, ring_keeps + looked_up),
        "split": Bytes(0.0, (1 - first) * split, (1 - first) * split_messages),
        "done": sum_of(all_of_it, otherwise(on, first, last, blocks)),
        "loss": Bytes(0.0, of.in_loss),
        "last_block": whole_backward,
        "first_block": sum_of(whole_backward, in_first),
        "behind": Bytes(0.0, enters - last * of.head - blocks * of.kept + of.between * embedding),
        "half": sum_of(in_block, again, kept_of_others),
        "halved": Bytes(0.0, split + last * (4 + on.low) * of.logits + of.width),
        "new_last_block": first_gradients,
        "new_first_block": sum_of(first_gradients, weights(on, before * block, before * whole)),
        "new_behind": sum_of(all_of_it, Bytes(0.0, plans.numerics.gradients * embedding)),
        "weights": Bytes(0.0, blocks * on.made_for_weights),
        "again": weights(on, on._down, on._down),
    }


def otherwise(on: Held, first: Array, last: Array, blocks: Array) -> Bytes:
    """Gradients that lie otherwise than their weights until the end of the step (Held.unlike): the
    whole one of an embedding that tp has cut, and norms' under sequence parallelism."""
    plans, size = on.plans, on.plans.numerics.gradients
    embedding = (plans.tp > 1) * first * on.of_embedding
    norms = on.norms_of(blocks, last)
    return Bytes(
        -size * ~on.modular * (embedding + norms),
        size * embedding * (plans.tp - on.modular),
        size * ~on.modular * norms,
    )
