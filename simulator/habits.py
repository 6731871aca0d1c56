"""What a program does that no plan says: its kernels, and which messages it hides.

The defaults are this program's. Those of others follow from what a published row says of its
program (simulator/candidates.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from simulator.cells import Cells, whole

# Flash kernels by generation: in Triton (2022), FlashAttention-2, those made for the device (cuDNN)
KERNELS = ("triton", "flash2", "fused")

# Bytes moved for one logit from the head's product to its backward. torch: written in 2 bytes, cast
# (6), log-softmax (8), zeros for its gradient (4), its backward (12), cast back (6). Megatron-LM's
# vocab_parallel_cross_entropy: cast, maximum (4), subtracted in place (8), exponential (8), sum
# (4), divided (8), the gradient scaled (8), cast back. In one kernel: written, read and written
# back in fp32 at the most
TORCH_LOGIT, MEGATRON_LOGIT, FUSED_LOGIT = 38.0, 54.0, 16.0
# this program's loss, compiled: written in 2 bytes, read, read again for its gradient, that written
COMPILED_LOGIT = 8.0
# Megatron-LM of 2022 sends the gradient of a layer's input while it computes that of its weight:
# two of the six all_reduces of a block whose forward runs again
BACKWARD_ONLY = 1 / 3
# torch's asynchronous tensor parallelism: a forward is up to 29 % faster, a step 8 %, so nothing of
# a backward (PyTorch, "Introducing Async Tensor Parallelism in PyTorch", 2024)
FORWARD_ONLY = 1 / 2
# BigScience's large runs set CUDA_LAUNCH_BLOCKING=1 round a hang (experiments/published/README.md).
# How large is not said: the hang was looked for on 40 and 48 nodes of 8 GPUs (its
# train/tr11-176B-ml/hang-debug.md), and this is the smaller. That it costs anything is our reading:
# its author saw no cost (chronicles-prequel.md). But without it rows of small products (tp=8, two
# sequences) are predicted 20 to 23 % too fast, of large ones (four) 9 to 13 %, and those from
# before the hang, of smaller products still, 6 to 10 %
BLOCKING_GPUS = 320
# Releases of Megatron-Bridge that launch a block with experts as CUDA graphs on GB200 and GB300,
# but for the experts (its scripts/performance/configs: cuda_graph_scope)
GRAPHED = r"^2[6-9]\.\d\d"


@dataclass(frozen=True)
class Habits:
    """One program's."""

    kernel: str = "flash2"  # of KERNELS
    logit_bytes: float = TORCH_LOGIT
    separate: bool = False  # norms and rotations in fp32 operator by operator, not in one kernel
    hides_tensor: float = 0.0  # share of tensor-parallel messages that are sent during products
    # messages as this program's: the ring's gradients in fp32, counts of experts before their rows,
    # whole activations to the next stage without sequence parallelism, torch's order of a pipeline
    sends_as_torch: bool = True
    hides_stages: bool = False  # activations travel to the next stage while others compute
    hides_gradients: bool = True  # they are sent while the backward goes on, else in one message
    hides_updates: bool = False  # updated weights (zero_stage 1) are gathered in the next forward
    hides_gathers: bool = True  # weights are gathered before they are wanted
    # to a rank with several of a token's experts it travels once, and once to a node with several
    # such ranks, which hand it on (DeepSeek-AI 2024, DeepSeek-V3, section 3.2.2)
    sends_once: bool = False
    # With zero_stage 1 each rank's part of each tensor is copied by itself, so many tensors a block
    # (nanotron, src/nanotron/distributed.py: all_gather_coalesced)
    copied_tensors: int = 0
    graphs: bool = False  # a block with experts is launched as CUDA graphs, but for the experts
    copies_shards: bool = True  # messages of sharded weights have buffers of their own
    # q, k and v are copied into the layout that attention's kernel wants where nothing rotates them
    # (Megatron-LM, core/transformer/attention.py: rearrange(...).contiguous()); torch's sdpa takes
    # them as the projections leave them
    lays_out_heads: bool = False
    blocking: bool = False  # the host waits for each kernel (CUDA_LAUNCH_BLOCKING=1)
    # torch's checkpoint without reentrant autograd stops once backward has what it needs, so that
    # the last product does not run again (from 2.1 on: set_checkpoint_early_stop)
    stops_early: bool = True
    launches: float = 1.0  # what the host takes for a block, as a share of one operator by operator


