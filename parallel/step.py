"""One optimiser step, the same for every layout: forward and backward, gradients, update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minigpt.experts import set_loss_factor
from parallel.gradients import align_gradients, gradient_norm, local_norms, scale_gradients
from parallel.passes import Marks, MicroBatch, NoMarks
from parallel.precision import LossScaler
from parallel.replica import Replica


@dataclass(frozen=True)
class Result:
    """What a step did, the same on all ranks."""

    loss: float  # mean over the valid tokens of the global batch
    tokens: int  # valid tokens in the global batch
    gradient_norm: float | None  # before clipping; null where nothing needed it
    skipped: bool  # a number was not finite: no update
    stop: bool = False  # a rank was asked to stop, and this is the step after which all do


STOP = 2.0**40  # what a rank that is to stop adds to its count of tokens, which is far smaller


class NonFinite(RuntimeError):
    """The loss or the gradient is NaN or infinite; the parameters are those of the step before."""


@dataclass
class Trainer:
    """Everything an optimiser step needs. `micro_batch_tokens` is B times T of one micro-batch."""

    replica: Replica
    optimizer: torch.optim.Optimizer
    micro_batch_tokens: int
    accumulation: int
    clip: float | None = None
    scaler: LossScaler | None = None  # fp16 only
    marks: Marks = field(default_factory=NoMarks)
    may_skip: int = 0  # steps in a row that a number which is not finite may cost; 0: it stops

    def __post_init__(self) -> None:
        # once: walking the modules takes a tenth of a millisecond
        self.parameters = list(self.replica.parameters())
        self.counted = self.replica.counted_parameters()
        self.asked_to_stop = False  # of this rank, which takes it to the others with its loss
        self.skipped_in_a_row = 0

    def step(self, micro_batches: Sequence[MicroBatch]) -> Result:
        """Train on this rank's share of one global batch."""
        assert len(micro_batches) == self.accumulation
        with self.marks.phase("optimizer"):
            for parameter in self.parameters:  # a tenth of a millisecond less than zero_grad()
                parameter.grad = None
        with self.marks.phase("forward_backward"):
            totals = self._forward_backward(micro_batches)
        with self.marks.phase("optimizer"):
            norms = local_norms(self.counted)
            own = totals.clone()
            if self.scaler is None:
                # what is not finite on one rank must be so to all, or some would update
                totals[0] += 0.0 * torch.stack(norms).sum()
            # a signal reaches ranks at different times: the sum makes all stop after the same step
            totals[1] += STOP * self.asked_to_stop
            loss_sum, count = self._read(self.replica.mesh.sum(totals))
            result = self._update(loss_sum, count % STOP, norms, own)
            return replace(result, stop=count >= STOP)

    def _forward_backward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Accumulate gradients. Returns (sum of losses, count of valid tokens) of this rank.

        Backward runs on sums divided by the number of tokens that a rank would have were none
        ignored. Data parallelism averages over ranks, so what arrives is the gradient of
        sum / nominal tokens, whatever the true counts were: _update corrects by their ratio once.
        A mean here would be a mean of means: wrong as soon as ranks or micro-batches differ.
        """
        replica, layout = self.replica, self.replica.mesh.layout
        factor = self._scale * layout.cp / (self.micro_batch_tokens * self.accumulation)
        for stage in replica.stages:
            set_loss_factor(stage, factor)
        mine = [replica.take(micro_batch) for micro_batch in micro_batches]
        totals = replica.passes.train(mine, factor, self.marks)
        if layout.tp > 1:
            align_gradients(self.parameters)
        return totals if replica.mesh.counts else torch.zeros_like(totals)

    def _update(self, loss_sum: float, count: float, norms: list[Tensor], own: Tensor) -> Result:
        """Correct, clip and apply the gradients, given the totals over all ranks.

        `norms` are of this rank's gradients, `own` its part of the totals.
        """
        if count == 0:
            raise ValueError("the global batch has no valid target: every token is ignored")
        loss = loss_sum / count
        if not math.isfinite(loss):
            return self._overflow(self._reason(own, norms), Result(loss, int(count), None, True))
        ranks = self.replica.mesh.layout.data_parallel
        nominal = self.micro_batch_tokens * self.accumulation * ranks
        correction = nominal / count / self._scale
        norm = None
        if self.clip is not None or self.scaler is not None:
            norm = correction * float(gradient_norm(self.counted, self.replica.mesh, norms))
            if not math.isfinite(norm):
                result = Result(loss, int(count), norm, True)
                return self._overflow(f"the gradient norm is {norm}", result)
        if norm is not None and self.clip is not None and norm > self.clip:
            correction *= self.clip / (norm + 1e-6)
        if correction != 1.0:
            scale_gradients(self.parameters, correction)
        self.optimizer.step()
        if self.scaler:
            self.scaler.update(finite=True)
        self.skipped_in_a_row = 0
        return Result(loss, int(count), norm, skipped=False)

    def _read(self, totals: Tensor) -> tuple[float, float]:
        """The totals as numbers: the host waits for the device. A trace overrides it."""
        loss_sum, count = totals.tolist()
        return loss_sum, count

    @property
    def _scale(self) -> float:
        return self.scaler.scale if self.scaler else 1.0

    def _reason(self, own: Tensor, norms: list[Tensor]) -> str:
        """What is not finite, and on how many ranks. All ranks call it, after they saw that."""
        wrong = [not math.isfinite(own[0]), not all(map(math.isfinite, norms))]
        counts = torch.tensor(wrong, dtype=torch.float64, device=own.device)
        loss, gradients = map(int, self.replica.mesh.sum(counts).tolist())
        what, ranks = ("loss", loss) if loss else ("gradient", gradients)
        return f"the {what} is not finite on {ranks} of {self.replica.mesh.layout.world_size} ranks"

    def _overflow(self, reason: str, skipped: Result) -> Result:
        """With a loss scaler: skip this step and scale less from now on. Without one: skip it where
        that is allowed, or stop. All ranks come here or none does."""
        if self.scaler is None:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row <= self.may_skip:
                return skipped
            again = f", {self.skipped_in_a_row} steps in a row" if self.may_skip else ""
            raise NonFinite(f"{reason}{again}: no update was made")
        self.scaler.update(finite=False)
        if self.scaler.scale < 1:
            raise NonFinite(f"{reason}, and no loss scale above 1 avoids it")
        return skipped


@torch.no_grad()
def evaluate(replica: Replica, batches: Iterable[MicroBatch]) -> float:
    """Mean loss over the valid tokens of `batches` on all ranks; every rank must call it."""
    totals = torch.zeros(2, dtype=torch.float64, device=replica.mesh.device)
    replica.train(False)
    for micro_batch in batches:
        totals += replica.passes.evaluate(*replica.take(micro_batch))
    replica.train(True)
    if not replica.mesh.counts:
        totals.zero_()
    loss_sum, count_sum = replica.mesh.sum(totals).tolist()
    return loss_sum / count_sum if count_sum else math.nan
