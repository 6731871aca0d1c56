"""Mixture of experts: each token goes through k of E MLPs, which a router picks for it.

The model is Mixtral's (Jiang et al. 2024, section 2.1), with the load-balancing loss of Switch
(Fedus et al. 2021, eq. 4) and, where a capacity is set, the slots of GShard (Lepikhin et al. 2020,
section 2.2). Both are those of one sequence, never of a batch: what a batch does is the sum over
its sequences, so that any split over micro-batches and ranks trains as a single process does.

Shape letters: B batch, T sequence, D width, F width of an expert, E experts, k experts of a token
(a choice is one of a token's k), C slots that an expert has for each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.autocast import cast_once
from minigpt.config import ModelConfig


class Routing(NamedTuple):
    """Where the tokens go."""

    chosen: Tensor  # (B, T, k) int64, the likeliest expert first
    weights: Tensor  # (B, T, k) fp32, which add up to 1 over k
    choices: Tensor  # (B, E) int64: how often each sequence chose each expert; they add up to T k
    balance: Tensor  # () fp32: the load-balancing loss, summed over sequences, times T


class Router(nn.Linear):
    """Probabilities of the experts (..., E), in fp32 whatever the rest runs in.

    Rounded logits make ties, and training unstable (Fedus et al. 2021, section 2.4).
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float()).softmax(-1)


