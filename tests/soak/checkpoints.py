"""Trials of checkpoints and weights: what was lost, silently wrong, or let in."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata

from tests.launching import launch
from tests.soak.trial import trial

LOST, WRONG, LET_IN = "No work is lost", "Silent and wrong", "Let in"
SMALL = (
    "data=generated",
    "data.tokens=200000",
    "model.n_layer=2",
    "model.d_model=32",
    "model.context=32",
    "micro_batch_size=2",
    "validation.batches=1",
    "sample.tokens=0",
)
ONE = (*SMALL, "strategy=single")


def done(result: CompletedProcess) -> CompletedProcess:
    """Return a launch that ended well; raises what it said otherwise."""
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr}"
    return result


def refused(result: CompletedProcess, said: str) -> str:
    """Return the one line of a launch whose input was refused, which must hold `said`."""
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == 1, f"exit {result.returncode}: {result.stderr}"
    assert said in lines[0], lines[0]
    return f"exit 2: {shown(lines[0])}"


def warnings_of(result: CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if "warning: " in line]


def shown(line: str) -> str:
    """Return a line without the folder that the trial ran in."""
    return re.sub(r"/\S*?/(?=run/|other/|\w+\.safetensors)", "", line)


def flipped(path: Path, stream: random.Random) -> bytes:
    """Flip one bit of a file; return what it held before."""
    whole = path.read_bytes()
    content = bytearray(whole)
    content[stream.randrange(len(whole))] ^= 1 << stream.randrange(8)
    path.write_bytes(content)
    return whole


# --- bytes


@trial(LOST, "one bit of model.pt flipped, 150 times, and read by generate and export")
def flips_in_model_pt(folder: Path) -> str:
    from experiments.model_file import check_model_file
    from experiments.run_folder import read_config

    done(launch(*ONE, "steps=2", "run.dir=run", cwd=folder))
    run, stream, noticed = folder / "run", random.Random(0), 0
    model = read_config(run).model
    for _ in range(150):
        whole = flipped(run / "model.pt", stream)
        try:
            check_model_file(run, model)
        except ValueError:
            noticed += 1
        (run / "model.pt").write_bytes(whole)
    assert noticed == 150
    flipped(run / "model.pt", stream)
    said = [
        refused(launch(*verb, "run=run", cwd=folder), "is damaged")
        for verb in (("generate",), ("export", "out=out.safetensors"))
    ]
    assert said[0] == said[1] and not (folder / "out.safetensors").exists()
    return f"{noticed} of 150 noticed; generate and export: {said[0]}"


@trial(LOST, "one bit of an exported file flipped, 150 times, and given to init=")
def flips_in_an_exported_file(folder: Path) -> str:
    from experiments.run_folder import read_config
    from experiments.weights_file import check_bytes, check_init

    done(launch(*ONE, "steps=2", "run.dir=run", cwd=folder))
    done(launch("export", "run=run", "out=a.safetensors", cwd=folder))
    path, stream = folder / "a.safetensors", random.Random(0)
    model, silent, warned = read_config(folder / "run").model, 0, 0
    for _ in range(150):
        whole = flipped(path, stream)
        try:
            warnings = check_init(path, model)
            check_bytes(path)
            warned += bool(warnings)
            silent += not warnings
        except ValueError:
            pass
        path.write_bytes(whole)
    assert silent == 0
    with open(path, "r+b") as file:
        file.seek(-100, 2)
        file.write(b"?")
    line = refused(launch(*ONE, "steps=2", "init=a.safetensors", cwd=folder), "is damaged")
    return f"{150 - warned} of 150 refused, {warned} warned of; {line}"


@trial(LOST, "init= of a truncated, an overlapping and an integer-typed .safetensors")
def bad_files_for_init(folder: Path) -> str:
    done(launch(*ONE, "steps=1", "run.dir=run", cwd=folder))
    done(launch("export", "run=run", "out=a.safetensors", cwd=folder))
    whole = (folder / "a.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    last = max(
        (e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"]
    )
    last["data_offsets"] = [n - 4 for n in last["data_offsets"]]
    text = json.dumps(header).encode()
    (folder / "truncated.safetensors").write_bytes(whole[:-7])
    overlapping = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    (folder / "overlapping.safetensors").write_bytes(overlapping)
    with safe_open(folder / "a.safetensors", framework="pt") as file:
        integers = {name: file.get_tensor(name).to(torch.int32) for name in file.keys()}  # noqa: SIM118
    save_file(integers, folder / "integers.safetensors")
    said = []
    for name in ("truncated", "overlapping", "integers"):
        result = launch(*ONE, "steps=1", f"init={name}.safetensors", cwd=folder)
        said.append(refused(result, f"init={name}.safetensors: "))
    assert not (folder / "runs").exists(), "nothing was started"
    return "; ".join(said)


# --- the model that weights belong to

OTHERS = {
    "model.rope_theta=500000": (),
    "model.norm_eps=0.01": (),
    "model.experts_per_token=1": ("model.ffn=moe",),
    "model.capacity_factor=1.0": ("model.ffn=moe",),
}


@trial(WRONG, "export, then init with another rope_theta, norm_eps, experts or capacity")
def init_with_another_model(folder: Path) -> str:
    said = []
    for number, (change, base) in enumerate(OTHERS.items()):
        run, out = f"run{number}", f"out=w{number}.safetensors"
        done(launch(*ONE, *base, "steps=1", f"run.dir={run}", cwd=folder))
        done(launch("export", f"run={run}", out, cwd=folder))
        init = f"init=w{number}.safetensors"
        key = change.partition("=")[0]
        said.append(refused(launch(*ONE, *base, change, init, cwd=folder), f"{key} is"))
        same = done(launch(*ONE, *base, "steps=1", init, cwd=folder))
        assert not warnings_of(same), same.stderr
    return "; ".join(said)


@trial(WRONG, "generate, resume, finetune and export of a run with another rope_theta")
def siblings_with_another_model(folder: Path) -> str:
    said = []
    done(launch(*ONE, "steps=2", "checkpoint.every=1", "run.dir=run", cwd=folder))
    other = "model.rope_theta=500000"
    said.append(refused(launch(*ONE, "steps=4", other, "resume=run", cwd=folder), "rope_theta"))
    lora = (*ONE, "steps=1", "finetune=lora", "resume=run")
    said.append(refused(launch(*lora, other, cwd=folder), "rope_theta"))
    config = folder / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("rope_theta: 10000.0", "rope_theta: 500000.0"))
    said.append(refused(launch("generate", "run=run", cwd=folder), "rope_theta"))
    said.append(refused(launch("export", "run=run", cwd=folder), "rope_theta"))
    return "; ".join(said)


@trial(WRONG, "init= of a foreign file, which names no model and has no digests")
def init_of_a_foreign_file(folder: Path) -> str:
    done(launch(*ONE, "steps=1", "run.dir=run", cwd=folder))
    done(launch("export", "run=run", "out=a.safetensors", cwd=folder))
    with safe_open(folder / "a.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(weights, folder / "b.safetensors")
    lines = warnings_of(done(launch(*ONE, "steps=1", "init=b.safetensors", cwd=folder)))
    assert "model.rope_theta" in lines[0] and "no digests" in lines[1], lines
    return "; ".join(lines)


# --- what lies in the folder of checkpoints

SAVES = (*SMALL, "strategy=ddp", "checkpoint.every=2")


def warnings_in(result: CompletedProcess, about: str = "/checkpoints/") -> list[str]:
    """Return the warnings that the ranks printed about something, without their folder."""
    lines = [shown(line) for line in result.stdout.splitlines() if line.startswith("warning: ")]
    return [line for line in lines if about in line]


@trial(LOST, "a checkpoint copied under the name of a later step, then resume=auto twice")
def copied_under_another_name(folder: Path) -> str:
    checkpoints = folder / "run" / "checkpoints"
    done(launch(*SAVES, "steps=4", "run.dir=run", cwd=folder))
    shutil.copytree(checkpoints / "step-000002", checkpoints / "step-000008")
    said = []
    for steps in (8, 10):
        auto = (*SAVES, f"steps={steps}", "run.dir=run", "resume=auto")
        out = done(launch(*auto, cwd=folder)).stdout
        said += [
            shown(line) for line in out.splitlines() if "skipped" in line or "going on" in line
        ]
    assert "its manifest is of step 2" in said[0] and "after 4 steps" in said[1], said
    assert "after 8 steps" in said[2] and len(said) == 3, said
    return "; ".join(said)


@trial(LOST, "links and files among the checkpoints, a run that publishes over them, resume=auto")
def links_among_checkpoints(folder: Path) -> str:
    checkpoints = folder / "run" / "checkpoints"
    done(launch(*SAVES, "steps=4", "run.dir=run", cwd=folder))
    moved = shutil.move(checkpoints / "step-000002", folder / "elsewhere")
    (checkpoints / "step-000002").symlink_to(moved)
    (checkpoints / "step-000006.part").symlink_to(moved)
    (checkpoints / "step-000008").write_text("a file")
    auto = (*SAVES, "run.dir=run", "resume=auto")
    first = done(launch(*auto, "steps=8", cwd=folder))
    second = done(launch(*auto, "steps=10", cwd=folder))
    assert "after 8 steps" in second.stdout, second.stdout
    assert (checkpoints / "step-000002").is_symlink() and Path(moved).is_dir()
    lines = warnings_in(first)
    assert len(lines) == 4 and len(warnings_in(second)) == 2, (lines, warnings_in(second))
    return f"both resumes exit 0 and go on; {'; '.join(lines)}"


@trial(LOST, "an old checkpoint that cannot be removed (a mount in it), then resume=auto")
def cannot_be_removed(folder: Path) -> str:
    """A file system mounted inside refuses to go, as an open file on NFS does."""
    checkpoints = folder / "run" / "checkpoints"
    done(launch(*SAVES, "steps=4", "run.dir=run", cwd=folder))
    mount = checkpoints / "step-000002" / "mounted"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(mount)], check=True)
    try:
        auto = (*SAVES, "run.dir=run", "resume=auto")
        first = done(launch(*auto, "steps=8", cwd=folder))
        second = done(launch(*auto, "steps=10", cwd=folder))
    finally:
        (mounted,) = checkpoints.rglob("mounted")
        subprocess.run(["umount", str(mounted)], check=True)
    lines = warnings_in(first)
    assert "could not be removed" in lines[0] and "after 8 steps" in second.stdout, lines
    return f"both resumes exit 0 and go on; {lines[0]}"


@trial(LOST, "a weight changed on one rank at step 12; checkpoint.every=10 drift.every=50")
def drift_before_a_checkpoint(folder: Path) -> str:
    from experiments.launch import Torchrun, prepare_job, run
    from experiments.reliability.faults import with_fault
    from experiments.step_log import read_metrics
    from experiments.verdict import failure
    from tests.configs import compose

    keys = (*SMALL, "strategy=ddp", "steps=80", "checkpoint.every=10", "drift.every=50")
    losses = []
    for name in ("sound", "drifted"):
        config = compose(*keys, f"run.dir={folder / name}")
        job = prepare_job(config, list(keys), Torchrun(["--max-restarts=2"]), folder / name)
        ended = run(with_fault(job, "drift", 1, 12) if name == "drifted" else job, quiet=True)
        assert ended.outcome == "done", f"{name}: {ended.outcome}: {failure(folder / name)}"
        losses.append([line["loss"] for line in read_metrics(folder / name / "metrics.jsonl")])
    log = (folder / "drifted" / "logs" / "torchrun.log").read_text()
    (start,) = re.findall(r"start 2 of this run: .*", log)
    (again,) = re.findall(r"going on from .*", log)
    assert "drifted apart" in start and "step-000010" in again, log[-2000:]
    differ = sum(a != b for a, b in zip(*losses, strict=True))
    assert len(losses[0]) == 80 and differ == 0
    return f"{shown(start)}; {shown(again)}; {differ} of 80 losses differ from a sound run's"


# --- learning rate


@trial(WRONG, "a finished cosine run resumed with more steps, and a warm-up longer than the run")
def learning_rate_jumps(folder: Path) -> str:
    keys = (*ONE, "optimizer.lr=0.003", "optimizer.warmup_steps=3", "checkpoint.every=10")
    done(launch(*keys, "steps=10", "run.dir=run", cwd=folder))
    again = done(launch(*keys, "steps=20", "run.dir=run", "resume=auto", cwd=folder))
    (jump,) = warnings_in(again, "learning rate")
    assert "from 0.0003 in step 10 of 10 to " in jump, jump
    (warm_up,) = warnings_in(done(launch(*ONE, "steps=5", cwd=folder)), "learning rate")
    assert "optimizer.warmup_steps=30: steps=5 end before it does" in warm_up, warm_up
    return f"{jump}; {warm_up}"


# --- made to do harm


@trial(LET_IN, "an index whose pickle sets an attribute of an allowed class, sealed again")
def index_that_builds(folder: Path) -> str:
    from pathlib import PosixPath

    def crafted(_index: Metadata) -> bytes:
        # the class, an empty dict, "name": 1 put into it, BUILD
        name = pickle.dumps(PosixPath, protocol=2)[2:-1]
        return b"\x80\x02" + name + b"}" + pickle.dumps("name", protocol=2)[2:-1] + b"I1\nsb."

    line = resealed(folder, crafted)
    assert isinstance(vars(PosixPath).get("name", PosixPath("a").name), str)
    return line


@trial(LET_IN, "an index whose sizes, offsets, chunks or lengths lie, sealed again")
def index_that_lies(folder: Path) -> str:
    return "; ".join(resealed(folder, lie) for lie in (half_a_tensor, beyond_the_file, too_large))


def half_a_tensor(index: Metadata) -> bytes:
    about: Any = index.state_dict_metadata["model/embedding.weight"]
    about.chunks[0].sizes = torch.Size([about.size[0] // 2, about.size[1]])
    return pickle.dumps(index)


def beyond_the_file(index: Metadata) -> bytes:
    next(iter(index.storage_data.values())).offset = 2**40
    return pickle.dumps(index)


def too_large(index: Metadata) -> bytes:
    about: Any = index.state_dict_metadata["model/embedding.weight"]
    about.size = about.chunks[0].sizes = torch.Size([2**40, about.size[1]])
    return pickle.dumps(index)


def resealed(folder: Path, change: Callable[[Metadata], bytes]) -> str:
    """Return what export says of a checkpoint with another index and a manifest made for it."""
    from experiments.checkpoints import MANIFEST, SEAL, check, facts_of, seal
    from parallel.checkpoint_index import read_index

    run = folder / "run"
    checkpoint = run / "checkpoints" / "step-000002"
    if not run.exists():
        done(launch(*ONE, "steps=2", "checkpoint.every=2", "run.dir=run", cwd=folder))
    kept = {path: path.read_bytes() for path in checkpoint.iterdir()}
    index = checkpoint / ".metadata"
    index.write_bytes(change(read_index(checkpoint)))
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    manifest["files"][index.name] = facts_of(index)
    content = json.dumps(manifest).encode()
    (checkpoint / MANIFEST).write_bytes(content)
    (checkpoint / SEAL).write_bytes(seal(content))
    check(checkpoint)
    line = refused(launch("export", "run=run", cwd=folder), ".metadata")
    for path, before in kept.items():
        path.write_bytes(before)
    return line
