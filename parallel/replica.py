"""A model that is ready to train on this rank: what every strategy ends in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from minigpt.model import GPT
from parallel.mesh import Mesh
from parallel.passes import MicroBatch, Passes


def as_it_is(micro_batch: MicroBatch) -> MicroBatch:
    return micro_batch


@dataclass(frozen=True)
class Replica:
    """This rank's part of one copy of the model.

    `stages` are the plain modules, one but where a pipeline gives a rank several; their parameters
    have the names that a single process gives them.
    """

    stages: list[GPT]
    mesh: Mesh
    passes: Passes
    take: Callable[[MicroBatch], MicroBatch] = as_it_is  # this rank's tokens of a micro-batch
    # a tied head that lies on another stage than its embedding exists twice, and counts once
    copies: frozenset[str] = field(default_factory=frozenset)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their global names, each tensor once."""
        for stage in self.stages:
            yield from stage.named_parameters()

    def stored_name(self, name: str) -> str:
        """A copy of a tied head has the numbers of what it is a copy of, and is known by its
        name wherever weights are kept or compared."""
        return "embedding.weight" if name in self.copies else name

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def buffers(self) -> Iterator[Tensor]:
        return (buffer for stage in self.stages for buffer in stage.buffers())

    def counted_parameters(self) -> list[nn.Parameter]:
        """Those whose gradients make up the norm on this rank."""
        return [p for name, p in self.named_parameters() if name not in self.copies]

    def train(self, on: bool) -> None:
        for stage in self.stages:
            stage.train(on)
