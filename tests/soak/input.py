"""What people type first, and what they type wrong: short runs, paths, other tools' settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from experiments.compose import CONFIGS
from experiments.refused import Refused
from experiments.run_folder import read_config
from tests.launching import PATIENCE_S, ROOT, SMALL, environment, launch
from tests.soak.trial import trial
from tests.test_every_key import PAIRS, composed, takes
from tests.whole_runs import check_short, settled, whole_run

STARTS = "It starts, or says why not"
SILENT = "Silent and wrong"
TYPED = "Input that people type"
STRATEGIES = sorted(path.stem for path in (CONFIGS / "strategy").glob("*.yaml"))
MORE = {"single": ("micro_batch_size=16",), "ep": ("model=tiny_moe", "model.d_ff=32")}
BOUND = 5e-6  # nats: what a strategy's loss may differ from that of a single process


@trial(STARTS, "every strategy, `steps=0` to `4`, and a resume with 1 to 4 steps left")
def short_runs(folder: Path) -> str:
    longest, runs = {}, 0
    for strategy in sorted(STRATEGIES, key="single".__ne__):
        ask = (f"strategy={strategy}", *MORE.get(strategy, ()), "checkpoint.every=2")
        for steps in range(1, 5):
            ledger = whole_run(folder / strategy / f"{steps}", *ask, f"steps={steps}")
            check_short(settled(*ask, f"steps={steps}"), ledger, steps)
            longest[strategy] = ledger["training"]["losses"]
            runs += 1
        begin = f"resume={folder / strategy / '2'}"
        for left in range(1, 5):
            path = folder / strategy / f"2+{left}"
            ledger = whole_run(path, *ask, begin, f"steps={2 + left}")
            check_short(settled(*ask, f"steps={2 + left}"), ledger, left)
            assert len(ledger["training"]["losses"]) == 2 + left
            runs += 1
    alike = [s for s in STRATEGIES if s != "ep"]  # ep has another model
    off = max(abs(a - b) for s in alike for a, b in zip(longest[s], longest["single"], strict=True))
    assert off < BOUND, off
    refused = launch("strategy=tp", "steps=0", *SMALL[:-3], cwd=folder)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    return (
        f"{runs} runs of {len(STRATEGIES)} strategies end well; flops equal the closed form, "
        f"what was not measured is null, losses are single's within {off:.0e}; "
        f"steps=0: exit 2: {refused.stderr.strip()}"
    )


ACCELERATE_CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: true}
mixed_precision: bf16
num_machines: 1
num_processes: 2
main_process_port: 0
"""


@trial(SILENT, "`accelerate launch` with a configuration file that asks for FSDP2 and bf16")
def accelerate_config(folder: Path) -> str:
    (folder / "fsdp.yaml").write_text(ACCELERATE_CONFIG)

    def start(*keys: str) -> subprocess.CompletedProcess:
        module = ("--module", "experiments", *keys, *SMALL, "device=cpu", "run.dir=run")
        options = ("--config_file", "fsdp.yaml")
        return subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *options, *module],
            cwd=folder,
            env={**environment(), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    other = start("strategy=accelerate")
    lines = {line for line in other.stderr.splitlines() if line.startswith("launch.sh: ")}
    assert other.returncode and len(lines) == 1 and not (folder / "run").exists(), other.stderr
    same = start("strategy=fsdp", "precision=bf16")
    assert same.returncode == 0, same.stderr
    config = read_config(folder / "run")
    assert config.layout.dp_shard == 2 and config.precision.value == "bf16"
    return f"exit {other.returncode}: {lines.pop()}; with those keys: exit 0, dp_shard2 in bf16"


def refused(*words: str, cwd: Path) -> str:
    """Launch what must be refused; return its one line."""
    done = launch(*words, cwd=cwd)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


@trial(SILENT, "a run's own `config.yaml` given back, by `config=` and by Hydra's flags")
def config_again(folder: Path) -> str:
    first = ("data=generated", "strategy=tp", "model.n_layer=3", "run.dir=old", "launch=dry")
    assert launch(*first, cwd=folder).returncode == 0
    for number, words in enumerate(
        (["config=old/config.yaml"], ["--config-path=old", "--config-name=config"])
    ):
        new = f"new{number}"
        done = launch(*words, "steps=10", "launch=dry", f"run.dir={new}", cwd=folder)
        assert done.returncode == 0, done.stderr
        config = read_config(folder / new)
        assert (config.model.n_layer, config.layout.tp, config.steps) == (3, 2, 10)
    line = refused("--config-dir=old", cwd=folder)
    return f"both: its model and layout, steps=10; --config-dir alone: exit 2: {line}"


@trial(
    TYPED, "run folders named `lr=0.1`, `it's #1 & [x]; $y!`, in unicode, with commas and spaces"
)
def any_path(folder: Path) -> str:
    names = ("lr=0.1", "it's #1 & [x]; $y!", "\u00fc/\u65e5", "a, b")
    for name in names:
        done = launch("data=generated", "launch=dry", f"run.dir={name}", cwd=folder)
        assert done.returncode == 0 and (folder / name / "config.yaml").is_file(), done.stderr
    return f"exit 0, each in its folder ({len(names)} names)"


@trial(TYPED, "`init=` a Hugging Face folder")
def hugging_face_folder(folder: Path) -> str:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    return f"exit 2: {refused('data=generated', 'init=hf', cwd=folder)}"


@trial(TYPED, "every key of the schema with a value of another type, null, empty, a list, a table")
def every_key(_folder: Path) -> str:
    taken = refusals = 0
    for key, value in PAIRS:
        try:
            composed(f"{key}={value}")
            taken += 1
            assert takes(key, value), f"{key}={value} was taken"
        except (Refused, ValueError) as error:
            refusals += 1
            assert "\n" not in str(error)
    return f"{refusals} refused, each in one line; {taken} are of their key's type and taken"
