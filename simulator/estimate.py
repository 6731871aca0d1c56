"""Seconds of a step on a cluster, by parts, for arrays of plans.

    step = m (compute + exposed tp, cp, ep, pp) + bubble + exposed data-parallel + optimizer

A product takes the longer of its flops and its bytes; element-wise operators take their bytes; the
host must launch every operator in time. All but the efficiencies, which are fitted
(experiments/predict/fit.py) or measured, and the constants below follows from the shapes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from simulator import collectives
from simulator.collectives import group
from simulator.data_seconds import exposed_data
from simulator.hardware import DTYPES, Cluster
from simulator.plans import Array
from simulator.reached import narrower, product_seconds, reached_flops
from simulator.work import Work

BACKWARD_PRODUCTS = 2.0  # gradients of inputs and of weights, each as large as the forward product
BACKWARD_FLASH = 2.5  # with the scores again (Dao et al. 2022, FlashAttention, appendix B.4)
BACKWARD_BYTES = 1.5  # of the forward's: each operator reads its input and a gradient, writes one
# of the element-wise bytes left where torch.compile fuses operators. Fitted:
# `./launch.sh python -m experiments.predict.fit constants` prints the error at other values, which
# here hardly changes it
FUSED = 0.6
SCORE_PASSES = 5.0  # over the T x T matrix: write, softmax in and out, dropout in and out
SCORE_PASSES_BACKWARD = 7.0  # the same with each operator's gradient
BLOCKED = 2.0  # overheads of an operator that the host waits for: to launch it, and to be told that
# it is over. Seen in BigScience's runs, where 3 would do as well
CAST_BYTES = 4.0  # of a number that a product in fp8 takes: read wide, written twice (transposed).
# Forward its input, backward its output's gradient
ALIGNED = 8  # numbers: tensor cores want multiples of 16 bytes (NVIDIA, Matrix Multiplication
# Background User's Guide, section 4)
TRITON_SHARE = 1 / 1.6  # of FlashAttention-2's speed: it is 1.3 to 2.5 times as fast as
# FlashAttention in Triton (Dao 2023, section 1)


def step_seconds(work: Work, cluster: Cluster) -> dict[str, Array]:
    """Seconds of each part of a step (of costs.ledger.TIME_PARTS; `other` is not modelled), and
    `total`."""
    block, head, lead = computing(work, cluster)
    hiding = block - lead / np.maximum(1, work.last_layers)
    hiding = hiding - ring_seconds(work, cluster)[1]  # the network does one thing at a time
    sent = block_messages(work, cluster)
    m, pp = work.micro_batches, work.pp
    last = work.last_layers * block + head
    mean = work.mean_layers * block + head / pp
    slowest = np.where(pp > 1, np.maximum(work.layers * block, last), last)
    stages = stage_messages(work, cluster)
    messages = work.mean_layers * sent + np.where(work.hides_stages > 0, 0.0, stages)
    # (p-1)/v idle slots (Narayanan et al. 2021, section 2.2), and what uneven stages wait for: the
    # first micro-batch goes through all of them, and then one comes out each time of the slowest
    slot = mean + work.mean_layers * sent + stages
    waits = bubble_slots(work) * slot + (m - 1) * (slowest - mean)
    parts = {
        "compute": m * mean + copy_seconds(work, cluster),
        "exposed_communication": m * messages + exposed_data(work, cluster, hiding),
        "bubble": np.where(pp > 1, waits, 0.0),
        "optimizer": crowded(work, cluster) * optimizer_seconds(work, cluster),
    }
    return {"total": sum(parts.values()), **parts}


def computing(work: Work, cluster: Cluster) -> tuple[Array, Array, Array]:
    """One micro-batch: a block, the head, and what of the head goes by while the host launches."""
    slow = straggling(work, cluster) * crowded(work, cluster)
    head = slow * head_seconds(work, cluster)
    lead = np.minimum(head, slow * late_seconds(work, cluster))
    return slow * block_seconds(work, cluster), head - lead, lead


def crowded(work: Work, cluster: Cluster) -> Array:
    """How much slower all is where a node has as many ranks as the plan puts there."""
    slower: Array = cluster.crowded(work.pp * work.tp * work.cp * work.dp)
    return slower


def straggling(work: Work, cluster: Cluster) -> Array:
    """How much slower the slowest of n nodes is: the expected maximum of n normal deviates,
    sqrt(2 ln n) standard deviations."""
    ranks = work.pp * work.tp * work.cp * work.dp
    nodes = np.maximum(1.0, ranks / cluster.node_size)
    return 1 + cluster.straggling * np.sqrt(2 * np.log(nodes))


def bubble_slots(work: Work) -> Array:
    """Micro-batches that would fit into the time in which a rank of the pipeline idles.

    (p-1)/v for 1F1B and its interleaved form (Narayanan et al. 2021); a third of it where the
    weights' gradients fill the rest (Qi et al. 2023, Zero Bubble Pipeline Parallelism, table 2).
    """
    return (work.pp - 1) / work.local_stages * np.where(work.splits_backward > 0, 1 / 3, 1.0)


def block_seconds(work: Work, cluster: Cluster) -> Array:
    """Compute of one block and micro-batch, forward and backward with what is recomputed: the
    device's, or the host's where it launches operators more slowly than they run; both where the
    device is the host, or the host waits for it."""
    busy, launches = busy_seconds(work, cluster), launch_seconds(work, cluster)
    waits = work.blocking > 0
    both = busy + np.where(waits, BLOCKED, 1.0) * launches
    ahead = np.where(waits, both, np.maximum(busy, launches))
    return np.where(cluster.device.asynchronous, ahead, both)


def launch_seconds(work: Work, cluster: Cluster) -> Array:
    """The host's: a backward has twice the operators of a forward."""
    return work.operators * (3 + work.recomputed) * cluster.operator_overhead


