"""One optimiser step, the same for every layout: forward and backward, gradients, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt.experts import moe_layers, set_loss_factor
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


class OnItsWay:
    """Numbers that the device is to send: the host launches on until it reads them."""

    def __init__(self, numbers: Tensor) -> None:
        on_gpu = numbers.is_cuda
        self.event = torch.cuda.Event() if on_gpu else None
        self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu)
        self.numbers.copy_(numbers, non_blocking=True)
        if self.event:
            self.event.record()

    def read(self) -> list[float]:
        """They are here once this returns."""
        if self.event:
            self.event.synchronize()
        return self.numbers.tolist()


class UnderWay:
    """A step that the host has launched; a GPU may still be at it."""

    def __init__(self, find: Callable[[], Result]) -> None:
        self._find = find
        self._found: Result | None = None

    def result(self) -> Result:
        """What it came to: waits for the device. All ranks call it, after the same step.

        Raises NonFinite where a number was not finite and must not be skipped, ValueError where no
        token counted.
        """
        if self._found is None:
            self._found = self._find()
        return self._found


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
        # once: walking the modules takes tenths of a millisecond
        self.experts = [layer for stage in self.replica.stages for layer in moe_layers(stage)]
        self.parameters = list(self.replica.parameters())
        self.counted = self.replica.counted_parameters()
        self.asked_to_stop = False  # of this rank, which takes it to the others with its loss
        self.skipped_in_a_row = 0
        self.launched: UnderWay | None = None  # the newest step
        plain = not any(isinstance(p, DTensor) for p in self.parameters)  # the kernel takes no mix
        fused = type(self.optimizer) is torch.optim.AdamW and self.scaler is None
        self.decides_on_device = self.replica.mesh.device.type == "cuda" and plain and fused

    def step(self, micro_batches: Sequence[MicroBatch]) -> Result:
        """Train on this rank's share of one global batch."""
        return self.launch(micro_batches).result()

    def launch(self, micro_batches: Sequence[MicroBatch]) -> UnderWay:
        """The same, but a GPU is not waited for: it has its next work before it asks for it.

        No update follows a bad number: the host reads what the step before came to once this one's
        forward and backward are on their way, and launches its update after that.
        """
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
            if self.launched:
                self.launched.result()
            update = self._update_on_device if self.decides_on_device else self._update
            self.launched = UnderWay(update(self.replica.mesh.sum(totals), norms, own))
        return self.launched

    def _forward_backward(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Accumulate gradients. Returns (sum of losses, count of valid tokens) of this rank.

        Backward runs on sums divided by the number of tokens that a rank would have were none
        ignored. Data parallelism averages over ranks, so what arrives is the gradient of
        sum / nominal tokens, whatever the true counts were: _update corrects by their ratio once.
        A mean here would be a mean of means: wrong as soon as ranks or micro-batches differ.
        """
        replica, layout = self.replica, self.replica.mesh.layout
        factor = self._scale * layout.cp / (self.micro_batch_tokens * self.accumulation)
        set_loss_factor(self.experts, factor)
        mine = [replica.take(micro_batch) for micro_batch in micro_batches]
        totals = replica.passes.train(mine, factor, self.marks)
        if layout.tp > 1:
            align_gradients(self.parameters)
        return totals if replica.mesh.counts else torch.zeros_like(totals)

    def _update(self, totals: Tensor, norms: list[Tensor], own: Tensor) -> Callable[[], Result]:
        """Correct, clip and apply the gradients, given the totals over all ranks.

        `norms` are of this rank's gradients, `own` its part of the totals. Returns what tells the
        outcome.
        """
        loss_sum, count = self._read(totals)
        correction = self._nominal / max(1.0, count % STOP) / self._scale
        norm = None
        if math.isfinite(loss_sum) and (self.clip is not None or self.scaler is not None):
            norm = correction * float(gradient_norm(self.counted, self.replica.mesh, norms))
        result = self._result(loss_sum, count, norm, norms, own)
        if result.skipped:
            return lambda: result
        if norm is not None and self.clip is not None and norm > self.clip:
            correction *= self.clip / (norm + 1e-6)
        if correction != 1.0:
            scale_gradients(self.parameters, correction)
        self.optimizer.step()
        if self.scaler:
            self.scaler.update(finite=True)
        return lambda: result

    def _update_on_device(
        self, totals: Tensor, norms: list[Tensor], own: Tensor
    ) -> Callable[[], Result]:
        """The same, where the update rule takes factor and verdict from the device, as it does for
        torch's GradScaler: the host need not know them yet."""
        loss_sum, count = totals[0], totals[1] % STOP
        correction = self._nominal / count
        finite, factor, read = loss_sum.isfinite() & (count > 0), correction, [totals]
        if self.clip is not None:
            norm = correction * gradient_norm(self.counted, self.replica.mesh, norms)
            finite &= norm.isfinite()
            factor = torch.where(norm > self.clip, factor * self.clip / (norm + 1e-6), factor)
            read.append(norm[None])
        said = OnItsWay(torch.cat(read))
        self.optimizer.grad_scale = factor.reciprocal().float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()

        def find() -> Result:
            loss, tokens, *clipped = said.read()
            return self._result(loss, tokens, clipped[0] if clipped else None, norms, own)

        return find

    def _result(
        self,
        loss_sum: float,
        count: float,
        norm: float | None,
        norms: list[Tensor],
        own: Tensor,
    ) -> Result:
        """What the totals say: `skipped` where there was nothing that an update could have used."""
        stop, count = count >= STOP, count % STOP
        if count == 0:
            raise ValueError("the global batch has no valid target: every token is ignored")
        result = Result(loss_sum / count, int(count), norm, skipped=False, stop=stop)
        wrong = None
        if not math.isfinite(loss_sum):
            wrong = self._reason(own, norms)
        elif norm is not None and not math.isfinite(norm):
            wrong = f"the gradient norm is {norm}"
        if wrong is None:
            self.skipped_in_a_row = 0
            return result
        return self._overflow(wrong, replace(result, skipped=True))

    @property
    def _nominal(self) -> float:
        """Tokens by which backward has divided, of all ranks."""
        ranks = self.replica.mesh.layout.data_parallel
        return self.micro_batch_tokens * self.accumulation * ranks

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
