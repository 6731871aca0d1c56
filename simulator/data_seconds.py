"""Seconds of what the data axes send: weights and gradients, and what no compute hides of it.

Gathered weights are prefetched and hide behind all of the compute (zero_stage 3; Zhao et al. 2023,
PyTorch FSDP, section 3.3), or the forwards (2). Gradients hide behind the last micro-batch's
backward, block by block (Li et al. 2020, PyTorch Distributed, section 3.2.3), or each behind its
own where each is scattered (gradient_sync); weights that were updated behind the next forward
(Megatron-Core's overlap-param-gather). The first gather and the last gradient have nothing to hide
behind. Replicas of shards add up theirs once a step (Zhao et al. 2023, section 3.2.2).
"""

from __future__ import annotations

import numpy as np

from simulator import collectives
from simulator.collectives import group
from simulator.hardware import Cluster
from simulator.plans import Array
from simulator.work import Work

# Of the time of messages that compute hides, by so much it takes longer: they take cores and
# bandwidth from it. 18.9 % in the mean of four kinds of GPU, 40 % at the most (Lee et al. 2025,
# Characterizing Compute-Communication Overlap in GPU-Accelerated Distributed Deep Learning);
# collectives, so not the ring of cp
SLOWED = 0.189


def exposed_data(work: Work, cluster: Cluster, block: Array) -> Array:
    """What is left to wait for in a step. `block`: seconds of one block and micro-batch behind
    which messages can hide."""
    by_block = (work.hides_gradients > 0) | (work.gathers_weights > 0)
    blocks = work.layers * work.messages_a_block
    calls = np.where(by_block, blocks, 1.0)
    scatter = among_shards("reduce_scatter", work.gradient_bytes, calls, work, cluster)
    together = among_shards("all_gather", work.gradient_bytes, calls, work, cluster)
    gather = among_shards("all_gather", work.weight_bytes, blocks, work, cluster)
    updates = among_shards("all_gather", work.weight_bytes, calls, work, cluster)
    # of the last micro-batch, and of those before it where each scatters its own
    last = scatter + np.where(work.shards > 1, 0.0, together) + among_replicas(calls, work, cluster)
    earlier, gathers = (work.scatters - 1) * scatter, work.gathers * gather
    updates = np.where((work.shards > 1) & (work.gathers == 0), updates, 0.0)

    def left(sent: Array, hides: Array) -> Array:
        return sent - np.minimum(sent * (1 - 1 / work.layers), hides)

    compute = work.layers * block  # of one micro-batch: its backward is twice its forward
    forward = cluster.overlap * compute / 3
    backward = 2 * work.hides_gradients * forward
    prefetched = work.hides_gathers * work.micro_batches * compute
    apart = left(last, backward) + left(earlier, (work.scatters - 1) * backward)
    # of a pipeline's, zero_stage 3 has some in backwards too
    behind = np.where(work.gathers > 1, prefetched, prefetched / 3)
    behind = np.where(work.pp > 1, behind, prefetched / 3)
    apart = apart + left(gathers, behind) + left(updates, work.hides_updates * forward)
    sent = last + earlier + gathers + updates
    shown = np.where(work.gathers_weights > 0, left(sent, prefetched), apart)
    shown = shown + SLOWED * (sent - shown)
    return np.where(cluster.device.asynchronous, shown, sent)  # sending is a core's work too


def among_shards(collective: str, item: Array, calls: Array, work: Work, cluster: Cluster) -> Array:
    """All weights or gradients of a rank, `item` bytes each, in so many messages: among the ranks
    that share them, or that hold copies where none are shared. Experts have ranks of their own."""
    ranks = group(work.dp * work.cp / work.replicas, work.tp, cluster.node_size)
    shared = collectives.seconds(collective, work.parameters * item / calls, ranks, cluster)
    if not np.any(work.experts):
        return calls * shared
    of_experts = work.expert_ranks / work.replicas
    owners = group(of_experts, work.ep * work.expert_tp, cluster.node_size)
    own = collectives.seconds(collective, work.experts * item / calls, owners, cluster)
    return calls * (shared + np.where(work.experts > 0, own, 0.0))


def among_replicas(calls: Array, work: Work, cluster: Cluster) -> Array:
    """Gradients of a rank's shards, added up over replicas, in so many messages."""
    if np.all(work.replicas == 1):
        return np.zeros_like(calls)
    sharing, of_experts = work.dp * work.cp / work.replicas, work.expert_ranks / work.replicas
    replicas = group(work.replicas, work.tp * sharing, cluster.node_size)
    held = work.parameters / sharing + work.experts / of_experts
    payload = held * work.gradient_bytes / calls
    return calls * collectives.seconds("all_reduce", payload, replicas, cluster)
