"""Seconds of a step on a cluster, by parts, for arrays of plans.

    step = m (compute + exposed tp, cp, ep, pp) + bubble + exposed data-parallel + optimizer

A product takes the longer of its flops and its bytes; element-wise operators take their bytes; the
host must launch every operator in time. All but the efficiencies, which are fitted
(experiments/predict/fit.py) or measured, and the constants below follows from the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator import collectives
from simulator.block_messages import message_kinds
from simulator.collectives import group
from simulator.data_seconds import exposed_data
from simulator.hardware import DTYPES, Cluster
from simulator.order_times import PASSES, pipeline_seconds
from simulator.plans import Array
from simulator.reached import narrower, product_seconds, reached_flops
from simulator.work import Work

Seconds = dict[str, Array]  # by kind of pass: F, B, I, W (simulator/schedules.py)
PASS_PHASES = ("forward", "backward")
BACKWARD_PRODUCTS = 2.0  # gradients of inputs and of weights, each as large as the forward product
BACKWARD_FLASH = 2.5  # with the scores again (Dao et al. 2022, FlashAttention, appendix B.4)
FORWARD_LOGITS = 16 / 38  # of the bytes moved for a logit (simulator/habits.py, TORCH_LOGIT)
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
    sent = micro_batch_messages(work, cluster)
    hiding = block - lead / work.pp / np.maximum(1, work.last_layers)
    hiding = hiding - sent.hidden_ring  # the network does one thing at a time
    m, pp = work.micro_batches, work.pp
    of_block, first, last = (
        by["forward"] + by["backward"] for by in (sent.block, sent.first, sent.last)
    )
    stages = stage_messages(work, cluster)
    each = block + of_block
    ended = work.last_layers * each + head + last
    mean = work.mean_layers * each + (head + first + last) / pp
    slowest = np.where(pp > 1, np.maximum(work.layers * each, ended), ended + first)
    compute = work.mean_layers * block + head / pp
    hops = np.where(work.hides_stages > 0, 0.0, m * stages)
    data = exposed_data(work, cluster, hiding) + tied_seconds(work, cluster)
    # (p-1)/v idle slots (Narayanan et al. 2021, section 2.2), and what uneven stages wait for: the
    # first micro-batch goes through all of them, and then one comes out each time of the slowest
    waits = bubble_slots(work) * (mean + stages) + (m - 1) * (slowest - mean)
    if len(places := np.flatnonzero(work.order >= 0)):
        late, at_once = in_order(work, cluster, sent, places)
        waits[places] = at_once - (m * mean)[places]
        hops[places] = (late - at_once) * (work.hides_stages[places] == 0)
    parts = {
        "compute": np.asarray(m * compute + copy_seconds(work, cluster)),
        "exposed_communication": m * (mean - compute) + hops + data,
        "bubble": np.where(pp > 1, waits, 0.0),
        "optimizer": crowded(work, cluster) * optimizer_seconds(work, cluster),
    }
    return {"total": sum(parts.values()), **parts}


def in_order(work: Work, cluster: Cluster, sent: Shown, places: Array) -> tuple[Array, Array]:
    """Seconds of the pipeline of the plans at `places`, each in the order of its schedule, and the
    same if messages between stages took no time."""
    block, head = passes(work, cluster)
    p, v = work.pp[places].astype(int), work.local_stages[places].astype(int)
    ends, plan = p * v - 1, np.arange(len(places))
    blocks = work.stage_blocks[places, : ends.max() + 1].T
    durations = np.empty((len(PASSES), *blocks.shape))
    for kind, of_kind in zip(PASSES, durations, strict=True):
        phase = "forward" if kind == "F" else "backward"
        on = float(kind != "W")  # weights' gradients wait for no message
        of_kind[:] = blocks * (block[kind] + on * sent.block[phase])[places]
        of_kind[0] += on * sent.first[phase][places]
        of_kind[ends, plan] += (head[kind] + on * sent.last[phase])[places]
    hop = hop_seconds(work, cluster)[places]
    both = pipeline_seconds(
        np.tile(work.order[places], 2),
        np.tile(p, 2),
        np.tile(v, 2),
        np.tile(work.micro_batches[places], 2),
        np.tile(durations, 2),
        np.concatenate([hop, 0 * hop]),
    )
    return both[: len(places)], both[len(places) :]


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
    """Micro-batches that would fit into the time in which a rank of the pipeline idles, where an
    equation says it: (p-1)/v for 1F1B and its interleaved form (Narayanan et al. 2021)."""
    return (work.pp - 1) / work.local_stages


def block_seconds(work: Work, cluster: Cluster) -> Array:
    """Compute of one block and micro-batch, forward and backward with what is recomputed: the
    device's, or the host's where it launches operators more slowly than they run; both where the
    device is the host, or the host waits for it."""
    busy, launches = busy_seconds(work, cluster), launch_seconds(work, cluster)
    return device_and_host(work, cluster, busy, launches)


def device_and_host(work: Work, cluster: Cluster, busy: Array, launches: Array) -> Array:
    """Join what the device takes and what its host takes to launch it."""
    waits = work.blocking > 0
    both = busy + np.where(waits, BLOCKED, 1.0) * launches
    ahead = np.where(waits, both, np.maximum(busy, launches))
    return np.where(cluster.device.asynchronous, ahead, both)


def passes(work: Work, cluster: Cluster) -> tuple[Seconds, Seconds]:
    """A block and the head of one micro-batch, by kind of pass: F forward, I and W the halves of a
    backward, B all of it. They add up to `computing`; each takes as much of it as it would by
    itself."""
    block, head, _ = computing(work, cluster)
    busy, each = busy_passes(work, cluster), work.operators * cluster.operator_overhead
    launches = {"F": each, "I": (1 + work.recomputed) * each, "W": each}
    alone = {k: device_and_host(work, cluster, busy[k], launches[k]) for k in busy}
    return _shared(block, alone), _shared(head, head_passes(work, cluster))


def _shared(whole: Array, alone: Seconds) -> Seconds:
    """Divide `whole` among F, I and W as what they take alone."""
    total = alone["F"] + alone["I"] + alone["W"]
    parts = {kind: whole * seconds / total for kind, seconds in alone.items()}
    return {**parts, "B": parts["I"] + parts["W"]}


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
    parts = busy_passes(work, cluster)
    return parts["F"] + parts["I"] + parts["W"]


def busy_passes(work: Work, cluster: Cluster) -> Seconds:
    """The device's, of a forward (F), of a backward for the gradients of inputs (I), with what is
    recomputed, and of weights (W). Attention has no weights."""
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
    inputs = products + BACKWARD_PRODUCTS * kept + BACKWARD_BYTES * pointwise + cast * given
    inputs = inputs + BACKWARD_FLASH * flash + SCORE_PASSES_BACKWARD * passes
    # gradients of several micro-batches are added up: read and written, or shards of them
    summed = (work.micro_batches > 1) / np.where(work.scatters > 1, work.shards, 1)
    added = summed * 2 * work.gradient_bytes * weights / bandwidth
    light = np.where(work.score_heads > 0, kept + SCORE_PASSES * passes, pointwise)
    again = work.recomputed * (forward - products) + work.selective * light
    again = again + np.sum(work.repeated * each, axis=1)
    return {"F": forward, "I": inputs + again, "W": products + added}


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
    parts = head_passes(work, cluster)
    return parts["F"] + parts["I"] + parts["W"]


def head_passes(work: Work, cluster: Cluster) -> Seconds:
    """The head by kind of pass, as `busy_passes`."""
    share = cluster.device.efficiency
    peak = reached_flops(work.wide_dtype, cluster)
    product = product_seconds(work.tokens, work.width, work.vocabulary, peak, share.half_size)
    logits = work.logit_bytes * work.tokens * work.vocabulary
    moved = logits / (cluster.device.memory_bandwidth * share.memory)
    forward = FORWARD_LOGITS * moved
    return {"F": product + forward, "I": product + moved - forward, "W": product}


@dataclass(frozen=True)
class Shown:
    """Seconds of one micro-batch's messages over tp, cp and ep that no compute hides, by phase: of
    a block, and besides of the stages at the model's ends."""

    block: dict[str, Array]
    first: dict[str, Array]
    last: dict[str, Array]
    hidden_ring: Array  # of a block, what of the ring of cp hides


