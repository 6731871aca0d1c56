"""precision=fp8 through torchao: which layers it takes, and that they still learn.

Numbers are rounded to fp8 and multiplied wide, as a CPU can; tests/test_gpu.py has the real units.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments import environment as machine
from experiments.config import Device
from minigpt.config import ModelConfig
from minigpt.model import GPT, token_loss
from tests.configs import compose

float8 = pytest.importorskip("parallel.float8", reason="torchao is not installed")
MODEL = ModelConfig(n_layer=2, n_head=4, d_model=64, vocab_size=96, context=32)


def model(in_float8: bool) -> GPT:
    """With the same first weights either way, from the meta device as every run makes it."""
    with torch.device("meta"):
        made = GPT(MODEL)
    if in_float8:
        float8.apply_float8(made.blocks, emulate=True)
    made.to_empty(device="cpu")
    made.tie()
    made.init_weights(seed=0)
    return made


def losses(made: GPT, steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 96, (4, 33))
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, count = token_loss(made(tokens[:, :-1]), tokens[:, 1:])
        (loss / count).backward()
        optimizer.step()
        found.append(float(loss / count))
    return found


def test_the_projections_of_blocks_and_nothing_else() -> None:
    plain, eights = model(False), model(True)
    assert eights.state_dict().keys() == plain.state_dict().keys(), "checkpoints fit both"
    kinds = {
        name: type(m).__name__ for name, m in eights.named_modules() if isinstance(m, nn.Linear)
    }
    assert kinds.pop("head") == "Linear"
    assert len(kinds) == 7 * MODEL.n_layer and set(kinds.values()) == {"Float8Linear"}


def test_it_rounds_and_learns() -> None:
    plain, eights = losses(model(False)), losses(model(True))
    assert plain[0] != eights[0], "something was rounded"
    assert eights == pytest.approx(plain, abs=0.1)
    assert eights[-1] < eights[0] - 1


def test_without_the_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpu_has_fp8", lambda: True)
    monkeypatch.setattr(machine, "is_installed", lambda package: package != "torchao")
    config = compose("precision=fp8", "strategy=single")
    with pytest.raises(ValueError, match="precision=fp8: the package is not installed; pip inst"):
        machine.settle(config, None, gpus=1)
    monkeypatch.setattr(machine, "is_installed", lambda _package: True)
    assert machine.settle(config, None, gpus=1).device == Device.cuda
    monkeypatch.setattr(machine, "gpu_has_fp8", lambda: False)
    with pytest.raises(ValueError, match="precision=fp8: needs a GPU with units for it"):
        machine.settle(config, None, gpus=1)