def late_seconds(work: Work, cluster: Cluster) -> Array:
    """By how much the host launches a backward of the last blocks too slowly. It can do so while
    the device is at the head, which is few operators, and long ones."""
    return work.last_layers * idle_seconds(work, cluster) * 2 / 3


def flash_seconds(work: Work, cluster: Cluster) -> Array:
    """Attention of one block's forward in a flash kernel, whose share is of the whole peak. Rows
    and columns of scores fill tiles as those of a product do."""
    share = cluster.device.efficiency
    peak = reached_flops(work.wide_dtype, cluster) / share.matmul
    given = np.nan if share.attention_fused is None else share.attention_fused
    own: Array = np.where(np.isnan(given), share.attention, given)
    shares: list[Any] = [TRITON_SHARE * share.attention, share.attention, own]
    reached = np.choose(
        work.kernel.astype(int), [np.broadcast_to(one, work.kernel.shape) for one in shares]
    )
    reached = reached * narrower(share, work.head_dim)
    fill = 1 + share.half_size * (1 / work.queries + 1 / work.keys)
    return work.flash_flops / (peak * reached) * fill


def busy_seconds(work: Work, cluster: Cluster) -> Array:
    """The device's."""
    share, narrow = cluster.device.efficiency, work.dtype >= DTYPES.index("fp8")
    bandwidth = cluster.device.memory_bandwidth * share.memory
    peak = reached_flops(work.dtype, cluster)[:, None]
    half = np.broadcast_to(share.half_size, narrow.shape)[:, None]
    each = product_seconds(work.rows, work.inner, work.columns, peak, half)
    products = np.sum(work.count * each, axis=1)
    weights = np.sum(work.count * work.inner * work.columns, axis=1)
    taken = np.sum(work.count * work.rows * work.inner, axis=1)
    given = np.sum(work.count * work.rows * work.columns, axis=1)
    cast = narrow * CAST_BYTES / bandwidth
    whole = work.whole_bytes / np.where(work.sequence_parallel > 0, work.tp, 1)
    fused = np.where(work.compiled > 0, FUSED, 1.0)
    pointwise = fused * (whole + work.cut_bytes) / bandwidth
    flash = flash_seconds(work, cluster)
    kept, passes = score_seconds(work, cluster)
    forward = products + pointwise + cast * taken + flash + kept + SCORE_PASSES * passes
    backward = BACKWARD_PRODUCTS * (products + kept) + BACKWARD_BYTES * pointwise + cast * given
    backward = backward + BACKWARD_FLASH * flash + SCORE_PASSES_BACKWARD * passes
    # gradients of several micro-batches are added up: read and written, or shards of them
    summed = (work.micro_batches > 1) / np.where(work.scatters > 1, work.shards, 1)
    added = summed * 2 * work.gradient_bytes * weights / bandwidth
    light = np.where(work.score_heads > 0, kept + SCORE_PASSES * passes, pointwise)
    again = work.recomputed * (forward - products) + work.selective * light
    again = again + np.sum(work.repeated * each, axis=1)
    return forward + backward + added + again


def copy_seconds(work: Work, cluster: Cluster) -> Array:
    """fully_shard copies what it has gathered into weights, and gradients into what it scatters
    (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py: split_with_sizes_copy, chunk_cat)."""
    gathers = np.maximum(work.gathers, 1)
    each = 2 * gathers * work.weight_bytes + work.scatters * (work.item + work.gradient_bytes)
    bandwidth = cluster.device.memory_bandwidth * cluster.device.efficiency.memory
    return work.copies_shards * work.parameters * each / bandwidth


def score_seconds(work: Work, cluster: Cluster) -> tuple[Array, Array]:
    """Attention that keeps its T x T matrix: its two products, and one pass over the matrix."""
    share = cluster.device.efficiency
    h, q, k = work.head_dim, work.queries, work.keys
    matrix = work.score_heads * q * k
    aligned = np.where(h % ALIGNED == 0, 1.0, share.unaligned)
    peak = reached_flops(work.wide_dtype, cluster) * aligned
    products = 2 * work.score_heads * product_seconds(q, h, k, peak, share.half_size)
    return products, matrix * work.item / (cluster.device.memory_bandwidth * share.memory)


