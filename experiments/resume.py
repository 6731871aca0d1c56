"""What `resume` means: which checkpoint a run goes on from, and whether it can. No torch.

resume=null                 a new run
resume=auto run.dir=RUN     the newest whole checkpoint of the run itself; with none, from the start
resume=auto                 the same, of the run in runs/ that wrote a checkpoint last
resume=RUN                  the newest one of a run, in a new run folder (or the same: run.dir=RUN)
resume=RUN/step-100         that one
finetune=lora resume=RUN    where RUN has no adapters: its weights, and a new run (run_weights.py)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.checkpoints import (
    FOLDER,
    STEP,
    Checkpoint,
    check,
    folder_of,
    newest_whole,
    steps_of,
)
from experiments.same_tokenizer import check_tokenizer
from minigpt.corpus import Corpus
from parallel.damaged import Damaged

AUTO = "auto"
RUNS = Path("runs")
# keys that may differ among those that say what is learned from what
HOW_ONLY = ("data.cache", "data.path", "model.attention", "model.impl")
BY_CONTENT = ("data.text_field", "data.bpe_sample")  # what they change has a digest of its own
OF_TOKENIZER = ("data.tokenizer", "data.vocab_size")  # so have these, where both sides name it


def choose(resume: str | None, run: Path | None) -> Checkpoint | None:
    """What `resume` means for a run in folder `run` (None: a new one that has no name yet).

    null: start afresh. auto: the newest whole one of the run's own; damaged ones are skipped, and
    named in what is returned. A path: that run's newest, or that step, and nothing else.
    Raises ValueError, one line.
    """
    if resume is None:
        return None
    if resume == AUTO:
        if run is None:
            return None
        found, skipped = newest_whole(run)
        if found is None and skipped:
            raise ValueError(f"resume=auto: no checkpoint of {run} is whole: {skipped[0]}")
        return found and Checkpoint(found.folder, found.manifest, skipped)
    folder = named_checkpoint(Path(resume))
    found = _checked(resume, folder)
    newer = [path for path in steps_of(found.run) if path != folder][:1]
    if run is not None and _same(run, found.run) and newer and _step(newer[0]) > found.step:
        raise ValueError(
            f"resume={resume}: {run} holds {newer[0].name}, which is newer; go on from an older "
            "step in a run.dir of its own"
        )
    return found


def run_dir(resume: str | None, given: str | None) -> Path | None:
    """The folder of a run that has one by now: the one that is given, or the one to go on in."""
    if given or resume != AUTO:
        return Path(given) if given else None
    newest = [steps[0] for run in RUNS.glob("*") if (steps := steps_of(run))]
    return run_of(max(newest, key=lambda step: step.lstat().st_mtime)) if newest else None


def goes_on_in(resume: str | None, run: Path | None) -> bool:
    """Whether a run folder that is there already is the one to go on in."""
    if resume is None or run is None:
        return False
    return resume == AUTO or _same(run, run_of(Path(resume)))


def run_of(path: Path) -> Path:
    """The run's folder, of what may be one of its checkpoints."""
    if not STEP.fullmatch(path.name):
        return path
    return path.parent.parent if path.parent.name == FOLDER else path.parent


def _checked(resume: str, folder: Path) -> Checkpoint:
    try:
        return check(folder)
    except Damaged as error:
        others = ", ".join(path.name for path in steps_of(folder.parent.parent) if path != folder)
        there_is = f"; {folder.parent} also has {others}" if others else ""
        raise Damaged(f"resume={resume}: {error}{there_is}") from error


def named_checkpoint(path: Path, key: str = "resume") -> Path:
    """The checkpoint that a path stands for: RUN, RUN/step-N, or the folder itself."""
    if match := STEP.fullmatch(path.name):
        folder = folder_of(run_of(path), int(match[1]))
        if not folder.is_dir():
            raise ValueError(f"{key}={path}: {folder} is not there")
        return folder
    steps = steps_of(path)
    if not steps:
        raise ValueError(f"{key}={path}: no checkpoint there; checkpoint.every=N writes some")
    return steps[0]


def newest_step(run: Path) -> int:
    """Return after how many steps a run's newest checkpoint was written, 0 if it has none."""
    return max(map(_step, steps_of(run)), default=0)


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def check_fits(
    found: Checkpoint, settings: dict[str, Any], batch_size: int, corpus: Corpus | None = None
) -> None:
    """Raise ValueError, one line, where a run would not go on with what the checkpoint began.

    Layout, precision, learning rate and the number of steps may differ. What is learned, from
    which samples, and in which order may not.
    """
    theirs = dotted(found.manifest["config"])
    ours = dotted(settings)
    free = (*HOW_ONLY, *BY_CONTENT, *_check_corpus(found, corpus))
    for key in sorted(theirs | ours):
        what = ("model.", "data.", "finetune.")
        must = key.startswith(what) or key in ("seed", "seq_len", "optimizer.name")
        if not must or key in free:
            continue
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"{key}={ours.get(key)}: {found.folder} was written with {theirs.get(key)}; "
                "export and init=FILE start anew from its weights"
            )
    if found.manifest["batch_size"] != batch_size:
        raise ValueError(
            f"global batch size {batch_size}: {found.folder} was written with "
            f"{found.manifest['batch_size']}; change micro_batch_size or "
            "gradient_accumulation_steps, or samples would be skipped or repeated"
        )
    if found.step >= settings["steps"]:
        raise ValueError(
            f"steps={settings['steps']}: {found.folder} has {found.step} done already; "
            "more steps go on from there"
        )


def _check_corpus(found: Checkpoint, corpus: Corpus | None) -> tuple[str, ...]:
    """Return the keys that need not be equal because the tokenizers themselves are.

    Raises ValueError, one line, if the checkpoint is of another text or tokenizer.
    """
    if corpus is None:
        return ()
    theirs = found.manifest.get("tokenizer")
    known = theirs is not None and corpus.vocabulary is not None
    if known:
        check_tokenizer(str(found.folder), theirs, corpus.vocabulary, found.run)
    if found.manifest["corpus"] != corpus.sha256:
        raise ValueError(
            f"data: its SHA-256 is not that of {found.folder}'s; "
            "export and init=FILE start anew from its weights"
        )
    return OF_TOKENIZER if known else ()


def dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the keys that a user writes: model.n_layer."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def same_layout(found: Checkpoint, settings: dict[str, Any]) -> bool:
    """Whether each rank is what it was, so that its random state is its own."""
    theirs = found.manifest["config"]
    keys = ("layout", "sequence_parallel", "zero_stage", "impl", "pipeline")
    return all(theirs.get(key) == settings[key] for key in keys)
