"""One .safetensors file: ours out and back in any layout, and GPT-2's format in."""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments.config import ExportConfig
from experiments.export import run as export
from experiments.figures.parity import make_config
from experiments.model_file import check_model_file, read_about, save_model
from experiments.reliability.resuming import train_on
from experiments.run_folder import Launched, write_config
from experiments.same_model import HOW_ONLY, SHOWN_BY_SHAPES
from experiments.saving import Saver
from experiments.weights_file import (
    check_bytes,
    check_init,
    read_header,
    reader,
    shapes_of,
    write,
)
from minigpt.config import FFN, ModelConfig, Norm, Positions
from minigpt.corpus import prepare
from minigpt.model import GPT
from parallel.layout import Layout
from tests.odd_input import json_values, many, one_line

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
    ours(path, model)
    assert check_init(path, model) == []
    with pytest.raises(ValueError, match=said):
        check_init(path, other(**{"tied": False, **changes}))


def ours(path: Path, model: ModelConfig) -> None:
    """An exported file with random weights of `model`."""
    write(path, dict(GPT(model).state_dict()), {"model": as_json(model)})


def as_json(model: ModelConfig) -> dict[str, Any]:
    return {key: getattr(value, "value", value) for key, value in vars(model).items()}


MOE = ModelConfig(n_layer=1, n_head=2, d_model=16, d_ff=16, vocab_size=16, context=8, ffn=FFN.moe)
ANOTHER: dict[str, Any] = {
    "n_head": 4,
    "vocab_size": 15,
    "norm": Norm.rmsnorm,
    "norm_eps": 1e-2,
    "positions": Positions.sinusoidal,
    "rope_theta": 100.0,
    "ffn": FFN.swiglu,
    "gelu_tanh": True,
    "experts_per_token": 3,
    "capacity_factor": 0.5,
}


def test_every_field_of_a_model_is_compared_or_known_to_change_no_logit() -> None:
    names = {field.name for field in fields(ModelConfig)}
    assert names == {*ANOTHER, *HOW_ONLY, *SHOWN_BY_SHAPES}
    shaped = {"n_layer": 2, "n_kv_head": 1, "d_model": 32, "d_ff": 32, "pad_vocab_to": 17}
    shaped |= {"n_expert": 4, "bias": True, "tied": True, "context": 9}
    assert shaped.keys() == set(SHOWN_BY_SHAPES)
    for key, value in shaped.items():
        learned = replace(MOE, positions=Positions.learned)
        assert shapes_of(replace(learned, **{key: value})) != shapes_of(learned), key


@pytest.mark.parametrize("key", ANOTHER)
def test_a_field_that_no_shape_shows_must_be_what_the_weights_were_trained_with(
    key: str, tmp_path: Path
) -> None:
    base = {"gelu_tanh": {"ffn": FFN.gelu}, "vocab_size": {"pad_vocab_to": 16}}
    model = replace(MOE, **base.get(key, {}))
    changed = replace(model, **{key: ANOTHER[key]})
    path = tmp_path / "model.safetensors"
    ours(path, model)
    theirs = as_json(model)[key]
    text = "null" if theirs is None else str(theirs).lower()
    with pytest.raises(ValueError, match=f"model.{key} is .*model.{key}={text} would do") as said:
        check_init(path, changed)
    one_line(said.value)
    tokens = torch.arange(8).view(1, 8)
    torch.manual_seed(0)
    weights = {n: torch.randn_like(t) for n, t in GPT(model).state_dict().items()}
    if shapes_of(model) == shapes_of(changed):
        logits = []
        for config in (model, changed):
            network = GPT(config).train()  # capacity_factor drops tokens in training only
            network.load_state_dict(weights)
            logits.append(network(tokens))
        assert not torch.equal(*logits), "the field changes what is computed"


