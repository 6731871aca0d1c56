"""What a single process can ask the same program. Nothing here knows which fault there is, if any.

Each probe has an answer that is known beforehand for every sound program, so that nothing has to be
compared with a run of yesterday.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.assemble import make_batches
from experiments.config import TrainConfig
from experiments.debug.observe import Gradients, Row, Seen, first_gradients
from experiments.sample import load_model
from minigpt.corpus import prepare
from minigpt.model import GPT, Attention, token_loss
from minigpt.optimizer import build_optimizer, set_learning_rate
from parallel.layout import ActivationCheckpointing, Impl, Layout, PipelineConfig

OVERFIT_STEPS, OVERFIT_LR = 30, 3e-3
RAMP_STEPS = 40
JUMP = 0.3  # nats by which a loss rises that is not noise


@dataclass(frozen=True)
class Probes:
    """The answers."""

    start: float  # largest distance of a weight before step 1 from what its name and the seed give
    rows: frozenset[Row]  # the sequences of step 1
    earlier_change: float  # of logits, relative, where only a later token was changed
    head_error: float  # of attention to equal tokens, relative: any average of equals is the same
    overfit: tuple[float, float]  # loss before and after some steps on one batch
    gradients: dict[bool, Gradients]  # as Seen.gradients, of one process with one micro-batch
    rise_with_ramp: float | None  # of the loss; None where the run's own losses do not rise
    fp32_norm: float | None  # of the failed step's gradient, in fp32; None where none failed


def ask(config: TrainConfig, seen: Seen) -> Probes:
    """Every question, in this process, whatever the layout of the run."""
    torch.set_num_threads(1)
    whole = alone(config)
    batches = make_batches(whole, prepare(config.data))
    tokens, _ = batches.rows(0, 0, config.batch_size)
    model = load_model(replace(config.model, dropout=0.0), seen.start, torch.device("cpu"))
    block = next(iter(model.blocks.values()))
    assert isinstance(block.attention, Attention)
    return Probes(
        start=distance_from_seed(model, config),
        rows=frozenset(tuple(row) for row in tokens.tolist()),
        earlier_change=causality(model, tokens[:4]),
        head_error=equal_tokens(block.attention, config.model.d_model, config.seq_len),
        overfit=learned_by_heart(model, *batches.rows(0, 0, min(4, config.batch_size))),
        gradients={uneven: first_gradients(whole, uneven) for uneven in (False, True)},
        rise_with_ramp=rise_with_ramp(whole, seen) if jumps(seen) else None,
        fp32_norm=norm_in_fp32(whole, seen) if seen.failed_step is not None else None,
    )


def alone(config: TrainConfig) -> TrainConfig:
    """The same batches and the same model for one process, in one micro-batch."""
    return replace(
        config,
        layout=Layout(),
        impl=Impl.torch,
        sequence_parallel=False,
        pipeline=PipelineConfig(),
        activation_checkpointing=ActivationCheckpointing.none,
        compile=False,
        micro_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        global_batch_size=None,
    )


@torch.no_grad()
def distance_from_seed(model: GPT, config: TrainConfig) -> float:
    """How far the run's first weights are from those that a process alone would begin with."""
    own = GPT(config.model)
    own.init_weights(config.seed)
    held = dict(model.named_parameters())
    return max(float((p - held[name]).abs().max()) for name, p in own.named_parameters())


@torch.no_grad()
def causality(model: GPT, tokens: Tensor) -> float:
    """Change the last token; nothing before it may notice."""
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 2
    before, after = model(tokens)[:, :-1], model(changed)[:, :-1]
    return float((before - after).abs().max() / before.abs().max())


@torch.no_grad()
def equal_tokens(attention: Attention, width: int, length: int) -> float:
    """If all tokens are the same, attention gives back their value, out(v(x)), whatever it
    attends to: heads that are not where they belong show."""
    x = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0))
    v = attention.v(x).unflatten(-1, (-1, attention.head_dim))
    group = attention.q.out_features // attention.v.out_features
    wanted = attention.out(v.repeat_interleave(group, dim=2).flatten(2))
    return float((attention(x.expand(1, length, -1)) - wanted).abs().max() / wanted.abs().max())


def learned_by_heart(model: GPT, tokens: Tensor, targets: Tensor) -> tuple[float, float]:
    """Losses before and after OVERFIT_STEPS of AdamW on one batch. It changes `model`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=OVERFIT_LR)
    losses = []
    for _ in range(OVERFIT_STEPS + 1):
        loss, _ = mean_loss(model, tokens, targets)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss)
    return losses[0], losses[-1]


def rise(losses: Sequence[float]) -> float:
    """The most by which a loss is above the first, which is a guess: no sound run gets worse."""
    return max((loss - losses[0] for loss in losses if math.isfinite(loss)), default=0.0)


def jumps(seen: Seen) -> bool:
    return rise(first_half(seen.losses)) >= JUMP


def first_half(losses: list[float]) -> list[float]:
    return losses[: 1 + len(losses) // 2]


def rise_with_ramp(whole: TrainConfig, seen: Seen) -> float:
    """How much the loss rises if RAMP_STEPS lead up to the same highest learning rate."""
    model = load_model(whole.model, seen.start, torch.device("cpu")).train()
    optimizer = build_optimizer(model.named_parameters(), whole.optimizer)
    batches = make_batches(whole, prepare(whole.data))
    losses, highest = [], max(seen.rates)
    for step in range(RAMP_STEPS + len(first_half(seen.losses))):
        set_learning_rate(optimizer, highest * min(1.0, (step + 1) / RAMP_STEPS))
        loss, _ = mean_loss(model, *batches.rows(step, 0, whole.batch_size))
        torch.nn.utils.clip_grad_norm_(model.parameters(), whole.clip or math.inf)
        optimizer.step()
        losses.append(loss)
    return rise(losses)


def norm_in_fp32(whole: TrainConfig, seen: Seen) -> float:
    """Of the gradient of the step that failed, once more from the weights that it began with."""
    assert seen.failed_step is not None
    model = load_model(whole.model, seen.failed_weights, torch.device("cpu"))
    batches = make_batches(whole, prepare(whole.data))
    _, norm = mean_loss(model, *batches.rows(seen.failed_step, 0, whole.batch_size))
    return norm


def mean_loss(model: GPT, tokens: Tensor, targets: Tensor) -> tuple[float, float]:
    """The mean loss of a batch and the norm of its gradient, which is left in .grad."""
    model.zero_grad()
    total, count = token_loss(model(tokens), targets)
    loss = total / count.clamp(min=1)
    loss.backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    return float(loss.detach()), float(norms.norm())
