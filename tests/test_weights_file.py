"""One .safetensors file: ours out and back in any layout, and GPT-2's format in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.config import ExportConfig
from experiments.export import run as export
from experiments.figures.parity import make_config
from experiments.reliability.resuming import train_on
from experiments.run_folder import Launched, write_config
from experiments.saving import Saver
from experiments.weights_file import check_init, reader, shapes_of, write
from minigpt.config import FFN, ModelConfig, Norm, Positions
from minigpt.corpus import prepare
from minigpt.model import GPT
from parallel.layout import Layout

GPT2 = ModelConfig(
    n_layer=2,
    n_head=3,
    d_model=24,
    vocab_size=50,
    context=16,
    norm=Norm.layernorm,
    positions=Positions.learned,
    ffn=FFN.gelu,
    gelu_tanh=True,
    bias=True,
    tied=True,
)


def gpt2_checkpoint(prefix: str = "") -> dict[str, Tensor]:
    """Random weights as Hugging Face names and lays them out, with its buffer of masks."""
    stream = torch.Generator().manual_seed(0)
    d, wide = GPT2.d_model, 4 * GPT2.d_model

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape).normal_(0, 0.3, generator=stream)

    found = {"wte.weight": normal(GPT2.vocab_size, d), "wpe.weight": normal(GPT2.context, d)}
    for name in ("ln_f", *(f"h.{i}.ln_{j}" for i in range(GPT2.n_layer) for j in (1, 2))):
        found |= {f"{name}.weight": 1 + normal(d), f"{name}.bias": normal(d)}
    for i in range(GPT2.n_layer):
        for name, (before, after) in {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, wide),
            "mlp.c_proj": (wide, d),
        }.items():
            found |= {f"h.{i}.{name}.weight": normal(before, after)}
            found |= {f"h.{i}.{name}.bias": normal(after)}
        found[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    return {prefix + name: value for name, value in found.items()}


def gpt2_logits(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """GPT-2 as published, written out: (B, T) to (B, T, V)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def conv1d(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    B, T = tokens.shape
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for i in range(GPT2.n_layer):
        qkv = conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = (
            part.view(B, T, GPT2.n_head, -1).transpose(1, 2)
            for part in qkv.split(GPT2.d_model, dim=2)
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(T, T).tril() == 0, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + conv1d(mixed, f"h.{i}.attn.c_proj")
        h = conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + conv1d(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2s_weights_give_gpt2s_logits(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(gpt2_checkpoint(prefix), path)
    check_init(path, GPT2)
    model, read = GPT(GPT2), reader(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
    tokens = torch.arange(24).view(2, 12) * 2
    wanted = gpt2_logits(gpt2_checkpoint(), tokens)
    assert wanted.std() > 1
    torch.testing.assert_close(model(tokens), wanted, rtol=1e-4, atol=1e-4)


def other(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**vars(GPT2), **changes})


@pytest.mark.parametrize(
    "model, said",
    [
        (other(gelu_tanh=False), "GPT-2's weights need model.gelu_tanh=true"),
        (other(tied=False, bias=False), "need model.bias=true model.tied=true"),
        (other(n_layer=3), "has no h.2."),
        (other(vocab_size=64), r"wte.weight is \[50, 24\], and the model's \[64, 24\]"),
    ],
)
def test_a_model_that_the_file_does_not_fit_is_one_line(
    model: ModelConfig, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(gpt2_checkpoint(), path)
    with pytest.raises(ValueError, match=said) as error:
        check_init(path, model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tied": True}, "the model has no place for head.weight: model.tied=true"),
        ({"n_layer": 1}, r"the model has no place for blocks\.1\."),
        ({"n_head": 2}, "model.n_head is 3 there, and 2 here"),
        ({"gelu_tanh": False}, "model.gelu_tanh is True there, and False here"),
        ({"positions": Positions.rotary}, "model.positions is learned there, and rotary here"),
    ],
)
def test_our_own_file_of_another_model_is_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "model.safetensors", other(tied=False)
    about = {key: getattr(value, "value", value) for key, value in vars(model).items()}
    write(path, dict(GPT(model).state_dict()), about)
    check_init(path, model)
    with pytest.raises(ValueError, match=said):
        check_init(path, other(**{"tied": False, **changes}))


@pytest.mark.parametrize("theirs", ["bert", "[1]", ""])
def test_what_others_say_of_a_model_is_theirs(theirs: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {name: t.contiguous() for name, t in GPT(other(tied=False)).state_dict().items()}
    save_file(weights, path, metadata={"model": theirs})
    check_init(path, other(tied=False))


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_a_file_that_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is no .safetensors file"):
        check_init(path, GPT2)
    with pytest.raises(ValueError, match="No such file"):
        check_init(tmp_path / "none", GPT2)


def test_a_checkpoint_becomes_a_file_and_the_file_a_run(tmp_path: Path) -> None:
    from experiments.assemble import make_trainer
    from experiments.figures.parity import mesh_of
    from parallel.weights import full_weights

    config = make_config(Layout(), {"steps": 2, "model.tied": True})
    corpus, run, out = prepare(config.data), tmp_path / "run", tmp_path / "model.safetensors"
    run.mkdir()
    write_config(run, config, Launched([], "", 0.0))
    trainer = make_trainer(config, mesh_of(config.layout))
    train_on(config, trainer, 0, 2)
    Saver(config, run, trainer, corpus, "a name").save(2)
    trained = full_weights(trainer.replica)

    said = export(ExportConfig(str(run), str(out)))
    assert said["parameters"] == config.model.parameters and "step-000002" in said["from"]
    with safe_open(out, framework="pt") as file:
        assert set(file.keys()) == set(shapes_of(config.model))
        assert json.loads(file.metadata()["model"])["d_model"] == config.model.d_model
    again = make_config(Layout(), {"steps": 2, "model.tied": True, "init": str(out), "seed": 7})
    started = full_weights(make_trainer(again, mesh_of(again.layout)).replica)
    assert all(torch.equal(started[name], value) for name, value in trained.items())
    assert started.keys() == trained.keys()