def head_seconds(work: Work, cluster: Cluster) -> Array:
    """Logits, loss and their gradients of one micro-batch."""
    share = cluster.device.efficiency
    peak = reached_flops(work.wide_dtype, cluster)
    product = product_seconds(work.tokens, work.width, work.vocabulary, peak, share.half_size)
    logits = work.logit_bytes * work.tokens * work.vocabulary
    bandwidth = cluster.device.memory_bandwidth * share.memory
    return (1 + BACKWARD_PRODUCTS) * product + logits / bandwidth


def block_messages(work: Work, cluster: Cluster) -> Array:
    """What a block sends over tp, cp and ep for one micro-batch and what compute leaves exposed.

    tp: two all_reduces of B T D forward, two backward (Shoeybi et al. 2019, section 3), those of
    the forward again where it is recomputed, or all but the last; with sequence parallelism in
    pieces that overlap products (Korthikanti et al. 2022, section 4.2.2; Wang et al. 2023). cp:
    keys and values round the ring, behind attention (Liu et al. 2023). ep: two all_to_alls each
    way.
    """
    one = np.ones_like(work.tp)
    payload = work.tokens * work.width * work.item
    tp = group(work.tp, one, cluster.node_size)
    reduces = (4 + work.reduced_again) * collectives.seconds("all_reduce", payload, tp, cluster)
    pieces = cluster.tensor_overlap * work.hides_tensor * reduces
    # no more hides than there is to hide behind
    shown = reduces - np.minimum(pieces, block_seconds(work, cluster))
    ring, _ = ring_seconds(work, cluster)
    slots = (4 + 2 * work.recomputed) * routed_seconds(work, cluster)
    return shown + ring + slots


def idle_seconds(work: Work, cluster: Cluster) -> Array:
    """Of a block: a device with nothing to do, for its host launches too slowly."""
    late = np.maximum(0.0, launch_seconds(work, cluster) - busy_seconds(work, cluster))
    return np.where(cluster.device.asynchronous, late, 0.0)


def ring_seconds(work: Work, cluster: Cluster) -> tuple[Array, Array]:
    """What a block sends round the ring of cp, exposed and hidden: behind attention, and while the
    device has nothing to do. On a core it hides behind nothing, for sending is its work too."""
    cp = group(work.cp, work.tp, cluster.node_size)
    rounds = (3 + work.recomputed) * (work.cp - 1)
    ring = rounds * collectives.seconds("send", work.kv_bytes, cp, cluster)
    behind = (1 + BACKWARD_FLASH) * flash_seconds(work, cluster) + idle_seconds(work, cluster)
    hidden = np.minimum(ring, np.where(cluster.device.asynchronous, behind, 0.0))
    return ring - hidden, hidden


def routed_seconds(work: Work, cluster: Cluster) -> Array:
    """One all_to_all over ep: a row for each choice; or, where they are sent once, one for each
    rank, and one for each node, that has any of the k experts of a token: of n of them
    n (1 - (1 - 1/n)^k), where experts are chosen evenly."""
    if not np.any(work.routed_bytes):
        return np.zeros_like(work.tokens)
    stride = np.where(work.expert_tp < work.tp, work.expert_tp, work.tp * work.cp)
    ep = group(work.ep, stride, cluster.node_size)
    nodes = np.ceil(work.ep / ep.in_node)

    def rows(n: Array) -> Array:
        any_of = n * (1 - (1 - 1 / n) ** work.choices)
        return work.routed_bytes * np.where(work.sends_once > 0, any_of / work.choices, 1.0)

    to = cluster.of("all_to_all")
    return collectives.all_to_all(rows(work.ep), ep, to, across=rows(nodes))


def stage_messages(work: Work, cluster: Cluster) -> Array:
    """Activations to the next stage and gradients from it, of one micro-batch: each of a tp
    group's ranks sends its part (Narayanan et al. 2021, section 4.1)."""
    payload = work.tokens * work.width * work.item / work.tp
    pair = group(np.minimum(work.pp, 2), work.tp * work.cp * work.dp, cluster.node_size)
    return 2 * work.local_stages * collectives.seconds("send", payload, pair, cluster)


def optimizer_seconds(work: Work, cluster: Cluster) -> Array:
    """Reading and writing weights, gradients and state of the weights that a rank updates, and
    copying them one by one in a program that does."""
    bandwidth = cluster.device.memory_bandwidth * cluster.device.efficiency.memory
    updated = work.parameters / work.shards + work.experts / work.expert_shards
    return (
        updated * work.state_bytes / bandwidth + work.update_operators * cluster.operator_overhead
    )
