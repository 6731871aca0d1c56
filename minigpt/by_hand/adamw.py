"""AdamW: each weight gets a step of its own size (Kingma 2015; Loshchilov 2019 for the decay).

m and v are running averages of the gradient and of its square. m / sqrt(v) is about +-1 while a
gradient keeps its sign, and small while it is noise, whatever the gradient's scale. The decay acts
on the weight itself: inside the gradient, m / sqrt(v) would take its strength away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """Two more numbers for each weight. Parameters and groups as torch's optimizers take them."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, weight.grad, self.state[weight], **group)

    @staticmethod
    def update(
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **_: Any,
    ) -> None:
        """One step of one weight, in place (Loshchilov 2019, algorithm 2)."""
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight)  # m, under torch's names: checkpoints agree
            state["exp_avg_sq"] = torch.zeros_like(weight)  # v
        state["step"] += 1
        t, m, v = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = betas
        m.mul_(beta1).add_(gradient, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # both began at 0 and are too small at first: by 1 - beta^t, the sum of what they averaged
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        weight.mul_(1 - lr * weight_decay)
        weight.sub_(lr * m_hat / (v_hat.sqrt() + eps))