def micro_batch_messages(work: Work, cluster: Cluster) -> Shown:
    """Price each kind of simulator.block_messages.message_kinds with its own bytes.

    Those of tp may hide in matmuls, with sequence parallelism in pieces that overlap them
    (Korthikanti et al. 2022, section 4.2.2; Wang et al. 2023); those of cp behind attention (Liu
    et al. 2023).
    """
    each, kinds = call_seconds(work, cluster), message_kinds()

    def summed(calls: Array, phase: str, *axes: str) -> Array:
        here = [i for i, (p, _, axis) in enumerate(kinds) if p == phase and axis in axes]
        return np.sum(each[:, here] * calls[:, here], axis=1)

    tensor = {phase: summed(work.sent_block, phase, "tp") for phase in PASS_PHASES}
    whole = sum(tensor.values())
    pieces = cluster.tensor_overlap * work.hides_tensor * whole
    # no more hides than there is to hide behind
    hidden = np.minimum(pieces, block_seconds(work, cluster)) / np.where(whole > 0, whole, 1.0)
    rings = {phase: summed(work.sent_block, phase, "cp") for phase in PASS_PHASES}
    behind = {phase: hiding_ring(work, cluster, phase) for phase in PASS_PHASES}
    hidden_rings = {phase: np.minimum(rings[phase], behind[phase]) for phase in PASS_PHASES}
    return Shown(
        block={
            phase: (1 - hidden) * tensor[phase]
            + rings[phase]
            - hidden_rings[phase]
            + summed(work.sent_block, phase, "ep")
            for phase in PASS_PHASES
        },
        first={phase: summed(work.sent_first, phase, "tp") for phase in PASS_PHASES},
        last={phase: summed(work.sent_last, phase, "tp") for phase in PASS_PHASES},
        hidden_ring=hidden_rings["forward"] + hidden_rings["backward"],
    )