# one device's compile=true: the model is one graph (parallel/parallelize.py). Seen on one H200's
# host: 1.5 ms a block for 3.2
COMPILED = Habits(logit_bytes=COMPILED_LOGIT, launches=0.47)


def program_of(cells: Cells) -> str:
    """The program that ran a row, where it matters for what the row does not state.

    megatron-deepspeed  flash attention, recomputation and 16 bits are off unless asked for; its
                        pipeline has one stage a rank
    deepspeed           ZeRO-3 gathers each parameter by itself, when it is wanted
    torchtitan          as many micro-batches as pipeline ranks; interleaved: two stages a rank
    megatron-bridge     its tables have a column for the stages of a rank, empty where it has one
    nanotron            splits layers by their flops, head included
    """
    note, source = cells.get("source_verbatim_note", ""), cells.get("source", "")
    marks = ("Megatron-DeepSpeed" in note, "bigscience" in source)
    if any(marks) or cells.get("model_name", "").startswith("MT-NLG"):
        return "megatron-deepspeed"
    for name in ("torchtitan", "nanotron", "megatron-bridge", "deepspeed"):
        if name in source.lower() or f"({name})" in note.lower():
            return name
    return ""


def habits_of(cells: Cells, flash: bool, compiled: bool) -> Habits:
    """Of the program of a published row.

    Programs from before flash kernels (Megatron-LM until 2022, Megatron-DeepSpeed) send gradients
    after the backward. Megatron-Core overlaps all but what a row says it does not, and runs cuDNN's
    attention through Transformer Engine; so do the runs of MegaScale and Llama 3, with other
    kernels. LLM-Foundry's MPT ran the Triton kernel. The loss is one kernel in NVIDIA's
    recipes, and where SimuMax says so ("cef"). Megatron-Bridge's recipes send tokens to experts by
    HybridEP or DeepEP.
    """
    program, source = program_of(cells), cells.get("source", "")
    note, gpu = cells.get("source_verbatim_note", ""), cells.get("gpu", "")
    core = any(name in source for name in ("NVIDIA", "SimuMax"))
    own = Habits(
        sends_as_torch=False,
        hides_gradients=flash,
        copies_shards=program == "torchtitan",
        lays_out_heads=True,
        stops_early=program == "torchtitan",
        blocking="bigscience" in source and whole(cells, "n_gpus", 1) >= BLOCKING_GPUS,
    )
    if program == "nanotron":  # of a block: qkv, out, gate and up, down, two norms
        own = replace(own, copied_tensors=6)
    if not flash or program == "nanotron":
        own = replace(own, logit_bytes=MEGATRON_LOGIT)
    if any(name in source for name in ("Korthikanti", "2205.05198")):
        own = replace(own, hides_tensor=BACKWARD_ONLY)
    if program == "deepspeed":
        own = replace(own, hides_gathers=False)
    if program == "torchtitan":
        asynchronous = "async TP" in note or "AsyncTP" in note
        own = replace(own, separate=not compiled, hides_tensor=asynchronous * FORWARD_ONLY)
    if "llm-foundry" in source:
        own = replace(own, kernel="triton")
    if flash and (core or any(name in source for name in ("MegaScale", "Llama 3"))):
        on = "overlap paths disabled" not in note
        one_kernel = "_cef" in note or any(name in source for name in ("NeMo", "examples/llama"))
        own = replace(
            own,
            kernel="fused" if core else "flash2",
            logit_bytes=FUSED_LOGIT if one_kernel else MEGATRON_LOGIT,
            hides_tensor=float(on),
            hides_stages=on,
            hides_gradients=on,
            hides_updates=on,
            sends_once=program == "megatron-bridge",
            graphs=core and re.search(GRAPHED, note) is not None and gpu.startswith("GB"),
        )
    return replace(own, logit_bytes=FUSED_LOGIT) if compiled else own
