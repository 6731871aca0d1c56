"""Measures what LoRA saves of a step, and that it learns. Prints docs/results/lora.md:

./launch.sh python -m experiments.figures.lora > docs/results/lora.md
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.document import rule, table
from experiments.ranks import ROOT
from minigpt.config import ModelConfig
from minigpt.finetune import FinetuneConfig, Method
from minigpt.lora import apply_lora, merged
from minigpt.model import GPT

COMMAND = "./launch.sh python -m experiments.figures.lora > docs/results/lora.md"
SMALL = "model.n_layer=2 model.d_model=64 model.context=64 sample.tokens=0 device=cpu"
LORA = "finetune=lora finetune.rank=8"
BASE_STEPS, MORE_STEPS = 300, 100
MEGA = 1e6


def run(*overrides: str) -> dict[str, Any]:
    """The ledger of a run; an override may be several, with spaces between them."""
    command = [str(ROOT / "launch.sh"), *SMALL.split(), "--json"]
    given = [part for override in overrides for part in override.split()]
    done = subprocess.run([*command, *given], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def of_a_projection(width: int, rank: int) -> Iterator[str]:
    """The numbers that are trained of one, by formula and counted without memory."""
    model = ModelConfig(n_layer=1, n_head=32, d_model=width)
    finetune = FinetuneConfig(Method.lora, rank=rank, targets=["q"])
    with torch.device("meta"):
        counted = GPT(model)
    apply_lora(counted, counted.blocks, finetune)
    trained = sum(p.numel() for p in counted.parameters() if p.requires_grad)
    closed = finetune.adapters(model)
    yield f"A projection of {width} x {width} has {width**2:,} numbers. Its adapter of rank {rank}"
    yield f"has r (in + out) = {closed:,} by the closed form, and {trained:,} counted on the meta"
    yield f"device: {width**2 / trained:g} times fewer."


def costs(folder: Path) -> Iterator[str]:
    """Of a step of two ranks: the ledger's rows, all weights trained and adapters only."""
    heads = ("strategy", "trained", "numbers", "gradients, MB", "optimizer, MB")
    sent = ("all_reduce", "all_gather", "reduce_scatter")
    yield table(*heads, *(f"{name}, MB" for name in sent))
    yield rule(len(heads) + len(sent))
    for strategy in ("ddp", "fsdp"):
        for name, given in (("all weights", ""), ("adapters", LORA)):
            where = folder / f"{strategy}-{name.split()[0]}"
            ledger = run(f"strategy={strategy} {given} steps=6 run.dir={where}")
            rows, memory = ledger["step"]["communication"], ledger["step"]["memory_bytes"]
            payload = {
                kind: sum(r["payload_bytes"] for r in rows if r["collective"] == kind)
                for kind in sent
            }
            numbers = ledger["training"]["trainable_parameters"]
            yield table(
                strategy,
                name,
                f"{numbers:,}",
                *(f"{memory[part] / MEGA:.3f}" for part in ("gradients", "optimizer")),
                *(f"{payload[kind] / MEGA:.3f}" for kind in sent),
            )


def learning(folder: Path) -> Iterator[str]:
    """A base that knows Python, and adapters that learn this project's own prose."""
    base, text = folder / "base", ROOT / "README.md"
    first = run("strategy=single", f"steps={BASE_STEPS}", f"run.dir={base}", "checkpoint.every=100")
    of_base = first["training"]["validation_loss"]
    yield f"A base is trained for {BASE_STEPS} steps on Python's standard library (held-out loss"
    yield f"{of_base:.3f}), then adapters of rank 8 beside all its projections on README.md, for"
    yield f"{MORE_STEPS} steps:"
    yield ""
    yield table("strategy", "loss of the first step", "of the last", "held-out loss")
    yield rule(4)
    for strategy in ("single", "ddp"):
        ledger = run(
            f"strategy={strategy} {LORA} finetune.targets=[q,k,v,out,mlp] resume={base}",
            f"data=text data.path={text} optimizer.lr=5e-3 steps={MORE_STEPS}",
            f"run.dir={folder / strategy}",
        )
        training = ledger["training"]
        losses = training["losses"][0], training["losses"][-1], training["validation_loss"]
        yield table(strategy, *(f"{loss:.3f}" for loss in losses))


@torch.no_grad()
def merging() -> Iterator[str]:
    """How far a merged model's logits are from those of the model with adapters."""
    model, finetune = ModelConfig(d_model=256), FinetuneConfig(Method.lora, rank=8)
    adapted, plain = GPT(model), GPT(model)
    apply_lora(adapted, adapted.blocks, finetune)
    adapted.init_weights(0)
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_b"):
            parameter.normal_(std=0.02)
    plain.load_state_dict(merged(dict(adapted.named_parameters()), finetune))
    tokens = torch.arange(128)[None] % model.vocab_size
    ours, wanted = plain(tokens), adapted(tokens)
    apart, largest = float((ours - wanted).abs().max()), float(wanted.abs().max())
    yield f"Merged weights give the adapter's logits within {apart:.1e} (the largest is"
    yield f"{largest:.2f}). What a run saves as model.pt is merged."


def main() -> None:
    print(f"# Adapters\n\nMade by `{COMMAND}` (torch {torch.__version__}, fp32).\n")
    print(f"Rows are of runs of `{SMALL}`;")
    print(f"`{LORA}` gives them adapters beside q, k, v and out. Memory is that of the")
    print("ledger: what is held at the moment of the peak, on the fullest rank.\n")
    with tempfile.TemporaryDirectory() as name:
        for title, lines in (
            ("Numbers", of_a_projection(4096, 8)),
            ("A step of two ranks, from their ledgers", costs(Path(name))),
            ("Learning", learning(Path(name))),
            ("Merging", merging()),
        ):
            print(f"## {title}\n")
            for line in lines:
                print(line, flush=True)
            print()


if __name__ == "__main__":
    main()