def test_a_field_that_the_model_does_not_use_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ours(path, other(tied=False))
    free = {"rope_theta": 1.0, "experts_per_token": 1, "capacity_factor": 2.0, "balance": 1.0}
    assert check_init(path, other(tied=False, dropout=0.5, **free)) == []


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    """In the bytes, the names, the shapes, the types, the model's fields or the digests."""
    path = tmp_path / "model.safetensors"
    ours(path, MOE)
    whole, stream, before = path.read_bytes(), random.Random(0), read_header(path)
    check_bytes(path)
    data = len(whole) - 8 - int.from_bytes(whole[:8], "little")
    places = [stream.randrange(len(whole) - data, len(whole)) for _ in range(40)]
    for place in [*range(8), *places, *range(8, len(whole) - data, 7)]:
        content = bytearray(whole)
        content[place] ^= 1 << stream.randrange(8)
        path.write_bytes(content)
        try:
            warnings = check_init(path, MOE)
            check_bytes(path)
        except ValueError as error:
            one_line(error)
        else:  # the names of our entries of the metadata, and JSON's white space
            assert warnings or read_header(path) == before, whole[place - 20 : place + 20]
            continue
        if place >= len(whole) - data:
            with pytest.raises(ValueError, match="is damaged: the SHA-256 of"):
                for name in shapes_of(MOE):
                    reader(path)(name)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_weights_of_another_type_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {name: torch.zeros(shape) for name, shape in shapes_of(MOE).items()}
    weights["norm.weight"] = weights["norm.weight"].to(dtype)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"norm.weight is \w+; weights are F64, F32, F16, BF16"):
        check_init(path, MOE)


def test_a_truncated_or_overlapping_file_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    ours(path, MOE)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    _, second, *_ = (entry for name, entry in header.items() if name != "__metadata__")
    second["data_offsets"] = [n - 4 for n in second["data_offsets"]]
    text = json.dumps(header).encode()
    overlapping = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    for content in (whole[:-1], whole[: len(whole) // 2], whole + b"1", overlapping):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is no \.safetensors file, or is damaged: ") as said:
            check_init(path, MOE)
        one_line(said.value)


def test_a_foreign_file_is_named_as_unverified(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes_of(MOE).items()}, path)
    unsaid, unhashed = check_init(path, MOE)
    assert "unverified: model.n_head, model.vocab_size, model.norm, model.norm_eps" in unsaid
    assert "has no digests" in unhashed
    save_file(gpt2_checkpoint(), path)
    assert check_init(path, GPT2)[0].endswith("unverified: model.n_head")


def test_model_pt_is_verified_and_belongs_to_its_model(tmp_path: Path) -> None:
    corpus = prepare(make_config(Layout(), {}).data)
    save_model(tmp_path, GPT(MOE).state_dict(), corpus, {"model": as_json(MOE)})
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "model.json"}
    assert check_model_file(tmp_path, MOE) == []
    with pytest.raises(ValueError, match=r"model\.experts_per_token is 2 there, and 1 here"):
        check_model_file(tmp_path, replace(MOE, experts_per_token=1))
    path, stream = tmp_path / "model.pt", random.Random(0)
    whole = path.read_bytes()
    for _ in range(150):
        content = bytearray(whole)
        content[stream.randrange(len(whole))] ^= 1 << stream.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pt: is damaged: its SHA-256") as said:
            check_model_file(tmp_path, MOE)
        one_line(said.value)
    path.write_bytes(whole)
    (tmp_path / "model.json").unlink()
    assert ["unverified" in line for line in check_model_file(tmp_path, MOE)] == [True, True]


@given(json_values)
@many
def test_any_model_json_is_read_or_told(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "model.json"
    for content in (value, {"schema": "worldsize.model/1", "files": value, "model": value}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError) as said:
            read_about(tmp_path)
        one_line(said.value)


@pytest.mark.parametrize("theirs", ["bert", "[1]", ""])
def test_what_others_say_of_a_model_is_theirs(theirs: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights = {name: t.contiguous() for name, t in GPT(other(tied=False)).state_dict().items()}
    save_file(weights, path, metadata={"model": theirs})
    assert "unverified: model.n_head" in check_init(path, other(tied=False))[0]


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


@pytest.mark.parametrize("name", ["model", "model.safetensors.index.json"])
def test_a_folder_of_hugging_faces_is_refused_with_what_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "model":
        path.mkdir()
        (path / "config.json").write_text("{}")
    else:
        path.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"; what is read is one \.safetensors file") as said:
        check_init(path, ModelConfig())
    assert "\n" not in str(said.value)
