"""Which formula each kind of message follows, in symbols, beside the value that it has.

The values are those of the closed forms. The symbols, which are in LETTERS, say where they come
from: the terms of one kind of message (collective, axis, dtype) are separated by " + ", and each
has its name in front. Sources of the formulas: simulator/communication.py,
simulator/data_messages.py.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

from minigpt.config import ModelConfig
from parallel.layout import (
    MESH_AXES,
    ActivationCheckpointing,
    GradientSync,
    Layout,
    Options,
    expert_axes,
    weights_axes,
)
from simulator.communication import payload_bytes
from simulator.plans import Plans
from simulator.sending import DTYPE_NAMES, ITEM_BYTES
from simulator.shapes import Rank

Key = tuple[str, str, str]  # collective, axis, dtype
LETTERS = {
    "P": "weights on this rank before the data axes cut them (R: in no block, W: in blocks)",
    "E": "weights of its experts",
    "G": "weights of its norms",
    "L": "its blocks",
    "m": "micro-batches",
    "B T D": "sequences, tokens here, width",
    "K H": "key-value heads here, their width",
    "V": "rows of its embedding",
    "S": "slots of all experts in a sequence",
    "A": "experts of a token",
    "X": "experts",
    "n": "ranks of the axis",
}


@dataclass(frozen=True)
class Case:
    """What one rank of one plan does: enough to know its closed forms."""

    model: ModelConfig
    layout: Layout
    options: Options
    clipped: bool = True
    pp_rank: int = 0

    @cached_property
    def rank(self) -> Rank:
        plan = Plans.of(self.model, self.layout, self.options, clipped=self.clipped)
        return Rank(plan, self.pp_rank)

    def payload_bytes(self) -> dict[Key, int]:
        """The closed form, by collective, axis and dtype."""
        return payload_bytes(
            self.model, self.layout, self.options, clipped=self.clipped, place=self.pp_rank
        )

    @property
    def unknown(self) -> str | None:
        """Why a measured payload need not be the closed form; None where it must be."""
        if self.layout.ep > 1 and self.model.capacity_factor is None:
            return "tokens choose their experts freely: this is the average of the ranks"
        return None

    @property
    def low(self) -> tuple[str, int]:
        """Name and bytes of the dtype that matmuls run in."""
        precision = self.options.precision
        return DTYPE_NAMES[precision], ITEM_BYTES[precision]

    @property
    def between(self) -> tuple[str, int]:
        """The same of what goes from block to block."""
        return self.low if self.rank.has_policy[0] else ("float32", 4)

    @property
    def sharded(self) -> bool:
        return bool(self.rank.sharded[0])

    @property
    def again(self) -> int:
        """1 where blocks run forward again in backward."""
        return int(self.options.activation_checkpointing != ActivationCheckpointing.none)

    @property
    def each(self) -> str:
        """Before what every micro-batch sends for itself (gradient_sync)."""
        return "m " if self.options.gradient_sync == GradientSync.micro_batch else ""

    @property
    def stages(self) -> list[int]:
        return [int(self.rank.stage(lap)[0]) for lap in range(int(self.rank.local_stages[0]))]

    @property
    def last_stage(self) -> int:
        return int(self.rank.stage_count[0]) - 1

    @property
    def by_order(self) -> bool:
        """Gathered weights come and go in the order of a schedule with several stages a rank."""
        several = self.layout.pp > 1 and len(self.stages) > 1
        return several and self.options.zero_stage == 3


@dataclass
class Terms:
    """The text of each kind of message, as it is put together."""

    case: Case
    of: defaultdict[Key, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, collective: str, axis: str, dtype: str, name: str, formula: str) -> None:
        self.of[collective, axis, dtype].append(f"{name} {formula}")


def formulas(case: Case) -> dict[Key, str]:
    """The formula of each kind of message that this rank sends, as text."""
    terms = Terms(case)
    _data(terms)
    _experts_data(terms)
    _tensor(terms)
    _pipeline(terms)
    _context(terms)
    _experts(terms)
    if case.clipped:
        _norm(terms)
    names = [axis for axis in MESH_AXES if getattr(case.layout, axis) > 1]
    if names:
        terms.add("all_reduce", "*".join(names), "float64", "loss and count", "16")
    return {key: " + ".join(texts) for key, texts in terms.of.items()}


def _data(terms: Terms) -> None:
    case = terms.case
    axes = weights_axes(case.layout)
    (replicas, r), (shards, n) = axes["replicate"], axes["shard"]
    if not case.sharded:
        if r > 1:
            terms.add("all_reduce", replicas, "float32", "gradients", "4 P")
        if n > 1:
            terms.add("all_reduce", shards, "float32", "gradients", "4 P")
            terms.add("broadcast", shards, "float32", "weights", "4 P")
        return
    (low, item), keep = case.low, case.options.zero_stage == 2
    if case.by_order:
        gathered = "(R + times of the schedule W)"
    elif case.layout.pp > 1:  # a pipeline keeps gathered weights from a backward to the last one
        gathered = "P" if keep else "(R + (m + 1) W)"
    else:
        gathered = "m P" if keep else "m (R + 2 W)"
    terms.add("all_gather", shards, low, "weights", f"{item} {gathered}")
    terms.add("reduce_scatter", shards, "float32", "gradients", f"4 {case.each}P")
    if r > 1:
        terms.add("all_reduce", replicas, "float32", "their shards", f"4 P / {n}")


def _experts_data(terms: Terms) -> None:
    """What the data axes send of experts that ep has spread."""
    case = terms.case
    if case.layout.ep == 1 or case.layout.data_parallel == case.layout.ep:
        return
    *outer, (shards, n) = expert_axes(case.layout)
    if not case.sharded:
        outer, n = [(shards, n)], 1
    if n > 1:
        low, item = case.low
        keep, staged = case.options.zero_stage == 2, case.layout.pp > 1
        again = "times of the schedule " if case.by_order else "(m + 1) "
        times = ("" if keep else again) if staged else ("m " if keep else "2 m ")
        terms.add("all_gather", shards, low, "experts", f"{item} {times}E")
        terms.add("reduce_scatter", shards, "float32", "gradients of experts", f"4 {case.each}E")
    for replicas, r in outer:
        if r > 1:
            cut = f" / {n}" if n > 1 else ""
            terms.add("all_reduce", replicas, "float32", "gradients of experts", f"4 E{cut}")


def _tensor(terms: Terms) -> None:
    case = terms.case
    if case.layout.tp == 1:
        return
    low, between, again = case.low, case.between, case.again
    first, last = int(0 in case.stages), int(case.last_stage in case.stages)
    times: defaultdict[tuple[str, tuple[str, int]], list[int]] = defaultdict(lambda: [0, 0])

    def activations(collective: str, dtype: tuple[str, int], a_block: int, once: int = 0) -> None:
        counts = times[collective, dtype]
        counts[0] += a_block
        counts[1] += once

    if case.options.sequence_parallel:
        activations("reduce_scatter", low, 2 + again)
        activations("all_gather", between, 2 + 2 * again, last + first)
        activations("reduce_scatter", between, 2, last)
        activations("all_gather", low, 2)
    else:
        activations("all_reduce", low, 2 + again)
        activations("all_reduce", between, 2, last)
    activations("all_reduce", between, 0, first)  # the embedding's rows come from all ranks
    for (collective, (dtype, item)), (a_block, once) in times.items():
        if a_block or once:
            terms.add(
                collective, "tp", dtype, "activations", f"{_count(item, a_block, once)}m B T D"
            )
    if last:
        terms.add("all_reduce", "tp", "float32", "loss", "12 m B T")
    if case.options.sequence_parallel:
        # the data axes hand over gradients in the dtype of their policy, accumulated ones in fp32
        alone = case.options.micro_batches == 1 or case.each
        dtype, item = between if alone else ("float32", 4)
        terms.add("all_reduce", "tp", dtype, "gradients of norms", f"{item} {case.each}G")


def _count(item: int, a_block: int, once: int) -> str:
    """So many bytes for each of so many messages a block, and so many more."""
    if not a_block:
        return f"{item * once} "
    return f"{item} ({a_block} L + {once}) " if once else f"{item * a_block} L "


def _pipeline(terms: Terms) -> None:
    case, layout = terms.case, terms.case.layout
    if layout.pp == 1:
        return
    cut = f" / {layout.tp}" if case.options.sequence_parallel and layout.tp > 1 else ""
    dtype, item = case.between
    here, last = case.stages, case.last_stage
    after = sum(1 for stage in here if stage < last and stage + 1 not in here)
    before = sum(1 for stage in here if stage > 0 and stage - 1 not in here)
    for collective, activations, gradients in (("send", after, before), ("recv", before, after)):
        for name, times in (("activations", activations), ("gradients", gradients)):
            if times:
                terms.add(collective, "pp", dtype, name, f"{item * times} m B T D{cut}")
    if case.model.tied and len({0, last} & set(here)) == 1:
        n = weights_axes(layout)["shard"][1] if case.sharded else 1
        shard = f" / {n}" if n > 1 else ""
        terms.add("all_reduce", "pp", "float32", "tied head", f"4 V D{shard}")


def _context(terms: Terms) -> None:
    case, n = terms.case, terms.case.layout.cp
    if n == 1:
        return
    dtype, item = case.low
    rounds = "(n - 1) L m B T K H"
    for collective in ("send", "recv"):
        blocks = f"{2 * (2 + case.again) * item} {rounds}"
        terms.add(collective, "cp", dtype, "keys and values", blocks)
        terms.add(collective, "cp", "float32", "their gradients", f"8 {rounds}")


def _experts(terms: Terms) -> None:
    case = terms.case
    if case.layout.ep == 1:
        return
    dtype, item = case.low
    free = case.model.capacity_factor is None
    each = f"{(4 + 2 * case.again) * item} L m B {'T A' if free else 'S'} D"
    terms.add("all_to_all", "ep", dtype, "tokens" if free else "slots", each)
    if free:
        counts = f"{8 * (1 + case.again)} L m X"
        terms.add("all_to_all", "ep", "int64", "tokens of each expert", counts)


def _norm(terms: Terms) -> None:
    """Weights that are cut alike are one sum; pipeline stages add theirs at the end."""
    case, layout = terms.case, terms.case.layout

    def add(axis: str, sums: int = 1) -> None:
        terms.add("all_reduce", axis, "float32", "norm", str(4 * sums))

    if case.sharded:  # tp cuts some weights and leaves others whole: two sums
        add(weights_axes(layout)["shard"][0], 2 if layout.tp > 1 else 1)
    if layout.tp > 1:
        add("tp")
    if layout.ep > 1 and layout.ep != layout.dp_shard:  # else the same ranks, and one sum
        rest, n = expert_axes(layout)[-1]
        if case.sharded and n > 1:
            add(rest)
        add("ep")
    if layout.pp > 1:
        add("pp")
