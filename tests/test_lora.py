"""LoRA: what is frozen stays, what it costs is the closed form, and merging changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.assemble import make_batches, set_step, share_of_batch
from experiments.config import TrainConfig
from experiments.explain import case_of, messages
from experiments.figures.parity import Plan, differences, make_config
from experiments.figures.short_runs import step_costs
from experiments.ranks import run_ranks
from experiments.run_folder import Launched, write_config
from experiments.run_weights import check_base, is_base
from minigpt.config import ModelConfig
from minigpt.corpus import prepare
from minigpt.finetune import FinetuneConfig, Method
from minigpt.lora import LoRALinear, apply_lora, is_adapter, merged
from minigpt.model import GPT
from parallel.layout import ActivationCheckpointing, Impl, Layout
from parallel.weights import full_weights
from simulator import lora
from tests import on_ranks
from tests.launching import launch

ALL = ["q", "k", "v", "out", "mlp"]
LORA: dict[str, Any] = {"finetune.method": Method.lora, "finetune.rank": 4, "steps": 6}
CHANGES: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora, accumulation, clipping": {**LORA, "gradient_accumulation_steps": 4, "clip": 0.01},
    "lora, all projections, uneven": {**LORA, "finetune.targets": ALL, "data.ragged": True},
}
PLANS = [
    Plan("ddp 2", Layout(dp_replicate=2), {}),
    Plan("zero1 2", Layout(dp_shard=2), {"zero_stage": 1}),
    Plan("zero2 2", Layout(dp_shard=2), {"zero_stage": 2}),
    Plan("fsdp 2", Layout(dp_shard=2), {}),
    Plan("pp 2", Layout(pp=2), {"gradient_accumulation_steps": 4}),
    Plan("cp 2", Layout(cp=2), {}),
]


def adapted(model: GPT, config: FinetuneConfig) -> GPT:
    """The model with adapters that are far from zero."""
    apply_lora(model, model.blocks, config)
    model.init_weights(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    return model.eval()


def test_a_projection_of_4096_has_256_times_fewer_numbers_to_train() -> None:
    """By the closed form, and counted on the meta device (Hu et al. 2021, table 1: r = 8)."""
    model = ModelConfig(n_layer=2, n_head=32, d_model=4096, vocab_size=256)
    finetune = FinetuneConfig(Method.lora, rank=8)
    shapes = finetune.shapes(model)
    of_q = sum(a * b for name, (a, b) in shapes.items() if name.startswith("attention.q."))
    assert 256 * of_q == 4096 * 4096
    with torch.device("meta"):
        counted = GPT(model)
    apply_lora(counted, counted.blocks, finetune)
    q = counted.blocks["0"].attention.q  # type: ignore[union-attr]
    assert isinstance(q, LoRALinear)
    trained = sum(p.numel() for p in q.parameters() if p.requires_grad)
    assert q.weight.numel() == 256 * trained  # type: ignore[union-attr, operator]
    everything = [p for p in counted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in everything) == finetune.adapters(model) == 2 * 4 * of_q


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("targets", [["q", "v"], ALL])
@torch.no_grad()
def test_merged_weights_give_the_adapters_logits(targets: list[str], bias: bool) -> None:
    shape = ModelConfig(n_layer=2, d_model=32, vocab_size=40, context=16, bias=bias)
    finetune = FinetuneConfig(Method.lora, rank=4, alpha=3.0, targets=targets)
    model, tokens = adapted(GPT(shape), finetune), torch.randint(40, (2, 16))
    plain = GPT(shape)
    assert not torch.allclose(model(tokens), of(plain, model)(tokens), atol=1e-2), "it adds to it"
    plain.load_state_dict(merged(dict(model.named_parameters()), finetune))
    torch.testing.assert_close(plain(tokens), model(tokens), atol=1e-5, rtol=1e-5)


def of(plain: GPT, model: GPT) -> GPT:
    """`plain` with the frozen weights of `model`."""
    plain.load_state_dict({n: p for n, p in model.named_parameters() if "lora" not in n})
    return plain.eval()


def test_a_run_starts_from_its_base_and_changes_adapters_only() -> None:
    config = make_config(Layout(), LORA)
    trainer, rows = on_ranks.make(config)
    plain, _ = on_ranks.make(make_config(Layout(), {}))
    with torch.no_grad():
        first = trainer.replica.stages[0](rows[0][0])
        torch.testing.assert_close(first, plain.replica.stages[0](rows[0][0]))
    before = full_weights(trainer.replica)
    for _ in range(3):
        trainer.step(rows)
    after = full_weights(trainer.replica)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert len(trainer.optimizer.param_groups[0]["params"]) == len(changed)


def a_base(folder: Path, steps: int) -> TrainConfig:
    """A run of one process that has learned, as its folder has it when it is done."""
    config = make_config(Layout(), {"steps": steps})
    trainer, batches = on_ranks.make(config)[0], make_batches(config, prepare(config.data))
    for step in range(steps):
        set_step(trainer, config, step)
        trainer.step(list(share_of_batch(batches, step, config, trainer.replica.mesh)))
    write_config(folder, config, Launched([], "", 0.0))
    torch.save(full_weights(trainer.replica), folder / "model.pt")
    return config


def test_adapters_start_from_a_runs_weights_and_the_loss_falls(tmp_path: Path) -> None:
    before = a_base(tmp_path, 30)
    adapters = {**LORA, "finetune.targets": ALL, "resume": str(tmp_path), "optimizer.lr": 1e-2}
    config = make_config(Layout(), {**adapters, "steps": 30, "seed": 1})
    assert is_base(config) and not is_base(before)
    check_base(config, "numbers")
    trainer, rows = on_ranks.make(config)
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    held = full_weights(trainer.replica)
    assert all(torch.equal(held[name], weight) for name, weight in saved.items())
    losses = [trainer.step(rows).loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1, losses
    with pytest.raises(ValueError, match=r"model.d_model=32: resume=.* was trained with 64"):
        check_base(make_config(Layout(), {**adapters, "model.d_model": 32}), "numbers")


@pytest.mark.slow
def test_a_run_goes_on_with_its_adapters_and_export_merges_them(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    shape = ("model.n_layer=2", "model.d_model=32", "model.context=32", "data=generated")
    small = (*shape, "sample.tokens=0", "validation.batches=1", "checkpoint.every=3")
    base = launch(*small, "strategy=single", "steps=3", "run.dir=base/run", cwd=tmp_path)
    lora_of = (*small, "strategy=fsdp", "finetune=lora", "finetune.rank=2", "run.dir=tuned")
    tuned = launch(*lora_of, "resume=base/run", "steps=3", cwd=tmp_path)
    assert (base.returncode, tuned.returncode) == (0, 0), tuned.stderr
    out = launch("export", "run=tuned", "out=plain.safetensors", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    exported = load_file(tmp_path / "plain.safetensors")
    saved = torch.load(tmp_path / "tuned" / "model.pt", weights_only=True)
    assert exported.keys() == saved.keys() and not any(map(is_adapter, saved))
    for name, weight in exported.items():
        torch.testing.assert_close(weight, saved[name])
    again = launch(*lora_of, "resume=auto", "steps=5", cwd=tmp_path)
    assert "after 3 steps" in again.stdout, again.stderr


@pytest.mark.slow
def test_every_layout_trains_adapters_as_a_single_process_does() -> None:
    cells = differences(PLANS, CHANGES)
    for cell, far in cells.items():
        assert not isinstance(far, str) and far.holds, (cell, far)


@pytest.mark.slow
def test_four_ranks_and_checkpointing() -> None:
    plans = [Plan("hsdp 4", Layout(dp_replicate=2, dp_shard=2), {})]
    full = {**LORA, "activation_checkpointing": ActivationCheckpointing.full}
    for cell, far in differences(plans, {"lora": LORA, "full": full}).items():
        assert not isinstance(far, str) and far.holds, (cell, far)


@pytest.mark.slow
def test_the_ledger_shows_what_the_closed_forms_say() -> None:
    """Messages to the byte; gradients and optimizer at the peak of memory."""
    layouts = [Layout(dp_replicate=2), Layout(dp_shard=2)]
    extra = [{}, {"gradient_accumulation_steps": 4, "clip": 1.0}, {"finetune.targets": ALL}]
    configs = [make_config(at, {**LORA, **more}) for at in layouts for more in extra]
    for costs, config in zip(run_ranks(2, step_costs, configs)[0], configs, strict=True):
        rows = messages(case_of(config, 0), costs["communication"], Impl.torch)
        assert rows and all(row.off == 0 and row.formula for row in rows), rows
        ranks = config.layout.dp_shard
        held = costs["memory_bytes"]
        wanted = lora.optimizer_bytes(config.model, config.finetune, ranks)
        assert held["optimizer"] == wanted
        assert held["gradients"] <= lora.gradient_bytes(config.model, config.finetune, ranks)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"finetune.rank": 0}, "finetune.rank=0: must be at least 1"),
        ({"finetune.targets": ["q", "w"]}, r"finetune.targets=\[q,w\]: must be some of q, k, v"),
        ({"finetune.alpha": 0.0}, "finetune.alpha=0.0: must be greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_config(Layout(), {**LORA, **changes})


def test_a_frozen_weight_costs_four_flops() -> None:
    """Forward and the gradient of its input; its own is not computed. Counted exactly: q, k and v
    of the first block, and their A, have an input that needs no gradient."""
    config = make_config(Layout(), LORA)
    (costs,) = step_costs([config])
    counted, said = costs["flops"]["hardware"], costs["flops"]["model"]
    full: TrainConfig = make_config(Layout(), {"steps": 4})
    (whole,) = step_costs([full])
    assert counted < 0.8 * whole["flops"]["hardware"]
    again = whole["flops"]["hardware"] - whole["flops"]["model"]  # attention's forward, in backward
    width, tokens = config.model.d_model, config.batch_size * config.seq_len
    first = 2 * tokens * 3 * width * (width + config.finetune.rank)
    assert counted == said + again - first
