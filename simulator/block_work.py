"""What one block of a plan computes for one micro-batch, product by product, and the head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from costs.program import Work
from minigpt.config import FFN, Attention, ModelConfig
from parallel.layout import ActivationCheckpointing, Layout, Options
from simulator.block_messages import expert_choices
from simulator.programs import ACTION_OF_KIND, PHASE_OF_KIND
from simulator.sending import DTYPE_NAMES, ITEM_BYTES

# Bytes that a backward moves for each of the forward's: it reads what was kept and a gradient, and
# writes a gradient
BACKWARD_BYTES = 1.5
HEAD = "head"
SCORES = ("attention", "scores and values")  # in a flash kernel, or with its T x T matrix


@dataclass
class BlockWork:
    """`activation`: numbers of a micro-batch's activations on one rank, B T D.

    Kinds are those of simulator/schedules.py: a backward has two products for each of the
    forward's, one of them in each of its halves; what full checkpointing repeats comes before.
    """

    model: ModelConfig
    layout: Layout
    options: Options
    activation: int

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.options.precision]

    @cached_property
    def products(self) -> list[tuple[str, int, int, int, int]]:
        """Of a block's forward: name, batch, rows, inner, columns."""
        m, o, tp = self.model, self.options, self.layout.tp
        tokens, d, f = self.activation // m.d_model, m.d_model, m.ff_dim
        kv = m.kv_heads * m.head_dim
        batch, rows = 1, tokens
        if m.ffn == FFN.moe:
            batch = m.n_expert // self.layout.ep
            rows = o.micro_batch_size * expert_choices(m, o.seq_len) // m.n_expert * self.layout.ep
        up = f if m.ffn == FFN.gelu else 2 * f
        sequence, part = o.seq_len, o.seq_len // self.layout.cp
        attention = SCORES[m.attention != Attention.sdpa]
        heads = o.micro_batch_size * m.n_head // tp
        return [
            ("qkv", 1, tokens, d, (d + 2 * kv) // tp),
            (attention, 2 * heads, part, m.head_dim, sequence),
            ("out", 1, tokens, d // tp, d),
            ("up", batch, rows, d, up // tp),
            ("down", batch, rows, f // tp, d),
        ]

    @cached_property
    def elementwise_bytes(self) -> int:
        """Of a block's forward: two norms and two residuals read and write B T D ten times in all,
        the activation of the MLP reads what `up` gave and writes F."""
        m, sp = self.model, self.options.sequence_parallel
        whole = 10 * self.activation // (self.layout.tp if sp else 1)
        _, batch, rows, inner, _ = self.products[4]
        gated = m.ffn != FFN.gelu
        return self.item * (whole + (3 if gated else 2) * batch * rows * inner)

    def works(self, kind: str, stage: int, i: int) -> list[Work]:
        """The products and the element-wise operators of one block."""
        full = self.options.activation_checkpointing in (
            ActivationCheckpointing.full,
            ActivationCheckpointing.offload,
        )
        again = full and kind in "BI"
        moved = {"F": 1.0, "B": BACKWARD_BYTES, "I": BACKWARD_BYTES, "W": 0.0}[kind] + again
        made = []
        for name, batch, *shape in self.products:
            # a block that runs again stops before its last product (simulator/flops.py)
            spared = name == "down" and self.model.ffn != FFN.moe
            # attention has no weights: its backward is all in the first half
            weighs = name not in SCORES
            times = {"F": 1, "B": 2, "I": 1 if weighs else 2, "W": int(weighs)}[kind]
            count = (times + (again and not spared)) * batch
            if not count:
                continue
            made.append(self._product(name, kind, (count, *shape), stage, i))
        size = round(moved * self.elementwise_bytes)
        made.append(self._work("elementwise", kind, stage, i, bytes=size))
        return made

    def head(self, kind: str, stage: int, i: int) -> Work:
        """Of the last stage: logits. The loss is left out."""
        m = self.model
        tokens = self.activation // m.d_model
        times = 2 if kind == "B" else 1
        shape = (times, tokens, m.d_model, m.vocab_rows // self.layout.tp)
        return self._product(HEAD, kind, shape, stage, i)

    def _product(self, name: str, kind: str, shape: tuple[int, ...], stage: int, i: int) -> Work:
        batch, rows, inner, columns = shape
        # a flash kernel keeps its T x T scores on the chip
        given = 0 if name == "attention" else rows * columns
        return self._work(
            name,
            kind,
            stage,
            i,
            flops=2 * math.prod(shape),
            bytes=self.item * batch * (rows * inner + inner * columns + given),
            dtype=DTYPE_NAMES[self.options.precision],
            shape=shape,
        )

    def _work(self, name: str, kind: str, stage: int, i: int, **costs: Any) -> Work:
        phase, action = PHASE_OF_KIND[kind], ACTION_OF_KIND[kind]
        return Work(phase, name, stage=stage, micro_batch=i, action=action, **costs)
