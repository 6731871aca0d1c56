"""The weights of a run, whole: for a file, and for adapters to stand beside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.checkpoints import check, steps_of
from experiments.config import TrainConfig
from experiments.resume import AUTO, HOW_ONLY, named_checkpoint, run_of
from experiments.run_folder import read_config, settings_of
from minigpt.config import require
from parallel.damaged import Damaged

if TYPE_CHECKING:
    from torch import Tensor


def source_of(given: Path, key: str) -> Path:
    """The checkpoint that `given` names (RUN, RUN/step-N), or the model.pt of a run without one.

    Raises ValueError, one line that begins with `key`.
    """
    if given == run_of(given) and not steps_of(given):
        source = given / "model.pt"
        require(source.is_file(), f"{key}={given}: no checkpoint and no model.pt there")
        return source
    return named_checkpoint(given, key)


def weights_of(given: Path, key: str) -> tuple[dict[str, Tensor], Path]:
    """A plain model's weights on the CPU, adapters merged, and where they come from.

    Raises ValueError, one line, where a checkpoint is damaged.
    """
    from minigpt.lora import merged  # torch takes seconds

    source, config = source_of(given, key), read_config(run_of(given))
    if source.name == "model.pt":  # which is merged
        from experiments.sample import read_model

        named = read_model(given, config.model, "cpu").named_parameters()
        return {name: weight.detach() for name, weight in named}, source
    try:
        check(source)
    except Damaged as error:
        raise ValueError(f"{key}={given}: {error}") from error
    from parallel.checkpoint_reader import read_whole

    return merged(read_whole(source, "model"), config.finetune), source


def is_base(config: TrainConfig) -> bool:
    """Whether `resume` names a run without adapters for one with them: only its weights count."""
    if not config.finetune.on or config.resume in (None, AUTO):
        return False
    run = run_of(Path(str(config.resume)))
    return (run / "config.yaml").is_file() and not read_config(run).finetune.on


def check_base(config: TrainConfig) -> None:
    """Raise ValueError, one line, where the base's weights are not there or of another model."""
    base = Path(str(config.resume))
    source_of(base, "resume")
    ours, theirs = (_model(c) for c in (config, read_config(run_of(base))))
    for key, value in ours.items():
        require(
            theirs.get(key) == value or f"model.{key}" in (*HOW_ONLY, "model.dropout"),
            f"model.{key}={value}: resume={base} was trained with {theirs.get(key)}",
        )


def _model(config: TrainConfig) -> dict[str, Any]:
    return settings_of(config)["model"]
