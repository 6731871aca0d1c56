"""Programs of a plan: what one rank of each pipeline place does in a step, from the closed forms.

Ranks that differ in other axes than pp behave alike, so rank 0 of each pp place stands for them.
Which messages there are, and their bytes, is simulator/communication.py's; here they get a place:
those of tp and ep after each block, waited for at once; those of cp beside attention; gathered
weights one block ahead; gradients from the last micro-batch's backward on, or each one's, waited
for at its end; the rest with the optimizer. The messages of a pass are spread evenly over its
blocks, so that embedding and head count with the blocks beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from costs.program import Message, Program, Wait, Work
from costs.rank_grid import RankGrid
from minigpt.config import ModelConfig
from parallel.layout import MESH_AXES, Layout, Options
from simulator.block_work import SCORES, BlockWork
from simulator.communication import messages_by_phase
from simulator.plans import Plans
from simulator.programs import PHASE_OF_KIND, pipeline_programs
from simulator.sending import DTYPE_NAMES, ITEM_BYTES
from simulator.shapes import Rank

WEIGHTS = ("dp_replicate", "dp_shard")  # axes whose messages carry weights and gradients


def programs_of(
    model: ModelConfig, layout: Layout, options: Options, clipped: bool = True
) -> tuple[dict[int, Program], Callable[[int], int]]:
    """A program for the first rank of each pp place, and which of them stands for a rank.

    The plan must be one that parallel.rules lets pass.
    """
    stride = layout.world_size // layout.pp
    ranks = [place * stride for place in range(layout.pp)]
    writers = [Writer(model, layout, options, clipped, place) for place in range(layout.pp)]
    if layout.pp == 1:
        passes = [(k, 0, i) for i in range(options.micro_batches) for k in ("F", "B")]
        programs = {0: [e for step in passes for e in writers[0].work(*step)]}
    else:
        held = {
            stage: writer
            for place, writer in enumerate(writers)
            for stage in options.pipeline.stages_of(place, layout.pp)
        }
        programs = pipeline_programs(
            options.pipeline,
            ranks,
            options.micro_batches,
            lambda kind, stage, i: held[stage].work(kind, stage, i),
            writers[0].between_stages,
            writers[0].between,
        )
    made = {rank: programs[rank] + writers[i].end() for i, rank in enumerate(ranks)}
    return made, lambda rank: rank // stride * stride


def event_count(model: ModelConfig, layout: Layout, options: Options, clipped: bool = True) -> int:
    """Return about how many events programs_of makes, from one pass of each kind and stage.

    Messages between stages and those that follow the last backward are left out.
    """
    kinds = "FIW" if options.pipeline.splits_backward and layout.pp > 1 else "FB"
    writers = (Writer(model, layout, options, clipped, place) for place in range(layout.pp))
    passes = ((w, kind, stage) for w in writers for stage in w.blocks for kind in kinds)
    return options.micro_batches * sum(len(w.work(kind, stage, 0)) for w, kind, stage in passes)


@dataclass
class Share:
    """One kind of message, spread evenly over the blocks of its passes."""

    collective: str
    axis: str
    dtype: str
    phase: str
    calls: int
    payload_bytes: int
    done: int = 0
    passed: int = 0

    @property
    def is_gradient(self) -> bool:
        """Sent when a backward gives it: the last, or each. A norm's, which sequence parallelism
        adds up over tp, is not told from activations."""
        return self.axis.startswith(WEIGHTS) and self.collective != "all_gather"

    def next(self, slots: int) -> Iterator[int]:
        """Bytes of each message that falls to the next of `slots` blocks."""
        self.passed += 1
        until = self.calls if self.passed >= slots else self.passed * self.calls // slots
        while self.done < until:
            yield (self.done + 1) * self.payload_bytes // self.calls - (
                self.done * self.payload_bytes // self.calls
            )
            self.done += 1


class Writer:
    """Writes the program of one pp place, pass by pass."""

    def __init__(
        self, model: ModelConfig, layout: Layout, options: Options, clipped: bool, place: int
    ) -> None:
        self.model, self.layout, self.options, self.place = model, layout, options, place
        self.rank = Rank(Plans.of(model, layout, options, clipped=clipped), place)
        self.number = -1  # counts down: pipeline_programs counts up
        self.groups: dict[tuple[str, bool], RankGrid] = {}
        self.pending: list[int] = []  # gradients under way
        self.shares = [
            Share(collective, axis, dtype, phase, int(sent.calls[0]), int(sent.payload_bytes[0]))
            for (collective, axis, dtype, phase), sent in messages_by_phase(self.rank).items()
            if collective not in ("send", "recv") or axis != "pp"
        ]
        self.computing = BlockWork(model, layout, options, int(self.rank.activation[0]))
        own = options.pipeline.stages_of(place, layout.pp) if layout.pp > 1 else [0]
        self.blocks = dict(zip(own, (int(n[0]) for n in self.rank.blocks), strict=True))
        self.slots = options.micro_batches * sum(self.blocks.values())
        self.backwards = dict.fromkeys(own, 0)  # that a stage has done
        self.scatters_each = bool(self.rank.scatters[0] > 1)

    # sizes

    @property
    def between(self) -> str:
        """The dtype of what goes from stage to stage."""
        return DTYPE_NAMES[self.options.precision] if self.rank.has_policy[0] else "float32"

    @property
    def between_stages(self) -> int:
        cut = self.layout.tp if self.options.sequence_parallel else 1
        item = 4 if self.between == "float32" else ITEM_BYTES[self.options.precision]
        return item * int(self.rank.activation[0]) // cut

    # events

    def work(self, kind: str, stage: int, i: int) -> Program:
        """One micro-batch through one stage."""
        phase = PHASE_OF_KIND[kind]
        self.backwards[stage] += kind in "BW"
        last = kind in "BW" and self.backwards[stage] == self.options.micro_batches
        made: Program = []
        for block in range(self.blocks[stage]):
            works = self.computing.works(kind, stage, i)
            computed: Program = [*works]
            if self._is_head(kind, stage, block):
                computed.append(self.computing.head(kind, stage, i))
            ahead, inside, ring = self._messages(phase, stage, i, kind != "W")
            waits: Program = [Wait(m.number, phase) for m in [*inside, *ahead]]
            if ring:
                place = next(n for n, e in enumerate(works) if e.name in SCORES)
                rounds: Program = [Wait(m.number, phase) for m in ring]
                computed[place : place + 1] = [*ring, computed[place], *rounds]
            # gathered weights are asked for before a block and waited for behind it: one ahead
            made += [*ahead, *computed, *inside, *waits]
            if kind in "BW":
                made += self._gradients(stage, i, last)
        if self.layout.pp == 1:
            made += self._arrived()
        return made

    def _is_head(self, kind: str, stage: int, block: int) -> bool:
        count = self.layout.pp * self.options.pipeline.local_stages if self.layout.pp > 1 else 1
        last_block = block == (self.blocks[stage] - 1 if kind == "F" else 0)
        return stage == count - 1 and last_block

    def _messages(
        self, phase: str, stage: int, i: int, sends: bool
    ) -> tuple[list[Message], list[Message], list[Message]]:
        """Return one block's gathers of weights, messages of activations and messages of a ring."""
        ahead: list[Message] = []
        inside: list[Message] = []
        ring: list[Message] = []
        for share in self.shares if sends else []:
            if share.phase != phase or share.axis == "pp" or share.is_gradient:
                continue
            weights = ahead if share.axis.startswith(WEIGHTS) else inside
            made = ring if share.axis == "cp" else weights
            made += [self._message(share, size, stage, i) for size in share.next(self.slots)]
        return ahead, inside, ring

    def _gradients(self, stage: int, i: int, last: bool) -> list[Message]:
        """Those that are sent when a block's backward is done: the last one, or each that scatters
        its own."""
        blocks, made = sum(self.blocks.values()), []
        for share in self.shares:
            if share.phase != "backward" or share.axis == "pp" or not share.is_gradient:
                continue
            of_each = self.scatters_each and share.collective == "reduce_scatter"
            if last or of_each:
                sizes = share.next(self.slots if of_each else blocks)
                made += [self._message(share, size, stage, i) for size in sizes]
        self.pending += [message.number for message in made]
        return made

    def _arrived(self) -> Program:
        """Wait for all gradients under way."""
        waits: Program = [Wait(number, "backward") for number in self.pending]
        self.pending = []
        return waits

    def end(self) -> Program:
        """What follows the last backward: a tied head's gradient, sums over ranks, the update."""
        made = self._arrived()
        optimizer = [s for s in self.shares if s.phase == "optimizer"]
        optimizer.sort(key=lambda s: (s.dtype != "float64", s.axis, s.collective))
        sums = [s for s in optimizer if s.collective == "all_reduce"]
        tied = [s for s in self.shares if s.phase == "backward" and s.axis == "pp"]
        for share in [*tied, *sums]:
            made += self._at_once(share)
        made.append(Work("optimizer", "optimizer", bytes=self.optimizer_bytes))
        for share in optimizer:
            if share.collective != "all_reduce":
                made += self._at_once(share)
        return made

    def _at_once(self, share: Share) -> Program:
        messages = [self._message(share, size) for size in share.next(1)]
        return [e for m in messages for e in (m, Wait(m.number, m.phase))]

    @property
    def optimizer_bytes(self) -> int:
        """Moments and weights are read and written, gradients read."""
        rank, numerics = self.rank, self.rank.plans.numerics
        n = np.where(rank.sharded | rank.zero1, rank.shards, 1)
        experts = rank.of_experts(rank.expert_shards) // rank.expert_shards
        held = (rank.of_outer(n) + rank.layers * rank.of_block(n)) // n + rank.layers * experts
        each = 2 * numerics.optimizer + 2 * numerics.weights + numerics.gradients
        return int(held[0]) * each

    def group(self, axis: str, tied: bool = False) -> RankGrid:
        """Return the global ranks of this rank's group on an axis, or on joined ones."""
        if (axis, tied) not in self.groups:
            self.groups[axis, tied] = self._group(axis, tied)
        return self.groups[axis, tied]

    def _group(self, axis: str, tied: bool) -> RankGrid:
        layout, name = self.layout, axis
        if axis == "ep" or axis.endswith("/ep"):
            name = "dp_shard" if layout.dp_shard > 1 else "dp_replicate"
        strides = [prod(layout.sizes[i + 1 :]) for i in range(len(MESH_AXES))]
        lines = dict(zip(MESH_AXES, zip(layout.sizes, strides, strict=True), strict=True))
        if name != axis:  # ep takes neighbours out of a data axis
            size, stride = lines[name]
            inside = (layout.ep, stride), (size // layout.ep, stride * layout.ep)
            lines[name] = inside[axis != "ep"]
        if tied:  # first and last stage
            lines["pp"] = 2, (layout.pp - 1) * strides[0]
        joined = name.split("*")
        first = 0 if "pp" in joined else self.place * strides[0]
        return RankGrid(first, tuple(line for a, line in lines.items() if a in joined))

    def _message(
        self, share: Share, size: int, stage: int | None = None, i: int | None = None
    ) -> Message:
        self.number -= 1
        group = self.group(share.axis, share.axis == "pp" and share.phase == "backward")
        ranks: Sequence[int] = group
        if share.collective in ("send", "recv"):  # round the ring of cp
            other = group[1] if share.collective == "send" else group[-1]
            ranks = (group[0], other) if share.collective == "send" else (other, group[0])
        return Message(
            self.number,
            share.collective,
            share.axis,
            ranks,
            share.dtype,
            size,
            share.phase,
            None,
            stage,
            i,
        )