class Experts(nn.Module):
    """E SwiGLU MLPs (Shazeer 2020), each weight of all of them in one tensor.

    `read` makes a plain tensor of a weight: what shards the weights sets it.
    """

    read: Callable[[Tensor], Tensor]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, width = config.n_expert, config.d_model, config.ff_dim
        self.gate = nn.Parameter(torch.empty(E, width, D))
        self.up = nn.Parameter(torch.empty(E, width, D))
        self.down = nn.Parameter(torch.empty(E, D, width))
        self.read = lambda weight: weight

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Slots (E, R, D), R for each expert; or rows (N, D) in the order of their experts, where
        `counts` (E,) says how many each has. The host must know the counts, so a GPU is waited for.
        """
        gate, up, down = (cast_once(self.read(w)) for w in (self.gate, self.up, self.down))
        if counts is None:
            return (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT
        # unbind, not an index each: its backward stacks the experts' gradients once
        rows = x.split(on_host(counts, len(x)))
        each = zip(rows, gate.unbind(), up.unbind(), down.unbind(), strict=True)
        parts = [
            F.linear(F.silu(F.linear(part, g)) * F.linear(part, u), d) for part, g, u, d in each
        ]
        return torch.cat(parts)


def on_host(counts: Tensor, even: int) -> list[int]:
    """Counts as numbers, for which the host waits. A trace, which has none, puts even shares here.

    `even`: what they add up to if every expert gets as many rows.
    """
    return counts.tolist()


# What computes the experts' results when they live elsewhere: takes what Experts.forward takes
Exchange = Callable[[Experts, Tensor, Tensor | None], Tensor]


class MoE(nn.Module):
    """What a block has in the place of an MLP.

    Without a capacity, and always in eval mode, no choice is dropped. With one, in training, each
    expert has C slots for each sequence: all first choices take theirs before any second choice,
    earlier tokens before later ones, and what finds no slot adds nothing (a later token's first
    choice may so push out an earlier one's second: GShard's order is not causal).

    `loss_factor`: by what the training step multiplies the sum of the cross entropies before
    backward; see `set_loss_factor`. `exchange`: expert parallelism sets it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config.d_model, config.n_expert, bias=False)
        self.experts = Experts(config)
        self.config = config
        self.loss_factor = 1.0
        self.exchange: Exchange | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        routing = self.route(x)
        limited = self.training and self.config.capacity_factor is not None
        y = (self.limited if limited else self.dropless)(cast_once(x), routing)
        y = F.dropout(y, self.config.dropout, self.training)
        if self.training and self.config.balance:
            y = AttachLoss.apply(y, self.config.balance * routing.balance, self.loss_factor)
        return y

    def route(self, x: Tensor) -> Routing:
        """The k likeliest experts of each token, and the balance loss E sum_e f_e P_e.

        f_e is the share of a sequence's choices that expert e got, P_e its mean probability. Even
        routing has 1. Only P_e has a gradient.
        """
        T, E, k = x.shape[1], self.config.n_expert, self.config.experts_per_token
        probabilities = self.router(x)
        weights, chosen = probabilities.topk(k)
        flat = chosen.flatten(1)
        choices = flat.new_zeros(len(flat), E).scatter_add_(1, flat, torch.ones_like(flat))
        balance = T * E * (choices / (T * k) * probabilities.mean(1)).sum()
        return Routing(chosen, weights / weights.sum(-1, keepdim=True), choices, balance)

    def dropless(self, x: Tensor, routing: Routing) -> Tensor:
        """Every choice is computed: B T k rows, sorted by expert."""
        chosen = routing.chosen
        slot = place(chosen.flatten()[None]).view_as(chosen)
        done = self.compute(scatter(x, slot, chosen.numel()), routing.choices.sum(0))
        return collect(done, slot, routing.weights)

    def limited(self, x: Tensor, routing: Routing) -> Tensor:
        """At most C choices of a sequence for each expert: E B C slots, whatever the routing."""
        B, T, D = x.shape
        E, C = self.config.n_expert, self.config.expert_slots(T)
        queue = routing.chosen.mT.flatten(1)  # (B, k T): all first choices, then all second ones
        starts = routing.choices.cumsum(1) - routing.choices
        turn = place(queue) - starts.gather(1, queue)  # 0, 1, ... among those of the same expert
        sequence = torch.arange(B, device=x.device)[:, None]
        slot = torch.where(turn < C, (queue * B + sequence) * C + turn, E * B * C)
        slot = slot.view(B, -1, T).mT
        done = self.compute(scatter(x, slot, E * B * C).view(E, B * C, D))
        return collect(done.view(E * B * C, -1), slot, routing.weights)

    def compute(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """The experts' results, here or wherever they live. Shapes as in Experts.forward."""
        if self.exchange is not None:
            return self.exchange(self.experts, x, counts)
        return self.experts(x, counts)


def place(expert: Tensor) -> Tensor:
    """(R, N) experts to their places (R, N) if each row were sorted; equals keep their order."""
    return expert.argsort(dim=1, stable=True).argsort(dim=1)


def scatter(x: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Copy each token of x (B, T, D) into its slots (B, T, k). Returns (slots, D), zero if empty.

    A choice whose slot is `slots`, one beyond the last, is dropped.
    """
    copies = x.unsqueeze(2).expand(*slot.shape, -1).reshape(slot.numel(), -1)
    filled = x.new_zeros(slots + 1, x.shape[-1])
    return filled.index_copy_(0, slot.flatten(), copies)[:slots]


def collect(done: Tensor, slot: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum (B, T, D) of what each token's slots hold. A dropped choice adds nothing."""
    kept = slot < len(done)
    results = done.index_select(0, slot.clamp(max=len(done) - 1).flatten()).view(*slot.shape, -1)
    return (results * (weights * kept).to(done.dtype).unsqueeze(-1)).sum(2)


class AttachLoss(torch.autograd.Function):
    """x as it is; its backward also sends `factor` into a loss that is never returned.

    forward gives logits only, and a pipeline stage has no way to the loss: so the balance loss
    begins its own backward where it was made, as if factor * loss had been added to the objective
    (MoEAuxLossAutoScaler of Megatron-LM).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, factor: float) -> Tensor:
        ctx.gradient = torch.full_like(loss, factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.gradient, None


def moe_layers(model: nn.Module) -> list[MoE]:
    """All of a model: none, if it has no experts."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def set_loss_factor(layers: Iterable[MoE], factor: float) -> None:
    """Weigh the balance losses as the training step weighs the summed cross entropies.

    Call it before the forward.
    """
    for layer in layers:
        layer.loss_factor = factor