def call_seconds(work: Work, cluster: Cluster) -> Array:
    """Seconds of one call of each kind of message: (plans, kinds)."""
    one, size = np.ones_like(work.tp), cluster.node_size
    groups = {"tp": group(work.tp, one, size), "cp": group(work.cp, work.tp, size)}
    calls = work.sent_block + work.sent_first + work.sent_last
    found = np.zeros_like(work.sent_bytes)
    priced: dict[tuple[str, str], list[int]] = {}
    for i, (_, collective, axis) in enumerate(message_kinds()):
        payload = work.sent_bytes[:, i]
        if not np.any((calls[:, i] > 0) & (getattr(work, axis) > 1)):
            continue
        alike = priced.setdefault((collective, axis), [])
        known = next((j for j in alike if np.array_equal(work.sent_bytes[:, j], payload)), None)
        if known is not None:
            found[:, i] = found[:, known]
            continue
        alike.append(i)
        if axis == "ep":
            found[:, i] = routed_seconds(work, cluster, payload)
        else:
            found[:, i] = collectives.seconds(collective, payload, groups[axis], cluster)
    return found


def idle_seconds(work: Work, cluster: Cluster) -> Array:
    """Of a block: a device with nothing to do, for its host launches too slowly."""
    late = np.maximum(0.0, launch_seconds(work, cluster) - busy_seconds(work, cluster))
    return np.where(cluster.device.asynchronous, late, 0.0)


def hiding_ring(work: Work, cluster: Cluster, phase: str) -> Array:
    """Return the seconds of a block's pass behind which the ring of cp hides: attention, and the
    time that the device idles. On a core it hides behind nothing, as sending is its work too."""
    if not np.any(work.cp > 1):
        return np.zeros_like(work.cp)
    busy, launches = busy_passes(work, cluster), work.operators * cluster.operator_overhead
    device, share, times = busy["F"], 1.0, np.ones_like(work.cp)
    if phase == "backward":
        device, share = busy["I"] + busy["W"], BACKWARD_FLASH
        times = 2 + work.recomputed
    idle = np.maximum(0.0, times * launches - device)
    behind = share * flash_seconds(work, cluster) + idle
    return np.where(cluster.device.asynchronous, behind, 0.0)


def routed_seconds(work: Work, cluster: Cluster, payload: Array) -> Array:
    """One all_to_all over ep: `payload` bytes, a row for each choice; or, where rows are sent once,
    one for each rank, and one for each node, that has any of the k experts of a token: of n of them
    n (1 - (1 - 1/n)^k), where experts are chosen evenly."""
    stride = np.where(work.expert_tp < work.tp, work.expert_tp, work.tp * work.cp)
    ep = group(work.ep, stride, cluster.node_size)
    nodes = np.ceil(work.ep / ep.in_node)

    def rows(n: Array) -> Array:
        any_of = n * (1 - (1 - 1 / n) ** work.choices)
        return payload * np.where(work.sends_once > 0, any_of / work.choices, 1.0)

    to = cluster.of("all_to_all")
    return collectives.all_to_all(rows(work.ep), ep, to, across=rows(nodes))


def stage_messages(work: Work, cluster: Cluster) -> Array:
    """Activations to the next stage and gradients from it, of one micro-batch."""
    return 2 * work.local_stages * hop_seconds(work, cluster)


def hop_seconds(work: Work, cluster: Cluster) -> Array:
    """One message to the next stage (Narayanan et al. 2021, section 4.1)."""
    pair = group(np.minimum(work.pp, 2), work.tp * work.cp * work.dp, cluster.node_size)
    return collectives.seconds("send", work.stage_bytes, pair, cluster)


def tied_seconds(work: Work, cluster: Cluster) -> Array:
    """The gradient of a tied head, which first and last stage add up once a step."""
    apart = np.maximum(1, work.pp - 1) * work.tp * work.cp * work.dp
    ends = group(np.minimum(work.pp, 2), apart, cluster.node_size)
    return collectives.seconds("all_reduce", work.tied_bytes, ends, cluster)


def optimizer_seconds(work: Work, cluster: Cluster) -> Array:
    """Reading and writing weights, gradients and state of the weights that a rank updates, and
    copying them one by one in a program that does."""
    bandwidth = cluster.device.memory_bandwidth * cluster.device.efficiency.memory
    updated = work.parameters / work.shards + work.experts / work.expert_shards
    return (
        updated * work.state_bytes / bandwidth + work.update_operators * cluster.operator_overhead
    )
