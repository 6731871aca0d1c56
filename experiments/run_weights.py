"""The weights of a run, whole: for a file, and for adapters to stand beside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.checkpoints import check, read_manifest, steps_of
from experiments.config import TrainConfig
from experiments.model_file import MODEL, check_model_file, read_about
from experiments.resume import AUTO, named_checkpoint, run_of
from experiments.run_folder import read_config, settings_of
from experiments.same_model import HOW_ONLY, check_same, override, unverified
from experiments.same_tokenizer import check_tokenizer, recorded
from minigpt.config import require
from parallel.damaged import Damaged

if TYPE_CHECKING:
    from torch import Tensor


def source_of(given: Path, key: str) -> Path:
    """The checkpoint that `given` names (RUN, RUN/step-N), or the model.pt of a run without one.

    Raises ValueError, one line that begins with `key`.
    """
    if given == run_of(given) and not steps_of(given):
        source = given / MODEL
        require(source.is_file(), f"{key}={given}: no checkpoint and no model.pt there")
        return source
    return named_checkpoint(given, key)


def check_source(given: Path, key: str) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of the model that a run's weights were trained in, and warnings.

    Reads every byte of what source_of names. Raises ValueError, one line, if one is not what was
    written, or if config.yaml of the run is another's than the weights'.
    """
    source, config = source_of(given, key), read_config(run_of(given))
    settings = settings_of(config)
    if source.name == MODEL:
        warnings = check_model_file(source.parent, config.model)
        about = read_about(source.parent)
        return about["model"] if about else settings["model"], warnings
    try:
        theirs = check(source).manifest["config"]
    except Damaged as error:
        raise ValueError(f"{key}={given}: {error}") from error
    said = f"{key}={given}: config.yaml is not of {source.name}"
    missing = check_same(said, theirs.get("model", {}), config.model)
    require(theirs.get("finetune") == settings["finetune"], f"{said}: finetune differs")
    return theirs["model"], unverified(f"{key}={given}", missing)


def weights_of(given: Path, key: str) -> tuple[dict[str, Tensor], Path]:
    """Return a plain model's weights on the CPU, adapters merged, and where they come from.

    Raises ValueError, one line, where they are damaged.
    """
    from minigpt.lora import merged  # torch takes seconds

    check_source(given, key)
    source, config = source_of(given, key), read_config(run_of(given))
    if source.name == MODEL:  # which is merged
        from experiments.sample import read_model

        named = read_model(source.parent, config.model, "cpu").named_parameters()
        return {name: weight.detach() for name, weight in named}, source
    from parallel.checkpoint_reader import read_whole

    return merged(read_whole(source, "model"), config.finetune), source


def is_base(config: TrainConfig) -> bool:
    """Whether `resume` names a run without adapters for one with them: only its weights count."""
    if not config.finetune.on or config.resume in (None, AUTO):
        return False
    run = run_of(Path(str(config.resume)))
    return (run / "config.yaml").is_file() and not read_config(run).finetune.on


def tokenizer_of(given: Path, key: str) -> str | None:
    """Return what tells the tokenizer of a run's weights, which check_source has read."""
    source, run = source_of(given, key), run_of(given)
    found = read_about(source.parent) if source.name == MODEL else read_manifest(source)
    theirs: str | None = (found or {}).get("tokenizer")
    return theirs or recorded(run, read_config(run).data)


def check_base(config: TrainConfig, tokenizer: str | None) -> list[str]:
    """Return warnings about the base's weights, one line each. `tokenizer` is that of the data.

    Raises ValueError, one line, where they are not there, damaged, or of another model or
    tokenizer.
    """
    base = Path(str(config.resume))
    theirs, warnings = check_source(base, "resume")
    of_base = tokenizer_of(base, "resume")
    warnings += check_tokenizer(f"resume={base}", of_base, tokenizer, run_of(base))
    for key, value in settings_of(config)["model"].items():
        require(
            theirs.get(key) == value or key in HOW_ONLY,
            f"model.{key}={value}: resume={base} was trained with {theirs.get(key)}; "
            f"model.{key}={override(theirs.get(key))} would do",
        )
    return warnings
