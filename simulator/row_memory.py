"""What the program of a published row keeps: bytes of its numbers, and what its figure counts."""

from __future__ import annotations

from parallel.layout import Precision
from simulator.cells import Cells
from simulator.footprint import MemoryHabits
from simulator.habits import program_of
from simulator.plans import Numerics


def numerics_of(kind: str, program: str, precision: Precision) -> Numerics:
    """Bytes of a weight, its gradient and its optimizer's state.

    fsdp keeps fp32 shards and casts. Megatron-LM keeps low weights and an fp32 master copy, and
    adds gradients up in fp32 but for fp16. nanotron has low gradients besides. DeepSpeed's ZeRO-1
    has a flat copy of the gradients and an fp32 part of them for the update; its bf16 adds up in
    an fp32 buffer that is not sharded (BLOOM's engine).
    """
    if kind in ("fsdp", "zero2", "zero3") or precision == Precision.fp32:
        return Numerics()
    half = precision == Precision.fp16
    if program == "megatron-deepspeed":
        return Numerics(weights=2, gradients=4 if half else 6, optimizer=16)
    if program == "nanotron":
        return Numerics(weights=2, gradients=6, optimizer=12)
    return Numerics(weights=2, gradients=2 if half else 4, optimizer=12)


# Bytes kept of a logit (those moved for one are in simulator/habits.py): low, fp32, its log-softmax
# and gradient in fp32; Megatron-LM's loss works in place
TORCH_LOGIT_KEPT, MEGATRON_LOGIT_KEPT = 14.0, 8.0
CONTEXT_BYTES = 3 * 2.0**30  # of a process: CUDA's context, NCCL's buffers, libraries' workspaces
RESERVED = 1.05  # over allocated: what the caching allocator cannot use


def memory_of(cells: Cells, flash: bool) -> MemoryHabits:
    """What the row's program keeps, and what its figure means: of the whole process
    (process-level), reserved by the allocator, or allocated."""
    note, program = cells.get("source_verbatim_note", ""), program_of(cells)
    process = program == "megatron-deepspeed"
    return MemoryHabits(
        fused=program not in ("torchtitan", "nanotron"),
        every_second_product=flash,
        logit_bytes=TORCH_LOGIT_KEPT if program == "torchtitan" else MEGATRON_LOGIT_KEPT,
        context_bytes=CONTEXT_BYTES if process else 0.0,
        spare=RESERVED if process or "reserved" in note or program == "nanotron" else 1.0,
    )
